"""The public door of advantages: rules beside the paper's, the batch's deviation, single rewards, lists in place of
tensors."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from helpers.losses import (
    ALL_BACKENDS,
    DEVICE,
    GIVEN,
    REWARDS,
    assert_within,
    call,
    config_for,
    make_batch,
    packed,
    to,
)
from torch import Tensor

import mdpgrpo_fast
from mdpgrpo_fast import reference
from mdpgrpo_fast.config import ConfigError, MDPGRPOConfig
from mdpgrpo_fast.reference import Advantages

all_backends = pytest.mark.parametrize("backend", ALL_BACKENDS)
NAMES = ("mean", "std", "z", "delta", "advantage", "kl_beta")
GDPO: dict[str, Any] = {"multi_objective_aggregation": "normalize_then_sum"}


def compute(backend: str, config: MDPGRPOConfig, **arguments: Any) -> Advantages:
    """On the device, the results on the CPU."""
    out = mdpgrpo_fast.advantages(config=config, backend=backend, **{n: to(x, DEVICE) for n, x in arguments.items()})
    return Advantages(*(getattr(out, n).cpu() for n in NAMES))


def assert_equal(got: Advantages, expected: Advantages) -> None:
    for name in NAMES:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def some_rewards(seed: int = 0, prompts: int = 5, size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, of which one group is constant, K and valid."""
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 5, (prompts, size), generator=g) / 4
    rewards[1] = 0.75
    return rewards, torch.randint(1, 6, (prompts,), generator=g), torch.rand(prompts, size, generator=g) < 0.8


# ---- scales and baselines -------------------------------------------------------------------------------------------


@all_backends
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_rules_are_the_reference_s(backend: str, scale: str, baseline: str) -> None:
    rewards, k, valid = some_rewards()
    for group_std, clip, more in product(("population", "sample"), (0.0, 0.6), ({}, {"dual_anchor": False})):
        config = config_for(
            num_generations=4, scale_rewards=scale, baseline=baseline, group_std=group_std, advantage_clip=clip, **more
        )
        for lost in ({}, {"valid": valid}):
            got = compute(backend, config, rewards=rewards, num_constraints=k, **lost)
            truth, own = (reference.advantages(r, k, config, **lost) for r in (rewards.double(), rewards))
            for name in NAMES[:-1]:
                assert_within(*(getattr(x, name) for x in (got, truth, own)), name)
            clear = (truth.advantage.abs() > 1e-6) | (truth.advantage == 0)
            assert torch.equal(got.kl_beta[clear], truth.kl_beta.float()[clear])
            assert (got.z[1] == 0).all(), "a constant group"


@all_backends
def test_the_deviation_of_more_than_these_rewards(backend: str) -> None:
    """Two ranks with the deviation of both give what one with all rewards gives; a number is as good as a tensor."""
    rewards, k, valid = some_rewards(prompts=6)
    config = config_for(num_generations=4, scale_rewards="batch", group_std="sample")
    whole = compute(backend, config, rewards=rewards, num_constraints=k, valid=valid)
    std = reference.batch_deviation(rewards, valid, config.group_std)
    for given in (std, float(std), std.double(), std[None]):
        halves = [
            compute(backend, config, rewards=rewards[i], num_constraints=k[i], valid=valid[i], batch_std=given)
            for i in (slice(0, 2), slice(2, 6))
        ]
        got = torch.cat([h.advantage for h in halves])
        torch.testing.assert_close(got, whole.advantage, rtol=1e-6, atol=1e-6)
    alone = compute(backend, config, rewards=rewards[:2], num_constraints=k[:2], valid=valid[:2])
    assert not torch.allclose(alone.advantage, whole.advantage[:2], atol=1e-3)
    with pytest.raises(ValueError, match=r"^batch_std must be left out for scale_rewards = group"):
        compute(backend, config_for(num_generations=4), rewards=rewards, num_constraints=k, batch_std=0.3)


@all_backends
@pytest.mark.parametrize("knobs", [{"scale_rewards": "batch"}, {"scale_rewards": "none", "baseline": "leave_one_out"}])
def test_a_batch_without_groups(backend: str, knobs: dict[str, Any]) -> None:
    got = compute(backend, config_for(**knobs), rewards=torch.zeros(0, 2), num_constraints=torch.zeros(0))
    assert got.advantage.shape == (0, 2) and got.std.shape == (0,)


@all_backends
@pytest.mark.parametrize("knobs", [{"scale_rewards": "batch", "group_std": "sample"}, {"scale_rewards": "none"}])
def test_a_loss_makes_the_same_advantages(backend: str, knobs: dict[str, Any]) -> None:
    batch, config = make_batch(3), config_for(**knobs)
    made = compute(backend, config, **REWARDS)
    given = call(backend, batch, config, advantage=made.advantage.flatten(), kl_beta=made.kl_beta.flatten())
    on_the_way = call(backend, batch, config, **GIVEN, **REWARDS)
    torch.testing.assert_close(on_the_way.loss, given.loss, rtol=1e-6, atol=1e-6)


# ---- several rewards ------------------------------------------------------------------------------------------------


def some_parts(seed: int = 0) -> Tensor:
    """Three rewards of 3 groups of 4; some do not apply, and to one completion none does."""
    g = torch.Generator().manual_seed(seed)
    parts = torch.randint(0, 5, (3, 4, 3), generator=g) / 4 * torch.tensor([1.0, 10.0, 0.1])
    parts[torch.rand(3, 4, 3, generator=g) < 0.2] = math.nan
    parts[1, 2] = math.nan
    return parts


@all_backends
def test_single_rewards_are_normalised_and_then_summed(backend: str) -> None:
    parts, weights, k = some_parts(), [1.0, 0.5, -2.0], [2, 3, 4]
    config = config_for(num_generations=4, **GDPO)
    got = compute(backend, config, num_constraints=k, parts=parts, part_weights=weights)
    valid = ~parts.isnan().all(-1)
    rewards = (parts.nan_to_num() * torch.tensor(weights)).sum(-1)
    z = reference.decoupled_anchor(parts, torch.tensor(weights), valid, config)
    expected = reference.advantages(rewards, torch.tensor(k), config, valid, relative=z)
    assert_equal(got, expected)
    assert got.advantage[1, 2] == 0 and not valid[1, 2]
    # The goal anchor takes the rewards that are given.
    other = compute(backend, config, rewards=rewards / 10, num_constraints=k, parts=parts, part_weights=weights)
    assert torch.equal(other.z, got.z) and not torch.equal(other.delta, got.delta)
    # By default each counts once.
    default, ones = (
        compute(backend, config, num_constraints=k, parts=parts, part_weights=w) for w in (None, torch.ones(3))
    )
    assert_equal(default, ones)


@all_backends
def test_single_rewards_by_a_map_and_without_some_completions(backend: str) -> None:
    parts, config, order = some_parts(), config_for(num_generations=4, **GDPO), torch.randperm(12)
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[0, 1] = False
    base = compute(backend, config, num_constraints=2, parts=parts, valid=valid)
    assert base.advantage[0, 1] == 0 and base.advantage[1, 2] == 0, "valid, but no reward applies"
    dirty = parts.clone()
    dirty[0, 1] = 1e6
    assert_equal(compute(backend, config, num_constraints=2, parts=dirty, valid=valid, rewards=parts.nansum(-1)), base)
    flat = {"parts": parts.flatten(0, 1)[order], "valid": valid.flatten()[order], "groups": order // 4}
    got = compute(backend, config, num_constraints=2, **flat)
    for name in ("z", "delta", "advantage", "kl_beta"):
        torch.testing.assert_close(getattr(got, name), getattr(base, name).flatten()[order], rtol=1e-5, atol=1e-6)


@all_backends
def test_single_rewards_over_more_than_these(backend: str) -> None:
    parts, config = some_parts(), config_for(num_generations=4, dual_anchor=False, **GDPO)
    whole = compute(backend, config, parts=parts)
    valid = ~parts.isnan().all(-1)
    sums = reference.decoupled_sums(parts, torch.ones(3), valid, config)[valid]
    batch = sums.mean(), float(sums.std(correction=0))
    halves = [compute(backend, config, parts=parts[i], batch=batch) for i in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(torch.cat([h.z for h in halves]), whole.z, rtol=1e-5, atol=1e-6)


@all_backends
@pytest.mark.parametrize("name", ["parts", "part_weights", "batch"])
def test_single_rewards_are_for_one_rule(backend: str, name: str) -> None:
    value = {"parts": torch.zeros(2, 2, 3), "part_weights": [1.0, 1.0, 1.0], "batch": (0.0, 1.0)}[name]
    with pytest.raises(ValueError, match=f"^{name} must be left out but for multi_objective_aggregation = normalize"):
        compute(backend, config_for(), **REWARDS, **{name: value})
    with pytest.raises(ValueError, match=r"^parts must be given for multi_objective_aggregation = normalize"):
        compute(backend, config_for(**GDPO), **REWARDS)


PLAIN: dict[str, Any] = {"rewards": torch.zeros(3, 4), "num_constraints": 2}
PARTS: dict[str, Any] = {"parts": torch.zeros(3, 4, 2), "num_constraints": 2}


@pytest.mark.parametrize(
    ("knobs", "arguments", "said"),
    [
        ({"goal_mean": "running"}, PLAIN, "^running must be .median"),
        ({}, {"num_constraints": 2}, "^rewards must be of shape"),
        (GDPO, {**PARTS, "parts": torch.zeros(3)}, "^parts must be of shape .P, G, R.*got shape"),
        (GDPO, {**PARTS, "parts": torch.zeros(3, 4, 0)}, "^parts must be of shape .P, G, R"),
        (GDPO, {**PARTS, "parts": torch.full((3, 4, 2), math.inf)}, "^parts must be finite, or NaN"),
        (GDPO, {**PARTS, "parts": torch.zeros(3, 4, 2, dtype=torch.long)}, "^parts must be .*float"),
        (GDPO, {**PARTS, "rewards": torch.zeros(2, 4)}, r"^parts must be of shape \(2, 4, 2\)"),
        (GDPO, {**PARTS, "part_weights": [1.0]}, r"^part_weights must be of shape \(2,\)"),
        (GDPO, {**PARTS, "part_weights": [1.0, math.inf]}, "^part_weights must be finite"),
        (GDPO, {**PARTS, "part_weights": torch.ones(2, device="meta")}, "^part_weights must be on"),
        (GDPO, {**PARTS, "batch": (0.0, "1")}, "^batch must be"),
        (GDPO, {**PARTS, "valid": torch.ones(3, 3, dtype=torch.bool)}, r"^valid must be of shape \(3, 4\)"),
        (GDPO, {**PARTS, "valid": torch.ones(3, 4)}, "^valid must be .*bool"),
        ({}, {**PLAIN, "valid": torch.ones(3, 4, device="meta")}, "^valid .*on"),
        ({"scale_rewards": "batch"}, {**PLAIN, "batch_std": -1.0}, "^batch_std"),
        ({}, {**PLAIN, "rewards": torch.full((3, 4), math.inf)}, "^rewards must be finite"),
    ],
)  # fmt: skip
def test_what_is_refused(knobs: dict[str, Any], arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mdpgrpo_fast.advantages(config=config_for(num_generations=4, **knobs), backend="torch", **arguments)


def test_dtypes_of_single_rewards() -> None:
    """float64 stays; less than float32, and whole numbers of a list, become float32."""
    config, parts = config_for(num_generations=4, **GDPO), torch.arange(24.0).view(3, 4, 2) ** 2 % 7
    base = mdpgrpo_fast.advantages(config=config, backend="torch", num_constraints=2, parts=parts)
    for same, dtype in (
        (parts.double(), torch.float64),
        (parts.bfloat16(), torch.float32),
        (parts.int().tolist(), None),
    ):
        got = mdpgrpo_fast.advantages(config=config, backend="torch", num_constraints=2, parts=same)
        assert got.advantage.dtype == (dtype or torch.float32)
        torch.testing.assert_close(got.advantage.float(), base.advantage, rtol=1e-5, atol=1e-6)


@all_backends
def test_a_loss_does_not_take_single_rewards(backend: str) -> None:
    with pytest.raises(ConfigError, match=r"normalize_then_sum needs the single rewards: make .*\(\.\.\., parts=\)"):
        call(backend, make_batch(3), config_for(**GDPO), **GIVEN, **REWARDS)


# ---- what an argument may be ----------------------------------------------------------------------------------------


@all_backends
def test_lists_and_numbers_in_place_of_tensors(backend: str) -> None:
    config = config_for(num_generations=4)
    rewards, k = torch.tensor([[0.0, 0.5, 0.5, 1.0], [1.0, 1.0, 0.0, 1.0]]), torch.tensor([4, 4])
    valid = torch.tensor([[True, True, False, True]] * 2)
    base = compute(backend, config, rewards=rewards, num_constraints=k, valid=valid)
    for r, n, v in product((rewards, rewards.tolist(), rewards.numpy()), (k, [4, 4], 4, 4.0, (4, 4)),
                           (valid, valid.tolist())):  # fmt: skip
        if DEVICE == "cpu" or isinstance(r, Tensor):
            assert_equal(compute(backend, config, rewards=r, num_constraints=n, valid=v), base)
    whole = compute(backend, config, rewards=[[0, 1, 1, 1]], num_constraints=2)
    assert_equal(whole, compute(backend, config, rewards=[[0.0, 1.0, 1.0, 1.0]], num_constraints=[2]))
    by_map = compute(backend, config, rewards=rewards[:, [0, 2, 1, 3]].t().flatten().tolist(), num_constraints=4,
                     groups=[0, 1] * 4)  # fmt: skip
    plain = compute(backend, config, rewards=rewards, num_constraints=4)
    assert torch.equal(by_map.advantage.view(4, 2).t()[:, [0, 2, 1, 3]], plain.advantage)


@all_backends
def test_constraints_may_be_left_out_without_a_goal_anchor(backend: str) -> None:
    rewards = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    for knobs in ({"dual_anchor": False}, {"dual_anchor_alpha": 0.0}):
        config = config_for(**knobs)
        got = compute(backend, config, rewards=rewards)
        base = compute(backend, config, rewards=rewards, num_constraints=torch.tensor([2, 3]))
        assert torch.equal(got.advantage, base.advantage) and torch.equal(got.z, base.z)
        assert (got.delta == 0).all() and (base.delta != 0).any()
    with pytest.raises(ValueError, match=r"^num_constraints must be given with rewards; got None, where the goal"):
        compute(backend, config_for(), rewards=rewards)


@all_backends
def test_losses_take_them_too(backend: str) -> None:
    batch, config = make_batch(3), config_for()
    expected = call(backend, batch, config, **GIVEN, **REWARDS).loss
    for more in ({"num_constraints": [4, 2]}, {"rewards": REWARDS["rewards"].tolist()}):
        assert torch.equal(call(backend, batch, config, **{**GIVEN, **REWARDS, **more}).loss, expected)
    assert torch.equal(
        call(backend, packed(batch), config, **{**GIVEN, **REWARDS, "rewards": REWARDS["rewards"].tolist()}).loss,
        call(backend, packed(batch), config, **GIVEN, **REWARDS).loss,
    )
    plain = config_for(dual_anchor=False)
    left_out = call(backend, batch, plain, **GIVEN, rewards=REWARDS["rewards"])
    assert torch.equal(left_out.loss, call(backend, batch, plain, **GIVEN, **REWARDS).loss)
    hidden, weight = torch.randn(4, batch.tokens.shape[1], 6, device=DEVICE), torch.randn(11, 6, device=DEVICE)
    shared = {n: to(x, DEVICE) for n, x in batch.kwargs.items()}
    losses = [
        mdpgrpo_fast.linear_token_loss(
            hidden, weight, batch.tokens.to(DEVICE), batch.mask.to(DEVICE), config, backend=backend, num_constraints=n,
            rewards=r, **shared,
        ).loss
        for r, n in ((to(REWARDS["rewards"], DEVICE), 3), (REWARDS["rewards"].tolist(), [3, 3]))
    ]  # fmt: skip
    assert torch.equal(*losses)


def test_a_loss_from_lists_compiles() -> None:
    batch, config = make_batch(3), config_for(scale_rewards="batch")

    def loss(x: Tensor) -> Tensor:
        return mdpgrpo_fast.token_loss(
            x, batch.tokens, batch.mask, config, rewards=[[0.25, 1.0], [0.5, 0.0]], num_constraints=3, backend="torch",
            **batch.kwargs,
        ).loss  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch.logits), loss(batch.logits))
