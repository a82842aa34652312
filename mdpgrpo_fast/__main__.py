"""The console script `mdpgrpo`, and `python -m mdpgrpo_fast`: one function for each subcommand."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import NoReturn

from .cli import end
from .config import nearest
from .version import __version__

COMMANDS = {
    "train": ("train:main", "train a model; without arguments, the embedded demonstration"),
    "evaluate": ("evaluate:main", "answer held-out prompts and score the answers; benchmark suites, pass@k"),
    "score": ("verifiers.__main__:score", "score a file of responses, in IFEval's form"),
    "explain": ("explain:main", "show what the method does to one group of rewards"),
    "report": ("report.page:main", "write the page of a run into its directory"),
    "compare": ("report.compare:main", "one page and one table of several runs"),
    "verifiers": ("verifiers.__main__:main", "list the instruction types, fetch their data"),
    "vllm-serve": ("rollout.vllm.serve:main", "start vLLM as the server that --vllm-url needs"),
    "doctor": ("doctor:main", "what is installed here, what can run, and what is missing"),
}


def usage() -> str:
    lines = [f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mdpgrpo COMMAND [--flag value ...]",
            "",
            "MDP-GRPO: stable reinforcement learning on many checkable constraints.",
            "",
            *lines,
            "",
            "`mdpgrpo COMMAND --help` lists the flags of a command; `mdpgrpo --version` says the version.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Status: 0 done, 1 failed, 2 what was asked for cannot be used, 130 interrupted."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h", "--help-all", "help"):
        print(usage())
        return 0
    if name in ("--version", "-V"):
        print(f"mdpgrpo_fast {__version__}")
        return 0
    if name not in COMMANDS:
        near = nearest(name, list(COMMANDS))
        meant = f"did you mean {near!r}?" if near else f"commands: {', '.join(COMMANDS)}"
        print(f"error: unknown command {name!r}; {meant}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name][0].partition(":")
    run: Callable[[list[str]], int] = getattr(importlib.import_module(f".{module}", __package__), function)
    return run(rest)


def console() -> NoReturn:
    end(main)


if __name__ == "__main__":
    console()
