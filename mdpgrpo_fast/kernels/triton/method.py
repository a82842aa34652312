"""Device functions of the method: advantages of a group; ratio, clip, KL, objective and share of a row.

Each carries the name of its equation in `reference`. Mirrored by csrc/method.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import NEG_INF, _knob

# Of `reference`; a test keeps them equal.
KL_EXPONENT_MAX = tl.constexpr(20.0)
RATIO_EXPONENT_MAX = tl.constexpr(80.0)
VESPO_LOG_MIN, VESPO_LOG_MAX = tl.constexpr(-18.420680743952367), tl.constexpr(20.0)
# Choices of schemas.Settings as constexpr; a test keeps them equal.
CISPO, SAPO, GMPO, VESPO = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
K1, K2, K3, ABS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
SCALE_BATCH, SCALE_NONE = tl.constexpr(1), tl.constexpr(2)
HALF, MAX_HALF_MEAN, MEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MEAN_OF_MEANS = tl.constexpr(0)


@triton.jit
def _bounded(x, low, high):
    """x between its bounds; NaN where any of them is, which minimum and maximum would ignore."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


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
def _distance(r, centre, noise):
    """r - centre, 0 where that is no more than the noise: its sign would be that of a rounding."""
    d = r - centre
    return tl.where(tl.abs(d) <= noise, 0.0, d)


@triton.jit
def _relative_anchor(z, std, n, groups, settings):
    """z of distances from μ in a group of n that is not constant, or from the μ of the others, over the deviation of
    the group, of the batch, or none."""
    if settings.scale == SCALE_BATCH:
        std = tl.load(groups.batch_std).to(tl.float32)
    if settings.scale != SCALE_NONE:
        # A deviation of the batch may be NaN where the group's rewards are not.
        scale = std + 1e-4 if settings.sample_std else tl.maximum(std, 1e-8, propagate_nan=tl.PropagateNan.ALL)
        z = z / scale
    if settings.leave_one_out:
        z = z * tl.div_rn(n, tl.maximum(n - 1.0, 1.0))
    return z


@triton.jit
def _rewards(groups, place, inside):
    """Rewards at a place or several, and which of them count."""
    r = tl.load(groups.rewards + place, mask=inside, other=0.0).to(tl.float32)
    if groups.valid is not None:
        inside = inside & (tl.load(groups.valid + place, mask=inside, other=0) != 0)
    return r, inside


@triton.jit
def _group_statistics(groups, settings, prompt, G, BLOCK_G: tl.constexpr):
    """μ, σ and number of one prompt's rewards, whether they are equal, and what one unit in the last place is."""
    slots = tl.arange(0, BLOCK_G)
    r, valid = _rewards(groups, prompt * G + slots, slots < G)
    n = tl.sum(valid.to(tl.float32), axis=0)
    kept = tl.where(valid, r, 0.0)
    top = tl.max(tl.where(valid, r, NEG_INF), axis=0)
    bottom = tl.min(tl.where(valid, r, -NEG_INF), axis=0)
    # Four units in the last place of float32: equal rewards, summed in another order.
    unit = 1.1920928955078125e-07 * tl.maximum(tl.abs(top), tl.abs(bottom))
    constant = (top - bottom <= 4.0 * unit) | (n == 0)
    # Division rounds to nearest, as elsewhere: the mean of 0, 0.5, 0.5, 1 is 0.5 and not almost.
    total = tl.sum(kept, axis=0)
    mean = tl.where(constant & (n > 0), top, tl.div_rn(total, tl.maximum(n, 1.0)))
    # 0, or NaN where a reward is not finite: never a plausible number from an implausible one.
    mean += total - total
    square = tl.sum(tl.where(valid, (kept - mean) * (kept - mean), 0.0), axis=0)
    divisor = tl.maximum(n - 1.0, 1.0) if settings.sample_std else tl.maximum(n, 1.0)
    std = tl.where(constant, 0.0, tl.sqrt_rn(tl.div_rn(square, divisor)))
    return mean, std, n, constant, unit


@triton.jit
def _advantages(r, valid, statistics, groups, settings, prompt, G):
    """z, δ, A and KL coefficient of a reward, or several, of one prompt, by `_group_statistics`."""
    mean, std, n, constant, unit = statistics
    k = tl.load(groups.num_constraints + prompt).to(tl.float32)
    k = tl.where(k >= 1, k, float("nan"))
    # Equal rewards become the mean, so that rounding does not decide a sign.
    r = tl.where(constant, mean, tl.where(valid, r, 0.0))
    noise = tl.maximum(n, 4.0) * unit
    z = _relative_anchor(_distance(r, mean, noise), std, n, groups, settings)
    z = tl.where(valid, tl.where(constant, 0.0, z), 0.0)
    goal = 0.5
    if settings.goal_mean == MAX_HALF_MEAN:
        goal = tl.maximum(mean, 0.5)
    elif settings.goal_mean == MEAN:
        goal = mean
    factor = 1.0 if settings.binomial else G.to(tl.float32)
    delta = tl.where(valid, _distance(r, goal, noise) / tl.sqrt_rn(tl.div_rn(factor, 4.0 * k)), 0.0)
    relative, absolute = z, delta
    if settings.prospect:
        relative = _prospect_shape(z, settings)
        if settings.prospect_on_goal:
            absolute = _prospect_shape(delta, settings)
    relative *= 1.0 - settings.alpha
    absolute *= settings.alpha
    advantage = relative + absolute
    # Terms that cancel but for rounding.
    cancelled = 4.0 * 1.1920928955078125e-07 * tl.maximum(n, 4.0) * (tl.abs(relative) + tl.abs(absolute))
    advantage = tl.where(tl.abs(advantage) <= cancelled, 0.0, advantage)
    if settings.advantage_clip is not None:
        advantage = _bounded(advantage, -settings.advantage_clip, settings.advantage_clip)
    beta = tl.where(advantage < 0, settings.kl_beta_neg, settings.kl_beta_pos)
    return z, delta, advantage, beta


@triton.jit
def _advantage_of(rows, is_per_row, groups, settings, G, completion, row, mask, BLOCK_G: tl.constexpr):
    """A and KL coefficient of rows of one completion: given, or from its group's rewards."""
    if groups.rewards is not None:
        place = completion
        if groups.slots is not None:
            place = tl.load(groups.slots + completion).to(tl.int64)
        prompt = place // G
        statistics = _group_statistics(groups, settings, prompt, G, BLOCK_G)
        r, valid = _rewards(groups, place, place >= 0)
        _, _, advantage, beta = _advantages(r, valid, statistics, groups, settings, prompt, G)
        return advantage, beta
    else:
        return (
            _knob(rows.advantage, is_per_row.advantage, 0.0, completion, row, mask),
            _knob(rows.kl_beta, is_per_row.kl_beta, 0.0, completion, row, mask),
        )


# ---- policy terms ---------------------------------------------------------------------------------------------------


@triton.jit
def _importance_ratio(log_ratio):
    """ρ = exp(log ρ), and dρ/dlog ρ, which is 0 where the exponent was clamped."""
    # Not a minimum, which would make a NaN the bound.
    over = log_ratio > RATIO_EXPONENT_MAX
    ratio = tl.exp(tl.where(over, RATIO_EXPONENT_MAX, log_ratio))
    return ratio, tl.where(over, 0.0, ratio)


@triton.jit
def _epsilons(rows, is_per_row, settings, completion, row, mask):
    return (
        _knob(rows.epsilon_low, is_per_row.epsilon_low, settings.epsilon_low, completion, row, mask),
        _knob(rows.epsilon_high, is_per_row.epsilon_high, settings.epsilon_high, completion, row, mask),
    )


@triton.jit
def _clip_marks(ratio, advantage, low, high):
    """Whether the lower or the upper clip holds."""
    # One comparison each, as some of these are scalars and some vectors.
    return tl.where(advantage < 0, ratio, low) < low, tl.where(advantage > 0, ratio, high) > high


@triton.jit
def _clipped_objective(ratio, advantage, rows, is_per_row, settings, completion, row, mask):
    """J = min(ρA, clip(ρ)A), ρ capped at delta first; dJ/dρ; whether the lower or the upper clip holds.

    The unclipped branch is taken where both are equal.
    """
    low, high = _epsilons(rows, is_per_row, settings, completion, row, mask)
    low, high = 1.0 - low, 1.0 + high
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
    clipped_low, clipped_high = _clip_marks(ratio, advantage, low, high)
    return value, slope, clipped_low, clipped_high


@triton.jit
def _cispo_weight(ratio, advantage, rows, is_per_row, settings, completion, row, mask):
    """clip(ρ), and whether the lower or the upper clip holds."""
    low, high = _epsilons(rows, is_per_row, settings, completion, row, mask)
    low, high = 1.0 - low, 1.0 + high
    clipped_low, clipped_high = _clip_marks(ratio, advantage, low, high)
    return _bounded(ratio, low, high), clipped_low, clipped_high


@triton.jit
def _sapo_gate(ratio, advantage, settings):
    """(4 / τ) sigmoid(τ (ρ - 1)), and its derivative with respect to ρ; τ by the sign of A."""
    tau = tl.where(advantage > 0, settings.sapo_temperature_pos, settings.sapo_temperature_neg)
    x = tau * (ratio - 1.0)
    e = tl.exp(-tl.abs(x))
    share = 1.0 / (1.0 + e)
    return 4.0 / tau * tl.where(x < 0, e * share, share), 4.0 * e * share * share


@triton.jit
def _gmpo_log_ratios(log_ratio, advantage, rows, is_per_row, settings, completion, row, mask):
    """log ρ bounded on the side that A has, NaN where a bound is; and where its lower or its upper bound holds."""
    low, high = _epsilons(rows, is_per_row, settings, completion, row, mask)
    log_ratio = tl.where(low != low, low, tl.where(high != high, high, log_ratio))
    is_low = tl.where(advantage < 0, log_ratio, -low) < -low
    is_high = tl.where(advantage > 0, log_ratio, high) > high
    return tl.where(is_low, -low, tl.where(is_high, high, log_ratio)), is_low, is_high


@triton.jit
def _vespo_weight(log_weight, advantage, settings):
    """φ(w) = exp(λ + k log w - λ w), k and λ by the sign of A."""
    k = tl.where(advantage >= 0, settings.vespo_k_pos, settings.vespo_k_neg)
    rate = tl.where(advantage >= 0, settings.vespo_lambda_pos, settings.vespo_lambda_neg)
    return tl.exp(rate + k * log_weight - rate * tl.exp(log_weight))


@triton.jit
def _ratio_objective(ratio, advantage, rows, is_per_row, settings, completion, row, mask):
    """J of the losses that are functions of ρ, dJ/dρ, and whether the lower or the upper clip holds."""
    if settings.loss == SAPO:
        gate, slope = _sapo_gate(ratio, advantage, settings)
        return gate * advantage, slope * advantage, False, False
    else:
        return _clipped_objective(ratio, advantage, rows, is_per_row, settings, completion, row, mask)


@triton.jit
def _entropy_gate(entropy, rows, is_per_row, settings, completion, row, mask):
    """0 where the entropy is under its floor, else 1; an entropy of NaN is not."""
    gate = 1.0
    if rows.entropy_floor is not None or settings.entropy_floor is not None:
        floor = _knob(rows.entropy_floor, is_per_row.entropy_floor, settings.entropy_floor, completion, row, mask)
        gate = tl.where(entropy < floor, 0.0, 1.0)
    return gate


@triton.jit
def _weighed(x, entropy, tau, advantage, drift, rows, is_per_row, settings, completion, row, mask):
    """x times what the policy term of rows is multiplied by: their own weights, and 0 where a gate is shut."""
    if rows.importance_weight is not None and settings.loss != VESPO:
        x *= tl.load(rows.importance_weight + row, mask=mask, other=0.0).to(tl.float32)
    if settings.rescale:
        x *= tau
    if settings.masks_off_policy:
        # A drift of NaN leaves its completion in.
        threshold = settings.off_policy_threshold
        x *= tl.where(tl.where(advantage < 0, drift, threshold) > threshold, 0.0, 1.0)
    if rows.entropy_floor is not None or settings.entropy_floor is not None:
        x *= _entropy_gate(entropy, rows, is_per_row, settings, completion, row, mask)
    return x


# ---- objective ------------------------------------------------------------------------------------------------------


@triton.jit
def _kl_penalty(logprob, ref_logprob, ESTIMATOR: tl.constexpr):
    """The KL estimate, its derivative with respect to logprob, and whether k3's exponent was clamped (derivative 0)."""
    d = ref_logprob - logprob
    over = d > KL_EXPONENT_MAX
    if ESTIMATOR == K1:
        return -d, d * 0.0 + 1.0, d != d
    elif ESTIMATOR == K2:
        return 0.5 * d * d, -d, d != d
    elif ESTIMATOR == ABS:
        return tl.abs(d), tl.where(d > 0, -1.0, tl.where(d < 0, 1.0, d)), d != d
    else:
        capped = tl.where(over, KL_EXPONENT_MAX, d)
        e = tl.exp(capped)
        return e - capped - 1.0, tl.where(over, 0.0, 1.0 - e), over


@triton.jit
def _coupled(ratio_ptr, slope_ptr, drift_ptr, completion, mask):
    """What `_completions_kernel` says of a row's completion."""
    ratio, slope, drift = 1.0, 0.0, 0.0
    if ratio_ptr is not None:
        ratio = tl.load(ratio_ptr + completion, mask=mask, other=1.0)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + completion, mask=mask, other=0.0)
    if drift_ptr is not None:
        drift = tl.load(drift_ptr + completion, mask=mask, other=0.0)
    return ratio, slope, drift


@triton.jit
def _token_objective(
    logprob, kl_logprob, entropy, tau, advantage, beta, coupled, rows, is_per_row, settings, completion, row, mask
):
    """-wJ - entropy_coef H + β KL of rows (one, or a vector of them) and its derivatives: c for ℓ, c_kl for ℓ at the
    KL's temperature, and that for -H.

    coupled: of `_coupled`; at sequence level it has ρ and -c, but for what does not go through ρ. No share of an
    aggregation in it yet.
    """
    coupled_ratio, coupled_slope, drift = coupled
    weight = _weighed(1.0, entropy, tau, advantage, drift, rows, is_per_row, settings, completion, row, mask)
    log_ratio, ratio, ratio_slope = 0.0, 1.0, 1.0
    if settings.sequence:
        ratio = coupled_ratio
    elif rows.old_logprobs is not None:
        log_ratio = logprob - tl.load(rows.old_logprobs + row, mask=mask, other=0.0).to(tl.float32)
        ratio, ratio_slope = _importance_ratio(log_ratio)
    kl_ratio = ratio
    clipped_low, clipped_high = False, False
    if settings.loss == CISPO:
        direct, clipped_low, clipped_high = _cispo_weight(
            ratio, advantage, rows, is_per_row, settings, completion, row, mask
        )
        value, c = direct * advantage * logprob, -weight * direct * advantage
        if settings.sequence:
            c -= coupled_slope
    elif settings.loss == VESPO:
        direct = _vespo_weight(coupled_ratio, advantage, settings) * advantage
        value, c = direct * logprob, -weight * direct
    elif settings.loss == GMPO:
        _, clipped_low, clipped_high = _gmpo_log_ratios(
            log_ratio, advantage, rows, is_per_row, settings, completion, row, mask
        )
        ratio = coupled_ratio
        value, c = ratio * advantage, tl.where(clipped_low | clipped_high, 0.0, -coupled_slope)
    else:
        value, slope, clipped_low, clipped_high = _ratio_objective(
            ratio, advantage, rows, is_per_row, settings, completion, row, mask
        )
        c = -coupled_slope if settings.sequence else -weight * slope * ratio_slope
    # A token that the policy cannot have drawn, or that a NaN is about: no term of it, however bounded, hides that.
    undrawn = tl.where(logprob > NEG_INF, 0.0, float("nan"))
    loss = undrawn - weight * value
    c += undrawn
    bonus = 0.0
    if rows.entropy_coef is not None or settings.entropy_coef is not None:
        bonus = _knob(rows.entropy_coef, is_per_row.entropy_coef, settings.entropy_coef, completion, row, mask)
        bonus *= _entropy_gate(entropy, rows, is_per_row, settings, completion, row, mask)
        loss -= bonus * entropy
    kl, c_kl, clamped = 0.0, 0.0, False
    if rows.ref_logprobs is not None:
        ref = tl.load(rows.ref_logprobs + row, mask=mask, other=0.0).to(tl.float32)
        kl, kl_slope, clamped = _kl_penalty(kl_logprob, ref, settings.estimator)
        if settings.unbiased_kl:
            if not settings.sequence:
                c += beta * kl * ratio_slope
            kl, kl_slope = kl * kl_ratio, kl_slope * kl_ratio
        loss += beta * kl
        c_kl = beta * kl_slope
    return loss, c, kl, c_kl, bonus, ratio, clipped_low, clipped_high, clamped


@triton.jit
def _token_share(denominator_ptr, lengths_ptr, settings, completion, mask):
    """What the aggregation multiplies a row's loss by."""
    denominator = tl.load(denominator_ptr)
    share = tl.where(denominator == denominator, 1.0 / tl.maximum(denominator, 1.0), denominator)
    if settings.aggregation == MEAN_OF_MEANS:
        share /= tl.load(lengths_ptr + completion, mask=mask, other=1.0)
    return share
