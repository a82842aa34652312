"""Rewards on the scale of the goal anchor: mapped to it, measured on it, or the goal taken from the rewards."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

from ..config import MDPGRPOConfig, TrainConfig

SEEN = 4096  # rewards that a running goal remembers
SLACK = 1e-6  # of a weighted sum that is 1 but for its rounding


def mapped(total: float, bounds: list[float] | None) -> float:
    """(r - low) / (high - low): the weighted sum of the rewards with 0 and 1 where reward_range has its ends."""
    return total if bounds is None else (total - bounds[0]) / (bounds[1] - bounds[0])


class RunningGoal:
    """Median and standard deviation of the last SEEN rewards of earlier steps, of all ranks; kept in checkpoints."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=SEEN)

    def of(self, rewards: list[float]) -> tuple[float, float]:
        """(m, s) for a step with these rewards, which are taken where none were seen before; s is 1 while all rewards
        are equal."""
        seen = self._seen or rewards
        return (statistics.median(seen), statistics.pstdev(seen) or 1.0) if seen else (0.5, 1.0)

    def add(self, rewards: list[float]) -> None:
        self._seen.extend(rewards)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = deque(state["seen"], maxlen=SEEN)


def scale_note(
    low: float | None, high: float | None, advantage_mean: float, run: TrainConfig, method: MDPGRPOConfig
) -> str | None:
    """One line where a step's rewards, from low to high, are mapped outside of the [0, 1] that the goal anchor is made
    for, and what helps.

    None where they do not, where there are none, or where no goal of a fixed scale acts.
    """
    fixed = method.alpha > 0 and method.goal_mean in ("half", "max_half_mean")
    if low is None or high is None or not fixed:
        return None
    low, high = mapped(low, run.reward_range), mapped(high, run.reward_range)
    if low >= -SLACK and high <= 1 + SLACK:
        return None
    weights = run.reward_weights or [1.0] * len(run.reward)
    least, most = sum(min(w, 0.0) for w in weights), sum(max(w, 0.0) for w in weights)
    # The range of shares under these weights, where the rewards are such.
    inside = run.reward_range is None and least - SLACK <= low and high <= most + SLACK
    bounds = f"{least:g} {most:g}" if inside else "LOW HIGH, the lowest and highest that can come,"
    given = "" if run.reward_range is None else ", as reward_range maps them,"
    return (
        f"rewards{given} go from {low:.4g} to {high:.4g}, and the goal anchor takes them for shares in [0, 1] (the "
        f"mean advantage is {advantage_mean:+.2f}): --reward-range {bounds} maps them there; --goal-mean running "
        "--goal-std running takes the goal from the rewards; --dual-anchor false leaves it out"
    )
