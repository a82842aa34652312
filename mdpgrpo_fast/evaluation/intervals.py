"""How far a mean over prompts may be off, by the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

RESAMPLES, CONFIDENCE = 2000, 0.95


def half_width(values: Sequence[float], seed: int = 0) -> float | None:
    """Half of the percentile bootstrap's 95 % interval of the mean (Efron 1979), the ± behind a score.

    values: one per prompt. None for fewer than two. The same values give the same number.
    """
    import numpy as np

    if len(values) < 2:
        return None
    x, draw = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    # Row by row: all resamples at once would take RESAMPLES times the memory.
    means = [x[draw.integers(0, len(x), len(x))].mean() for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(high - low) / 2
