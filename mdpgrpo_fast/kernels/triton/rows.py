"""Device functions for a row of logits: its tiles, online log-sum-exp and entropy, gradient, token, temperature.

A row of V logits is read in tiles of `tile.block` columns, shaped (block / width, width) so that one thread holds
`width` neighbours: they are one 16-byte access, and the running maximum and sums are kept per thread, with no exchange
between threads until the row ends. Rows that do not all begin on 16 bytes (axis 0), as of an odd V, are read for their
sums element by element by neighbouring threads. So the order of a sum depends on V, the tile and whether all rows are
aligned, never on what else is in the batch or on where in it a row is. The sweep that writes has no sums: of such rows
it begins at the first whole 16 bytes and ends with what lies before them. Which elements are in the tile of the token,
and with it the last bits of a float32 gradient, then depends on where a row begins.

`tiles`, the whole tiles of a row, is V // block given at run time: known at compile time, the loops would be unrolled
and their addresses fill the registers.

z is a logit after the soft-cap, before the temperature; `k` is log2(e) / τ, so that exp(z / τ) = exp2(k z). `least` is
the smallest z of a row's support, outside of which p is 0, but for the KL's; None: there is no such bound.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import interpreted

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))
INTERPRETED = tl.constexpr(interpreted())


# ---- tiles ----------------------------------------------------------------------------------------------------------


@triton.jit
def _reciprocal(x):
    """One instruction, where a division guards against denormal numbers."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _log2(x):
    """One instruction, where the library's guards against denormal numbers."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _softcap(x, cap):
    """u in [-1, 0], growing with x, and u² e: cap * tanh(x / cap) is cap + 2 cap u, its derivative 4 u² e.

    Neither cancels where it matters: a derivative of nearly 0 keeps its digits. The bound avoids inf * 0.
    """
    e = tl.exp2(x * (2.0 * LOG2E / cap))
    u = _reciprocal(-1.0 - e)
    return u, tl.minimum(e, 1.0e30) * u * u


@triton.jit
def _logit(u, softcap):
    """z of x, or of what `_softcap` makes of it."""
    z = u
    if softcap is not None:
        z = tl.fma(u, 2.0 * softcap, softcap)
    return z


@triton.jit
def _row_at(base, row, row_length, stride_b, stride_l, ALIGNED: tl.constexpr):
    """Where a row of (B, L, V) begins. row: int64, as offsets exceed 2³¹ elements long before memory is full.

    ALIGNED: on 16 bytes, which the compiler knows by itself where the strides are multiples of 16 elements.
    """
    pointer = base + row // row_length * stride_b + row % row_length * stride_l
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _columns(start, tile, AXIS: tl.constexpr):
    """Columns of a tile. AXIS 1: (block / width, width), a thread has neighbours; 0: (width, block / width)."""
    threads = tl.arange(0, tile.block // tile.width)
    own = tl.arange(0, tile.width)
    if AXIS == 1:
        return threads[:, None] * tile.width + own[None, :] + start
    else:
        return own[:, None] * (tile.block // tile.width) + threads[None, :] + start


@triton.jit
def _float32(x):
    """The bits of a bfloat16 are the upper half of a float32: said so, it is one instruction and not two for half."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _load_tile(row, start, softcap, EVICT: tl.constexpr, TAIL: tl.constexpr, tile):
    """x of one tile, float32, or `_softcap` of it; columns past V are -inf, so that they have probability 0."""
    inside = None
    if TAIL:
        inside = _columns(start, tile, tile.axis) < tile.vocab
    # The start is added to the pointer, once for all threads, whose own columns do not change from tile to tile.
    return _load(row + start + _columns(0, tile, tile.axis), inside, softcap, EVICT)


@triton.jit
def _load(pointers, inside, softcap, EVICT: tl.constexpr):
    if inside is not None:
        x = _float32(tl.load(pointers, mask=inside, other=NEG_INF, eviction_policy=EVICT))
    else:
        x = _float32(tl.load(pointers, eviction_policy=EVICT))
    slope = 1.0
    if softcap is not None:
        x, slope = _softcap(x, softcap)
        if inside is not None:
            x = tl.where(inside, x, NEG_INF)
    return x, slope


# ---- reading --------------------------------------------------------------------------------------------------------


@triton.jit
def _offset(top, k):
    """What makes k u an exponent relative to k top: -k top, rounded the same way wherever it is used.

    Bounded, so that the rounding of a low maximum fits an exponent; what is lower than that, or nothing, adds 0.
    """
    return tl.minimum(-k * top, 536870912.0)


@triton.jit
def _accumulate(u, top, total, moment, total_kl, k, k_kl, softcap, least, TWO_TEMPERATURES: tl.constexpr, tile):
    """One tile into the running maximum, Σ exp2(t), Σ t exp2(t) and Σ exp2(t_kl) of each thread.

    t = k u + c, c the offset of the maximum: one rounding, so that logits of ±1e4 lose nothing.
    """
    new = tl.maximum(top, tl.max(u, axis=tile.axis))
    c = _offset(new, k)
    gap = c - _offset(top, k)
    shrink = tl.exp2(gap)
    # Finite also for a logit of -inf, whose exp is 0 and must not make 0 * inf; NaN stays.
    t = tl.fma(u, k, c[:, None] if tile.axis == 1 else c[None, :])
    t = tl.maximum(t, -1.0e30, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(t)
    if least is not None:
        e = tl.where(_logit(u, softcap) < least, 0.0, e)
    moment = (moment + gap * total) * shrink + tl.sum(t * e, axis=tile.axis)
    total = total * shrink + tl.sum(e, axis=tile.axis)
    if TWO_TEMPERATURES:
        c = _offset(new, k_kl)
        e = tl.exp2(tl.fma(u, k_kl, c[:, None] if tile.axis == 1 else c[None, :]))
        total_kl = total_kl * tl.exp2(c - _offset(top, k_kl)) + tl.sum(e, axis=tile.axis)
    return new, total, moment, total_kl


@triton.jit
def _rounding(peak, k):
    """k peak plus its offset: what the rounding of the offset left."""
    return tl.fma(peak, k, _offset(peak, k))


@triton.jit
def _total(top, peak, total, k):
    """Σ exp((z - maximum) / τ) of a row, from each thread's maximum and sum; NaN of no logit.

    At least 1, and 1 to the bit where all others are 0: the maximum's own part, as it was summed, is taken out.
    """
    total = tl.sum(total * tl.exp2(_offset(peak, k) - _offset(top, k)), axis=0)
    total = tl.where(total > 0, total, float("nan"))
    rounding = _rounding(peak, k)
    return 1.0 + (total - tl.exp2(rounding)) * tl.exp2(-rounding)


@triton.jit
def _read_row(row, tiles, k, k_kl, softcap, least, EVICT: tl.constexpr, TWO_TEMPERATURES: tl.constexpr, tile):
    """The one sweep for the statistics of a row: its maximum, log Σ exp, entropy, and log Σ exp at the KL temperature.

    log Σ is that of exp((z - maximum) / τ): log p = (z - maximum) / τ - log Σ. Of a row whose maximum is beyond some
    ±3e8 τ all may be NaN.
    """
    if softcap is not None:
        k, k_kl = 2.0 * softcap * k, 2.0 * softcap * k_kl
    top = tl.full((tile.block // tile.width,), NEG_INF, tl.float32)
    total = tl.zeros((tile.block // tile.width,), tl.float32)
    moment = tl.zeros((tile.block // tile.width,), tl.float32)
    total_kl = tl.zeros((tile.block // tile.width,), tl.float32)
    for i in tl.range(0, tiles, num_stages=tile.stages):
        u, _ = _load_tile(row, i * tile.block, softcap, EVICT, False, tile)
        top, total, moment, total_kl = _accumulate(
            u, top, total, moment, total_kl, k, k_kl, softcap, least, TWO_TEMPERATURES, tile
        )
    if tile.vocab % tile.block != 0:
        u, _ = _load_tile(row, tile.vocab // tile.block * tile.block, softcap, EVICT, True, tile)
        top, total, moment, total_kl = _accumulate(
            u, top, total, moment, total_kl, k, k_kl, softcap, least, TWO_TEMPERATURES, tile
        )
    peak = tl.max(top, axis=0)
    gap = _offset(peak, k) - _offset(top, k)
    moment = tl.sum((moment + gap * total) * tl.exp2(gap), axis=0)
    total = _total(top, peak, total, k)
    log_total = tl.log(total)
    log_total_kl = log_total
    if TWO_TEMPERATURES:
        log_total_kl = tl.log(_total(top, peak, total_kl, k_kl))
    # Entropy = -Σ p log p, with log2 p = t - rounding - log2 Σ; a sum that rounds is not to make it negative.
    rounding = _rounding(peak, k)
    entropy = log_total - (moment * tl.exp2(-rounding) / total - rounding) / LOG2E
    entropy = tl.maximum(entropy, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return _logit(peak, softcap), log_total, entropy, log_total_kl


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
    return _logit(x, softcap)


@triton.jit
def _least(rows, row, z):
    """The smallest z of a row's support, which its own token is always in; NaN, which nothing is below, where z is."""
    if rows.logit_floor is None:
        return None
    else:
        floor = tl.load(rows.logit_floor + row).to(tl.float32)
        return tl.minimum(floor, z, propagate_nan=tl.PropagateNan.ALL)


# ---- writing --------------------------------------------------------------------------------------------------------


@triton.jit
def _first_whole(row, out, tile):
    """row and out from the row's first 16 aligned bytes on, and how many elements lie before: none where all begin so.

    They become the row's last places. `tiles.row_tile` has looked that out is aligned as the row is, and that what is
    left after the whole tiles has room for them.
    """
    before = 0
    if tile.wraps:
        before = ((-row.to(tl.int64)) & 15).to(tl.int32) // (16 // tile.width)
        row, out = tl.multiple_of(row + before, 16), tl.multiple_of(out + before, 16)
    return row, out, before


@triton.jit
def _offsets(start, before, TAIL: tl.constexpr, tile):
    """Where the places of a tile lie from `start` on."""
    offsets = _columns(0, tile, tile.write_axis)
    if TAIL and tile.wraps:
        offsets = tl.where(offsets + start < tile.vocab - before, offsets, offsets - tile.vocab)
    return offsets


@triton.jit
def _write_tile(
    row, out, start, before, token, peak, a, scale, scale_kl, bonus, shift, k, k_kl, c, c_kl, softcap, least,
    OWN: tl.constexpr, TAIL: tl.constexpr, TWO_TEMPERATURES: tl.constexpr, tile,
):  # fmt: skip
    """scale exp2(t) + scale_kl exp2(t_kl) + bonus exp2(t) (t + shift), t = k u + c, of a tile; a at the token."""
    places, offsets, inside = _columns(start, tile, tile.write_axis), _offsets(start, before, TAIL, tile), None
    if TAIL:
        inside = places < tile.vocab
    u, slope = _load(row + start + offsets, inside, softcap, "evict_first")
    outside = None
    if least is not None:
        outside = _logit(u, softcap) < least
    if OWN:
        u = _logit(u, softcap) - peak
    t = tl.fma(u, k, c)
    if bonus is not None:
        # Finite also for a logit of -inf, whose exp is 0 and must not make 0 * inf; NaN stays.
        t = tl.maximum(t, -1.0e5, propagate_nan=tl.PropagateNan.ALL)
        # Of the token's tile the difference first, which is 0 where p is 1; of the others it is in scale.
        scale = tl.fma(bonus, t + shift if OWN else t, scale)
    g = scale * tl.exp2(t)
    if outside is not None:
        g = tl.where(outside, 0.0, g)
    if TWO_TEMPERATURES:
        g = tl.fma(scale_kl, tl.exp2(tl.fma(u, k_kl, c_kl)), g)
    if OWN:
        g += tl.where(places == token, a, 0.0)
    if softcap is not None:
        g *= slope
    g = g.to(out.dtype.element_ty)
    if TAIL:
        tl.store(out + start + offsets, g, mask=inside, cache_modifier=".cs")
    else:
        tl.store(out + start + offsets, g, cache_modifier=".cs")


@triton.jit
def _write_gradient(
    row, out, tiles, token, peak, log_total, log_total_kl, entropy, a, a_kl, b, k, k_kl, softcap, least,
    TWO_TEMPERATURES: tl.constexpr, tile,
):  # fmt: skip
    """a (onehot - p) + a_kl (onehot - p_kl) + b p (log p + entropy), last tile first: what `_read_row` read last is
    still in the L2 cache.

    Without TWO_TEMPERATURES, a_kl must be 0; b may be None. `out` may be `row`: each tile is read before it is written.
    """
    if softcap is not None:
        a, a_kl = 4.0 * a, 4.0 * a_kl  # of a quarter of the slope
    bonus, shift = None, 0.0
    if b is not None:
        bonus, shift = b / LOG2E, entropy * LOG2E
        if softcap is not None:
            bonus *= 4.0
    # The tile with the row's own token compares columns, and takes differences from the maximum, as 1 - p must be 0
    # where p is 1. The others spend fewer instructions: they are off by some last bits of p.
    row, out, before = _first_whole(row, out, tile)
    if tile.wraps:
        place = tl.where(token >= before, token - before, token - before + tile.vocab)
        token = tl.where(token >= 0, place, token)
    own = tl.maximum(token, 0) // tile.block
    c = -log_total * LOG2E
    c_kl = -log_total_kl * LOG2E
    if tile.vocab % tile.block != 0:
        _write_tile(row, out, tile.vocab // tile.block * tile.block, before, token, peak, a + a_kl, -a, -a_kl, bonus,
                    shift, k, k_kl, c, c_kl, softcap, least, True, True, TWO_TEMPERATURES, tile)  # fmt: skip
    if own < tiles:
        _write_tile(row, out, own * tile.block, before, token, peak, a + a_kl, -a, -a_kl, bonus, shift, k, k_kl, c,
                    c_kl, softcap, least, True, False, TWO_TEMPERATURES, tile)  # fmt: skip
    if softcap is not None:
        k, k_kl = 2.0 * softcap * k, 2.0 * softcap * k_kl
        peak = (peak - softcap) / (2.0 * softcap)
    a *= -tl.exp2(c - _rounding(peak, k))
    if b is not None:
        # log2 p = t + c - rounding.
        bonus *= tl.exp2(c - _rounding(peak, k))
        a += bonus * (shift + (c - _rounding(peak, k)))
    a_kl *= -tl.exp2(c_kl - _rounding(peak, k_kl))
    others = tiles - (own < tiles).to(tl.int32)
    for i in tl.range(0, others, num_stages=tile.stages):
        j = others - 1 - i
        j += (j >= own).to(tl.int32)
        _write_tile(row, out, j * tile.block, before, token, peak, 0.0, a, a_kl, bonus, 0.0, k, k_kl,
                    _offset(peak, k), _offset(peak, k_kl), softcap, least, False, False, TWO_TEMPERATURES,
                    tile)  # fmt: skip


@triton.jit
def _write_zeros(row, out, tiles, tile):
    """Zeros in place of the gradient of a row."""
    _, out, before = _first_whole(row, out, tile)
    if tile.write_axis == 1:
        zero = tl.zeros((tile.block // tile.width, tile.width), out.dtype.element_ty)
    else:
        zero = tl.zeros((tile.width, tile.block // tile.width), out.dtype.element_ty)
    for i in range(0, tiles):
        tl.store(out + _columns(i * tile.block, tile, tile.write_axis), zero, cache_modifier=".cs")
    if tile.vocab % tile.block != 0:
        start = tile.vocab // tile.block * tile.block
        inside = _columns(start, tile, tile.write_axis) < tile.vocab
        tl.store(out + start + _offsets(start, before, True, tile), zero, mask=inside, cache_modifier=".cs")


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
