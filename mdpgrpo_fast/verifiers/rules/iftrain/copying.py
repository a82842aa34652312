"""IF-Train's checks on copies of the request, or of a phrase.

Each follows allenai/open-instruct, `open_instruct/IFEvalG/instructions.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...arguments import Count, Positive, Request
from ...text.patterns import compiled, same
from ..layout import span_holds_text
from .kinds import Repeated, iftrain

_DIVIDER = "******"


@iftrain("copy:copy")
def copy(text: str, prompt_to_repeat: Request) -> bool:
    """The response is `prompt_to_repeat`, word for word, and nothing else."""
    return same(text, prompt_to_repeat)


@iftrain("copy:copying_simple")
def copying_simple(text: str, prompt_to_repeat: Request) -> bool:
    """The response is `prompt_to_repeat`, word for word, and nothing else."""
    return same(text, prompt_to_repeat)


@iftrain("copy:copying_multiple")
def copying_multiple(text: str, prompt_to_repeat: Request, N: Positive) -> bool:
    """The response is `prompt_to_repeat`, `N` times, divided by ******."""
    return text.count(_DIVIDER) == N - 1 and all(same(piece, prompt_to_repeat) for piece in text.split(_DIVIDER))


def _forward(arguments: Mapping[str, Any]) -> None:
    start, end = arguments["n_start"], arguments["n_end"]
    if end <= start:
        raise ValueError(f"n_end: expected more than n_start ({start}), got {end}")
    span_holds_text(arguments["prompt_to_repeat"], start, end)


@iftrain("new:copy_span_idx", agree=_forward, examples={"n_start": 2, "n_end": 9})
def copy_span(text: str, prompt_to_repeat: Request, n_start: Count, n_end: Count) -> bool:
    """The response is the characters `n_start` up to, but not including, `n_end` of `prompt_to_repeat`."""
    # The original draws a start of its own in place of 0, which the request names all the same.
    return same(text, prompt_to_repeat[n_start:n_end])


@iftrain("copy:repeat_phrase")
def repeat_phrase(text: str, phrase: Repeated, small_n: Positive) -> bool:
    """`phrase` `small_n` times, each time with one word between its first and last replaced by another."""
    wanted, found = phrase.split(), 0
    for repeat in _repeats(text, wanted[0], wanted[-1]):
        words, found = repeat.split(), found + 1
        if found > small_n or len(words) != len(wanted):
            return False
        if sum(word != other for word, other in zip(words, wanted, strict=True)) != 1:
            return False
    return found == small_n


def _repeats(text: str, first: str, last: str) -> Iterator[str]:
    """What matches `first .*? last`; a line is read once, although no `last` may follow any of its `first`s."""
    start, end = compiled(first + " "), compiled(" " + last)
    opening = start.search(text)
    while opening:
        stop = text.find("\n", opening.end())
        stop = len(text) if stop < 0 else stop
        closing = end.search(text, opening.end(), stop)
        if closing:
            yield text[opening.start() : closing.end()]
        opening = start.search(text, closing.end() if closing else stop)
