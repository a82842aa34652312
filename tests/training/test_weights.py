"""Importance weights of the sampler's log-probs, its drift, and advantages with the statistics of all ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import PLAIN, make_trainer, rows, run_small

from mdpgrpo_fast import reference
from mdpgrpo_fast.config import MDPGRPOConfig, preset
from mdpgrpo_fast.rewards import Score
from mdpgrpo_fast.training.update.advantages import step_advantages
from mdpgrpo_fast.training.update.weights import importance_weights, log_ratio, share_outside

G = 4


def trl_weights(
    gap: torch.Tensor, mask: torch.Tensor, mode: str, low: float | None, high: float | None
) -> torch.Tensor:
    """GRPOTrainer._generate_and_score_completions of TRL 1.16, from `per_token_logps_diff` on."""
    diff = gap * mask
    if mode.startswith("sequence"):
        diff = diff.sum(dim=-1, keepdim=True)
    ratio = torch.exp(diff)
    if mode.endswith("truncate"):
        return torch.clamp(ratio, min=low, max=high)
    invalid = (ratio < (-float("inf") if low is None else low)) | (ratio > (float("inf") if high is None else high))
    return ratio.masked_fill(invalid, value=0.0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("floor", [0.0, 0.8])
def test_weights_are_trls(level: Any, kind: Any, floor: float) -> None:
    method = MDPGRPOConfig(
        temperature_objective="corrected", importance_weight_level=level, importance_weight_kind=kind,
        importance_weight_cap=1.3, importance_weight_floor=floor,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    gap = 0.3 * torch.randn(8, 7, generator=generator)
    mask = torch.arange(7) < torch.randint(0, 8, (8, 1), generator=generator)
    gap = gap.masked_fill(~mask, torch.nan)
    weight, outside = importance_weights(gap, mask, method)
    theirs = trl_weights(gap.nan_to_num(0.0), mask, f"{level}_{kind}", floor or None, 1.3).expand_as(gap)
    torch.testing.assert_close(weight[mask], theirs[mask])
    raw = trl_weights(gap.nan_to_num(0.0), mask, f"{level}_mask", None, None).expand_as(gap)
    out = (raw < floor) | (raw > 1.3)
    assert torch.equal(outside, out & mask) and 0 < int(outside.sum()) < int(mask.sum())
    rated = mask.any(1)
    expected = out[mask] if level == "token" else out[rated, 0]
    assert share_outside(outside, mask, method) == pytest.approx(expected.float().mean().item())
    assert share_outside(outside, torch.zeros_like(mask), method) is None


def test_what_truncation_kept_is_taken_off_where_it_is_known() -> None:
    x = torch.tensor([[-1.0, -2.0]])
    rollout: Any = SimpleNamespace(
        policy_logprobs=x, sampling_logprobs=x + 0.5, log_kept=torch.tensor([[-0.25, torch.nan]])
    )
    torch.testing.assert_close(log_ratio(rollout, None), torch.tensor([[-0.5, -0.5]]))
    torch.testing.assert_close(log_ratio(rollout, x + 1), torch.tensor([[0.75, 0.5]]))


def test_a_row_at_its_own_temperature_has_the_weight_of_its_samplers_numerics(tmp_path: Path) -> None:
    """1 where the trainer's model sampled by itself; the sampler's own error where it is another's."""
    method = preset("exact", num_generations=G, temperatures=[0.5, 1.0], sampler_correction=True)
    trainer = make_trainer(tmp_path, method, backend="torch")
    rollout = trainer.collector.sample([0, 1])
    batch = trainer.collector.assemble(rollout, [0, 1], [""] * 8, [Score(i / 8, {}, None) for i in range(8)])
    trainer.collector.weigh(batch)
    assert batch.weight is not None
    torch.testing.assert_close(batch.weight, torch.ones_like(batch.weight), atol=1e-3, rtol=0)
    batch.rollout = replace(rollout, sampling_logprobs=rollout.sampling_logprobs - 0.5)
    trainer.collector.weigh(batch)
    assert batch.weight[rollout.mask].mean() == pytest.approx(1.6487, abs=2e-3)
    (m,) = trainer.updates.micro_batches(batch)
    assert m.objective["importance_weight"].mean() == pytest.approx(1.6487, abs=2e-3)


def test_weights_out_of_bounds_are_logged(tmp_path: Path) -> None:
    method = preset(
        "trl", num_generations=G, multi_temperature=True, temperatures=[0.2, 1.0], importance_weight_cap=1.5,
        importance_weight_floor=0.5,
    )  # fmt: skip
    (row,) = rows(run_small(tmp_path, method, steps=1, backend="torch"))
    cool, plain = row["slots"]
    assert cool["out_of_bounds"] > plain["out_of_bounds"] == 0
    assert row["out_of_bounds"] == pytest.approx(cool["out_of_bounds"] / 2)
    (row,) = rows(run_small(tmp_path, PLAIN, "none", steps=1))
    assert row["out_of_bounds"] is row["slots"][0]["out_of_bounds"] is None


@pytest.mark.parametrize("packing", ["on", "off"])
def test_the_loss_measures_drift_by_an_engines_log_probs(tmp_path: Path, packing: str) -> None:
    """At the loss's own temperature, and only for a threshold."""
    warm = {"temperatures": [0.5, 1.0], "multi_temperature": True}
    for knobs, engine, handed in (
        ({"off_policy_threshold": 0.1}, True, True),
        ({"off_policy_threshold": 0.1}, False, False),
        ({}, True, False),
        ({"off_policy_threshold": 0.1, **warm}, True, False),
        ({"off_policy_threshold": 0.1, **warm, "temperature_objective": "per_row"}, True, True),
        ({"off_policy_threshold": 0.1, "top_k": 40}, True, False),
        ({"off_policy_threshold": 0.1, "repetition_penalty": 1.1}, True, False),
    ):
        run = {"repetition_penalty": knobs.pop("repetition_penalty", 1.0)}
        trainer = make_trainer(tmp_path, replace(PLAIN, **knobs), packing=packing, backend="torch", **run)
        rollout = trainer.collector.sample([0, 1])
        batch = trainer.collector.assemble(rollout, [0, 1], [""] * 8, [Score(i / 8, {}, None) for i in range(8)])
        trainer.collector.engine = object() if engine else None  # type: ignore[assignment]
        trainer.collector.weigh(batch)
        (m,) = trainer.updates.micro_batches(batch)
        assert ("sampling_logprobs" in m.objective) == handed
        if handed:
            assert torch.equal(m.objective["sampling_logprobs"], m.of(rollout.sampling_logprobs))
            trainer.updates.forward_backward(m, None, None, None, 1.0, torch.zeros(()), _clock())


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("size", [3, 8])
def test_what_the_threshold_left_out_is_logged(tmp_path: Path, packing: str, size: int) -> None:
    """Of the completions that count, those with A < 0 whose sampler was surer of them."""
    knobs: dict[str, Any] = {"packing": packing, "micro_batch_size": size, "backend": "torch", "learning_rate": 1e-30}
    trainer = make_trainer(tmp_path, replace(PLAIN, off_policy_threshold=0.1), skip_idle=True, **knobs)
    rollout = trainer.collector.sample([0, 1])
    rewards, trainer.collector.engine = [0.0, 1.0, 0.0, None, *[0.5] * 4], object()  # type: ignore[assignment]
    drift = torch.tensor([0.5, 0.5, 0.0, 0.5, *[0.5] * 4])[:, None]
    rollout = replace(rollout, sampling_logprobs=rollout.sampling_logprobs + drift)
    batch = trainer.collector.assemble(rollout, [0, 1], [""] * 8, [Score(r, {}, None) for r in rewards])
    trainer.collector.weigh(batch)
    assert trainer.updates.apply(batch, 1, _clock())["off_policy_masked"] == pytest.approx(1 / 7)
    batch.sampling = None
    assert trainer.updates.apply(batch, 2, _clock())["off_policy_masked"] == 0
    assert "off_policy_masked" not in make_trainer(tmp_path, PLAIN, "none", **knobs).updates.apply(batch, 1, _clock())


def _clock() -> Any:
    from mdpgrpo_fast.training.timing import StageClock

    return StageClock(torch.device("cpu"))


# ---- statistics of all ranks ----------------------------------------------------------------------------------------


def both(first: torch.Tensor, second: torch.Tensor) -> Any:
    """An accelerator of two ranks, of which the other's rewards and valid are known."""
    return SimpleNamespace(num_processes=2, gather=lambda mine: torch.cat([mine, torch.stack([first, second], -1)]))


def test_the_deviation_of_a_batch_is_of_all_ranks() -> None:
    method = preset("grpo", num_generations=G, scale_rewards="batch")
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.rand(2, 2, G, generator=generator)
    valid, others = torch.ones(2, 2, G, dtype=torch.bool)
    others[0, 1] = False
    k = torch.ones(2)
    scores = [Score(0.0, {}, None)] * 8
    arguments: Any = {"running": None, "backend": "torch"}
    found = step_advantages(
        ours, k, valid, scores, [1.0], method, accelerator=both(theirs, others.float()), **arguments
    )
    pool = torch.cat([ours[valid], theirs[others]])
    expected = (ours - ours.mean(1, keepdim=True)) / (pool.std() + 1e-4)
    torch.testing.assert_close(found.advantage, expected)
    alone = step_advantages(ours, k, valid, scores, [1.0], method, accelerator=None, **arguments)
    torch.testing.assert_close(alone.advantage, (ours - ours.mean(1, keepdim=True)) / (ours.std() + 1e-4))


def test_decoupled_rewards_are_normalised_over_all_ranks() -> None:
    """GDPO: of this rank's half what the reference makes of all; a reward that does not apply is NaN to it."""
    method = preset("grpo", num_generations=G, multi_objective_aggregation="normalize_then_sum")
    generator = torch.Generator().manual_seed(0)
    parts = torch.rand(4, G, 2, generator=generator)
    parts[0, 1, 1] = torch.nan
    valid = torch.ones(4, G, dtype=torch.bool)
    valid[1, 2] = False
    weights = [1.0, 0.5]
    scores = [
        Score(float(p.nansum()), {n: None if x.isnan() else x.item() for n, x in zip("ab", p, strict=True)}, None)
        for p in parts[:2].view(-1, 2)
    ]
    whole = reference.decoupled_anchor(parts, torch.tensor(weights), valid, method)
    sums = reference.decoupled_sums(parts, torch.tensor(weights), valid, method)
    arguments: Any = {"running": None, "backend": "torch"}
    totals = torch.tensor([s.total for s in scores]).view(2, G)
    found = step_advantages(
        totals, torch.ones(2), valid[:2], scores, weights, method, accelerator=both(sums[2:], valid[2:].float()),
        **arguments,
    )  # fmt: skip
    torch.testing.assert_close(found.advantage, whole[:2])
    still = [Score(1.0, {"a": 0.5, "b": 0.5}, None)] * 4 + scores[4:]
    alone = step_advantages(totals, torch.ones(2), valid[:2], still, weights, method, accelerator=None, **arguments)
    assert (alone.advantage[0] == 0).all() and (alone.advantage[1] != 0).any(), "a group to be refilled is seen"
