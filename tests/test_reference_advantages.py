"""The reference's advantages against the golden groups, an oracle in plain Python, and known traps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import mdpgrpo_fast
from mdpgrpo_fast.config import MDPGRPOConfig, preset

GOLDEN = Path(__file__).parent / "data" / "method_golden.jsonl"


@pytest.fixture(scope="module")
def golden() -> list[dict[str, Any]]:
    return [json.loads(line) for line in GOLDEN.read_text().split("\n") if line]


@pytest.mark.parametrize(("dtype", "budget"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_golden_groups(golden: list[dict[str, Any]], dtype: torch.dtype, budget: float) -> None:
    assert len(golden) == 1500
    names = {"mean": "mean", "std": "std", "z": "z", "delta": "delta", "advantage": "advantage", "beta_kl": "kl_beta"}
    batches: dict[Any, list[dict[str, Any]]] = {}
    for row in golden:
        knobs = {k: v for k, v in row.items() if k not in ("rewards", "num_constraints", "expected")}
        batches.setdefault((len(row["rewards"]), *sorted(knobs.items())), []).append(row)
    for (g, *knobs), rows in batches.items():
        config = MDPGRPOConfig(num_generations=g, multi_temperature=False, **dict(knobs))
        k = torch.tensor([r["num_constraints"] for r in rows])
        got = mdpgrpo_fast.advantages(torch.tensor([r["rewards"] for r in rows], dtype=dtype), k, config)
        for theirs, ours in names.items():
            expected = torch.tensor([r["expected"][theirs] for r in rows], dtype=torch.float64)
            error = (getattr(got, ours).double() - expected).abs().max()
            assert error <= budget, f"{ours} is off by {error:.1e} with G = {g}, {dict(knobs)}"


def advantage_oracle(rewards: list[float], k: int, c: MDPGRPOConfig) -> list[tuple[float, ...]]:
    """(z, δ, A, β) of each completion of one group, term by term as METHOD has them."""
    n, out = len(rewards), []
    mean = math.fsum(rewards) / n
    square = math.fsum((r - mean) ** 2 for r in rewards)
    for r in rewards:
        if max(rewards) == min(rewards):
            z = 0.0
        elif c.group_std == "population":
            z = (r - mean) / max(math.sqrt(square / n), 1e-8)
        else:
            z = (r - mean) / (math.sqrt(square / (n - 1)) + 1e-4)
        m = {"half": 0.5, "max_half_mean": max(0.5, mean), "mean": mean}[c.goal_mean]
        delta = (r - m) / math.sqrt((n if c.goal_std == "released" else 1) / (4 * k))

        def psi(v: float) -> float:
            return (c.prospect_gain if v >= 0 else c.prospect_loss) * math.tanh(c.prospect_beta * v)

        goal = psi(delta) if c.prospect and c.prospect_on_goal else delta
        alpha = c.dual_anchor_alpha if c.dual_anchor else 0.0
        a = (1 - alpha) * (psi(z) if c.prospect else z) + alpha * goal
        out.append((z, delta, a, c.kl_beta_neg if a < 0 and c.asymmetric_kl else c.kl_beta_pos))
    return out


@pytest.mark.parametrize("group_std", ["population", "sample"])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"prospect_on_goal": False, "goal_mean": "max_half_mean", "prospect_gain": 2.0, "prospect_loss": 1.25},
        {"prospect": False, "goal_std": "binomial", "goal_mean": "mean"},
        {"dual_anchor": False, "asymmetric_kl": False},
        {"dual_anchor_alpha": 1.0, "prospect_beta": 0.3},
    ],
)
def test_advantages_follow_the_equations(group_std: Any, knobs: dict[str, Any]) -> None:
    config = MDPGRPOConfig(num_generations=4, group_std=group_std, **knobs)
    groups = [[0.25, 0.5, 0.5, 1.0], [0.0, 0.0, 0.0, 0.25], [1.0, 0.75, 1.0, 1.0], [0.5, 0.0, 1.0, 0.5]]
    k = [4, 4, 4, 2]
    got = mdpgrpo_fast.advantages(torch.tensor(groups, dtype=torch.float64), torch.tensor(k), config)
    table = torch.stack([got.z, got.delta, got.advantage, got.kl_beta], -1)
    expected = torch.tensor([advantage_oracle(g, n, config) for g, n in zip(groups, k, strict=True)])
    torch.testing.assert_close(table, expected.double(), rtol=0, atol=1e-6)
    exact = [advantage_oracle(g, n, config) for g, n in zip(groups, k, strict=True)]
    torch.testing.assert_close(table, torch.tensor(exact, dtype=torch.float64), rtol=0, atol=1e-13)


def test_hand_computed_group() -> None:
    """r = 0, 0, 0, 1 with K = 4: μ = 1/4, σ = √3/4, z = -1/√3 and √3; s = 1/2, δ = -1 and 1."""
    got = mdpgrpo_fast.advantages(
        torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64), torch.tensor([4]), MDPGRPOConfig(num_generations=4)
    )
    low = 0.8 * 2.0 * math.tanh(-0.8 / math.sqrt(3)) + 0.2 * 2.0 * math.tanh(-0.8)
    high = 0.8 * 1.25 * math.tanh(0.8 * math.sqrt(3)) + 0.2 * 1.25 * math.tanh(0.8)
    assert got.advantage[0].tolist() == pytest.approx([low, low, low, high], abs=1e-15)
    assert got.kl_beta[0].tolist() == [0.025, 0.025, 0.025, 0.01]


REPEATED = (0.1 + 0.2, 0.7, 1 / 3, 0.95, 1e-3, 1 - 1e-7, 0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group_std", ["population", "sample"])
def test_constant_group_has_z_exactly_zero(dtype: torch.dtype, group_std: Any) -> None:
    """NeMo-RL#4158: the rounding of a mean must not become a deviation that a z-score then amplifies."""
    for size in (2, 3, 6, 7, 8):
        rewards = torch.tensor(REPEATED, dtype=dtype)[:, None].expand(-1, size)
        k = torch.full((len(REPEATED),), 4)
        config = preset("grpo", num_generations=size, group_std=group_std, asymmetric_kl=True)
        got = mdpgrpo_fast.advantages(rewards, k, config)
        assert (got.z == 0).all() and (got.std == 0).all() and (got.advantage == 0).all()
        assert torch.equal(got.mean, rewards[:, 0])
        assert (got.kl_beta == torch.tensor(config.kl_beta_pos, dtype=dtype)).all(), "A = 0 takes β₊"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rewards_equal_but_for_rounding_are_a_constant_group(dtype: torch.dtype) -> None:
    """A sum of rewards in another order ends one unit in the last place away: no advantage, and no β₋, from that."""
    one = torch.tensor(0.3, dtype=dtype)
    up = torch.nextafter(one, torch.ones_like(one))
    rewards = torch.stack([one, up, one, up])[None]
    assert rewards.unique().numel() == 2
    for knobs in ({"goal_mean": "mean"}, {"dual_anchor": False}, {"dual_anchor": False, "group_std": "sample"}):
        config = MDPGRPOConfig(num_generations=4, **knobs)
        got = mdpgrpo_fast.advantages(rewards, torch.tensor([4]), config)
        assert (got.z == 0).all() and (got.std == 0).all() and (got.advantage == 0).all(), knobs
        assert (got.kl_beta == torch.tensor(config.kl_beta_pos, dtype=dtype)).all()
    # The smallest step of a real reward is far above it.
    real = mdpgrpo_fast.advantages(torch.tensor([[0.7, 0.7, 0.7, 0.7001]], dtype=dtype), torch.tensor([4]), config)
    assert real.z[0, 3] > 0.4


def test_constant_group_still_learns_from_the_goal() -> None:
    """Zero-variance collapse is repaired: an all-fail group is pushed down, an all-pass group up."""
    rewards = torch.tensor([[0.0] * 4, [1.0] * 4, [0.5] * 4], dtype=torch.float64)
    got = mdpgrpo_fast.advantages(rewards, torch.tensor([3, 3, 2]), MDPGRPOConfig(num_generations=4))
    assert (got.z == 0).all()
    assert (got.advantage[0] < 0).all() and (got.advantage[1] > 0).all() and (got.advantage[2] == 0).all()
    assert got.kl_beta[:, 0].tolist() == [0.025, 0.01, 0.01]


def test_population_and_sample_deviation() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64)
    k = torch.tensor([1])
    population = mdpgrpo_fast.advantages(rewards, k, MDPGRPOConfig(num_generations=3, multi_temperature=False))
    sample = mdpgrpo_fast.advantages(rewards, k, preset("grpo", num_generations=3))
    assert population.std.item() == pytest.approx(math.sqrt(2) / 3, abs=1e-15)
    assert sample.std.item() == pytest.approx(math.sqrt(1 / 3), abs=1e-15)
    assert sample.advantage[0, 0].item() == pytest.approx(-(2 / 3) / (math.sqrt(1 / 3) + 1e-4), abs=1e-14)


def test_advantages_do_not_depend_on_order() -> None:
    g = torch.Generator().manual_seed(3)
    rewards, k = torch.randint(0, 5, (6, 8), generator=g).double() / 4, torch.randint(1, 6, (6,), generator=g)
    config = MDPGRPOConfig()
    base = mdpgrpo_fast.advantages(rewards, k, config).advantage
    prompts, slots = torch.randperm(6, generator=g), torch.randperm(8, generator=g)
    moved = mdpgrpo_fast.advantages(rewards[prompts][:, slots], k[prompts], config).advantage
    torch.testing.assert_close(moved, base[prompts][:, slots], rtol=0, atol=1e-14)
    bound = max(config.prospect_gain, config.prospect_loss)
    assert base.abs().max() <= bound


@pytest.mark.parametrize("group_std", ["population", "sample"])
@pytest.mark.parametrize("lost", [(0,), (1, 3), (0, 1, 2, 3)])
def test_invalid_samples_are_as_if_they_were_not_there(group_std: Any, lost: tuple[int, ...]) -> None:
    rewards, k = torch.tensor([[0.25, 1.0, 0.25, 0.75]], dtype=torch.float64), torch.tensor([4])
    valid = torch.ones(1, 4, dtype=torch.bool)
    valid[0, list(lost)] = False
    knobs: dict[str, Any] = {"group_std": group_std, "goal_std": "binomial", "multi_temperature": False}
    got = mdpgrpo_fast.advantages(
        rewards.masked_fill(~valid, math.nan), k, MDPGRPOConfig(num_generations=4, **knobs), valid=valid
    )
    for name in ("z", "delta", "advantage"):
        assert (getattr(got, name)[~valid] == 0).all(), name
        assert getattr(got, name).isfinite().all(), name
    assert (got.kl_beta[~valid] == 0.01).all()
    kept = rewards[valid][None]
    if kept.shape[1] < 2:  # no group of one: its z is 0 and the goal anchor is all there is
        assert (got.z == 0).all() and got.mean.isfinite().all()
        return
    small = mdpgrpo_fast.advantages(kept, k, MDPGRPOConfig(num_generations=kept.shape[1], **knobs))
    torch.testing.assert_close(got.advantage[valid], small.advantage[0], rtol=0, atol=1e-15)
    torch.testing.assert_close(got.z[valid], small.z[0], rtol=0, atol=1e-15)
    torch.testing.assert_close(torch.stack([got.mean, got.std]), torch.stack([small.mean, small.std]), rtol=0, atol=0)


def test_released_goal_scale_is_that_of_the_configured_group() -> None:
    """s = √(G/(4K)) names the knob G: a dropped sample does not change it."""
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    valid = torch.tensor([[True, True, True, False]])
    got = mdpgrpo_fast.advantages(rewards, torch.tensor([4]), MDPGRPOConfig(num_generations=4), valid=valid)
    assert got.delta[0].tolist() == pytest.approx([-1.0, 1.0, 1.0, 0.0])


def test_half_precision_rewards_are_computed_in_float32() -> None:
    rewards = torch.tensor([[0.0, 0.25, 0.5, 1.0]])
    k, config = torch.tensor([4]), MDPGRPOConfig(num_generations=4)
    low = mdpgrpo_fast.advantages(rewards.bfloat16(), k, config)
    assert low.advantage.dtype == torch.float32
    assert torch.equal(low.advantage, mdpgrpo_fast.advantages(rewards, k, config).advantage)
