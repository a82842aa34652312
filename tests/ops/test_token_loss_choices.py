"""Losses beside PPO's clip, gates and the entropy bonus where they have edges of their own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.losses import BACKENDS, EACH, assert_matches, config_for, make_batch, run

from mdpgrpo_fast.kernels.triton import library, tiles

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
LOSSES: list[dict[str, Any]] = [
    {"loss": "cispo"}, {"loss": "cispo", "importance_level": "sequence"}, {"loss": "sapo"},
    {"loss": "sapo", "importance_level": "sequence"}, {"loss": "gmpo"}, {"loss": "vespo"},
    {"kl_gradient": "unbiased", "importance_level": "sequence"}, {"off_policy_threshold": 0.1},
]  # fmt: skip


# ---- the entropy bonus ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(1, "float32"), (4097, "float32"), (9001, "bfloat16"), (12288, "float16")]
)
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_bonus_over_many_tiles(backend: str, vocab: int, dtype: str, softcap: float | None) -> None:
    """Tiles without the row's token go a shorter way. Logits of -inf must not make 0 * inf."""
    batch = make_batch(23, vocab=vocab, dtype=dtype)
    if softcap is None and vocab > 1:
        banned = (batch.tokens[..., None] + torch.arange(1, vocab, 3)) % vocab
        batch.logits.scatter_(2, banned, -math.inf)
    more = {"softcap": softcap, "temperature": EACH, "entropy_coef": torch.tensor([0.3, -0.5, 0.0, 20.0])}
    assert_matches(backend, batch, config_for(), **more)


def test_bonus_at_another_tile(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "tile_for", lambda vocab, *_: tiles.fit(tiles.Tile(256, 1, 3, 0), vocab))
    batch = make_batch(24, vocab=1001)
    assert_matches(backend, batch, config_for(entropy_coef=0.5, kl_temperature=0.8), temperature=EACH)


@pytest.mark.parametrize("vocab", [8, 9000])
def test_bonus_where_one_token_has_all_the_probability(backend: str, vocab: int) -> None:
    """Entropy 0, of which the gradient is 0: the token's own column and those of other tiles alike."""
    batch = make_batch(25, lengths=(2, 2), vocab=vocab)
    batch.logits = torch.zeros_like(batch.logits)
    batch.logits[..., 3] = 1000.0
    batch.tokens = torch.full_like(batch.tokens, 3)
    batch.tokens[1] = vocab - 1
    batch.kwargs = {}
    got = run(backend, batch, config_for(entropy_coef=1.0), advantage=0.0, kl_beta=0.0)
    assert (got.grad.abs() < 1e-9).all() and got.out.loss == 0
    assert_matches(backend, batch, config_for(entropy_coef=1.0))


def test_a_bonus_alone_has_a_gradient(backend: str) -> None:
    """Rows without an advantage are idle but for their entropy; under the floor they are idle."""
    batch = make_batch(26, vocab=300)
    given: dict[str, Any] = {"advantage": 0.0, "kl_beta": 0.0}
    got = assert_matches(backend, batch, config_for(entropy_coef=0.1), **given)
    assert got.grad.abs().sum() > 0
    none = run(backend, batch, config_for(entropy_coef=0.1), entropy_floor=100.0, **given)
    assert (none.grad == 0).all() and none.out.loss == 0


# ---- couplings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", LOSSES, ids=str)
def test_ratios_beyond_float_range(backend: str, knobs: dict[str, Any]) -> None:
    """exp(80) is where ρ ends, with gradient 0: no 0 * inf, no NaN."""
    for gap in (85.0, 1000.0, -1000.0):
        batch = make_batch(27)
        batch.kwargs["old_logprobs"] = batch.kwargs["old_logprobs"] - gap
        assert run(backend, batch, config_for(**knobs)).grad.isfinite().all()
        if "kl_gradient" not in knobs:  # exp(80) times the rounding of an estimate near 0
            del batch.kwargs["ref_logprobs"]
            assert_matches(backend, batch, config_for(**knobs))


@pytest.mark.parametrize("knobs", LOSSES, ids=str)
def test_a_nan_is_in_the_loss(backend: str, knobs: dict[str, Any]) -> None:
    """Neither a bound nor a gate makes a plausible number of it."""
    finite = []
    for name in ("logits", "advantage", "old_logprobs", "ref_logprobs", "importance_weight", "temperature",
                 "entropy_coef"):  # fmt: skip
        for absent in ((), ("old_logprobs",)):
            batch = make_batch(28, lengths=(1, 0, 0, 1), dtype="float32")
            more: dict[str, Any] = {}
            if name == "logits":
                batch = replace(batch, logits=batch.logits * math.nan)
            elif name not in absent:
                more[name] = torch.full((4, 1) if name.endswith(("probs", "weight")) else (4,), math.nan)
            else:
                continue
            for other in absent:
                batch.kwargs.pop(other)
            loss = run(backend, batch, config_for(**knobs), check_values=False, **more).out.loss
            finite += [] if loss.isnan() else [(name, absent, loss.item())]
    assert finite == []


@pytest.mark.parametrize("loss", ["ppo_clip", "cispo", "gmpo", "luspo"])
def test_a_bound_that_is_nan_is_in_the_loss(backend: str, loss: Any) -> None:
    """Each bound by itself: the other one clips nothing."""
    batch = make_batch(29, lengths=(1, 0, 0, 1), dtype="float32")
    for name in ("epsilon_low", "epsilon_high"):
        for value in (math.nan, 0.2):
            bound = {name: torch.full((4,), value)}
            got = run(backend, batch, config_for(loss=loss), check_values=False, **bound).out.loss
            assert bool(got.isnan()) == math.isnan(value), (name, value)
