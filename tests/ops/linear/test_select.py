"""Which rows take part: idle ones are left out exactly, lengths known on the host, wrong ones seen."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.linear import BACKENDS, budget, make_linear, run
from helpers.losses import config_for, packed

from mdpgrpo_fast.ops.linear import chunks, select

backends = pytest.mark.parametrize("backend", BACKENDS)
levels = pytest.mark.parametrize("level", ["token", "sequence"])


@backends
@levels
def test_idle_rows_are_left_out_exactly(backend: str, level: Any) -> None:
    """A = 0 without a KL term: no row of it is multiplied, and nothing but its statistics is missing."""
    batch, head = make_linear(12, lengths=(2, 2, 1, 2))
    advantage = batch.advantage * torch.tensor([1.0, 0.0, 1.0, 0.0])
    idle = (advantage == 0)[:, None] & batch.mask
    config = config_for(importance_level=level, aggregation="grpo")
    for more in ({"ref_logprobs": None}, {"kl_beta": batch.kl_beta * (advantage != 0)}):
        skipped = run(backend, batch, head, config, advantage=advantage, **more)
        kept = run(backend, batch, head, config, advantage=advantage, skip_idle=False, **more)
        torch.testing.assert_close(skipped.out.loss, kept.out.loss, rtol=2e-6, atol=1e-7)
        for name, g in skipped.grads.items():
            torch.testing.assert_close(g, kept.grads[name], rtol=1e-5, atol=1e-7)
        assert (skipped.out.logprobs.cpu()[idle] == 0).all() and (kept.out.logprobs.cpu()[idle] != 0).all()
        assert skipped.out.total("tokens") == 3 and kept.out.total("tokens") == 7
    bonus = replace(config, entropy_coef=0.1)
    with_bonus = run(backend, batch, head, bonus, advantage=advantage, ref_logprobs=None)
    assert (with_bonus.out.logprobs.cpu()[batch.mask] != 0).all(), "an entropy bonus leaves no row idle"
    quantile = replace(config, top_entropy_quantile=0.5)
    of_all = run(backend, batch, head, quantile, advantage=advantage, ref_logprobs=None)
    assert (of_all.out.logprobs.cpu()[batch.mask] != 0).all(), "nor does a quantile, which is of all"
    with_kl = run(backend, batch, head, config, advantage=advantage)
    assert (with_kl.out.logprobs.cpu()[batch.mask] != 0).all(), "A = 0 with a KL term contributes"


@backends
@pytest.mark.parametrize("layout", ["padded", "packed"])
@levels
def test_lengths_known_on_the_host(
    backend: str, layout: str, level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """As on a GPU, where nothing is looked at: without lengths under a mask, with them compacted, wrong ones NaN."""
    batch, head = make_linear(13, lengths=(2, 1, 0, 2))
    batch = batch if layout == "padded" else packed(batch, 13, drop_masked=False)
    batch.logits = batch.logits.masked_fill(~batch.mask[..., None], math.nan)  # whatever a masked row holds
    config, size = config_for(importance_level=level), budget(head, 3)
    looked = run(backend, batch, head, config, workspace_bytes=size)
    monkeypatch.setattr(select, "may_look", lambda device: False)
    seen: list[int] = []
    take = chunks.Head.take
    monkeypatch.setattr(chunks.Head, "take", lambda self, a, b: seen.append(b - a) or take(self, a, b))
    for lengths, rows in ((None, batch.tokens.numel()), ([2, 1, 0, 2], 5)):
        seen.clear()
        got = run(backend, batch, head, config, workspace_bytes=size, lengths=lengths)
        # Packed rows at sequence level whose extents nobody knows are scored first.
        twice = level == "sequence" and lengths is None and layout == "packed"
        assert sum(seen) == rows * (1 + twice)
        for name in ("loss", "logprobs", "entropy", "kl", "ratio", "completion_kl", "totals"):
            torch.testing.assert_close(getattr(got.out, name), getattr(looked.out, name), rtol=2e-6, atol=1e-6)
        for name, g in got.grads.items():
            torch.testing.assert_close(g, looked.grads[name], rtol=1e-5, atol=1e-6)


@backends
def test_lengths_that_are_not_the_masks_give_nan(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, head = make_linear(13, lengths=(2, 1, 1, 2))
    with pytest.raises(ValueError, match=r"lengths must be what mask keeps of each completion, \[2, 1, 1, 2\], or 0"):
        run(backend, batch, head, config_for(), "cpu", lengths=[2, 2, 1, 1])
    monkeypatch.setattr(select, "may_look", lambda device: False)
    monkeypatch.setattr("mdpgrpo_fast.ops.linear.checks.look", lambda x, check: False)
    for lengths in ([2, 2, 1, 1], [2, 1, 0, 2], [1, 1, 1, 2]):
        got = run(backend, batch, head, config_for(), lengths=lengths)
        assert got.out.loss.isnan() and got.grads["weight"].isnan().any(), lengths
    idle = run(backend, batch, head, config_for(), lengths=[2, 1, 0, 2], ref_logprobs=None,
               advantage=batch.advantage * torch.tensor([1.0, 1.0, 0.0, 1.0]))  # fmt: skip
    assert idle.out.loss.isfinite() and idle.grads["weight"].isfinite().all()
