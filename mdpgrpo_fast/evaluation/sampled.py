"""Scores of several completions per prompt: pass@k, best and mean of G, and each temperature by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .scores import Estimate, Scored, estimate, rewards_of

if TYPE_CHECKING:
    from ..data import Example
    from ..rewards import Score


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Chance that one of k completions of n, of which `passed` pass, passes: 1 - C(n - passed, k) / C(n, k), the
    unbiased estimator of Chen et al. 2021 (arXiv 2107.03374)."""
    return 1 - math.comb(n - passed, k) / math.comb(n, k)


def ks(n: int) -> list[int]:
    """1, 2, 4, 8 … below n, and n."""
    return [2**i for i in range(n.bit_length()) if 2**i < n] + [n]


def passes(example: Example, strict: Sequence[bool], score: Score) -> bool:
    """All constraints hold; for a prompt without any, the reward is at least 1."""
    return all(strict) if example.instruction_ids else score.total is not None and score.total >= 1


def over_samples(scored: Scored) -> dict[str, Any]:
    """pass@k, best and mean of each reward, and scores by temperature, each an (value, ±) of `estimate`.

    The best of those that are left would be the best of fewer than G: a prompt with a completion that lacks a reward is
    left out where the reward counts. `incomplete`: how many lack the sum of them.
    """
    g = scored.samples
    rows = range(len(scored.answers))
    passed = [passes(scored.examples[i // g], scored.strict[i], scored.scores[i]) for i in rows]
    totals = [[s.total for s in scored.scores[i : i + g]] for i in rows[::g]]
    incomplete = [None in group for group in totals]
    counts = [
        None if lacks and not example.instruction_ids else sum(passed[i : i + g])
        for i, example, lacks in zip(rows[::g], scored.examples, incomplete, strict=True)
    ]
    rewards = {
        name: {"best": _over(values, g, max), "mean": _over(values, g, _mean)}
        for name, values in rewards_of(scored.scores).items()
    }
    return {
        "pass_at_k": {str(k): estimate([None if c is None else pass_at_k(g, c, k) for c in counts]) for k in ks(g)},
        "best_of": rewards,
        "incomplete": sum(incomplete),
        "by_temperature": {f"{tau:g}": _slots(scored, tau) for tau in dict.fromkeys(scored.temperatures)},
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _over(values: list[float | None], g: int, of: Any) -> Estimate:
    """What `of` gives for each prompt's G values; a prompt that lacks one is left out."""
    groups = [values[i : i + g] for i in range(0, len(values), g)]
    return estimate([None if None in group else of(group) for group in groups])


def _slots(scored: Scored, tau: float) -> dict[str, Any]:
    """The scores of the completions at one temperature."""
    at = scored.only([slot for slot, other in enumerate(scored.temperatures) if other == tau])
    return {
        "samples": at.samples,
        "hsr": at.mean([float(all(row)) if row else None for row in at.strict]),
        "ssr": at.mean([sum(row) / len(row) if row else None for row in at.strict]),
        "reward": at.mean([s.total for s in at.scores]),
        "truncated": at.mean([float(not a.finished) for a in at.answers]),
    }
