"""A small part of `make metamorphic`, and that it sees a fault."""

from __future__ import annotations

import metamorphic
import pytest
from metamorphic import Tally, check

from mdpgrpo_fast.reference import Layout


def run(first: int, count: int) -> Tally:
    tally = Tally()
    for seed in range(first, first + count):
        check(seed, tally)
    return tally


def test_some_configurations_hold_every_relation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metamorphic, "TRITON_SHARE", 0.0)
    tally = run(20_000, 60)
    assert not tally.failures
    seen = {name.split()[0] for name in tally.counts}
    assert {"rows", "completions", "padding", "repetition", "a_head", "micro_batches", "backends"} <= seen


def test_a_mean_over_the_wrong_rows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metamorphic, "TRITON_SHARE", 0.0)
    monkeypatch.setattr(Layout, "mean", lambda self, x, mask: x.sum() / mask.sum().clamp(min=1) + 0 * x)
    assert run(20_000, 40).failures
