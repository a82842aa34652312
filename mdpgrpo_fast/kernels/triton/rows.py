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


# ---- advantages -----------------------------------------------------------------------------------------------------
