"""Advantages on every fused backend: the golden groups, the reference in float64, and what must not depend on what."""

from __future__ import annotations

import json
import math
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.losses import BACKENDS, DEVICE, assert_within, config_for, to
from torch import Tensor

import mdpgrpo_fast
from mdpgrpo_fast.config import MDPGRPOConfig
from mdpgrpo_fast.reference import Advantages

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
GOLDEN = Path(__file__).parents[1] / "data" / "method_golden.jsonl"
NAMES = ("mean", "std", "z", "delta", "advantage", "kl_beta")


def compute(backend: str, rewards: Tensor, k: Tensor, config: MDPGRPOConfig, **more: Any) -> Advantages:
    """The operation on the device, its results on the CPU."""
    more = {n: to(x, DEVICE) for n, x in more.items()}
    out = mdpgrpo_fast.advantages(rewards.to(DEVICE), k.to(DEVICE), config, backend=backend, **more)
    return Advantages(*(getattr(out, n).cpu() for n in NAMES))


def assert_matches(backend: str, rewards: Tensor, k: Tensor, config: MDPGRPOConfig, **more: Any) -> Advantages:
    got = compute(backend, rewards, k, config, **more)
    truth, own = (mdpgrpo_fast.advantages(r, k, config, backend="torch", **more) for r in (rewards.double(), rewards))
    for name in NAMES[:-1]:
        assert getattr(got, name).dtype == torch.float32
        assert_within(*(getattr(x, name) for x in (got, truth, own)), name)
    # The sign of an A that is 0 but for rounding is nobody's.
    clear = (truth.advantage.abs() > 1e-6) | (truth.advantage == 0)
    assert torch.equal(got.kl_beta[clear], truth.kl_beta.float()[clear])
    return got


def test_golden_groups(backend: str) -> None:
    """1500 groups with every knob that the method has, to 1e-5."""
    batches: dict[Any, list[dict[str, Any]]] = {}
    for row in map(json.loads, GOLDEN.read_text().splitlines()):
        knobs = {k: v for k, v in row.items() if k not in ("rewards", "num_constraints", "expected")}
        batches.setdefault((len(row["rewards"]), *sorted(knobs.items())), []).append(row)
    assert sum(map(len, batches.values())) == 1500
    # 1261 mixtures of knobs, a launch each: in Triton's interpreter every third.
    every = 3 if backend == "triton" and DEVICE == "cpu" else 1
    for (g, *knobs), rows in list(batches.items())[::every]:
        config = config_for(num_generations=g, **dict(knobs))
        k = torch.tensor([r["num_constraints"] for r in rows])
        got = compute(backend, torch.tensor([r["rewards"] for r in rows]), k, config)
        for name in NAMES:
            theirs = [r["expected"]["beta_kl" if name == "kl_beta" else name] for r in rows]
            error = (getattr(got, name).double() - torch.tensor(theirs, dtype=torch.float64)).abs().max()
            assert error <= 1e-5, f"{name} is off by {error:.1e} with G = {g}, {dict(knobs)}"


@pytest.mark.parametrize("g", [2, 3, 8, 32])
def test_every_knob(backend: str, g: int) -> None:
    """Mixtures of all choices, K from 1 to 8, with lost samples; groups of a size that is no power of two too."""
    for seed in range(6):
        r, generator = random.Random(100 * g + seed), torch.Generator().manual_seed(seed)
        config = config_for(
            num_generations=g, group_std=r.choice(["population", "sample"]),
            goal_std=r.choice(["released", "binomial"]),
            goal_mean=["half", "max_half_mean", "mean"][seed % 3], prospect=seed % 2 == 0, prospect_on_goal=seed < 4,
            dual_anchor=r.random() < 0.8, asymmetric_kl=r.random() < 0.8, prospect_beta=r.choice([0.3, 0.8, 2.0]),
        )  # fmt: skip
        k = torch.arange(1, 9)
        rewards = torch.randint(0, 9, (8, g), generator=generator) % (k[:, None] + 1) / k[:, None]
        assert_matches(backend, rewards, k, config)
        valid = torch.rand(8, g, generator=generator) < 0.7
        valid[0] = False
        got = assert_matches(backend, rewards, k, config, valid=valid)
        lost = compute(backend, rewards.masked_fill(~valid, math.nan), k, config, valid=valid)
        for name in NAMES:
            assert torch.equal(getattr(lost, name), getattr(got, name)), "what a lost sample holds does not matter"
        assert (got.advantage[~valid] == 0).all() and (got.kl_beta[~valid] == config.kl_beta_pos).all()


REPEATED = (0.1 + 0.2, 0.7, 1 / 3, 0.95, 1e-3, 1 - 1e-7, 0.0, 1.0)


@pytest.mark.parametrize("group_std", ["population", "sample"])
def test_constant_group_has_z_exactly_zero(backend: str, group_std: Any) -> None:
    """NeMo-RL#4158: the rounding of a mean is no deviation. A = 0 takes β₊; the goal anchor alone moves the policy."""
    for size in (2, 3, 7, 8):
        rewards = torch.tensor(REPEATED)[:, None].repeat(1, size)
        k, config = torch.full((8,), 4), config_for(num_generations=size, group_std=group_std, dual_anchor=False)
        got = compute(backend, rewards, k, config)
        assert (got.z == 0).all() and (got.std == 0).all() and (got.advantage == 0).all()
        assert torch.equal(got.mean, rewards[:, 0])
        assert (got.kl_beta == torch.tensor(config.kl_beta_pos)).all()
        moved = compute(backend, rewards, k, config_for(num_generations=size, group_std=group_std))
        assert torch.equal(moved.advantage.sign(), (rewards - 0.5).sign())
        assert torch.equal(moved.kl_beta == torch.tensor(config.kl_beta_neg), rewards < 0.5)


def test_rewards_equal_but_for_rounding_are_a_constant_group(backend: str) -> None:
    one = torch.tensor(0.3)
    up = torch.nextafter(one, torch.tensor(1.0))
    rewards, k = torch.stack([one, up, one, up])[None], torch.tensor([4])
    for knobs in ({"goal_mean": "mean"}, {"dual_anchor": False}, {"dual_anchor": False, "group_std": "sample"}):
        config = config_for(num_generations=4, **knobs)
        got = compute(backend, rewards, k, config)
        assert (got.z == 0).all() and (got.advantage == 0).all() and (got.kl_beta == got.kl_beta[0, 0]).all(), knobs
        assert got.kl_beta[0, 0] == torch.tensor(config.kl_beta_pos)
    # Four units in the last place are rounding, five are not.
    eps = torch.finfo(torch.float32).eps
    edge = compute(backend, torch.tensor([[1.0, 1 - 4 * eps] * 2, [1.0, 1 - 5 * eps] * 2]), k.repeat(2), config)
    assert (edge.z[0] == 0).all() and (edge.std > 0).tolist() == [False, True]
    real = compute(backend, torch.tensor([[0.7, 0.7, 0.7, 0.7001]]), k, config)
    assert real.z[0, 3] > 0.4, "the smallest step of a real reward is far above it"


def test_population_and_sample_deviation(backend: str) -> None:
    rewards, k = torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([1])
    population = compute(backend, rewards, k, config_for(num_generations=3))
    sample = compute(
        backend, rewards, k, config_for(num_generations=3, group_std="sample", dual_anchor=False, prospect=False)
    )
    assert population.std.item() == pytest.approx(math.sqrt(2) / 3, rel=1e-6)
    assert sample.std.item() == pytest.approx(math.sqrt(1 / 3), rel=1e-6)
    assert sample.advantage[0, 0].item() == pytest.approx(-(2 / 3) / (math.sqrt(1 / 3) + 1e-4), rel=1e-6)


def test_order_of_groups_and_members_does_not_matter(backend: str) -> None:
    g = torch.Generator().manual_seed(3)
    rewards, k = torch.randint(0, 5, (6, 8), generator=g) / 4, torch.randint(1, 6, (6,), generator=g)
    config = config_for(num_generations=8)
    base = compute(backend, rewards, k, config)
    prompts, slots = torch.randperm(6, generator=g), torch.randperm(8, generator=g)
    moved = compute(backend, rewards[prompts], k[prompts], config)
    assert torch.equal(moved.advantage, base.advantage[prompts]), "a group does not depend on the others"
    moved = compute(backend, rewards[:, slots], k, config)
    torch.testing.assert_close(moved.advantage, base.advantage[:, slots], rtol=1e-6, atol=1e-7)


def test_members_of_a_group_need_not_be_neighbours(backend: str) -> None:
    """Group ids travel with the rows, so that sorting a batch by length splits no group."""
    rewards, k, config = (
        torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.25, 0.75]]),
        torch.tensor([2, 4]),
        config_for(num_generations=3),
    )
    valid = torch.tensor([[True, True, True], [True, False, True]])
    base = compute(backend, rewards, k, config, valid=valid)
    order = torch.tensor([3, 0, 1, 5, 2, 4])
    got = compute(backend, rewards.flatten()[order], k, config, groups=order // 3, valid=valid.flatten()[order])
    for name in NAMES:
        expected = getattr(base, name)
        assert torch.equal(getattr(got, name), expected if expected.ndim == 1 else expected.flatten()[order]), name


def test_dtypes_strides_and_no_groups(backend: str) -> None:
    rewards, k, config = (
        torch.tensor([[0.0, 0.25, 0.5, 1.0]]).repeat(3, 1),
        torch.tensor([4, 2, 1]),
        config_for(num_generations=4),
    )
    base = compute(backend, rewards, k, config)
    for same in (rewards.bfloat16(), rewards.half(), rewards.t().contiguous().t(), rewards.repeat(1, 2)[:, :4]):
        assert torch.equal(compute(backend, same, k, config).advantage, base.advantage)
    for same in (k.int(), k.float(), torch.stack([k, k], 1)[:, 0]):
        assert torch.equal(compute(backend, rewards, same, config).advantage, base.advantage)
    none = compute(backend, rewards[:0], k[:0], config)
    assert none.advantage.shape == (0, 4) and none.mean.shape == (0,)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_an_unseen_bad_reward_makes_its_group_nan_and_no_other(backend: str) -> None:
    k = torch.tensor([2, 2, 2])
    choices = ({}, {"dual_anchor": False}, {"group_std": "sample", "prospect": False}, {"goal_mean": "mean"})
    for bad, knobs in product((math.nan, math.inf, -math.inf), choices):
        rewards = torch.tensor([[0.0, 1.0, 0.5], [bad, 1.0, 0.5], [bad, bad, bad]])
        config = config_for(num_generations=3, **knobs)
        got = compute(backend, rewards, k, config, check_values=False)
        assert got.advantage[1:].isnan().all(), knobs
        assert torch.equal(got.advantage[0], compute(backend, rewards[:1], k[:1], config).advantage[0])
