"""Device functions of the method: advantages of a group; ratio, clip, KL, objective and share of a row.

Each carries the name of its equation in `reference`. Mirrored by csrc/method.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import NEG_INF, _knob

# reference.KL_EXPONENT_MAX and RATIO_EXPONENT_MAX; a test keeps them equal.
KL_EXPONENT_MAX = tl.constexpr(20.0)
RATIO_EXPONENT_MAX = tl.constexpr(80.0)
# Choices of schemas.Settings as constexpr; a test keeps them equal.
K1, K2, K3 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
HALF, MAX_HALF_MEAN, MEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MEAN_OF_MEANS = tl.constexpr(0)


# ---- advantages -----------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x >= 0, t, -t)


@triton.jit
def _prospect_shape(v, settings):
    return tl.where(v >= 0, settings.prospect_gain, settings.prospect_loss) * _tanh(settings.prospect_beta * v)


@triton.jit
def _group_advantages(groups, settings, prompt, G, BLOCK_G: tl.constexpr):
    """Statistics, anchors, A and KL coefficient of one prompt's G completions: μ, σ scalars, the others (BLOCK_G,)."""
    slots = tl.arange(0, BLOCK_G)
    inside = slots < G
    r = tl.load(groups.rewards + prompt * G + slots, mask=inside, other=0.0).to(tl.float32)
    valid = inside
    if groups.valid is not None:
        valid = inside & (tl.load(groups.valid + prompt * G + slots, mask=inside, other=0) != 0)
    k = tl.load(groups.num_constraints + prompt).to(tl.float32)
    k = tl.where(k >= 1, k, float("nan"))
    n = tl.sum(valid.to(tl.float32), axis=0)
    kept = tl.where(valid, r, 0.0)
    top = tl.max(tl.where(valid, r, NEG_INF), axis=0)
    bottom = tl.min(tl.where(valid, r, -NEG_INF), axis=0)
    # Four units in the last place of float32: equal rewards, summed in another order.
    constant = (top - bottom <= 4.76837158203125e-07 * tl.maximum(tl.abs(top), tl.abs(bottom))) | (n == 0)
    # Division rounds to nearest, as elsewhere: the mean of 0, 0.5, 0.5, 1 is 0.5 and not almost.
    total = tl.sum(kept, axis=0)
    mean = tl.where(constant & (n > 0), top, tl.div_rn(total, tl.maximum(n, 1.0)))
    # 0, or NaN where a reward is not finite: never a plausible number from an implausible one.
    mean += total - total
    square = tl.sum(tl.where(valid, (kept - mean) * (kept - mean), 0.0), axis=0)
    divisor = tl.maximum(n - 1.0, 1.0) if settings.sample_std else tl.maximum(n, 1.0)
    std = tl.where(constant, 0.0, tl.sqrt_rn(tl.div_rn(square, divisor)))
    scale = std + 1e-4 if settings.sample_std else tl.maximum(std, 1e-8)
    # Equal rewards become the mean, so that rounding does not decide a sign.
    r = tl.where(constant, mean, kept)
    z = tl.where(valid, tl.where(constant, 0.0, (r - mean) / scale), 0.0)
    goal = 0.5
    if settings.goal_mean == MAX_HALF_MEAN:
        goal = tl.maximum(mean, 0.5)
    elif settings.goal_mean == MEAN:
        goal = mean
    factor = 1.0 if settings.binomial else G.to(tl.float32)
    delta = tl.where(valid, (r - goal) / tl.sqrt_rn(tl.div_rn(factor, 4.0 * k)), 0.0)
    relative, absolute = z, delta
    if settings.prospect:
        relative = _prospect_shape(z, settings)
        if settings.prospect_on_goal:
            absolute = _prospect_shape(delta, settings)
    advantage = (1.0 - settings.alpha) * relative + settings.alpha * absolute
    beta = tl.where(advantage < 0, settings.kl_beta_neg, settings.kl_beta_pos)
    return mean, std, z, delta, advantage, beta


@triton.jit
def _pick(x, slot, BLOCK_G: tl.constexpr):
    """One element of a (BLOCK_G,) vector as a scalar."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_G) == slot, x, 0.0), axis=0)


@triton.jit
def _advantage_of(rows, is_per_row, groups, settings, G, completion, row, mask, BLOCK_G: tl.constexpr):
    """A and KL coefficient of rows of one completion: given, or from its group's rewards."""
    if groups.rewards is not None:
        place = completion
        if groups.slots is not None:
            place = tl.load(groups.slots + completion).to(tl.int64)
        _, _, _, _, advantages, betas = _group_advantages(groups, settings, place // G, G, BLOCK_G)
        return _pick(advantages, place % G, BLOCK_G), _pick(betas, place % G, BLOCK_G)
    else:
        return (
            _knob(rows.advantage, is_per_row.advantage, 0.0, completion, row, mask),
            _knob(rows.kl_beta, is_per_row.kl_beta, 0.0, completion, row, mask),
        )


# ---- objective ------------------------------------------------------------------------------------------------------


@triton.jit
def _importance_ratio(log_ratio):
    """ρ = exp(log ρ), and dρ/dlog ρ, which is 0 where the exponent was clamped."""
    # Not a minimum, which would make a NaN the bound.
    over = log_ratio > RATIO_EXPONENT_MAX
    ratio = tl.exp(tl.where(over, RATIO_EXPONENT_MAX, log_ratio))
    return ratio, tl.where(over, 0.0, ratio)


@triton.jit
def _clipped_objective(ratio, advantage, rows, is_per_row, settings, completion, row, mask):
    """J = min(ρA, clip(ρ)A), ρ capped at delta first; dJ/dρ; whether the lower or the upper clip holds.

    The unclipped branch is taken where both are equal.
    """
    low = 1.0 - _knob(rows.epsilon_low, is_per_row.epsilon_low, settings.epsilon_low, completion, row, mask)
    high = 1.0 + _knob(rows.epsilon_high, is_per_row.epsilon_high, settings.epsilon_high, completion, row, mask)
    inside = tl.minimum(tl.maximum(ratio, low), high)
    clipped = inside * advantage
    free = ratio * advantage
    free_slope = advantage
    if rows.delta is not None or settings.delta is not None:
        delta = _knob(rows.delta, is_per_row.delta, settings.delta, completion, row, mask)
        cap = tl.where(delta <= 0.0, float("inf"), delta)
        free = tl.minimum(ratio, cap, propagate_nan=tl.PropagateNan.ALL) * advantage
        free_slope = tl.where(ratio > cap, 0.0, advantage)
    value = tl.where(clipped < free, clipped, free)
    # A bound that is NaN makes the value NaN; minimum and maximum would ignore it.
    value = tl.where(low == low, tl.where(high == high, value, high), low)
    slope = tl.where(clipped < free, tl.where(inside == ratio, advantage, 0.0), free_slope)
    # One comparison each, as some of these are scalars and some vectors.
    clipped_low = tl.where(advantage < 0, ratio, low) < low
    clipped_high = tl.where(advantage > 0, ratio, high) > high
    return value, slope, clipped_low, clipped_high


@triton.jit
def _kl_penalty(logprob, ref_logprob, ESTIMATOR: tl.constexpr):
    """The KL estimate, its derivative with respect to logprob, and whether k3's exponent was clamped (derivative 0)."""
    d = ref_logprob - logprob
    over = d > KL_EXPONENT_MAX
    if ESTIMATOR == K1:
        return -d, d * 0.0 + 1.0, d != d
    elif ESTIMATOR == K2:
        return 0.5 * d * d, -d, d != d
    else:
        capped = tl.where(over, KL_EXPONENT_MAX, d)
        e = tl.exp(capped)
        return e - capped - 1.0, tl.where(over, 0.0, 1.0 - e), over


@triton.jit
def _token_objective(
    logprob, kl_logprob, tau, advantage, beta, coupled_ratio, coupled_slope, rows, is_per_row, settings, completion,
    row, mask,
):  # fmt: skip
    """-wJ + β KL of rows (one, or a vector of them) and its derivatives: c for ℓ, c_kl for ℓ at the KL's temperature.

    At sequence level ρ and -c are the completion's, given. No share of an aggregation in it yet.
    """
    weight = 1.0
    if rows.importance_weight is not None:
        weight = tl.load(rows.importance_weight + row, mask=mask, other=0.0).to(tl.float32)
    if settings.rescale:
        weight *= tau
    ratio, ratio_slope = 1.0, 1.0
    if settings.sequence:
        ratio = coupled_ratio
    elif rows.old_logprobs is not None:
        old = tl.load(rows.old_logprobs + row, mask=mask, other=0.0).to(tl.float32)
        ratio, ratio_slope = _importance_ratio(logprob - old)
    value, slope, clipped_low, clipped_high = _clipped_objective(
        ratio, advantage, rows, is_per_row, settings, completion, row, mask
    )
    # On-policy the ratio is 1 whatever ℓ is: a NaN must not get lost on the way.
    loss = tl.where(logprob == logprob, -weight * value, logprob)
    c = -coupled_slope if settings.sequence else -weight * slope * ratio_slope
    c = tl.where(logprob == logprob, c, logprob)
    kl, c_kl, clamped = 0.0, 0.0, False
    if rows.ref_logprobs is not None:
        ref = tl.load(rows.ref_logprobs + row, mask=mask, other=0.0).to(tl.float32)
        kl, kl_slope, clamped = _kl_penalty(kl_logprob, ref, settings.estimator)
        loss += beta * kl
        c_kl = beta * kl_slope
    return loss, c, kl, c_kl, ratio, clipped_low, clipped_high, clamped


@triton.jit
def _token_share(denominator_ptr, lengths_ptr, settings, completion, mask):
    """What the aggregation multiplies a row's loss by."""
    denominator = tl.load(denominator_ptr)
    share = tl.where(denominator == denominator, 1.0 / tl.maximum(denominator, 1.0), denominator)
    if settings.aggregation == MEAN_OF_MEANS:
        share /= tl.load(lengths_ptr + completion, mask=mask, other=1.0)
    return share
