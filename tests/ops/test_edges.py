"""Numbers that lie on an edge to the bit, on every backend: the bounds of clips, caps, thresholds, and of rounding.

A token's logit of -50 beside one of 0 makes ℓ exactly -50 in float32 and in float64, with a probability so near to 0
that the gradient of the logit is ∂loss/∂ℓ.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from helpers.losses import ALL_BACKENDS, BACKENDS, DEVICE, config_for
from torch import Tensor

import mdpgrpo_fast
from mdpgrpo_fast import reference
from mdpgrpo_fast.reference.groups import decoupled_anchor, decoupled_sums, goal_anchor, mixed, reward_noise
from mdpgrpo_fast.reference.losses import (
    KL_EXPONENT_MAX,
    gmpo_log_ratios,
    importance_ratio,
    kl_penalty,
    kl_penalty_slope,
    vespo_log_weight,
)
from mdpgrpo_fast.reference.objective import kept_off_policy
from mdpgrpo_fast.reference.rows import Layout, entropy_quantile, linear_logits

ELL = -50.0
INF, NAN = math.inf, math.nan
EPS = torch.finfo(torch.float32).eps
every_backend = pytest.mark.parametrize("backend", ALL_BACKENDS)


class Tokens(NamedTuple):
    out: Any
    slope: Tensor  # ∂loss/∂ℓ of each


def tokens(backend: str, advantage: Any, knobs: dict[str, Any] | None = None, **more: Any) -> Tokens:
    """One completion of a token for each advantage, or with `lengths` of more; the loss is their sum."""
    advantage = torch.as_tensor(advantage, dtype=torch.float32)
    size = (len(advantage), more.pop("length", 1))
    logits = torch.tensor([ELL, 0.0]).expand(*size, 2).clone().to(DEVICE).requires_grad_()
    mask = torch.arange(size[1], device=DEVICE).expand(size) < more.pop("counts", size[1])
    given = {
        k: torch.as_tensor(v, dtype=torch.float32).expand(size).to(DEVICE) if k.endswith("logprobs") else v
        for k, v in more.items()
    }
    config = config_for(**{"kl_beta_pos": 1.0, "kl_beta_neg": 1.0, "aggregation": "dapo", **(knobs or {})})
    out = mdpgrpo_fast.token_loss(
        logits, torch.zeros(size, dtype=torch.long, device=DEVICE), mask, config, advantage=advantage.to(DEVICE),
        kl_beta=torch.ones(len(advantage), device=DEVICE), backend=backend, **{"denominator": 1.0, **given},
    )  # fmt: skip
    return Tokens(out, torch.autograd.grad(out.loss, logits)[0][..., 0].cpu())


@every_backend
@pytest.mark.parametrize("loss", ["ppo_clip", "cispo", "gmpo"])
def test_a_ratio_on_a_bound_is_not_clipped(backend: str, loss: Any) -> None:
    """ρ = 1 on both bounds; and where A = 0 nothing is clipped, while where A is small something is."""
    at = tokens(backend, [1.0, -1.0], {"loss": loss, "epsilon_low": 0.0, "epsilon_high": 0.0}, old_logprobs=ELL)
    assert not at.out.clipped_low.any() and not at.out.clipped_high.any()
    if loss != "cispo":
        assert at.slope.flatten().tolist() == [-1.0, 1.0]
    for log_ratio, sign in ((1.0, 1), (-1.0, -1)):
        beyond = tokens(backend, [0.0, sign * 0.25], {"loss": loss}, old_logprobs=ELL - log_ratio)
        marked, other = beyond.out.clipped_high, beyond.out.clipped_low
        marked, other = (marked, other) if sign > 0 else (other, marked)
        assert marked.flatten().tolist() == [False, True] and not other.any()


@every_backend
@pytest.mark.parametrize("loss", ["ppo_clip", "cispo", "gmpo"])
def test_a_bound_that_is_nan_shows_in_the_loss(backend: str, loss: Any) -> None:
    nan = torch.full((2,), NAN, device=DEVICE)
    for name in ("epsilon_low", "epsilon_high"):
        got = tokens(backend, [1.0, -1.0], {"loss": loss}, old_logprobs=ELL - 1, check_values=False, **{name: nan})
        assert got.out.loss.isnan()
        masked = {name: torch.tensor([[0.2, NAN]], device=DEVICE)}
        got = tokens(backend, [1.0], {"loss": loss}, length=2, counts=1, check_values=False, old_logprobs=ELL, **masked)
        assert got.out.loss.isfinite() and got.slope.isfinite().all()


@every_backend
def test_a_cap_below_one(backend: str) -> None:
    """delta caps ρ where it is above 0, whatever the bounds are: ρ = e, A < 0."""
    got = tokens(backend, [-1.0], old_logprobs=ELL - 1, delta=torch.full((1,), 0.5, device=DEVICE), check_values=False)
    # min(ρA, clip(ρ)A): the clipped branch, 1.2 A, is below the capped one, 0.5 A.
    assert got.slope.item() == 0 and got.out.loss.item() == pytest.approx(1.2)
    free = tokens(backend, [-1.0], old_logprobs=ELL - 1, delta=torch.zeros(1, device=DEVICE))
    assert free.out.loss.item() == pytest.approx(math.e) and free.slope.item() == pytest.approx(math.e)


@every_backend
def test_kl_on_its_edges(backend: str) -> None:
    """ℓ_ref - ℓ of exactly 20, where k3 is not clamped yet, and of 0, where |ℓ - ℓ_ref| has no slope."""
    at = tokens(backend, [0.0], ref_logprobs=ELL + KL_EXPONENT_MAX)
    assert at.out.totals[-1] == 0 and at.slope.item() == pytest.approx(1 - math.exp(20), rel=1e-6)
    above = tokens(backend, [0.0], ref_logprobs=ELL + KL_EXPONENT_MAX + 1)
    assert above.out.totals[-1] == 1 and above.slope.item() == 0
    for gap, slope in ((0.0, 0.0), (0.5, -1.0), (-0.5, 1.0)):
        got = tokens(backend, [0.0], {"kl_estimator": "abs"}, ref_logprobs=ELL + gap)
        assert (got.slope.item(), got.out.loss.item()) == (slope, abs(gap))
    d = torch.tensor([KL_EXPONENT_MAX], dtype=torch.float64, requires_grad=True)
    value, over = kl_penalty(-d, torch.zeros_like(d), "k3")
    assert not over.item()
    assert kl_penalty_slope(-d, torch.zeros_like(d), "k3").item() == -torch.autograd.grad(value, d)[0].item()


@every_backend
def test_a_bonus_of_one_and_a_denominator_below_two(backend: str) -> None:
    def loss(coef: float, denominator: float) -> float:
        logits = torch.zeros(1, 1, 2, device=DEVICE)
        out = mdpgrpo_fast.token_loss(
            logits, torch.zeros(1, 1, dtype=torch.long, device=DEVICE), None, config_for(entropy_coef=coef),
            advantage=torch.zeros(1, device=DEVICE), kl_beta=0.0, denominator=denominator, backend=backend,
        )  # fmt: skip
        return float(out.loss)

    assert loss(1.0, 1.0) == pytest.approx(-math.log(2)) and loss(1.0, 1.5) == pytest.approx(-math.log(2) / 1.5)


@every_backend
def test_a_bonus_reaches_the_gradient_of_a_head_as_number_and_as_tensor(backend: str) -> None:
    hidden = torch.tensor([[[1.0, -0.5]], [[0.25, 2.0]]], device=DEVICE).requires_grad_()
    weight = torch.tensor([[0.5, 1.0], [-1.0, 0.5], [0.25, -0.75]], device=DEVICE)
    chosen = torch.zeros(2, 1, dtype=torch.long, device=DEVICE)

    def slope(logits: bool, **more: Any) -> Tensor:
        config = config_for(**{k: v for k, v in more.items() if isinstance(v, float)})
        given = {k: v for k, v in more.items() if isinstance(v, Tensor)}
        given |= {"advantage": torch.zeros(2, device=DEVICE), "kl_beta": 0.0}
        if logits:
            out = mdpgrpo_fast.token_loss(hidden @ weight.T, chosen, None, config, backend="torch", **given)
        else:
            out = mdpgrpo_fast.linear_token_loss(hidden, weight, chosen, None, config, backend=backend, **given)
        return torch.autograd.grad(out.loss, hidden)[0].cpu()

    expected = slope(True, entropy_coef=0.5)
    assert expected.abs().sum() > 0.1
    for given in ({"entropy_coef": 0.5}, {"entropy_coef": torch.full((2,), 0.5, device=DEVICE)}):
        torch.testing.assert_close(slope(False, **given), expected, rtol=1e-5, atol=1e-7)


@every_backend
def test_an_entropy_on_its_floor_is_not_under_it(backend: str) -> None:
    def loss(floor: Tensor | None) -> Any:
        logits = torch.tensor([[[0.3, -1.0, 2.0], [0.0, 0.1, 0.2], [1.5, 1.0, -2.0]]], device=DEVICE)
        return mdpgrpo_fast.token_loss(
            logits, torch.zeros(1, 3, dtype=torch.long, device=DEVICE), None, config_for(entropy_coef=1.0),
            advantage=torch.ones(1, device=DEVICE), kl_beta=0.0, entropy_floor=floor, backend=backend,
        )  # fmt: skip

    free = loss(None)
    assert loss(free.entropy).loss == free.loss
    above = torch.nextafter(free.entropy, torch.full_like(free.entropy, INF))
    assert loss(above).loss == 0


@every_backend
def test_the_threshold_is_of_the_mean_drift(backend: str) -> None:
    """Drifts 0, 1.5 and a mean of 0.75: kept at a threshold of 0.75, left out below it. A = 0 is never left out."""
    for threshold, kept in ((0.75, True), (0.5, False)):
        got = tokens(
            backend, [-1.0], {"off_policy_threshold": threshold}, length=2, sampling_logprobs=[ELL, ELL + 1.5],
            old_logprobs=ELL,
        )  # fmt: skip
        assert got.slope.flatten().tolist() == [float(kept)] * 2
    layout, keep = Layout(2, torch.tensor([0, 0, 1])), torch.ones(3, dtype=torch.bool)
    sampled, own = torch.tensor([0.0, 1.5, 1.0]), torch.zeros(3)
    advantage = torch.tensor([-1.0, -1.0, 0.0])
    assert kept_off_policy(own, sampled, keep, layout, advantage, 0.75).tolist() == [True] * 3
    assert kept_off_policy(own, sampled, keep, layout, advantage, 0.5).tolist() == [False, False, True]


@every_backend
def test_vespo_by_the_sign_of_its_advantage(backend: str) -> None:
    """φ = exp(λ + k log w - λ w) at log w = 0.5, and where log w is at its bounds."""
    knobs: dict[str, Any] = {
        "loss": "vespo", "vespo_k_pos": 0.3, "vespo_lambda_pos": 0.7, "vespo_k_neg": 1.1, "vespo_lambda_neg": 1.3,
    }  # fmt: skip
    got = tokens(backend, [1.0, -1.0], knobs, old_logprobs=ELL - 0.5)
    for slope, (k, rate, sign) in zip(got.slope.flatten().tolist(), ((0.3, 0.7, 1), (1.1, 1.3, -1)), strict=True):
        assert slope == pytest.approx(-sign * math.exp(rate + 0.5 * k - rate * math.exp(0.5)), rel=1e-5)
    layout, mask = Layout(1), torch.ones(1, 2, dtype=torch.float64)
    far = torch.tensor([[30.0, -25.0]], dtype=torch.float64)
    assert vespo_log_weight(far, None, mask, layout).item() == 0
    weights = torch.tensor([[1e30, 1.0]], dtype=torch.float64)
    assert vespo_log_weight(0 * far, weights, mask, layout).item() == 20
    assert vespo_log_weight(far - 30, None, mask, layout).item() == pytest.approx(math.log(1e-8))


@every_backend
def test_on_policy_a_token_of_no_probability_has_a_ratio_of_one(backend: str) -> None:
    logits = torch.tensor([[[-INF, 0.0], [0.0, 0.0]]], device=DEVICE)
    out = mdpgrpo_fast.token_loss(
        logits, torch.zeros(1, 2, dtype=torch.long, device=DEVICE), None, config_for(),
        advantage=torch.ones(1, device=DEVICE), kl_beta=0.0, backend=backend,
    )  # fmt: skip
    assert out.loss.isnan() and out.ratio.flatten().tolist() == [1.0, 1.0]
    assert out.logprobs[0, 0] == -INF


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_no_completion_takes_part_in_none(backend: str) -> None:
    """Its own numbers are NaN; the ratio of the sequence and the mean KL are those of the rows that are known. torch's
    operations refuse it."""
    knobs: dict[str, Any] = {"importance_level": "sequence"}
    flat = {"num_completions": 2, "check_values": False, "advantage": torch.tensor([1.0, -1.0], device=DEVICE)}

    def run(completion: list[int]) -> Any:
        n = len(completion)
        logits = torch.tensor([ELL, 0.0]).expand(n, 2).to(DEVICE)
        old = torch.tensor([ELL - 0.1, ELL + 0.2, ELL - 0.1, ELL - 3.0])[:n].to(DEVICE)
        return mdpgrpo_fast.token_loss(
            logits, torch.zeros(n, dtype=torch.long, device=DEVICE), None, config_for(**knobs), kl_beta=0.0,
            completion=torch.tensor(completion, device=DEVICE), old_logprobs=old, ref_logprobs=old, backend=backend,
            **flat,
        )  # fmt: skip

    known, more = run([0, 1, 0]), run([0, 1, 0, 5])
    assert torch.equal(more.ratio[:3], known.ratio) and torch.equal(more.completion_kl, known.completion_kl)
    assert more.loss.isnan() and more.logprobs[3].isnan()


# ---- rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *ALL_BACKENDS])
def test_how_far_from_the_mean_rounding_reaches(backend: str) -> None:
    """4 units in the last place of the largest reward, that included: the group is not constant, but z is 0."""

    def z(*rewards: float) -> list[float]:
        config = config_for(scale_rewards="none", num_generations=len(rewards))
        given, k = torch.tensor([rewards]), torch.ones(1)
        if backend == "reference":
            return reference.advantages(given, k, config).z[0].tolist()
        return mdpgrpo_fast.advantages(given.to(DEVICE), k.to(DEVICE), config, backend=backend).z[0].tolist()

    assert z(1 - 8 * EPS, 1.0) == [0, 0]
    assert z(1.0, 1 + 9 * EPS) == [0, 5 * EPS]  # of its mean, 1 + 4.5 ε, half a unit is rounded off
    assert z(1.0, 1 + 12 * EPS) == [-6 * EPS, 6 * EPS]
    assert z(1.0, -3.0) == [2, -2]
    assert z(-1.0, -1 - 9 * EPS) == [0, -5 * EPS]
    assert z(*[1.0] * 9, 1 + 10 * EPS)[-1] == 0  # 9 ε from the mean of ten: no more than 10 units


@every_backend
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_a_reward_that_is_nan_does_not_count(backend: str, scale: Any) -> None:
    config, k = config_for(num_generations=3, scale_rewards=scale), torch.ones(2, device=DEVICE)
    rewards = torch.tensor([[0.0, 1.0, NAN], [0.5, 0.25, 1.0]], device=DEVICE)
    valid = rewards.isfinite()
    got = mdpgrpo_fast.advantages(rewards, k, config, valid=valid, backend=backend)
    assert got.advantage.isfinite().all() and got.z[0].tolist()[2] == 0 and got.z[0, 1] > 0
    default = mdpgrpo_fast.advantages(rewards, k, config, valid=valid)
    torch.testing.assert_close(default.advantage, got.advantage, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *ALL_BACKENDS])
def test_how_far_rounding_reaches_where_two_terms_cancel(backend: str) -> None:
    """z = -1 and δ near 1: A is 0 at 16 units in the last place of |z| + |δ|, and the sum beyond."""
    config = config_for(prospect=False, dual_anchor_alpha=0.5, goal_std="released", num_generations=2)
    scale, found = math.sqrt(0.5), []
    for units in range(-120, 121):
        low = torch.tensor(0.5 + scale) + units * EPS
        rewards, k = torch.stack([low, low + 1]).reshape(1, 2), torch.ones(1)
        if backend == "reference":
            got = reference.advantages(rewards, k, config)
        else:
            got = mdpgrpo_fast.advantages(rewards.to(DEVICE), k.to(DEVICE), config, backend=backend)
        exact = (float(got.z[0, 0]) + float(got.delta[0, 0])) / 2
        found.append((abs(exact) / EPS, float(got.advantage[0, 0])))
    assert all(a == 0 for off, a in found if off < 15) and all(a != 0 for off, a in found if off > 17)
    assert len([a for off, a in found if 17 < off < 30]) > 4 < len([a for off, a in found if off < 15])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_of_a_group(dtype: torch.dtype) -> None:
    eps, valid = torch.finfo(dtype).eps, torch.ones(2, 6, dtype=torch.bool)
    valid[0, 2:] = False
    rewards = torch.tensor([[-3.0, 1, 9, 9, 9, 9], [2.0, 1, 1, 1, 1, 0]], dtype=dtype)
    assert reward_noise(rewards, valid).tolist() == [4 * eps * 3, 6 * eps * 2]
    rewards[1, 0] = INF
    assert reward_noise(rewards, valid).isnan().tolist() == [False, True]
    assert reward_noise(rewards[:, :0], valid[:, :0]).tolist() == [0, 0]
    one = torch.ones(1, 1, dtype=dtype)
    for count, reach in ((2, 16), (4, 16), (6, 24)):
        for units, is_zero in ((reach - 2, True), (reach + 2, False)):
            # |1| + |-1 + 2 u| is 2 but for rounding: their sum is 2 u, which is to be above reach ε · 2.
            total = mixed(one, -one + 2 * units * eps, torch.tensor([count]))
            assert (total.item() == 0) is is_zero, (count, units)
            assert (mixed(0.125 * one, -(0.125 * one) + units * eps / 4, torch.tensor([count])).item() == 0) is is_zero


def test_single_rewards_cancel_but_for_their_own_rounding() -> None:
    """Rewards of another sign about means that round, with weights that make the rounding large beside a third."""
    config = config_for(num_generations=4)
    first = torch.tensor([[1000.1, 1000.3, 1000.7, 1000.75]])
    third = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    valid = torch.ones(1, 4, dtype=torch.bool)
    parts = torch.stack([first, 3000 - first, third], -1)
    assert decoupled_sums(parts, torch.tensor([100.0, 100.0, 1e-5]), valid, config).tolist() == [[0.0] * 4]
    seen = decoupled_sums(parts, torch.tensor([100.0, 100.0, 10.0]), valid, config)
    assert (seen.abs() > 5).all()


def test_a_deviation_of_next_to_nothing_is_divided_by_its_bound() -> None:
    config, valid = config_for(num_generations=2), torch.tensor([[True, True, False]])
    parts = torch.tensor([[[0.0], [1.0], [5.0]]], dtype=torch.float64)
    got = decoupled_anchor(parts, torch.tensor([1e-9], dtype=torch.float64), valid, config)
    assert got.flatten().tolist() == pytest.approx([-0.1, 0.1, 0.0], rel=1e-6) and got[0, 2] == 0
    mean, k = torch.zeros(1), torch.ones(1)
    near = goal_anchor(torch.tensor([[1.0, 0.0]]), mean, k, "running", "running", (0.0, 0.0))
    assert near.tolist() == [[pytest.approx(1e8), 0.0]]
    assert goal_anchor(torch.tensor([[1.0]]), mean, k, "mean", "binomial", noise=torch.tensor([2.0])).item() == 0


# ---- parts of the reference -----------------------------------------------------------------------------------------


def test_a_log_ratio_on_gmpo_s_bound_is_inside() -> None:
    log_ratio, advantage = torch.tensor([-0.25, 0.5, -0.26, 0.51]), torch.tensor([-1.0, 1.0, -1.0, 1.0])
    bounded, low, high = gmpo_log_ratios(log_ratio, advantage, 0.25, 0.5)
    assert bounded.tolist() == [-0.25, 0.5, -0.25, 0.5]
    assert low.tolist() == [False, False, True, False] and high.tolist() == [False, False, False, True]


def test_totals_by_their_names() -> None:
    got = tokens("torch", [1.0, -1.0], old_logprobs=[[ELL - 1], [ELL - 2]], ref_logprobs=ELL - 1).out
    ratios = [math.e, math.e**2]
    expected = {
        "tokens": 2.0, "kl": math.exp(-1), "entropy": 0.0, "clip_low": 0.0, "clip_high": 0.5,
        "ratio_mean": sum(ratios) / 2, "ratio_max": ratios[1], "kl_clamped": 0.0,
    }  # fmt: skip
    assert {n: float(got.total(n)) for n in reference.TOTALS} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert tuple(expected) == reference.TOTALS


def test_logits_of_a_head_and_the_quantile_of_nothing() -> None:
    hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0], [0.0, -1.0]])
    assert linear_logits(hidden, weight).tolist() == [[11.0, 17.0, -2.0]]
    assert linear_logits(hidden, weight, torch.tensor([1.0, 0.0, 2.0]), 0.5).tolist() == [[6.0, 8.5, 0.0]]
    nothing = torch.zeros(0)
    assert entropy_quantile(nothing, nothing.bool(), 0.5).item() == 0
    assert entropy_quantile(torch.ones(3), torch.zeros(3, dtype=torch.bool), 0.5).item() == 0


def test_half_precision_becomes_single() -> None:
    got = reference.advantages(torch.tensor([[0.1, 0.7]], dtype=torch.float16), torch.ones(1), config_for())
    assert got.z.dtype == got.mean.dtype == torch.float32
    ratio = importance_ratio(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), Layout(1), "token")
    assert ratio.item() == 1 and reference.token_logprobs(
        torch.zeros(1, 2, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.long)
    )[0].item() == pytest.approx(-math.log(2), rel=1e-6)
