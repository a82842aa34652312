"""The reference's advantages against the golden groups, an oracle in plain Python, and known traps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import mdpgrpo_fast
from mdpgrpo_fast import reference
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


# ---- other scales and baselines, by loops ---------------------------------------------------------------------------

GROUPS = [[0.25, 0.5, 0.5, 1.0], [0.0, 0.0, 0.0, 0.25], [0.75, 0.75, 0.75, 0.75], [1.0, 0.5, -3.0, 2.0]]
PLAIN: dict[str, Any] = {"dual_anchor": False, "prospect": False, "multi_temperature": False, "num_generations": 4}


def deviation(values: list[float], group_std: str) -> float:
    mean, n = math.fsum(values) / len(values), len(values)
    square = math.fsum((v - mean) ** 2 for v in values)
    return math.sqrt(square / (n if group_std == "population" else n - 1))


def scaled(value: float, std: float, group_std: str) -> float:
    return value / (max(std, 1e-8) if group_std == "population" else std + 1e-4)


def z_oracle(groups: list[list[float]], c: MDPGRPOConfig) -> list[list[float]]:
    """Term by term: r - the mean of the group, or of the others, over the deviation of the group, of all, or 1."""
    whole = deviation([r for group in groups for r in group], c.group_std)
    out = []
    for group in groups:
        row = []
        for i, r in enumerate(group):
            others = group if c.baseline == "mean" else group[:i] + group[i + 1 :]
            v = r - math.fsum(others) / len(others)
            std = {"group": deviation(group, c.group_std), "batch": whole, "none": None}[c.scale_rewards]
            row.append(0.0 if len(set(group)) == 1 else v if std is None else scaled(v, std, c.group_std))
        out.append(row)
    return out


@pytest.mark.parametrize("group_std", ["population", "sample"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_scales_and_baselines_follow_their_definitions(group_std: Any, scale: Any, baseline: Any) -> None:
    config = MDPGRPOConfig(**PLAIN, group_std=group_std, scale_rewards=scale, baseline=baseline)
    rewards = torch.tensor(GROUPS, dtype=torch.float64)
    got = reference.advantages(rewards, torch.tensor([4] * 4), config)
    expected = torch.tensor(z_oracle(GROUPS, config), dtype=torch.float64)
    torch.testing.assert_close(got.z, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(got.advantage, got.z)
    assert (got.advantage[2] == 0).all(), "a constant group has no advantage, to the bit"
    # Goal anchor and shaping are of what z is.
    mixed = MDPGRPOConfig(num_generations=4, group_std=group_std, scale_rewards=scale, baseline=baseline)
    got = reference.advantages(rewards, torch.tensor([4] * 4), mixed)
    torch.testing.assert_close(got.z, expected, rtol=1e-13, atol=1e-13)

    def psi(v: float) -> float:
        return (1.25 if v >= 0 else 2.0) * math.tanh(0.8 * v)

    for i, group in enumerate(GROUPS):
        for j, r in enumerate(group):
            a = 0.8 * psi(expected[i, j].item()) + 0.2 * psi((r - 0.5) / 0.5)
            assert got.advantage[i, j].item() == pytest.approx(a, abs=1e-13)
            assert got.kl_beta[i, j] == (0.025 if a < 0 else 0.01)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("group_std", ["population", "sample"])
def test_invalid_samples_are_out_of_every_scale_and_baseline(scale: Any, baseline: Any, group_std: Any) -> None:
    """Of the group's mean and deviation, of the others', and of the batch's."""
    config = MDPGRPOConfig(**PLAIN, scale_rewards=scale, baseline=baseline, group_std=group_std)
    rewards = torch.tensor(GROUPS, dtype=torch.float64)
    valid = torch.tensor([[True, True, False, True], [True] * 4, [True, False, True, True], [False] * 4])
    got = mdpgrpo_fast.advantages(rewards.masked_fill(~valid, math.nan), torch.tensor([4] * 4), config, valid=valid)
    kept = [
        [r for r, on in zip(group, row, strict=True) if on] for group, row in zip(GROUPS, valid.tolist(), strict=True)
    ]
    expected = z_oracle([group for group in kept if group], config)
    for i, row in enumerate(expected):
        assert got.z[i][valid[i]].tolist() == pytest.approx(row, abs=1e-13)
    assert (got.z[~valid] == 0).all() and (got.advantage[~valid] == 0).all()


@pytest.mark.parametrize("knobs", [{"scale_rewards": "none"}, {"baseline": "leave_one_out"}, {"scale_rewards": "batch"},
                                   {"baseline": "leave_one_out", "scale_rewards": "none"}])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_groups_are_exactly_zero_in_all_of_them(knobs: dict[str, Any], dtype: torch.dtype) -> None:
    for size in (2, 3, 7, 8):
        rewards = torch.tensor(REPEATED, dtype=dtype)[:, None].repeat(1, size)
        config = preset("grpo", num_generations=size, asymmetric_kl=True, **knobs)
        got = mdpgrpo_fast.advantages(rewards, torch.full((len(REPEATED),), 4), config)
        assert (got.z == 0).all() and (got.advantage == 0).all()
        assert (got.kl_beta == torch.tensor(config.kl_beta_pos, dtype=dtype)).all()
        one = mdpgrpo_fast.advantages(rewards[:1], torch.tensor([4]), config)  # a batch whose deviation is 0
        assert (one.advantage == 0).all()


def test_one_sample_left_of_a_group_has_nothing_to_be_compared_with() -> None:
    rewards, valid = torch.tensor([[0.25, 1.0], [0.0, 1.0]]), torch.tensor([[False, True], [True, True]])
    for scale in ("group", "batch", "none"):
        config = MDPGRPOConfig(**{**PLAIN, "num_generations": 2}, scale_rewards=scale, baseline="leave_one_out")
        got = mdpgrpo_fast.advantages(rewards, torch.tensor([4, 4]), config, valid=valid, backend="torch")
        assert (got.advantage[0] == 0).all() and got.advantage[1, 1] > 0


def test_the_advantage_is_clipped_last() -> None:
    """After shaping and mixing; the KL coefficient goes by the sign, which a clip keeps."""
    rewards, k = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64), torch.tensor([4])
    free = reference.advantages(rewards, k, MDPGRPOConfig(num_generations=4))
    for bound in (0.3, 1.1, 5.0):
        got = reference.advantages(rewards, k, MDPGRPOConfig(num_generations=4, advantage_clip=bound))
        assert got.advantage[0].tolist() == [max(-bound, min(bound, a)) for a in free.advantage[0].tolist()]
        for name in ("z", "delta", "kl_beta", "mean", "std"):
            assert torch.equal(getattr(got, name), getattr(free, name)), name


# ---- several rewards (GDPO) -----------------------------------------------------------------------------------------


def gdpo_oracle(parts: list[list[list[float]]], weights: list[float], c: MDPGRPOConfig) -> list[list[float]]:
    """Each reward over its own group's deviation, their weighted sum over that of all completions."""
    sums: list[list[float | None]] = []
    for group in parts:
        row: list[float | None] = []
        for r in group:
            total, applies = 0.0, False
            for k, weight in enumerate(weights):
                own = [x[k] for x in group if not math.isnan(x[k])]
                if math.isnan(r[k]):
                    continue
                applies = True
                if len(set(own)) > 1:
                    others = own if c.baseline == "mean" else [x for i, x in enumerate(own) if i != own.index(r[k])]
                    v = r[k] - math.fsum(others) / len(others)
                    total += weight * scaled(v, deviation(own, c.group_std), c.group_std)
            row.append(total if applies else None)
        sums.append(row)
    known = [s for row in sums for s in row if s is not None]
    mean, std = math.fsum(known) / len(known), deviation(known, c.group_std)
    return [[0.0 if s is None else scaled(s - mean, std, c.group_std) for s in row] for row in sums]


NAN = math.nan
PARTS = [
    [[0.0, 10.0, 1.0], [1.0, 20.0, 1.0], [0.5, NAN, 1.0], [0.0, 50.0, NAN]],  # the third reward is constant
    [[NAN, 5.0, 0.1], [NAN, 1.0, 0.2], [NAN, NAN, NAN], [NAN, 2.0, 0.4]],  # none applies to the third completion
    [[1.0, 1.0, NAN], [0.0, 1.0, 3.0], [0.25, 1.0, NAN], [0.5, 1.0, NAN]],  # one of a group has the third
]


@pytest.mark.parametrize("group_std", ["population", "sample"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.1, 2.3, -0.7]])
def test_single_rewards_by_loops(group_std: Any, baseline: Any, weights: list[float]) -> None:
    more = {"group_std": group_std, "baseline": baseline, "multi_objective_aggregation": "normalize_then_sum"}
    config = MDPGRPOConfig(**PLAIN, **more)
    parts = torch.tensor(PARTS, dtype=torch.float64)
    got = mdpgrpo_fast.advantages(config=config, parts=parts, part_weights=weights)
    expected = torch.tensor(gdpo_oracle(PARTS, weights, config), dtype=torch.float64)
    torch.testing.assert_close(got.z, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(got.advantage, got.z) and got.advantage[1, 2] == 0
    # With the goal anchor on their sum, shaped and clipped.
    mixed = MDPGRPOConfig(num_generations=4, advantage_clip=1.0, **more)
    got = mdpgrpo_fast.advantages(num_constraints=4, config=mixed, parts=parts, part_weights=weights)
    total = [[math.fsum(w * v for w, v in zip(weights, r, strict=True) if v == v) for r in group] for group in PARTS]

    def psi(v: float) -> float:
        return (1.25 if v >= 0 else 2.0) * math.tanh(0.8 * v)

    for i, j in ((0, 0), (0, 2), (1, 0), (2, 1), (2, 3)):
        a = 0.8 * psi(expected[i, j].item()) + 0.2 * psi((total[i][j] - 0.5) / 0.5)
        assert got.advantage[i, j].item() == pytest.approx(max(-1.0, min(1.0, a)), abs=1e-12)
    assert got.advantage[1, 2] == 0 and got.delta[1, 2] == 0


def test_single_rewards_that_are_all_constant_are_exactly_zero() -> None:
    """Also where weights and rounding would leave something, and in a batch of them."""
    parts = torch.tensor([0.1 + 0.2, 1 / 3, 0.7])[None, None].repeat(3, 7, 1)
    for group_std in ("population", "sample"):
        config = MDPGRPOConfig(**{**PLAIN, "num_generations": 7, "group_std": group_std},
                               multi_objective_aggregation="normalize_then_sum")  # fmt: skip
        got = mdpgrpo_fast.advantages(config=config, parts=parts, part_weights=[0.1, 0.7, 3.0], backend="torch")
        assert (got.z == 0).all() and (got.advantage == 0).all()
        # Equal but for rounding, and a batch that is said to have no deviation.
        noisy = torch.where(torch.arange(7)[:, None] % 2 == 0, parts, torch.nextafter(parts, parts + 1))
        assert (mdpgrpo_fast.advantages(config=config, parts=noisy, backend="torch").z == 0).all()
        varied = parts + torch.arange(7)[:, None]
        assert (mdpgrpo_fast.advantages(config=config, parts=varied, batch=(0.1, 0.0), backend="torch").z == 0).all()


def test_a_group_constant_in_all_its_rewards_is_exactly_zero_beside_others() -> None:
    """Whatever rounding, or the ranks' own, leaves of the mean that is subtracted."""
    parts = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0))
    parts[1] = torch.tensor([0.1 + 0.2, torch.nan])
    config = MDPGRPOConfig(**PLAIN, multi_objective_aggregation="normalize_then_sum")
    for batch in (None, (0.01, 0.9)):
        got = mdpgrpo_fast.advantages(config=config, parts=parts, part_weights=[0.3, 0.7], batch=batch)
        assert (got.z[1] == 0).all() and (got.advantage[1] == 0).all() and (got.z[::2] != 0).all()


def test_one_reward_of_larger_numbers_does_not_outweigh_another() -> None:
    """What GDPO is for: the sum of rewards of 0 to 1 and of 0 to 100 is all but the second."""
    parts = torch.tensor([[[0.0, 100.0], [1.0, 0.0], [0.0, 0.0], [1.0, 100.0]]], dtype=torch.float64)
    together = MDPGRPOConfig(**PLAIN)
    apart = MDPGRPOConfig(**PLAIN, multi_objective_aggregation="normalize_then_sum")
    summed = mdpgrpo_fast.advantages(parts.sum(-1), config=together).advantage[0]
    single = mdpgrpo_fast.advantages(config=apart, parts=parts).advantage[0]
    assert summed[0] > 0.9 and summed[1] < -0.9
    assert single[:2].abs().max() < 1e-12 and single[3] == -single[2] > 1


def test_a_sum_of_zero_beside_others_is_not_a_constant_group() -> None:
    """By the mean and the deviation of a larger batch."""
    config = MDPGRPOConfig(num_generations=3, multi_temperature=False, multi_objective_aggregation="normalize_then_sum")
    parts, valid = torch.tensor([[[0.0], [1.0], [2.0]], [[1.0], [1.0], [1.0]]]), torch.ones(2, 3, dtype=torch.bool)
    batch = torch.tensor(0.5), torch.tensor(2.0)
    z = reference.decoupled_anchor(parts, torch.ones(1), valid, config, batch)
    one = math.sqrt(1.5)
    torch.testing.assert_close(z[0], (torch.tensor([-one, 0.0, one]) - 0.5) / 2)
    assert (z[1] == 0).all()


def test_the_goal_of_rewards_seen_before() -> None:
    """(r - median) / deviation where both are running; each may be it alone."""
    rewards, k, running = torch.tensor([[0.25, 0.75]]), torch.tensor([4]), (0.5, 0.125)
    for mean, std, expected in (
        ("running", "running", [-2.0, 2.0]), ("running", "binomial", [-1.0, 1.0]), ("half", "running", [-2.0, 2.0]),
        ("mean", "running", [-2.0, 2.0]),
    ):  # fmt: skip
        config = MDPGRPOConfig(num_generations=2, multi_temperature=False, goal_mean=mean, goal_std=std)
        got = reference.advantages(rewards, k, config, running=running)
        assert got.delta.tolist() == [pytest.approx(expected)], (mean, std)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_rewards_that_cancel_leave_no_sign_of_a_rounding(dtype: torch.dtype, baseline: Any) -> None:
    """The deviation of a batch whose sums are all noise would make them as large as any."""
    config = MDPGRPOConfig(num_generations=7, multi_temperature=False, dual_anchor=False, baseline=baseline,
                           kl_beta_neg=0.5, multi_objective_aggregation="normalize_then_sum")  # fmt: skip
    one = torch.tensor([[0.1, 0.2, 0.3, 0.7, 0.4, 0.9, 0.15]], dtype=dtype)
    opposed = torch.stack([one, 1 - 3 * one], -1)
    thirds = torch.tensor([[0.0, 1.0, 2.0, 1.0, 0.0, 1.0, 2.0]], dtype=dtype)[..., None] / 3  # 1/3 is their mean
    got = mdpgrpo_fast.advantages(config=config, parts=opposed, backend="torch")
    assert (got.z == 0).all() and (got.advantage == 0).all() and (got.kl_beta == got.kl_beta[0, 0]).all()
    got = mdpgrpo_fast.advantages(config=config, parts=thirds, backend="torch")
    assert got.z[0].sign().tolist() == [-1, 0, 1, 0, -1, 0, 1] and got.kl_beta[0, 1] == got.kl_beta[0, 2]
    real = mdpgrpo_fast.advantages(config=config, parts=opposed + torch.tensor([0, 1e-4]) * thirds, backend="torch")
    assert real.z[0, 2] > 0.1 and real.z[0, 0] < -0.1, "what is above the noise is not"


def test_the_noise_is_of_the_dtype_of_the_rewards() -> None:
    """float16 holds no unit in the last place of a float64."""
    torch.set_default_dtype(torch.float16)
    try:
        noise = reference.reward_noise(torch.ones(1, 8, dtype=torch.float64), torch.ones(1, 8, dtype=torch.bool))
    finally:
        torch.set_default_dtype(torch.float32)
    assert noise.tolist() == [8 * torch.finfo(torch.float64).eps]
