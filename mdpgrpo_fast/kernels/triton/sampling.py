"""One token a row by Gumbel-max, with its log-probs at the row's temperature and at 1: one read of the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import LOG2E, NEG_INF, _accumulate, _columns, _load_tile, _log2, _row_at, _total
from .tiles import TileSource, compiler_options, on_device, row_tile


@triton.jit
def _random_bits(seed, start, tile):
    """32 bits for each column of a tile: a thread calls Philox for four of its columns at a time."""
    threads, calls = tl.arange(0, tile.block // tile.width), tl.arange(0, tile.width // 4)
    if tile.axis == 1:
        a, b, c, d = tl.randint4x(seed, (threads[:, None] * tile.width + start) // 4 + calls[None, :])
        return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (tile.block // tile.width, tile.width))
    else:
        a, b, c, d = tl.randint4x(seed, calls[:, None] * (tile.block // tile.width) + threads[None, :] + start // 4)
        bits = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1))
        return tl.reshape(bits, (tile.width, tile.block // tile.width))


@triton.jit
def _race(z, start, best, choice, seed, k, NOISE: tl.constexpr, tile):
    """One tile into each thread's best k z + Gumbel noise / log 2, and the column it is at; the first of equals."""
    key, columns = z, _columns(start, tile, tile.axis)
    if NOISE:
        # Half a step up, so never 0. Small values have the resolution: the noise is -log E of E = -log(1 - u), and not
        # -log(-log u) of u near 1.
        u = tl.fma(_random_bits(seed, start, tile).to(tl.float32), 2.3283064e-10, 1.1641532e-10)
        # E / log 2, by its series where 1 - u has lost digits: less than 1e-5 of it is wrong. 1 - u may round to 0.
        series = u * tl.fma(u, tl.fma(u, 0.48089835, 0.7213475), 1.442695)
        key = tl.fma(z, k, -_log2(tl.where(u < 0.03125, series, -_log2(tl.maximum(1.0 - u, 2.9802322e-8)))))
    top = tl.max(key, axis=tile.axis)
    is_top = key == (top[:, None] if tile.axis == 1 else top[None, :])
    first = tl.min(tl.where(is_top, columns, 2147483647), axis=tile.axis)
    return tl.maximum(best, top), tl.where(top > best, first, choice)


@triton.jit(do_not_specialize=["n_rows", "tiles"], do_not_specialize_on_alignment=["temperature_ptr", "seeds_ptr"])
def _sample_kernel(
    logits_ptr, temperature_ptr, seeds_ptr, tokens_ptr, logprobs_ptr, n_rows, tiles, stride_l, NOISE: tl.constexpr,
    tile,
):  # fmt: skip
    """NOISE: a draw at the row's τ; else the most likely token, both log-probs at 1."""
    row = tl.program_id(0).to(tl.int64)
    logits = _row_at(logits_ptr, row, n_rows, 0, stride_l, tile.axis == 1)
    tau, seed = 1.0, 0
    if NOISE:
        tau = tl.load(temperature_ptr + row).to(tl.float32)
        tau = tl.where(tau > 0, tau, float("nan"))
        seed = tl.load(seeds_ptr + row)
    k = LOG2E / tau
    top = tl.full((tile.block // tile.width,), NEG_INF, tl.float32)
    total = tl.zeros((tile.block // tile.width,), tl.float32)
    moment = tl.zeros((tile.block // tile.width,), tl.float32)
    total_policy = tl.zeros((tile.block // tile.width,), tl.float32)
    best = tl.full((tile.block // tile.width,), NEG_INF, tl.float32)
    choice = tl.zeros((tile.block // tile.width,), tl.int32)
    for i in tl.range(0, tiles, num_stages=tile.stages):
        z, _ = _load_tile(logits, i * tile.block, None, "evict_first", False, tile)
        top, total, moment, total_policy = _accumulate(
            z, top, total, moment, total_policy, k, LOG2E, None, None, NOISE, tile
        )
        best, choice = _race(z, i * tile.block, best, choice, seed, k, NOISE, tile)
    if tile.vocab % tile.block != 0:
        z, _ = _load_tile(logits, tile.vocab // tile.block * tile.block, None, "evict_first", True, tile)
        top, total, moment, total_policy = _accumulate(
            z, top, total, moment, total_policy, k, LOG2E, None, None, NOISE, tile
        )
        best, choice = _race(z, tile.vocab // tile.block * tile.block, best, choice, seed, k, NOISE, tile)
    peak = tl.max(top, axis=0)
    token = tl.min(tl.where(best == tl.max(best, axis=0), choice, tile.vocab), axis=0)
    # Rows of NaN have no best: a token in range, and NaN for its log-probs.
    token = tl.where(token < tile.vocab, token, 0)
    d = tl.load(logits + token).to(tl.float32) - peak
    log_total = tl.log(_total(top, peak, total, k))
    log_total_policy = log_total
    if NOISE:
        log_total_policy = tl.log(_total(top, peak, total_policy, LOG2E))
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, d / tau - log_total)
    tl.store(logprobs_ptr + tl.cast(n_rows, tl.int64) + row, d - log_total_policy)


def launch_sample(
    logits: Tensor, temperature: Tensor | None, seeds: Tensor | None = None, *, tile_of: TileSource
) -> tuple[Tensor, Tensor, Tensor]:
    """Token (R,) int64 of each row, its log-prob at the row's temperature and at 1, float32.

    logits (R, V) with unit stride in V; temperature (R,), None: the most likely token. seeds (R,): int64, of each row's
    noise; None: from torch's generator of the device, without a wait for it.
    """
    n, vocab = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens = torch.empty(n, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    if temperature is not None:
        temperature = temperature.contiguous()
        seeds = torch.randint(2**62, (n,), device=logits.device) if seeds is None else seeds.contiguous()
    if n:
        tile = tile_of()._replace(programs=0)
        with on_device(logits.device):
            _sample_kernel[(n,)](
                logits, temperature, seeds, tokens, logprobs, n, vocab // tile.block, logits.stride(0),
                temperature is not None, row_tile(tile, logits), **compiler_options(tile),
            )  # fmt: skip
    return tokens, logprobs[0], logprobs[1]
