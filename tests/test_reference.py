"""The reference's objective against an oracle in plain Python, its closed-form gradient, and known traps."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from helpers.inputs import LossInputs, make_inputs

import mdpgrpo_fast
from mdpgrpo_fast import reference
from mdpgrpo_fast.config import MDPGRPOConfig

AGGREGATIONS = ("grpo", "dapo", "dr_grpo", "bnpo")
MAX_LENGTH = 7


# ---- token objective: the oracle ------------------------------------------------------------------------------------


def log_softmax(row: list[float], tau: float, cap: float | None) -> list[float]:
    x = [(cap * math.tanh(v / cap) if cap else v) / tau for v in row]
    top = max(x)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in x))
    return [v - lse for v in x]


def oracle(batch: LossInputs, c: MDPGRPOConfig) -> tuple[float, list[list[list[float]]]]:
    """Loss and closed-form gradient ∂loss/∂x = (c/τ)(onehot(y) - p) of METHOD.md, in loops over Python floats."""
    logits, tokens, mask, advantage, kl_beta = (x.tolist() for x in batch)
    kw = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.kwargs.items()}
    b, width, vocab = len(tokens), len(tokens[0]), len(logits[0][0])
    cap, old, ref, weight = (kw.get(n) for n in ("softcap", "old_logprobs", "ref_logprobs", "importance_weight"))
    taus = kw.get("temperature", 1.0)
    taus = taus if isinstance(taus, list) else [taus] * b
    lengths = [sum(bool(m) for m in row) for row in mask]
    full = sum(n > 0 for n in lengths)
    loss, grad = 0.0, [[[0.0] * vocab for _ in range(width)] for _ in range(b)]
    for i, tau in enumerate(taus):
        mine = [t for t in range(width) if mask[i][t]]
        if not mine:
            continue
        divisor = {"grpo": full * len(mine), "dr_grpo": full * MAX_LENGTH}.get(c.aggregation, sum(lengths))
        if kw.get("denominator") is not None:
            divisor = kw["denominator"] * (len(mine) if c.aggregation == "grpo" else 1)
        logp = {t: log_softmax(logits[i][t], tau, cap) for t in mine}
        gap = {t: logp[t][tokens[i][t]] - old[i][t] if old else 0.0 for t in mine}
        if c.importance_level == "sequence":
            gap = dict.fromkeys(mine, math.fsum(gap.values()) / len(mine))
        slope = {}
        for t in mine:
            rho, a = math.exp(gap[t]), advantage[i]
            capped = rho if c.delta is None else min(rho, c.delta)
            clipped = min(max(rho, 1 - c.epsilon_low), 1 + c.epsilon_high)
            w = (weight[i][t] if weight else 1.0) * (tau if c.rescale_per_row else 1.0)
            loss -= w * min(capped * a, clipped * a) / divisor
            free = capped * a <= clipped * a and (c.delta is None or rho <= c.delta)
            slope[t] = -w * a * rho * free / divisor
        if c.importance_level == "sequence":
            slope = dict.fromkeys(mine, math.fsum(slope.values()) / len(mine))
        parts = [(slope, logp, tau)]
        if ref:
            at_kl, kl_slope = {t: log_softmax(logits[i][t], c.kl_temperature, cap) for t in mine}, {}
            for t in mine:
                d = ref[i][t] - at_kl[t][tokens[i][t]]
                value, slope_kl = {
                    "k1": (-d, 1.0),
                    "k2": (d * d / 2, -d),
                    "k3": (math.exp(d) - d - 1, 1 - math.exp(d)),
                }[c.kl_estimator]
                loss += kl_beta[i] * value / divisor
                kl_slope[t] = kl_beta[i] * slope_kl / divisor
            parts.append((kl_slope, at_kl, c.kl_temperature))
        for weights, logps, temperature in parts:
            for t, v in product(mine, range(vocab)):
                chain = 1 - math.tanh(logits[i][t][v] / cap) ** 2 if cap else 1.0
                onehot = float(v == tokens[i][t])
                grad[i][t][v] += weights[t] / temperature * (onehot - math.exp(logps[t][v])) * chain
    return loss, grad


def config_for(**knobs: Any) -> MDPGRPOConfig:
    return MDPGRPOConfig(num_generations=2, multi_temperature=False, **knobs)


def run(batch: LossInputs, config: MDPGRPOConfig, **more: Any) -> tuple[reference.TokenLoss, torch.Tensor]:
    """The loss through the public door and its gradient."""
    logits = batch.logits.detach().requires_grad_()
    out = mdpgrpo_fast.token_loss(
        logits, batch.tokens, batch.mask, config, **{"max_completion_length": MAX_LENGTH, **batch.given(), **more}
    )
    (grad,) = torch.autograd.grad(out.loss, logits)
    return out, grad


def assert_follows_oracle(batch: LossInputs, config: MDPGRPOConfig) -> None:
    out, grad = run(batch, config)
    loss, expected = oracle(batch, config)
    assert out.loss.item() == pytest.approx(loss, abs=1e-13, rel=1e-13)
    torch.testing.assert_close(grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("delta", [None, 1.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_and_gradient_follow_the_equations(aggregation: Any, level: Any, delta: float | None) -> None:
    config = config_for(
        aggregation=aggregation, importance_level=level, delta=delta, epsilon_low=0.1, epsilon_high=0.15
    )
    assert_follows_oracle(make_inputs(1, lengths=(5, 3, 0, 1, 4, 5)), config)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kl_temperature", [1.0, 0.6])
def test_kl_estimators_at_their_own_temperature(estimator: Any, kl_temperature: float) -> None:
    batch = make_inputs(2)
    batch.kwargs["temperature"] = torch.tensor([0.4, 0.7, 1.0, 1.3], dtype=torch.float64)
    assert_follows_oracle(batch, config_for(kl_estimator=estimator, kl_temperature=kl_temperature))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["paper", "per_row", "rescaled", "corrected"])
def test_temperature_objectives(objective: str, level: Any) -> None:
    batch, knobs = make_inputs(4, vocab=7), {"importance_level": level}
    if objective in ("per_row", "rescaled"):
        batch.kwargs["temperature"] = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
        knobs["rescale_per_row"] = objective == "rescaled"
    if objective == "corrected":
        batch.kwargs["importance_weight"] = make_inputs(5).kwargs["ref_logprobs"].exp().clamp(max=2.0)
    assert_follows_oracle(batch, config_for(temperature_objective=objective.replace("rescaled", "per_row"), **knobs))


@pytest.mark.parametrize("softcap", [2.0, 30.0])
def test_softcap(softcap: float) -> None:
    batch = make_inputs(6)
    batch.kwargs |= {"softcap": softcap, "temperature": 0.7}
    assert_follows_oracle(batch, config_for())


def test_on_policy_and_no_reference() -> None:
    """Absent old log-probs mean ratio 1, absent reference log-probs no KL: the loss is the mean of -A."""
    batch = make_inputs(7)
    batch.kwargs.clear()
    assert_follows_oracle(batch, config_for())
    out, _ = run(batch, config_for())
    assert (out.ratio == 1).all() and (out.kl == 0).all() and not (out.clipped_low | out.clipped_high).any()
    assert out.loss.item() == pytest.approx(-batch.advantage.mean().item(), abs=1e-15)


def test_statistics_are_those_of_the_tokens() -> None:
    batch, config = make_inputs(8), config_for(epsilon_low=0.1, epsilon_high=0.1)
    out, _ = run(batch, config)
    logp = batch.logits.log_softmax(-1)
    at = logp.gather(-1, batch.tokens[..., None]).squeeze(-1)
    rho, a, keep = (at - batch.kwargs["old_logprobs"]).exp(), batch.advantage[:, None], batch.mask
    gap = batch.kwargs["ref_logprobs"] - at
    torch.testing.assert_close(out.logprobs, at * keep)
    torch.testing.assert_close(out.entropy, -(logp.exp() * logp).sum(-1) * keep)
    torch.testing.assert_close(out.ratio[keep], rho[keep])
    torch.testing.assert_close(out.kl, (gap.exp() - gap - 1) * keep)
    assert torch.equal(out.clipped_low, (rho < 0.9) & (a < 0) & keep)
    assert torch.equal(out.clipped_high, (rho > 1.1) & (a > 0) & keep)
    assert out.clipped_low.any() and out.clipped_high.any()
    n = keep.sum()
    means = (out.kl, out.entropy, out.clipped_low, out.clipped_high, rho * keep)
    expected = [n, *(x.sum() / n for x in means), rho[keep].max(), torch.tensor(0.0)]
    torch.testing.assert_close(out.totals, torch.stack([x.double() for x in expected]))
    torch.testing.assert_close(out.completion_kl, out.kl.sum(1) / keep.sum(1))
    assert out.total("kl_clamped") == 0
    for name in ("logprobs", "entropy", "kl", "ratio", "totals", "completion_kl"):
        assert not getattr(out, name).requires_grad, name


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["grpo", "dapo"])
def test_gradcheck(level: Any, aggregation: Any) -> None:
    batch = make_inputs(9, lengths=(3, 2, 0), vocab=5, scale=1.0)
    config = config_for(importance_level=level, aggregation=aggregation, temperature_objective="per_row")
    taus = torch.tensor([0.5, 1.2, 1.0], dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return mdpgrpo_fast.token_loss(
            x, batch.tokens, batch.mask, config, temperature=taus, softcap=4.0, **batch.given()
        ).loss

    assert torch.autograd.gradcheck(loss, batch.logits.requires_grad_(), eps=1e-6, atol=1e-7)
    assert torch.autograd.gradcheck(
        lambda x: mdpgrpo_fast.token_logprobs(x, batch.tokens, temperature=taus)[0], batch.logits, eps=1e-6, atol=1e-7
    )


# ---- token objective: temperature and importance weight -------------------------------------------------------------


def test_rescale_takes_the_temperature_out_of_the_gradient() -> None:
    """per_row: a row's policy gradient carries 1/τ; rescaled, τ = 0.1 weighs no more than τ = 1. KL stays as it is."""
    taus = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    batch = make_inputs(10)
    del batch.kwargs["ref_logprobs"]
    plain = run(batch, config_for(temperature_objective="per_row"), temperature=taus)[1]
    rescaled = run(batch, config_for(temperature_objective="per_row", rescale_per_row=True), temperature=taus)[1]
    torch.testing.assert_close(rescaled, plain * taus[:, None, None], rtol=1e-12, atol=0)
    no_policy = make_inputs(10)
    no_policy.advantage.zero_()
    a, b = (
        run(no_policy, config_for(temperature_objective="per_row", rescale_per_row=r), temperature=taus)[1]
        for r in (False, True)
    )
    assert torch.equal(a, b) and a.abs().sum() > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weight_multiplies_the_policy_term_only(level: Any) -> None:
    """Liger#1082: loss and gradient are w * policy + KL, for a constant w; and the weight is detached."""
    batch, config = make_inputs(11), config_for(importance_level=level)
    policy = LossInputs(*batch, kwargs={"old_logprobs": batch.kwargs["old_logprobs"]})
    kl = LossInputs(*batch, kwargs=batch.kwargs)
    kl.advantage = torch.zeros_like(batch.advantage)
    w = torch.full_like(batch.kwargs["old_logprobs"], 1.7).requires_grad_()
    both, policy_only, kl_only = run(batch, config, importance_weight=w), run(policy, config), run(kl, config)
    torch.testing.assert_close(both[0].loss, 1.7 * policy_only[0].loss + kl_only[0].loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(both[1], 1.7 * policy_only[1] + kl_only[1], rtol=1e-11, atol=1e-14)
    assert kl_only[1].abs().sum() > 0
    assert not mdpgrpo_fast.token_loss(
        *list(batch)[:3], config, importance_weight=w, **batch.given()
    ).loss.requires_grad


def test_a_number_a_scalar_tensor_and_a_row_tensor_of_one_temperature_agree() -> None:
    batch = make_inputs(12)
    for rescale in (False, True):
        config = config_for(temperature_objective="per_row", rescale_per_row=rescale)
        results = [run(batch, config, temperature=t) for t in (0.7, torch.tensor(0.7), torch.full((4,), 0.7))]
        for out, grad in results[1:]:
            torch.testing.assert_close(out.loss, results[0][0].loss, rtol=1e-6, atol=0)
            torch.testing.assert_close(grad, results[0][1], rtol=1e-5, atol=1e-7)
    a, b = (mdpgrpo_fast.token_logprobs(batch.logits, batch.tokens, temperature=t)[0] for t in (0.5, torch.tensor(0.5)))
    assert torch.equal(a, b)


# ---- token objective: clipping --------------------------------------------------------------------------------------


def one_token(gap: float, advantage: float) -> LossInputs:
    """One completion of one token whose ratio is exp(gap)."""
    logits = torch.tensor([[[0.5, -1.0, 2.0]]], dtype=torch.float64)
    logp = logits.log_softmax(-1)[0, 0, 2].item()
    return LossInputs(
        logits,
        torch.tensor([[2]]),
        torch.tensor([[True]]),
        torch.tensor([advantage], dtype=torch.float64),
        torch.tensor([0.0], dtype=torch.float64),
        {"old_logprobs": torch.tensor([[logp - gap]], dtype=torch.float64)},
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.3, 1, False), (1.3, -1, True), (0.7, 1, True), (0.7, -1, False), (1.1, 1, True), (1.3, 0, False)],
)
def test_clip_stops_the_gradient_where_the_step_was_taken(ratio: float, advantage: float, moves: bool) -> None:
    out, grad = run(one_token(math.log(ratio), advantage), config_for())
    assert bool(grad.abs().sum() > 0) == moves
    assert bool(out.clipped_high) == (ratio > 1.2 and advantage > 0)
    assert bool(out.clipped_low) == (ratio < 0.8 and advantage < 0)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.25, 1.0), (0.75, -1.0)])
def test_ties_at_the_clip_boundary_take_the_unclipped_branch(ratio: float, advantage: float) -> None:
    """ρ exactly at the bound: both branches are equal and the gradient still flows."""
    r = torch.tensor([[ratio]], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([[advantage]], dtype=torch.float64)
    objective, low, high = reference.clipped_objective(r, a, 0.25, 0.25, None)
    assert torch.autograd.grad(objective.sum(), r)[0].item() == advantage
    assert not low.any() and not high.any()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_ratio_above_delta_has_zero_gradient(advantage: float) -> None:
    config = config_for(delta=1.5)
    out, grad = run(one_token(math.log(1.6), advantage), config)
    assert (grad == 0).all()
    assert out.loss.item() == pytest.approx(-1.2 if advantage > 0 else 1.5)
    _, below = run(one_token(math.log(1.4), -1.0), config)
    assert below.abs().sum() > 0
    r = torch.tensor([[1.5]], dtype=torch.float64, requires_grad=True)  # at delta itself: unclipped
    objective, *_ = reference.clipped_objective(r, torch.tensor([[-1.0]], dtype=torch.float64), 0.2, 0.2, 1.5)
    assert torch.autograd.grad(objective.sum(), r)[0].item() == -1


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("advantage", "delta"), [(1.0, None), (1.0, 4.0), (-1.0, 4.0)])
def test_a_ratio_beyond_float_range_is_clipped_not_nan(level: Any, advantage: float, delta: float | None) -> None:
    """exp(ℓ - ℓ_old) = inf has zero gradient where it is clipped; 0 * inf must not be formed on the way."""
    for gap in (100.0, 1000.0, math.inf):
        batch = one_token(gap, advantage)
        for dtype in (torch.float32, torch.float64):
            batch.logits = batch.logits.to(dtype)
            out, grad = run(batch, config_for(importance_level=level, delta=delta))
            assert out.loss.item() == pytest.approx(-1.2 if advantage > 0 else 4.0)
            assert (grad == 0).all()


# ---- token objective: KL --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_overflow_is_clamped_and_counted(dtype: torch.dtype) -> None:
    """ℓ_ref - ℓ = 100 overflows float32 as exp; clamped, it neither explodes nor pushes the token further away."""
    logits = torch.zeros(1, 3, 4, dtype=dtype)
    logits[0, :2, 0] = -100
    args = (torch.zeros(1, 3, dtype=torch.long), torch.tensor([[True, False, True]]), torch.zeros(1), torch.ones(1))
    batch = LossInputs(logits, *args, kwargs={"ref_logprobs": torch.full((1, 3), -1.0, dtype=dtype)})
    out, grad = run(batch, config_for())
    assert out.total("kl_clamped").item() == 1, "the masked token is not counted"
    assert out.kl[0, 0].item() == pytest.approx(math.exp(reference.KL_EXPONENT_MAX) - reference.KL_EXPONENT_MAX - 1)
    assert (grad[0, 0] == 0).all() and grad[0, 2, 0] != 0
    assert out.loss.isfinite() and grad.isfinite().all()
    for estimator in ("k1", "k2"):
        assert run(batch, config_for(kl_estimator=estimator))[0].total("kl_clamped") == 0


def test_kl_is_zero_at_the_reference_and_k3_is_never_negative() -> None:
    batch = make_inputs(13)
    at, _ = mdpgrpo_fast.token_logprobs(batch.logits, batch.tokens)
    for estimator in ("k1", "k2", "k3"):
        assert reference.kl_penalty(at, at, estimator)[0].abs().max() == 0
    assert reference.kl_penalty(at, batch.kwargs["ref_logprobs"], "k3")[0].min() >= 0


def test_kl_coefficient_is_per_completion() -> None:
    batch = make_inputs(14)
    batch.advantage.zero_()
    only = batch.rows(slice(None))
    only.kl_beta = torch.tensor([0.0, 0.3, 0.0, 0.0], dtype=torch.float64)
    _, grad = run(only, config_for())
    assert grad[1].abs().sum() > 0 and grad[[0, 2, 3]].abs().sum() == 0


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_positions_may_hold_anything(aggregation: Any, level: Any) -> None:
    """NeMo-RL#4120: inf * 0 in the backward. Masked log-probs, weights and logits are out before any arithmetic."""
    batch = make_inputs(15)
    batch.kwargs["importance_weight"] = torch.ones_like(batch.kwargs["old_logprobs"])
    config = config_for(aggregation=aggregation, importance_level=level)
    out, grad = run(batch, config)
    drop = ~batch.mask
    for junk in (math.nan, math.inf, -math.inf):
        dirty = batch.rows(slice(None))
        dirty.logits = batch.logits.masked_fill(drop[..., None], junk)
        dirty.tokens = batch.tokens.masked_fill(drop, 10)
        dirty.kwargs = {k: v.masked_fill(drop, junk) for k, v in batch.kwargs.items()}
        got, got_grad = run(dirty, config)
        assert torch.equal(got.loss, out.loss) and torch.equal(got_grad, grad)
        for name in ("logprobs", "entropy", "kl"):
            assert (getattr(got, name)[drop] == 0).all(), name


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("b", "width"), [(2, 3), (2, 0), (0, 3)])
def test_a_batch_without_tokens_has_loss_and_gradient_zero(level: Any, b: int, width: int) -> None:
    junk = torch.full((b, width), math.nan)
    batch = LossInputs(
        torch.full((b, width, 4), -math.inf),
        torch.zeros(b, width, dtype=torch.long),
        torch.zeros(b, width),
        torch.ones(b),
        torch.ones(b),
        {"old_logprobs": junk, "ref_logprobs": junk},
    )
    for aggregation in AGGREGATIONS:
        out, grad = run(batch, config_for(aggregation=aggregation, importance_level=level))
        assert out.loss.item() == 0 and (grad == 0).all() and grad.shape == (b, width, 4)


def test_minus_infinite_logits_of_real_tokens() -> None:
    """A banned token has probability 0: no NaN in the log-probs, the entropy or the gradient of the others."""
    batch = make_inputs(16)
    banned = (batch.tokens + 1) % 11
    batch.logits.scatter_(2, banned[..., None], -math.inf)
    logp, entropy = mdpgrpo_fast.token_logprobs(batch.logits, batch.tokens)
    kept = batch.logits.log_softmax(-1)
    expected = -(kept.exp() * kept.masked_fill(kept == -math.inf, 0)).sum(-1)
    torch.testing.assert_close(entropy, expected)
    out, grad = run(batch, config_for())
    assert logp.isfinite().all() and out.loss.isfinite() and grad.isfinite().all()
    assert (grad.gather(2, banned[..., None]) == 0).all()


def test_any_non_zero_mask_counts_once() -> None:
    batch, config = make_inputs(17), config_for(aggregation="dapo")
    out, grad = run(batch, config)
    for mask in (batch.mask.long(), batch.mask * 3.0, batch.mask * -1, batch.mask.bfloat16() * 0.5):
        other = LossInputs(batch.logits, batch.tokens, mask, batch.advantage, batch.kl_beta, batch.kwargs)
        got, got_grad = run(other, config)
        assert torch.equal(got.loss, out.loss) and torch.equal(got_grad, grad)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_completion_without_tokens_is_out_of_the_normaliser(aggregation: Any) -> None:
    """trl#6439: a truncated completion that is masked out leaves the loss as if it had not been drawn."""
    batch = make_inputs(18)
    batch.mask[2] = False
    rest = torch.tensor([0, 1, 3])
    out, grad = run(batch, config_for(aggregation=aggregation))
    got, got_grad = run(batch.rows(rest), config_for(aggregation=aggregation))
    torch.testing.assert_close(out.loss, got.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(grad[rest], got_grad, rtol=1e-13, atol=0)
    assert (grad[2] == 0).all()
    assert out.completion_kl[2] == 0 and (out.completion_kl[rest] != 0).all()


# ---- invariances ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_with_the_global_denominator_sum_to_the_batch(aggregation: Any) -> None:
    """trl#2647: the mean of micro-batch means is another loss; sums over the global count are the same."""
    batch, config = make_inputs(19, lengths=(5, 3, 1, 4, 0, 2)), config_for(aggregation=aggregation)
    batch.kwargs["temperature"] = torch.tensor([0.5, 0.8, 1.0] * 2, dtype=torch.float64)
    whole, grad = run(batch, config)
    denominator = reference.default_denominator(batch.mask.sum(1), aggregation, MAX_LENGTH)
    expected = {"grpo": 5, "dapo": 15, "dr_grpo": 5 * MAX_LENGTH}[aggregation]
    assert denominator.item() == expected
    cuts = [slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 6)]
    pieces = [run(batch.rows(cut), config, denominator=denominator) for cut in cuts]
    torch.testing.assert_close(sum(p[0].loss for p in pieces), whole.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat([p[1] for p in pieces]), grad, rtol=1e-12, atol=0)
    local = sum(run(batch.rows(slice(i, i + 3)), config)[0].loss for i in (0, 3)) / 2
    assert abs(local - whole.loss) > 1e-4, "the local means are a different number"


def test_row_order_does_not_matter_and_rows_do_not_see_each_other() -> None:
    """verl#6280: a log-prob is the same whatever else is in the batch, to the bit."""
    batch, config = make_inputs(20, dtype="float32", vocab=1001), config_for()
    order = torch.tensor([2, 0, 3, 1])
    out, grad = run(batch, config)
    moved, moved_grad = run(batch.rows(order), config)
    torch.testing.assert_close(moved.loss, out.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moved_grad, grad[order], rtol=1e-6, atol=1e-9)
    for i in range(4):
        alone, entropy = mdpgrpo_fast.token_logprobs(batch.logits[i : i + 1, :3], batch.tokens[i : i + 1, :3])
        together, entropies = mdpgrpo_fast.token_logprobs(batch.logits, batch.tokens)
        assert torch.equal(alone[0], together[i, :3]) and torch.equal(entropy[0], entropies[i, :3])


@pytest.mark.parametrize("shift", [100.0, -1000.0])
def test_shift_of_the_logits_does_not_matter(shift: float) -> None:
    batch = make_inputs(21)
    out, grad = run(batch, config_for(), temperature=0.7)
    batch.logits = batch.logits + shift
    moved, moved_grad = run(batch, config_for(), temperature=0.7)
    torch.testing.assert_close(moved.loss, out.loss, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(moved_grad, grad, rtol=1e-8, atol=1e-11)
    assert moved_grad.sum(-1).abs().max() < 1e-12, "a gradient row sums to zero"


def test_strided_logits() -> None:
    """Slices like logits[:, :-1] and views of a padded vocabulary are not contiguous."""
    batch, config = make_inputs(22), config_for()
    out, grad = run(batch, config)
    b, width, v = batch.logits.shape
    wide = torch.full((b, width + 1, v + 5), math.nan, dtype=torch.float64)
    wide[:, :-1, :v] = batch.logits
    wide.requires_grad_()
    view = wide[:, :-1, :v]
    assert not view.is_contiguous()
    got = mdpgrpo_fast.token_loss(
        view, batch.tokens, batch.mask, config, max_completion_length=MAX_LENGTH, **batch.given()
    )
    got.loss.backward()
    assert torch.equal(got.loss, out.loss) and torch.equal(wide.grad[:, :-1, :v], grad)
    assert (wide.grad[:, -1] == 0).all() and (wide.grad[..., v:] == 0).all()


def test_loss_scale_reaches_the_gradient() -> None:
    """An accumulation factor or an AMP scaler scales the gradient, and the same logits serve a second consumer."""
    batch = make_inputs(23)
    logits = batch.logits.clone().requires_grad_()
    loss = mdpgrpo_fast.token_loss(logits, batch.tokens, batch.mask, config_for(), **batch.given()).loss
    (one,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (half,) = torch.autograd.grad(loss, logits, grad_outputs=torch.tensor(0.5, dtype=torch.float64), retain_graph=True)
    (many,) = torch.autograd.grad(loss * 65536.0 + logits.sum() * 0, logits)
    assert torch.equal(half, one * 0.5) and torch.equal(many, one * 65536.0)


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_logits_are_computed_in_float32(dtype: str) -> None:
    """trl#4303: a log-prob rounded in bfloat16 at |logit| ≈ 25 is off by up to 0.06."""
    batch = make_inputs(24, dtype=dtype, scale=8.0, vocab=257)
    out, grad = run(batch, config_for())
    exact = batch.rows(slice(None))
    exact.logits = batch.logits.float()
    same, same_grad = run(exact, config_for())
    assert torch.equal(out.loss, same.loss) and torch.equal(out.logprobs, same.logprobs)
    assert out.loss.dtype == out.logprobs.dtype == out.entropy.dtype == torch.float32
    assert grad.dtype == batch.logits.dtype and torch.equal(grad, same_grad.to(grad.dtype))
    rounded = batch.logits.log_softmax(-1).float().gather(-1, batch.tokens[..., None]).squeeze(-1)
    truth = batch.logits.double().log_softmax(-1).gather(-1, batch.tokens[..., None]).squeeze(-1)
    ours = (out.logprobs - truth)[batch.mask].abs().max()
    assert ours < 1e-5 < (rounded - truth)[batch.mask].abs().max()


def test_float32_is_as_exact_as_torch_itself() -> None:
    """Error against float64 ≤ that of torch's own log_softmax in float32, plus a constant; V is odd and large."""
    batch = make_inputs(25, dtype="float32", vocab=32003, scale=6.0)
    truth = batch.logits.double().log_softmax(-1).gather(-1, batch.tokens[..., None]).squeeze(-1)
    torchs = batch.logits.log_softmax(-1).gather(-1, batch.tokens[..., None]).squeeze(-1)
    ours, _ = mdpgrpo_fast.token_logprobs(batch.logits, batch.tokens)
    assert (ours - truth).abs().max() <= (torchs - truth).abs().max() + 5e-6
    double = LossInputs(*(x.double() if x.is_floating_point() else x for x in batch), kwargs=batch.kwargs)
    out, grad = run(batch, config_for())
    exact, exact_grad = run(double, config_for())
    assert (out.loss - exact.loss).abs() < 1e-5
    assert (grad - exact_grad).abs().max() < 1e-5 * exact_grad.abs().max()


def test_logprobs_keep_the_dtype_of_the_logits_whatever_the_temperature_has() -> None:
    logits, tokens = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    got = reference.token_logprobs(logits, tokens, torch.full((2, 3), 0.7, dtype=torch.float64))
    assert {x.dtype for x in got} == {torch.float32}
    expected = reference.token_logprobs(logits.double(), tokens, 0.7)
    torch.testing.assert_close([x.double() for x in got], list(expected), rtol=1e-5, atol=1e-6)


def test_entropy_of_known_distributions() -> None:
    uniform, certain = torch.zeros(1, 1, 8, dtype=torch.float64), torch.zeros(1, 1, 8, dtype=torch.float64)
    certain[..., 3] = 1e4
    token = torch.full((1, 1), 3)
    assert mdpgrpo_fast.token_logprobs(uniform, token)[1].item() == pytest.approx(math.log(8))
    logp, entropy = mdpgrpo_fast.token_logprobs(certain.requires_grad_(), token)
    assert logp.item() == 0 and entropy.item() == 0 and not entropy.requires_grad


def test_compiles_without_graph_breaks() -> None:
    """Liger#1366: the torch path holds nothing that Dynamo cannot trace."""
    batch, config = make_inputs(26), config_for()
    rest, kwargs = (batch.tokens, batch.mask), batch.given()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return reference.token_loss(x, *rest, config, max_completion_length=MAX_LENGTH, **kwargs).loss

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    x, y = batch.logits.clone().requires_grad_(), batch.logits.clone().requires_grad_()
    (a,), (b,) = torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(y), y)
    torch.testing.assert_close(a, b)
