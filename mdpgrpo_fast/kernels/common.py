"""Device helpers that every kernel shares: tiles of a row, online log-sum-exp, gradient row, objective, advantages.

A row of V logits is read in tiles of BLOCK_V, shaped (BLOCK_V / WIDTH, WIDTH) so that one thread holds WIDTH
neighbours: WIDTH elements are one 16-byte access, and the running maximum and sums are kept per thread, with no
exchange between threads until the row ends. Rows that are not aligned to 16 bytes (AXIS 0) are read element by element
by neighbouring threads, the rest is the same. The order of every sum depends on V, the tile and the alignment alone,
never on what else is in the batch.

`tiles`, the whole tiles of a row, is V // BLOCK_V given at run time: known at compile time, the loops would be unrolled
and their addresses fill the registers.

z is a logit after the soft-cap, before the temperature; `k` is log2(e) / τ, so that exp(z / τ) = exp2(k z).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))
# reference.KL_EXPONENT_MAX and RATIO_EXPONENT_MAX; a test keeps them equal.
KL_EXPONENT_MAX = tl.constexpr(20.0)
RATIO_EXPONENT_MAX = tl.constexpr(80.0)

# Values of the enumerations that come in as constexpr integers.
K1, K2, K3 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
HALF, MAX_HALF_MEAN, MEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# ---- rows -----------------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x >= 0, t, -t)


@triton.jit
def _softcap(x, cap):
    """cap * tanh(x / cap) and its derivative 1 - tanh², the latter without cancellation; one division by element."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E / cap))
    r = 1.0 / (1.0 + e)
    t = cap * (1.0 - e) * r
    return tl.where(x >= 0, t, -t), 4.0 * e * r * r


@triton.jit
def _columns(start, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr, AXIS: tl.constexpr):
    """Columns of a tile. AXIS 1: (BLOCK_V / WIDTH, WIDTH), a thread has neighbours; 0: (WIDTH, BLOCK_V / WIDTH)."""
    threads = tl.arange(0, BLOCK_V // WIDTH)
    own = tl.arange(0, WIDTH)
    if AXIS == 1:
        return start + threads[:, None] * WIDTH + own[None, :]
    else:
        return start + own[:, None] * (BLOCK_V // WIDTH) + threads[None, :]


@triton.jit
def _tile(
    row, start, softcap, EVICT: tl.constexpr, TAIL: tl.constexpr, HAS_SOFTCAP: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, WIDTH: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """z and dz/dx of one tile, float32; columns past V are -inf after the cap, so that they have probability 0."""
    columns = _columns(start, BLOCK_V, WIDTH, AXIS)
    if TAIL:
        x = tl.load(row + columns, mask=columns < V, other=NEG_INF, eviction_policy=EVICT).to(tl.float32)
    else:
        x = tl.load(row + columns, eviction_policy=EVICT).to(tl.float32)
    slope = 1.0
    if HAS_SOFTCAP:
        x, slope = _softcap(x, softcap)
        if TAIL:
            x = tl.where(columns < V, x, NEG_INF)
    return x, slope


@triton.jit
def _gap(top, base):
    """top - base, finite: 0 where nothing was met yet, and floored for logits as low as float32 goes."""
    return tl.where(top == NEG_INF, 0.0, tl.maximum(top - base, -3.0e38))


@triton.jit
def _accumulate(z, top, total, moment, total_kl, k, k_kl, TWO: tl.constexpr, AXIS: tl.constexpr):
    """One tile into the running maximum, Σ exp(k d), Σ d exp(k d) and Σ exp(k_kl d) of each thread, d = z - maximum.

    Relative to the maximum, so that logits of ±1e4 lose nothing. A maximum of -inf has met nothing yet.
    """
    new = tl.maximum(top, tl.max(z, axis=AXIS))
    base = tl.where(new == NEG_INF, 0.0, new)
    gap = _gap(top, base)
    shrink = tl.exp2(gap * k)
    d = z - (base[:, None] if AXIS == 1 else base[None, :])
    e = tl.exp2(d * k)
    # Where exp is 0 the product is 0, also for d = -inf.
    moment = moment * shrink + (gap * shrink) * total + tl.sum(tl.where(e > 0, d, 0.0) * e, axis=AXIS)
    total = total * shrink + tl.sum(e, axis=AXIS)
    if TWO:
        total_kl = total_kl * tl.exp2(gap * k_kl) + tl.sum(tl.exp2(d * k_kl), axis=AXIS)
    return new, total, moment, total_kl


@triton.jit
def _read_row(
    row, tiles, k, k_kl, softcap, EVICT: tl.constexpr, TWO: tl.constexpr, HAS_SOFTCAP: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, WIDTH: tl.constexpr, AXIS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The one sweep for the statistics of a row: its maximum, log Σ exp, entropy, and log Σ exp at the KL temperature.

    log Σ is that of exp((z - maximum) / τ): log p = (z - maximum) / τ - log Σ.
    """
    top = tl.full((BLOCK_V // WIDTH,), NEG_INF, tl.float32)
    total = tl.zeros((BLOCK_V // WIDTH,), tl.float32)
    moment = tl.zeros((BLOCK_V // WIDTH,), tl.float32)
    total_kl = tl.zeros((BLOCK_V // WIDTH,), tl.float32)
    for i in tl.range(0, tiles, num_stages=STAGES):
        z, _ = _tile(row, i * BLOCK_V, softcap, EVICT, False, HAS_SOFTCAP, V, BLOCK_V, WIDTH, AXIS)
        top, total, moment, total_kl = _accumulate(z, top, total, moment, total_kl, k, k_kl, TWO, AXIS)
    if V % BLOCK_V != 0:
        z, _ = _tile(row, V // BLOCK_V * BLOCK_V, softcap, EVICT, True, HAS_SOFTCAP, V, BLOCK_V, WIDTH, AXIS)
        top, total, moment, total_kl = _accumulate(z, top, total, moment, total_kl, k, k_kl, TWO, AXIS)
    peak = tl.max(top, axis=0)
    gap = _gap(top, peak)
    shrink = tl.exp2(gap * k)
    moment = tl.sum(moment * shrink + (gap * shrink) * total, axis=0)
    total = tl.sum(total * shrink, axis=0)
    log_total = tl.log(total)
    log_total_kl = log_total
    if TWO:
        log_total_kl = tl.log(tl.sum(total_kl * tl.exp2(gap * k_kl), axis=0))
    # Entropy = -Σ p log p, with log p = k d / log2(e) - log Σ.
    return peak, log_total, log_total - k / LOG2E * moment / total, log_total_kl


@triton.jit
def _write_tile(
    row, out, start, token, peak, log_total, log_total_kl, a, a_kl, k, k_kl, softcap, TAIL: tl.constexpr,
    TWO: tl.constexpr, HAS_SOFTCAP: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    z, slope = _tile(row, start, softcap, "evict_first", TAIL, HAS_SOFTCAP, V, BLOCK_V, WIDTH, AXIS)
    columns = _columns(start, BLOCK_V, WIDTH, AXIS)
    d = z - peak
    g = tl.where(columns == token, a + a_kl, 0.0) - a * tl.exp2(d * k - log_total * LOG2E)
    if TWO:
        g -= a_kl * tl.exp2(d * k_kl - log_total_kl * LOG2E)
    if HAS_SOFTCAP:
        g *= slope
    g = g.to(out.dtype.element_ty)
    if TAIL:
        tl.store(out + columns, g, mask=columns < V, cache_modifier=".cs")
    else:
        tl.store(out + columns, g, cache_modifier=".cs")


@triton.jit
def _write_gradient(
    row, out, tiles, token, peak, log_total, log_total_kl, a, a_kl, k, k_kl, softcap, TWO: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr, AXIS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """a (onehot - p) + a_kl (onehot - p_kl), last tile first: what `_read_row` read last is still in the L2 cache.

    Without TWO, a_kl must be 0. `out` may be `row`: each tile is read before it is written.
    """
    if V % BLOCK_V != 0:
        _write_tile(row, out, V // BLOCK_V * BLOCK_V, token, peak, log_total, log_total_kl, a, a_kl, k, k_kl, softcap,
                    True, TWO, HAS_SOFTCAP, V, BLOCK_V, WIDTH, AXIS)  # fmt: skip
    for i in tl.range(0, tiles, num_stages=STAGES):
        _write_tile(row, out, (tiles - 1 - i) * BLOCK_V, token, peak, log_total, log_total_kl, a, a_kl, k, k_kl,
                    softcap, False, TWO, HAS_SOFTCAP, V, BLOCK_V, WIDTH, AXIS)  # fmt: skip


@triton.jit
def _write_zeros(
    out, tiles, V: tl.constexpr, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr, AXIS: tl.constexpr
):  # fmt: skip
    if AXIS == 1:
        zero = tl.zeros((BLOCK_V // WIDTH, WIDTH), out.dtype.element_ty)
    else:
        zero = tl.zeros((WIDTH, BLOCK_V // WIDTH), out.dtype.element_ty)
    for i in range(0, tiles):
        tl.store(out + _columns(i * BLOCK_V, BLOCK_V, WIDTH, AXIS), zero, cache_modifier=".cs")
    if V % BLOCK_V != 0:
        columns = _columns(V // BLOCK_V * BLOCK_V, BLOCK_V, WIDTH, AXIS)
        tl.store(out + columns, zero, mask=columns < V, cache_modifier=".cs")


@triton.jit
def _token(tokens_ptr, row, V: tl.constexpr):
    """The token of a row, 32 bits wide as columns are; -1 where it is outside [0, V)."""
    token = tl.load(tokens_ptr + row)
    return tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)


@triton.jit
def _target(row, token, softcap, HAS_SOFTCAP: tl.constexpr):
    """z of the row's own token. A token of -1 gives NaN and touches no memory."""
    x = tl.load(row + token, mask=token >= 0, other=float("nan")).to(tl.float32)
    if HAS_SOFTCAP:
        x, _ = _softcap(x, softcap)
    return x


@triton.jit
def _completion_of(completion_ptr, row, row_length, n_completions, PACKED: tl.constexpr):
    """The completion of a row, and whether it is one; an unknown one becomes 0, and the caller makes its row NaN."""
    completion = row // row_length
    known = True
    if PACKED:
        completion = tl.load(completion_ptr + row).to(tl.int64)
        known = (completion >= 0) & (completion < n_completions)
        completion = tl.where(known, completion, 0)
    return completion, known


@triton.jit
def _value(ptr, number, completion, rows, per_row, mask, HAS: tl.constexpr):
    """A knob of rows: a number, or a tensor with one value per completion or per row."""
    if HAS:
        return tl.load(ptr + tl.where(per_row != 0, rows, completion), mask=mask, other=1.0).to(tl.float32)
    else:
        return number


@triton.jit
def _temperature(ptr, number, completion, row, per_row, HAS: tl.constexpr):
    """τ of a row; NaN where it is not above 0, which would give plausible numbers."""
    tau = _value(ptr, number, completion, row, per_row, True, HAS)
    return tl.where(tau > 0, tau, float("nan"))


# ---- objective ------------------------------------------------------------------------------------------------------


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


# ---- advantages -----------------------------------------------------------------------------------------------------


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
