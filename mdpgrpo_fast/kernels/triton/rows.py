"""Device functions for a row of logits: its tiles, online log-sum-exp and entropy, gradient, token, temperature.

A row of V logits is read in tiles of `tile.block` columns, shaped (block / width, width) so that one thread holds
`width` neighbours: they are one 16-byte access, and the running maximum and sums are kept per thread, with no exchange
between threads until the row ends. Rows that are not aligned to 16 bytes (axis 0) are read element by element by
neighbouring threads, the rest is the same. The order of every sum depends on V, the tile and the alignment alone, never
on what else is in the batch.

`tiles`, the whole tiles of a row, is V // block given at run time: known at compile time, the loops would be unrolled
and their addresses fill the registers.

z is a logit after the soft-cap, before the temperature; `k` is log2(e) / τ, so that exp(z / τ) = exp2(k z).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))


# ---- tiles ----------------------------------------------------------------------------------------------------------


@triton.jit
def _softcap(x, cap):
    """cap * tanh(x / cap) and its derivative 1 - tanh², the latter without cancellation; one division by element."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E / cap))
    r = 1.0 / (1.0 + e)
    t = cap * (1.0 - e) * r
    return tl.where(x >= 0, t, -t), 4.0 * e * r * r


@triton.jit
def _columns(start, tile):
    """Columns of a tile. axis 1: (block / width, width), a thread has neighbours; 0: (width, block / width)."""
    threads = tl.arange(0, tile.block // tile.width)
    own = tl.arange(0, tile.width)
    if tile.axis == 1:
        return start + threads[:, None] * tile.width + own[None, :]
    else:
        return start + own[:, None] * (tile.block // tile.width) + threads[None, :]


@triton.jit
def _load_tile(row, start, softcap, EVICT: tl.constexpr, TAIL: tl.constexpr, tile):
    """z and dz/dx of one tile, float32; columns past V are -inf after the cap, so that they have probability 0."""
    columns = _columns(start, tile)
    if TAIL:
        x = tl.load(row + columns, mask=columns < tile.vocab, other=NEG_INF, eviction_policy=EVICT).to(tl.float32)
    else:
        x = tl.load(row + columns, eviction_policy=EVICT).to(tl.float32)
    slope = 1.0
    if softcap is not None:
        x, slope = _softcap(x, softcap)
        if TAIL:
            x = tl.where(columns < tile.vocab, x, NEG_INF)
    return x, slope


# ---- reading --------------------------------------------------------------------------------------------------------


@triton.jit
def _gap(top, base):
    """top - base, finite: 0 where nothing was met yet, and floored for logits as low as float32 goes."""
    return tl.where(top == NEG_INF, 0.0, tl.maximum(top - base, -3.0e38))


@triton.jit
def _accumulate(z, top, total, moment, total_kl, k, k_kl, TWO_TEMPERATURES: tl.constexpr, tile):
    """One tile into the running maximum, Σ exp(k d), Σ d exp(k d) and Σ exp(k_kl d) of each thread, d = z - maximum.

    Relative to the maximum, so that logits of ±1e4 lose nothing. A maximum of -inf has met nothing yet.
    """
    new = tl.maximum(top, tl.max(z, axis=tile.axis))
    base = tl.where(new == NEG_INF, 0.0, new)
    gap = _gap(top, base)
    shrink = tl.exp2(gap * k)
    d = z - (base[:, None] if tile.axis == 1 else base[None, :])
    e = tl.exp2(d * k)
    # Where exp is 0 the product is 0, also for d = -inf.
    moment = moment * shrink + (gap * shrink) * total + tl.sum(tl.where(e > 0, d, 0.0) * e, axis=tile.axis)
    total = total * shrink + tl.sum(e, axis=tile.axis)
    if TWO_TEMPERATURES:
        total_kl = total_kl * tl.exp2(gap * k_kl) + tl.sum(tl.exp2(d * k_kl), axis=tile.axis)
    return new, total, moment, total_kl


@triton.jit
def _read_row(row, tiles, k, k_kl, softcap, EVICT: tl.constexpr, TWO_TEMPERATURES: tl.constexpr, tile):
    """The one sweep for the statistics of a row: its maximum, log Σ exp, entropy, and log Σ exp at the KL temperature.

    log Σ is that of exp((z - maximum) / τ): log p = (z - maximum) / τ - log Σ.
    """
    top = tl.full((tile.block // tile.width,), NEG_INF, tl.float32)
    total = tl.zeros((tile.block // tile.width,), tl.float32)
    moment = tl.zeros((tile.block // tile.width,), tl.float32)
    total_kl = tl.zeros((tile.block // tile.width,), tl.float32)
    for i in tl.range(0, tiles, num_stages=tile.stages):
        z, _ = _load_tile(row, i * tile.block, softcap, EVICT, False, tile)
        top, total, moment, total_kl = _accumulate(z, top, total, moment, total_kl, k, k_kl, TWO_TEMPERATURES, tile)
    if tile.vocab % tile.block != 0:
        z, _ = _load_tile(row, tile.vocab // tile.block * tile.block, softcap, EVICT, True, tile)
        top, total, moment, total_kl = _accumulate(z, top, total, moment, total_kl, k, k_kl, TWO_TEMPERATURES, tile)
    peak = tl.max(top, axis=0)
    gap = _gap(top, peak)
    shrink = tl.exp2(gap * k)
    moment = tl.sum(moment * shrink + (gap * shrink) * total, axis=0)
    total = tl.sum(total * shrink, axis=0)
    log_total = tl.log(total)
    log_total_kl = log_total
    if TWO_TEMPERATURES:
        log_total_kl = tl.log(tl.sum(total_kl * tl.exp2(gap * k_kl), axis=0))
    # Entropy = -Σ p log p, with log p = k d / log2(e) - log Σ.
    return peak, log_total, log_total - k / LOG2E * moment / total, log_total_kl


@triton.jit
def _token(tokens_ptr, row, tile):
    """The token of a row, 32 bits wide as columns are; -1 where it is outside [0, V)."""
    token = tl.load(tokens_ptr + row)
    return tl.where((token >= 0) & (token < tile.vocab), token, -1).to(tl.int32)


@triton.jit
def _target(row, token, softcap):
    """z of the row's own token. A token of -1 gives NaN and touches no memory."""
    x = tl.load(row + token, mask=token >= 0, other=float("nan")).to(tl.float32)
    if softcap is not None:
        x, _ = _softcap(x, softcap)
    return x


# ---- writing --------------------------------------------------------------------------------------------------------


@triton.jit
def _write_tile(
    row, out, start, token, peak, log_total, log_total_kl, a, a_kl, k, k_kl, softcap, TAIL: tl.constexpr,
    TWO_TEMPERATURES: tl.constexpr, tile,
):  # fmt: skip
    z, slope = _load_tile(row, start, softcap, "evict_first", TAIL, tile)
    columns = _columns(start, tile)
    d = z - peak
    g = tl.where(columns == token, a + a_kl, 0.0) - a * tl.exp2(d * k - log_total * LOG2E)
    if TWO_TEMPERATURES:
        g -= a_kl * tl.exp2(d * k_kl - log_total_kl * LOG2E)
    if softcap is not None:
        g *= slope
    g = g.to(out.dtype.element_ty)
    if TAIL:
        tl.store(out + columns, g, mask=columns < tile.vocab, cache_modifier=".cs")
    else:
        tl.store(out + columns, g, cache_modifier=".cs")


@triton.jit
def _write_gradient(
    row, out, tiles, token, peak, log_total, log_total_kl, a, a_kl, k, k_kl, softcap,
    TWO_TEMPERATURES: tl.constexpr, tile,
):  # fmt: skip
    """a (onehot - p) + a_kl (onehot - p_kl), last tile first: what `_read_row` read last is still in the L2 cache.

    Without TWO_TEMPERATURES, a_kl must be 0. `out` may be `row`: each tile is read before it is written.
    """
    if tile.vocab % tile.block != 0:
        _write_tile(row, out, tile.vocab // tile.block * tile.block, token, peak, log_total, log_total_kl, a, a_kl, k,
                    k_kl, softcap, True, TWO_TEMPERATURES, tile)  # fmt: skip
    for i in tl.range(0, tiles, num_stages=tile.stages):
        _write_tile(row, out, (tiles - 1 - i) * tile.block, token, peak, log_total, log_total_kl, a, a_kl, k, k_kl,
                    softcap, False, TWO_TEMPERATURES, tile)  # fmt: skip


@triton.jit
def _write_zeros(out, tiles, tile):
    if tile.axis == 1:
        zero = tl.zeros((tile.block // tile.width, tile.width), out.dtype.element_ty)
    else:
        zero = tl.zeros((tile.width, tile.block // tile.width), out.dtype.element_ty)
    for i in range(0, tiles):
        tl.store(out + _columns(i * tile.block, tile), zero, cache_modifier=".cs")
    if tile.vocab % tile.block != 0:
        columns = _columns(tile.vocab // tile.block * tile.block, tile)
        tl.store(out + columns, zero, mask=columns < tile.vocab, cache_modifier=".cs")


# ---- which completion, which number ---------------------------------------------------------------------------------


@triton.jit
def _kept(rows, row):
    """Whether a row counts."""
    kept = True
    if rows.mask is not None:
        kept = tl.load(rows.mask + row) != 0
    return kept


@triton.jit
def _completion_of(rows, row, row_length, num_completions):
    """The completion of a row, and whether it is one; an unknown one becomes 0, and the caller makes its row NaN."""
    completion = row // row_length
    known = True
    if rows.completion is not None:
        completion = tl.load(rows.completion + row).to(tl.int64)
        known = (completion >= 0) & (completion < num_completions)
        completion = tl.where(known, completion, 0)
    return completion, known


@triton.jit
def _knob(x, is_per_row, number, completion, row, mask):
    """A knob of rows: a number, or a tensor with one value per completion or per row."""
    if x is None:
        return number
    elif is_per_row:
        return tl.load(x + row, mask=mask, other=1.0).to(tl.float32)
    else:
        return tl.load(x + completion).to(tl.float32)


@triton.jit
def _temperature(rows, is_per_row, settings, completion, row, mask):
    """τ of a row; NaN where it is not above 0, which would give plausible numbers."""
    tau = _knob(rows.temperature, is_per_row.temperature, settings.temperature, completion, row, mask)
    return tl.where(tau > 0, tau, float("nan"))
