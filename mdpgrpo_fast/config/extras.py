"""Packages that are not required: which extra of pyproject.toml brings each, and the sentence where one is missing."""

from __future__ import annotations

EXTRA_OF = {
    "peft": "lora",
    "datasets": "data",
    "pyarrow": "data",
    "lm-eval": "eval",
    "vllm": "vllm",
    "flash-attn": "flash",
    "emoji": "ifbench",
    "syllapy": "ifbench",
    "janome": "m-ifeval",
    "trl": "trl",
    "verl": "verl",
    "TransferQueue": "verl",
}


def how_to_install(package: str) -> str:
    """The command that brings a package."""
    options = "--no-build-isolation " if package == "flash-attn" else ""  # it builds against the torch that is there
    return f"pip install {options}'mdpgrpo-fast[{EXTRA_OF[package]}]'"


def needs_package(package: str, why: str = "") -> str:
    """ "needs the package peft: pip install 'mdpgrpo-fast[lora]' (why)", for a sentence that says what needs it."""
    return f"needs the package {package}: {how_to_install(package)}" + (f" ({why})" if why else "")
