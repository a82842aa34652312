"""How far a mean over prompts may be off, by the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

RESAMPLES, CONFIDENCE = 2000, 0.95


def half_width(values: Sequence[float], seed: int = 0, weights: Sequence[float] | None = None) -> float | None:
    """Half of the percentile bootstrap's 95 % interval of the mean (Efron 1979), the ± behind a score.

    values: one per prompt. weights: of the mean, one per prompt; None: equal. None for fewer than two values, and where
    all are equal: every resample is then the same, which would say that the mean is certain. The same values give the
    same number.
    """
    import numpy as np

    if len(values) < 2 or min(values) == max(values):
        return None
    x, draw = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    w = None if weights is None else np.asarray(weights, dtype=np.float64)
    means = []
    for _ in range(RESAMPLES):  # row by row: all resamples at once would take RESAMPLES times the memory
        rows = draw.integers(0, len(x), len(x))
        means.append(x[rows].mean() if w is None else np.average(x[rows], weights=w[rows]))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(high - low) / 2
