"""The reference's losses beside the clipped one: numbers worked out by hand, derivatives by differences, and what has
to hold whatever the numbers are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.inputs import LossInputs, make_inputs
from torch import Tensor

from mdpgrpo_fast import reference
from mdpgrpo_fast.config import MDPGRPOConfig
from mdpgrpo_fast.reference import Layout, losses

LOSSES = ("ppo_clip", "cispo", "sapo", "gmpo", "luspo", "vespo")
LEVELS = [
    (loss, level)
    for loss in LOSSES
    for level in ("token", "sequence")
    if (loss, level) not in (("gmpo", "sequence"), ("vespo", "sequence"), ("luspo", "token"))
]
each_loss = pytest.mark.parametrize(("loss", "level"), LEVELS)


def config_for(**knobs: Any) -> MDPGRPOConfig:
    return MDPGRPOConfig(**{"num_generations": 2, "multi_temperature": False, **knobs})


def run(batch: LossInputs, config: MDPGRPOConfig, **more: Any) -> tuple[reference.TokenLoss, Tensor]:
    """The loss and its gradient."""
    logits = batch.logits.detach().requires_grad_()
    given = {"max_completion_length": batch.tokens.shape[-1], **batch.given(), **more}
    out = reference.token_loss(logits, batch.tokens, batch.mask, config, **given)
    (grad,) = torch.autograd.grad(out.loss, logits)
    return out, grad


def assert_close(got: Any, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(got, expected, **{"rtol": 1e-11, "atol": 1e-13, **tolerance})


# ---- derivatives ----------------------------------------------------------------------------------------------------

# What is detached is a number, and not a function of the logits: for differences it has to stay where it is.
DETACHED = {"cispo": "cispo_weight", "vespo": "vespo_log_weight"}


def freeze(monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    """The detached weight of a loss becomes what it is at the first call."""
    if loss in DETACHED:
        kept: list[Tensor] = []
        weight = getattr(losses, DETACHED[loss])

        def first(*args: Any, **kwargs: Any) -> Tensor:
            if not kept:
                kept.append(weight(*args, **kwargs))
            return kept[0]

        monkeypatch.setattr(losses, DETACHED[loss], first)


@each_loss
@pytest.mark.parametrize("option", ["plain", "unbiased", "abs", "entropy", "floor", "weighed", "off_policy", "top"])
def test_gradcheck(loss: Any, level: Any, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios off the policy, of which some are clipped, away from the corners; one completion is empty."""
    batch = make_inputs(9, lengths=(3, 2, 0, 3), vocab=5, scale=1.0)
    knobs: dict[str, Any] = {
        "unbiased": {"kl_gradient": "unbiased"},
        "abs": {"kl_estimator": "abs", "kl_gradient": "unbiased"},
        "entropy": {"entropy_coef": 0.3},
        "off_policy": {"off_policy_threshold": 0.02},
        "top": {"top_entropy_quantile": 0.6, "entropy_coef": 0.2},
    }.get(option, {})
    if option == "floor":
        batch.kwargs |= {"entropy_floor": 1.0, "entropy_coef": 0.3}
    if option == "weighed":
        batch.kwargs["importance_weight"] = batch.kwargs["ref_logprobs"].exp() * 3
    config = config_for(
        loss=loss, importance_level=level, temperature_objective="per_row", epsilon_low=0.1, epsilon_high=0.15, **knobs
    )
    taus = torch.tensor([0.5, 1.2, 1.0, 0.8], dtype=torch.float64)
    _, expected = run(batch, config, temperature=taus)
    freeze(monkeypatch, loss)

    def value(x: Tensor) -> Tensor:
        return reference.token_loss(
            x, batch.tokens, batch.mask, config, temperature=taus, max_completion_length=3, **batch.given()
        ).loss

    assert torch.autograd.gradcheck(value, batch.logits.requires_grad_(), eps=1e-6, atol=1e-7)
    assert_close(torch.autograd.grad(value(batch.logits), batch.logits)[0], expected)


def slope_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    (slope,) = torch.autograd.grad(function(at).sum(), at)
    return slope


def test_slopes_are_the_derivatives() -> None:
    x = torch.linspace(0.3, 2.0, 35, dtype=torch.float64)
    a = torch.where(torch.arange(35) % 2 == 0, 1.3, -0.7).double()
    config = config_for(loss="sapo", sapo_temperature_neg=2.0)
    assert_close(losses.sapo_gate_slope(x, a, config), slope_of(lambda r: losses.sapo_gate(r, a, config), x))
    for delta in (0.0, 1.5):
        assert_close(
            losses.clipped_objective_slope(x, a, 0.21, 0.33, delta),
            slope_of(lambda r, d=delta: losses.clipped_objective(r, a, 0.21, 0.33, d)[0], x),
        )
    ref = torch.full_like(x, 1.234)
    for estimator in ("k1", "k2", "k3", "abs"):
        assert_close(
            losses.kl_penalty_slope(x, ref, estimator),
            slope_of(lambda r, e=estimator: losses.kl_penalty(r, ref, e)[0], x),
        )


# ---- by hand --------------------------------------------------------------------------------------------------------


def objective(
    logprobs: list[float], config: MDPGRPOConfig, keep: list[bool] | None = None, **given: Any
) -> tuple[reference.Objective, list[float]]:
    """-w·J - c·H + β·KL of the tokens of one completion, and the derivative of their sum with respect to ℓ."""
    at = torch.tensor([logprobs], dtype=torch.float64).requires_grad_()
    rows = {n: torch.tensor([x], dtype=torch.float64) if isinstance(x, list) else x for n, x in given.items()}
    absent = dict.fromkeys(("old_logprobs", "ref_logprobs", "sampling_logprobs", "importance_weight"))
    numbers = {"advantage": 0.0, "kl_beta": 0.0, "temperature": 1.0, "epsilon_low": config.epsilon_low,
               "epsilon_high": config.epsilon_high, "delta": config.delta, "entropy_coef": 0.0,
               "entropy_floor": 0.0}  # fmt: skip
    keep = torch.ones_like(at, dtype=torch.bool) if keep is None else torch.tensor([keep])
    out = reference.token_objective(
        at, at, torch.ones_like(at), keep, Layout(1), config, **{**absent, **numbers, **rows}
    )
    (grad,) = torch.autograd.grad(out.per_token.sum(), at, allow_unused=True)
    return out, [0.0] * len(logprobs) if grad is None else grad[0].tolist()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_that_does_not_count_is_none(loss: Any) -> None:
    """Whatever its log-probs, with an entropy bonus, a KL that is clamped and a ratio beyond the clip."""
    given = {"old_logprobs": [-0.5, -3.0], "ref_logprobs": [-0.6, 40.0], "entropy_coef": 0.3, "kl_beta": 0.2}
    out, grad = objective([-0.4, -0.5], config_for(loss=loss), keep=[True, False], advantage=1.5, **given)
    assert out.per_token[0, 1] == out.kl[0, 1] == grad[1] == 0 and out.ratio[0, 1] == 1
    assert not any(x[0, 1] for x in (out.clipped_low, out.clipped_high, out.kl_clamped, out.gate))
    alone, slope = objective([-0.4], config_for(loss=loss), advantage=1.5, **{
        n: x[:1] if isinstance(x, list) else x for n, x in given.items()
    })  # fmt: skip
    assert out.per_token[0, 0].item() == pytest.approx(alone.per_token.item(), abs=1e-14)
    assert grad[0] == pytest.approx(slope[0], abs=1e-14)


@pytest.mark.parametrize(("kind", "slope"), [("plain", (-0.350, 0.330)), ("unbiased", (-0.300, 0.400))])
def test_the_gradient_of_the_kl(kind: Any, slope: tuple[float, ...]) -> None:
    """On-policy at ℓ = (-1.2, -0.7) with ℓ_ref = (-0.9, -1.1): 1 - exp(ℓ_ref - ℓ), and ℓ - ℓ_ref, the KL's own."""
    config = config_for(kl_gradient=kind)
    out, grad = objective([-1.2, -0.7], config, ref_logprobs=[-0.9, -1.1], kl_beta=1.0)
    assert grad == pytest.approx(slope, abs=5e-4)
    exact = (1 - math.exp(0.3), 1 - math.exp(-0.4)) if kind == "plain" else (-0.3, 0.4)
    assert grad == pytest.approx(exact, abs=1e-14)
    assert out.kl[0].tolist() == pytest.approx([math.exp(0.3) - 1.3, math.exp(-0.4) - 0.6], abs=1e-15), "ρ = 1"


def test_the_unbiased_kl_off_the_policy() -> None:
    """ρ k3: its value times ρ, its derivative ρ (k3 + 1 - exp(ℓ_ref - ℓ)) = ρ (ℓ - ℓ_ref)."""
    out, grad = objective([-1.2], config_for(kl_gradient="unbiased"), old_logprobs=[-1.5], ref_logprobs=[-0.9],
                          kl_beta=2.0)  # fmt: skip
    rho = math.exp(0.3)
    assert out.kl.item() == pytest.approx(rho * (math.exp(0.3) - 1.3), abs=1e-14)
    assert grad == pytest.approx([2 * rho * -0.3], abs=1e-14)


def test_the_absolute_kl() -> None:
    out, grad = objective([-1.2, -0.7, -0.5], config_for(kl_estimator="abs"), ref_logprobs=[-0.9, -1.1, -0.5],
                          kl_beta=0.5)  # fmt: skip
    assert out.kl[0].tolist() == pytest.approx([0.3, 0.4, 0.0]) and grad == pytest.approx([-0.5, 0.5, 0.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"), [(1.5, 2.0, 1.2), (1.5, -2.0, 1.2), (0.5, 2.0, 0.8), (1.1, -1.0, 1.1)]
)
def test_cispo(ratio: float, advantage: float, weight: float) -> None:
    """clip(ρ) A ℓ: the clipped weight is a number, so that the gradient never stops: -clip(ρ) A."""
    out, grad = objective([-0.5], config_for(loss="cispo"), old_logprobs=[-0.5 - math.log(ratio)], advantage=advantage)
    assert out.per_token.item() == pytest.approx(-weight * advantage * -0.5, abs=1e-14)
    assert grad == pytest.approx([-weight * advantage], abs=1e-14)
    assert bool(out.clipped_high) == (ratio > 1.2 and advantage > 0)
    assert bool(out.clipped_low) == (ratio < 0.8 and advantage < 0)


def test_sapo() -> None:
    """ρ = 1.5, A = 1, τ = 1: 4 σ(0.5) = 2.48984, slope 4 σ(1 - σ) ρ = 1.41002; A = -1: τ = 1.05."""
    config, old = config_for(loss="sapo"), [-0.5 - math.log(1.5)]
    out, grad = objective([-0.5], config, old_logprobs=old, advantage=1.0)
    assert out.per_token.item() == pytest.approx(-2.48984, abs=5e-6) and grad == pytest.approx([-1.41002], abs=5e-6)
    out, grad = objective([-0.5], config, old_logprobs=old, advantage=-1.0)
    s = 1 / (1 + math.exp(-0.525))
    assert out.per_token.item() == pytest.approx(4 * s / 1.05, abs=1e-14)
    assert grad == pytest.approx([4 * s * (1 - s) * 1.5], abs=1e-14)
    # On-policy the gate is 2/τ and its slope 1, whatever τ: the gradient is that of the plain policy term.
    out, grad = objective([-0.5], config, advantage=-1.0)
    assert out.per_token.item() == pytest.approx(2 / 1.05, abs=1e-14) and grad == pytest.approx([1.0], abs=1e-14)


@pytest.mark.parametrize(
    ("epsilon", "advantage", "ratio", "slopes"),
    [
        (0.4, 1.0, math.exp(0.1), (1.0, 1.0)),  # (0.3 - 0.1)/2
        (0.2, 1.0, math.exp(0.05), (0.0, 1.0)),  # (0.2 - 0.1)/2
        (0.2, -1.0, math.exp(0.1), (1.0, 1.0)),  # the upper bound is for A > 0
        (0.05, -1.0, math.exp(0.125), (1.0, 0.0)),  # (0.3 - 0.05)/2: the lower one for A < 0
    ],
)
def test_gmpo(epsilon: float, advantage: float, ratio: float, slopes: tuple[float, ...]) -> None:
    """Log-ratios 0.3 and -0.1, clipped, averaged: each token has the geometric mean, and a half of its gradient."""
    config = config_for(loss="gmpo", epsilon_low=epsilon, epsilon_high=epsilon)
    out, grad = objective([-0.5, -1.0], config, old_logprobs=[-0.8, -0.9], advantage=advantage)
    assert out.per_token[0].tolist() == pytest.approx([-ratio * advantage] * 2, abs=1e-14)
    assert grad == pytest.approx([-ratio * advantage * s for s in slopes], abs=1e-14)
    assert out.ratio[0].tolist() == pytest.approx([ratio] * 2)


@pytest.mark.parametrize(("advantage", "k", "rate"), [(1.0, 2.0, 3.0), (-1.0, 3.0, 2.0)])
def test_vespo(advantage: float, k: float, rate: float) -> None:
    """Log-ratios 0.3 and -0.1: log w = 0.2, φ = exp(λ + 0.2 k - λ e^0.2), J = φ A ℓ; for A > 0 φ = 0.7678."""
    phi = math.exp(rate + 0.2 * k - rate * math.exp(0.2))
    assert advantage < 0 or phi == pytest.approx(0.7678, abs=5e-5)
    out, grad = objective([-0.5, -1.0], config_for(loss="vespo"), old_logprobs=[-0.8, -0.9], advantage=advantage)
    assert out.per_token[0].tolist() == pytest.approx([-phi * advantage * x for x in (-0.5, -1.0)], abs=1e-14)
    assert grad == pytest.approx([-phi * advantage] * 2, abs=1e-14)
    odd = config_for(loss="vespo", vespo_k_pos=1.1, vespo_lambda_pos=0.7, vespo_k_neg=1.1, vespo_lambda_neg=0.7)
    out, _ = objective([-1.0, -1.0], odd, old_logprobs=[-1.3, -0.9], advantage=advantage)
    small = math.exp(0.7 + 0.2 * 1.1 - 0.7 * math.exp(0.2))
    assert out.per_token[0].tolist() == pytest.approx([small * advantage] * 2, abs=1e-14)
    # An importance weight is a part of w, and multiplies nothing else.
    weighed, _ = objective([-0.5, -1.0], config_for(loss="vespo"), old_logprobs=[-0.8, -0.9], advantage=advantage,
                           importance_weight=[2.0, 1.0])  # fmt: skip
    phi = math.exp(rate + (0.2 + math.log(2)) * k - rate * 2 * math.exp(0.2))
    assert weighed.per_token[0].tolist() == pytest.approx([-phi * advantage * x for x in (-0.5, -1.0)], abs=1e-14)


def test_vespo_is_bounded() -> None:
    """A w beyond all bounds is one at 1e-8 or e^20, and neither the loss nor its gradient is NaN."""
    for gap in (1e4, -1e4):
        out, grad = objective([-0.5] * 3, config_for(loss="vespo"), old_logprobs=[-0.5 - gap] * 3, advantage=1.0)
        assert out.per_token.isfinite().all() and all(map(math.isfinite, grad))


def test_sequence_level_and_its_sum() -> None:
    """GSPO: exp of the mean log-ratio for all tokens, clipped; each token's gradient is the mean's."""
    config = config_for(importance_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4)
    out, grad = objective([-0.5, -1.0], config, old_logprobs=[-0.5002, -1.0], advantage=1.0)
    assert out.per_token[0].tolist() == pytest.approx([-math.exp(1e-4)] * 2, abs=1e-12)
    assert grad == pytest.approx([-math.exp(1e-4)] * 2, abs=1e-12)
    out, grad = objective([-0.5, -1.0], config, old_logprobs=[-0.502, -1.0], advantage=1.0)
    assert out.per_token[0].tolist() == pytest.approx([-1.0004] * 2) and grad == [0.0, 0.0]


def test_off_policy_mask() -> None:
    """Only A < 0 with a mean of ℓ_sampling - ℓ above the threshold goes: (0.3 - 0.1)/2 = 0.1."""
    for advantage, threshold, stays in ((-1.0, 0.09, False), (-1.0, 0.11, True), (1.0, 0.09, True)):
        config = config_for(off_policy_threshold=threshold)
        for name in ("old_logprobs", "sampling_logprobs"):
            out, grad = objective([-0.5, -1.0], config, advantage=advantage, **{name: [-0.2, -1.1]})
            assert (out.weight[0].tolist() == [1.0, 1.0]) == stays and (grad != [0.0, 0.0]) == stays


def test_entropy_floor_is_of_policy_term_and_bonus_alone() -> None:
    """An entropy of 1: under the floor the row keeps its KL and nothing else."""
    given = {"ref_logprobs": [-0.9], "kl_beta": 0.1, "advantage": 1.0, "entropy_coef": 0.2}
    kl = 0.1 * (math.exp(0.3) - 1.3)
    for floor, expected in ((1.0, -1 - 0.2 + kl), (1.001, kl)):
        out, _ = objective([-1.2], config_for(), entropy_floor=floor, **given)
        assert out.per_token.item() == pytest.approx(expected, abs=1e-14)


# ---- what has to hold -----------------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo", "seq_mean_token_sum"])
def test_order_does_not_matter(loss: Any, level: Any, aggregation: Any) -> None:
    """Of completions, of groups of them, and of the tokens of one; nor does it matter whether rows are packed."""
    if loss == "luspo" and aggregation != "seq_mean_token_sum":
        aggregation = "grpo"  # which means that one there
    batch = make_inputs(3, lengths=(5, 3, 1, 4))
    batch.kwargs["importance_weight"] = batch.kwargs["ref_logprobs"].exp() * 3
    config = config_for(loss=loss, importance_level=level, aggregation=aggregation, entropy_coef=0.1,
                        kl_gradient="unbiased", off_policy_threshold=0.1)  # fmt: skip
    out, grad = run(batch, config, max_completion_length=7)
    for order in (torch.tensor([1, 0, 3, 2]), torch.tensor([2, 3, 0, 1]), torch.tensor([3, 1, 2, 0])):
        moved, moved_grad = run(batch.rows(order), config, max_completion_length=7)
        assert_close(moved.loss, out.loss)
        assert_close(moved_grad, grad[order])
        assert_close(moved.ratio, out.ratio[order])
    places = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    turned = LossInputs(batch.logits[:, places], batch.tokens[:, places], batch.mask[:, places], batch.advantage,
                        batch.kl_beta, {k: v[:, places] for k, v in batch.kwargs.items()})  # fmt: skip
    moved, moved_grad = run(turned, config, max_completion_length=7)
    assert_close(moved.loss, out.loss)
    assert_close(moved_grad, grad[:, places])
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    packed = LossInputs(*(x.flatten(0, 1)[rows] for x in (batch.logits, batch.tokens, batch.mask)), batch.advantage,
                        batch.kl_beta, {k: v.flatten()[rows] for k, v in batch.kwargs.items()})  # fmt: skip
    moved, moved_grad = run(packed, config, max_completion_length=7, completion=rows // 5, num_completions=4)
    assert_close(moved.loss, out.loss)
    assert_close(moved_grad, grad.flatten(0, 1)[rows])


@each_loss
def test_a_masked_row_changes_nothing(loss: Any, level: Any) -> None:
    batch = make_inputs(4)
    batch.kwargs["importance_weight"] = batch.kwargs["ref_logprobs"].exp() * 3
    config = config_for(loss=loss, importance_level=level, entropy_coef=0.1, off_policy_threshold=0.1,
                        kl_gradient="unbiased", top_entropy_quantile=0.5)  # fmt: skip
    out, grad = run(batch, config)
    for junk in (math.nan, math.inf, -1e30):

        def longer(x: Tensor, fill: Any = junk) -> Tensor:
            return torch.cat([x, torch.full_like(x[:, :1], fill)], 1)

        more = LossInputs(longer(batch.logits), longer(batch.tokens, 0), longer(batch.mask, False), batch.advantage,
                          batch.kl_beta, {k: longer(v) for k, v in batch.kwargs.items()})  # fmt: skip
        got, got_grad = run(more, config)
        assert_close(got.loss, out.loss)
        assert_close(got_grad[:, :-1], grad)
        assert (got_grad[:, -1] == 0).all() and (got.ratio[:, -1] == 1).all() and (got.entropy[:, -1] == 0).all()


@each_loss
@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_the_policy_gradient_scales_with_the_advantage(loss: Any, level: Any, scale: float) -> None:
    batch = make_inputs(5)
    del batch.kwargs["ref_logprobs"]
    config = config_for(loss=loss, importance_level=level)
    out, grad = run(batch, config)
    assert grad.abs().sum() > 0
    batch.advantage = batch.advantage * scale
    scaled, scaled_grad = run(batch, config)
    assert_close(scaled.loss, out.loss * scale)
    assert_close(scaled_grad, grad * scale)


def test_luspo_is_gspo_times_the_length() -> None:
    for length in (1, 4, 9):
        batch = make_inputs(6, lengths=(length,))
        del batch.kwargs["ref_logprobs"]
        gspo, gspo_grad = run(batch, config_for(importance_level="sequence"))
        luspo, luspo_grad = run(batch, config_for(loss="luspo"))
        assert_close(luspo.loss, gspo.loss * length)
        assert_close(luspo_grad, gspo_grad * length)
    batch = make_inputs(6)
    summed, _ = run(batch, config_for(importance_level="sequence", aggregation="seq_mean_token_sum"))
    assert_close(run(batch, config_for(loss="luspo"))[0].loss, summed.loss)


@pytest.mark.parametrize("loss", ["gmpo", "sapo", "cispo", "vespo"])
def test_on_policy_every_loss_has_the_plain_policy_gradient(loss: Any) -> None:
    """-A ∇ℓ: ratios and gates are 1 there, and their derivatives what makes it so."""
    batch = make_inputs(7)
    batch.kwargs.clear()
    plain, expected = run(batch, config_for())
    got, grad = run(batch, config_for(loss=loss))
    assert_close(grad, expected)
    if loss == "gmpo":
        assert_close(got.loss, plain.loss)
    assert (got.ratio == 1).all() and not (got.clipped_low | got.clipped_high).any()


@each_loss
def test_old_logprobs_of_the_policy_itself_are_none(loss: Any, level: Any) -> None:
    batch = make_inputs(8)
    del batch.kwargs["old_logprobs"]
    config = config_for(loss=loss, importance_level=level, kl_gradient="unbiased")
    absent, expected = run(batch, config)
    given, grad = run(batch, config, old_logprobs=absent.logprobs)
    assert_close(given.loss, absent.loss)
    assert_close(grad, expected)


@each_loss
def test_the_bonus_pushes_the_entropy_up(loss: Any, level: Any) -> None:
    batch = make_inputs(10, scale=1.0)
    batch.kwargs.clear()
    batch.advantage = torch.zeros_like(batch.advantage)
    for coefficient, more in ((0.5, True), (-0.5, False)):
        out, grad = run(batch, config_for(loss=loss, importance_level=level, entropy_coef=coefficient))
        batch_after = batch.rows(slice(None))
        batch_after.logits = batch.logits - 0.1 * grad
        after, _ = run(batch_after, config_for(loss=loss, importance_level=level))
        changed = (after.entropy - out.entropy)[batch.mask]
        assert ((changed > 0) if more else (changed < 0)).all()
        mean = out.entropy.sum(1) / batch.mask.sum(1)
        if loss != "luspo":
            assert_close(out.loss, -coefficient * mean.mean())


@each_loss
def test_a_nan_in_a_logprob_shows_in_the_loss(loss: Any, level: Any) -> None:
    """Neither a clip, nor a gate, nor a bound of a weight may make a number of it."""
    for place in ((0, 0), (1, 2)):  # A > 0 and A < 0
        for knobs in ({}, {"off_policy_threshold": 0.01, "kl_gradient": "unbiased"}, {"entropy_coef": 0.1}):
            batch = make_inputs(11)
            batch.logits[place] = math.nan
            for absent in ((), ("old_logprobs",), ("ref_logprobs",), ("old_logprobs", "ref_logprobs")):
                less = {k: v for k, v in batch.kwargs.items() if k not in absent}
                some = LossInputs(*batch, kwargs=less)
                out, _ = run(some, config_for(loss=loss, importance_level=level, **knobs))
                assert out.loss.isnan(), (place, knobs, absent)
    batch = make_inputs(11)
    batch.kwargs["old_logprobs"][0, 0] = math.nan
    assert run(batch, config_for(loss=loss, importance_level=level))[0].loss.isnan()


def test_a_quantile_of_the_entropy_is_torch_s() -> None:
    batch = make_inputs(12)
    out, _ = run(batch, config_for())
    for share in (0.1, 0.2, 0.5, 0.9, 1.0):
        floor = reference.entropy_quantile(out.entropy, batch.mask, share)
        assert_close(floor, torch.quantile(out.entropy[batch.mask], 1 - share))
    only, _ = run(batch, config_for(top_entropy_quantile=0.3))
    given, _ = run(batch, config_for(), entropy_floor=reference.entropy_quantile(out.entropy, batch.mask, 0.3))
    assert_close(only.loss, given.loss)
    none = torch.zeros_like(batch.mask)
    assert reference.entropy_quantile(out.entropy, none, 0.3) == 0
