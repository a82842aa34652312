"""Samples without a reward: few are left out, a run that loses all or many of them ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from .functions import RewardError
from .scorer import Score

WINDOW = 10  # steps in a row over which a share is taken


def why_all_failed(scores: Sequence[Score]) -> Score | None:
    """The first of these scores where every one was lost to one cause, a reward that failed; None where not."""
    causes = {s.cause for s in scores}
    return scores[0] if len(causes) == 1 and "" not in causes else None


def raise_where_all_failed(failed: Sequence[Score | None], where: str, count: int) -> None:
    """Raises RewardError where all samples of all ranks were lost to one cause. failed: of each rank what
    `why_all_failed` gave."""
    first = failed[0]
    if first is not None and all(f is not None and f.cause == first.cause for f in failed):
        raise RewardError(f"{first.problem}; all {count} samples of {where} were lost like this", first.trace)


class LostSamples:
    """Counts the samples that a run drops. limit: the share of WINDOW steps' samples above which it ends."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._steps: deque[tuple[int, int]] = deque(maxlen=WINDOW)
        self._last: tuple[str | None, str] = None, ""

    def record(self, dropped: int, samples: int) -> None:
        """A step of the run before it was resumed."""
        self._steps.append((dropped, samples))

    def check(self, step: int, dropped: int, samples: int, problem: str | None, trace: str | None) -> None:
        """Raises RewardError where too many of the last steps' samples were dropped. Counts are of all ranks; problem,
        trace: of the last one."""
        self.record(dropped, samples)
        if dropped:
            self._last = problem, trace or ""
        lost, total = (sum(column) for column in zip(*self._steps, strict=True))
        if len(self._steps) == WINDOW and lost > self.limit * total:
            raise RewardError(
                f"{lost} of the {total} samples of steps {step - WINDOW + 1} to {step} were dropped, more than "
                f"max_dropped = {self.limit:g} allows; the last because {self._last[0]}",
                self._last[1],
            )

    def check_end(self) -> None:
        """Raises RewardError at the end of a run too short for a share, which lost all that it had."""
        if self._steps and self.limit < 1 and all(dropped == samples for dropped, samples in self._steps):
            total = sum(samples for _, samples in self._steps)
            raise RewardError(
                f"all {total} samples of the run were dropped; the last because {self._last[0]}", self._last[1]
            )
