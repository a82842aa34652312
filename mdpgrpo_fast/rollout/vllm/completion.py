"""A completion as a vLLM gives it, checked, and the errors of one that does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MOST = 1e30  # of a log-prob, either way: float32 holds it


@dataclass(frozen=True)
class Completion:
    """One completion: its L tokens, their log-probs under the distribution drawn from, whether an eos ended it.

    weights: the label of those that all its tokens were drawn with, None where they are of several.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool
    weights: str | None = None


class RolloutError(RuntimeError):
    """The engine failed; one line. partial: one entry per row, the completions that came and None for the others."""

    def __init__(self, message: str, partial: Sequence[Completion | None] = ()) -> None:
        super().__init__(message)
        self.partial = list(partial)


class RestartedError(RolloutError):
    """The engine no longer holds the weights that it was given: `sync` gives them again. partial: as above."""


def completion(
    tokens: list[int], logprobs: list[float], finish_reason: str | None, labels: Iterable[str]
) -> Completion:
    """A checked completion. Raises ValueError for one without tokens, without a log-prob for each, or cut off.

    labels: of the weights that its tokens were drawn with, one after the other.
    """
    if finish_reason not in ("stop", "length"):
        raise ValueError(f"finish_reason must be stop or length; got {finish_reason!r}")
    if not tokens or len(tokens) != len(logprobs) or not all(abs(x) < MOST for x in logprobs):
        raise ValueError(f"a completion must have a finite log-prob per token; got {len(logprobs)} for {len(tokens)}")
    found = set(labels)
    return Completion(list(tokens), list(logprobs), finish_reason == "stop", found.pop() if len(found) == 1 else None)
