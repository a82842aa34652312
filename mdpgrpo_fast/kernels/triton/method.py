"""Device functions of the method: ratio, clip, KL, objective and share of a row; advantages of a group."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import NEG_INF, _tanh

# reference.KL_EXPONENT_MAX and RATIO_EXPONENT_MAX; a test keeps them equal.
KL_EXPONENT_MAX = tl.constexpr(20.0)


RATIO_EXPONENT_MAX = tl.constexpr(80.0)


# Values of the enumerations that come in as constexpr integers.
K1, K2, K3 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


HALF, MAX_HALF_MEAN, MEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _ratio(log_ratio):
    """ρ = exp(log ρ), and dρ/dlog ρ, which is 0 where the exponent was clamped."""
    # Not a minimum, which would make a NaN the bound.
    over = log_ratio > RATIO_EXPONENT_MAX
    ratio = tl.exp(tl.where(over, RATIO_EXPONENT_MAX, log_ratio))
    return ratio, tl.where(over, 0.0, ratio)


@triton.jit
def _policy(ratio, advantage, epsilon_low, epsilon_high, delta, HAS_DELTA: tl.constexpr):
    """J = min(ρA, clip(ρ)A), ρ capped at delta first; dJ/dρ; whether the lower or the upper clip holds.

    The unclipped branch is taken where both are equal.
    """
    low, high = 1.0 - epsilon_low, 1.0 + epsilon_high
    inside = tl.minimum(tl.maximum(ratio, low), high)
    clipped = inside * advantage
    free = ratio * advantage
    free_slope = advantage
    if HAS_DELTA:
        free = tl.where(ratio > delta, delta, ratio) * advantage
        free_slope = tl.where(ratio > delta, 0.0, advantage)
    value = tl.where(clipped < free, clipped, free)
    # A bound that is NaN makes the value NaN; minimum and maximum would ignore it.
    value = tl.where(low == low, tl.where(high == high, value, high), low)
    slope = tl.where(clipped < free, tl.where(inside == ratio, advantage, 0.0), free_slope)
    # One comparison each, as some of these are scalars and some vectors.
    clipped_low = tl.where(advantage < 0, ratio, low) < low
    clipped_high = tl.where(advantage > 0, ratio, high) > high
    return value, slope, clipped_low, clipped_high


@triton.jit
def _kl(logprob, ref_logprob, ESTIMATOR: tl.constexpr):
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
def _objective(
    logprob, kl_logprob, old_ptr, ref_ptr, weight_ptr, rows, mask, tau, advantage, beta, low, high, delta,
    sequence_ratio, sequence_slope, SEQUENCE: tl.constexpr, ESTIMATOR: tl.constexpr, RESCALE: tl.constexpr,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DELTA: tl.constexpr,
):  # fmt: skip
    """-wJ + β KL of rows (one, or a vector of them) and its derivatives: c for ℓ, c_kl for ℓ at the KL's temperature.

    At sequence level ρ and -c are the completion's, given. No share of an aggregation in it yet.
    """
    factor = 1.0
    if HAS_WEIGHT:
        factor = tl.load(weight_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    if RESCALE:
        factor *= tau
    ratio, ratio_slope = 1.0, 1.0
    if SEQUENCE:
        ratio = sequence_ratio
    elif HAS_OLD:
        ratio, ratio_slope = _ratio(logprob - tl.load(old_ptr + rows, mask=mask, other=0.0).to(tl.float32))
    value, slope, clipped_low, clipped_high = _policy(ratio, advantage, low, high, delta, HAS_DELTA)
    # On-policy the ratio is 1 whatever ℓ is: a NaN must not get lost on the way.
    loss = tl.where(logprob == logprob, -factor * value, logprob)
    c = -sequence_slope if SEQUENCE else -factor * slope * ratio_slope
    c = tl.where(logprob == logprob, c, logprob)
    kl, c_kl, clamped = 0.0, 0.0, False
    if HAS_REF:
        ref = tl.load(ref_ptr + rows, mask=mask, other=0.0).to(tl.float32)
        kl, kl_slope, clamped = _kl(kl_logprob, ref, ESTIMATOR)
        loss += beta * kl
        c_kl = beta * kl_slope
    return loss, c, kl, c_kl, ratio, clipped_low, clipped_high, clamped


@triton.jit
def _share(denominator_ptr, length, MEAN_OF_MEANS: tl.constexpr):
    """What the aggregation multiplies a row's loss by; length: the tokens of its completion."""
    denominator = tl.load(denominator_ptr)
    share = tl.where(denominator == denominator, 1.0 / tl.maximum(denominator, 1.0), denominator)
    if MEAN_OF_MEANS:
        share /= length
    return share


@triton.jit
def _shape(v, beta, gain, loss):
    return tl.where(v >= 0, gain, loss) * _tanh(beta * v)


@triton.jit
def _group(
    rewards_ptr, constraints_ptr, valid_ptr, prompt, G, alpha, prospect_beta, prospect_gain, prospect_loss, beta_pos,
    beta_neg, HAS_VALID: tl.constexpr, SAMPLE_STD: tl.constexpr, GOAL_MEAN: tl.constexpr, BINOMIAL: tl.constexpr,
    PROSPECT: tl.constexpr, PROSPECT_ON_GOAL: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Statistics, anchors, A and KL coefficient of one prompt's G completions: μ, σ scalars, the others (BLOCK_G,)."""
    slots = tl.arange(0, BLOCK_G)
    inside = slots < G
    r = tl.load(rewards_ptr + prompt * G + slots, mask=inside, other=0.0).to(tl.float32)
    valid = inside
    if HAS_VALID:
        valid = inside & (tl.load(valid_ptr + prompt * G + slots, mask=inside, other=0) != 0)
    k = tl.load(constraints_ptr + prompt).to(tl.float32)
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
    divisor = tl.maximum(n - 1.0, 1.0) if SAMPLE_STD else tl.maximum(n, 1.0)
    std = tl.where(constant, 0.0, tl.sqrt_rn(tl.div_rn(square, divisor)))
    scale = std + 1e-4 if SAMPLE_STD else tl.maximum(std, 1e-8)
    # Equal rewards become the mean, so that rounding does not decide a sign.
    r = tl.where(constant, mean, kept)
    z = tl.where(valid, tl.where(constant, 0.0, (r - mean) / scale), 0.0)
    goal = 0.5
    if GOAL_MEAN == MAX_HALF_MEAN:
        goal = tl.maximum(mean, 0.5)
    elif GOAL_MEAN == MEAN:
        goal = mean
    factor = 1.0 if BINOMIAL else G.to(tl.float32)
    delta = tl.where(valid, (r - goal) / tl.sqrt_rn(tl.div_rn(factor, 4.0 * k)), 0.0)
    relative, absolute = z, delta
    if PROSPECT:
        relative = _shape(z, prospect_beta, prospect_gain, prospect_loss)
        if PROSPECT_ON_GOAL:
            absolute = _shape(delta, prospect_beta, prospect_gain, prospect_loss)
    advantage = (1.0 - alpha) * relative + alpha * absolute
    beta = tl.where(advantage < 0, beta_neg, beta_pos)
    return mean, std, z, delta, advantage, beta


@triton.jit
def _pick(x, slot, BLOCK_G: tl.constexpr):
    """One element of a (BLOCK_G,) vector as a scalar."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_G) == slot, x, 0.0), axis=0)
