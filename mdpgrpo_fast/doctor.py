"""`mdpgrpo doctor`: what is installed here, what can run, and what is missing for what."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys

from .cli import Parser, report_errors
from .config import EXTRA_OF, how_to_install
from .version import __version__

# What needs it.
OPTIONAL = {
    "peft": "--lora",
    "datasets": "hub ids, folders and parquet files of prompts",
    "vllm": "--rollout vllm in this process",
    "flash-attn": "--attention flash_attention_2",
    "lm-eval": "mdpgrpo evaluate --suite",
    "emoji": "one type of --rules ifbench",
    "syllapy": "one type of --rules ifbench",
    "janome": "Japanese types of --rules m-ifeval",
    "trl": "mdpgrpo_fast.integrations.trl",
    "triton": "fused kernels on a GPU",
}
REQUIRED = "torch transformers accelerate safetensors numpy langdetect nltk".split()


def version_of(package: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages() -> tuple[list[str], bool]:
    """One line for each package, and whether all that are required can be imported."""
    lines, whole = [], True
    for name in REQUIRED:
        try:
            importlib.import_module(name)
            lines.append(f"  {name:<14}{version_of(name)}")
        except Exception as e:  # whatever a broken installation raises
            whole = False
            lines.append(f"  {name:<14}cannot be imported: {type(e).__name__}: {' '.join(str(e).split())[:200]}")
    for name, purpose in OPTIONAL.items():
        version = version_of(name)
        how = how_to_install(name) if name in EXTRA_OF else "a CUDA build of torch brings it"
        lines.append(f"  {name:<14}" + (version or f"not installed: {purpose} needs it ({how})"))
    return lines, whole


def main(argv: list[str] | None = None) -> int:
    """Prints the report. Status 1 where a required package cannot be imported."""
    with report_errors():
        Parser(prog="mdpgrpo doctor", description=__doc__, allow_abbrev=False).parse_args(argv)
    print(f"mdpgrpo_fast {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"CPUs: {os.cpu_count()}")
    lines, whole = packages()
    print("packages:", *lines, sep="\n")
    if not whole:
        print("error: a required package cannot be imported; `pip install mdpgrpo-fast` installs them", file=sys.stderr)
        return 1
    from .ops.backends import backend_report
    from .verifiers.text.sentences import punkt_source

    print("kernels:")
    backend_report()
    print(f"sentences: {punkt_source()}")
    return 0
