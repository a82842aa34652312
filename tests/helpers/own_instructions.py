"""Instruction types of a user's own, that behave and misbehave; scoring processes load this module."""

from typing import Literal

from mdpgrpo_fast.verifiers import instruction


@instruction("my:emphasis")
def emphasis(text: str, minimum: int, mark: Literal["!", "?"] = "!") -> bool:
    """At least `minimum` of `mark`."""
    return text.count(mark) >= minimum


@instruction("my:raises")
def raises(text: str) -> bool:
    """Never answers."""
    raise KeyError("no such column")


@instruction("my:half")
def half(text: str) -> bool:
    """Answers with a number."""
    return 0.5  # type: ignore[return-value]


@instruction("my:exits")
def exits(text: str) -> bool:
    """Ends its process."""
    raise SystemExit(0)
