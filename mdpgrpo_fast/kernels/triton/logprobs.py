"""Log-probabilities of given tokens and the entropy of each row: one read of the logits, and their gradient.

The gradient is written in the same launch where nothing has to weigh it, or by a second one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schemas import NUM_STATISTICS, Rows, Settings
from .rows import (
    LOG2E,
    _completion_of,
    _kept,
    _least,
    _read_row,
    _row_at,
    _target,
    _temperature,
    _token,
    _write_gradient,
    _write_zeros,
)
from .tiles import TileSource, compiler_options, grid_for, kernel_rows, kernel_settings, on_device, row_tile

READS_ROWS = ("tokens", "mask", "completion", "temperature", "logit_floor")
BACKWARD_READS_SETTINGS = ("temperature", "kl_temperature", "softcap")
READS_SETTINGS = (*BACKWARD_READS_SETTINGS, "two_temperatures")


@triton.jit(do_not_specialize=["n_rows", "row_length", "tiles", "num_completions"])
def _logprobs_kernel(
    logits_ptr, gradient_ptr, rows, is_per_row, settings, logprobs_ptr, statistics_ptr, n_rows, row_length, tiles,
    num_completions, stride_lb, stride_ll, stride_gb, stride_gl, tile,
):  # fmt: skip
    """ℓ and the statistics of rows; masked rows cost no read and give 0. With a gradient ∂ℓ/∂x too, over x if asked."""
    n = tl.cast(n_rows, tl.int64)
    first = tl.program_id(0)
    for index in range(first, n_rows if tile.persistent else first + 1, tl.num_programs(0) if tile.persistent else 1):
        row = tl.cast(index, tl.int64)
        logits = _row_at(logits_ptr, row, row_length, stride_lb, stride_ll, tile.axis == 1)
        gradient = logits
        if gradient_ptr is not None:
            gradient = _row_at(
                gradient_ptr, row, row_length, stride_gb, stride_gl, tile.write_axis == 1 and not tile.wraps
            )
        if _kept(rows, row):
            completion, known = _completion_of(rows, row, row_length, num_completions)
            tau = _temperature(rows, is_per_row, settings, completion, row, True)
            token = _token(rows.tokens, row, tile)
            z = tl.where(known, _target(logits, token, settings.softcap), float("nan"))
            least = _least(rows, row, z)
            peak, log_total, entropy, log_total_kl = _read_row(
                logits, tiles, LOG2E / tau, LOG2E / settings.kl_temperature, settings.softcap, least,
                "evict_first" if gradient_ptr is None else "evict_last", settings.two_temperatures, tile,
            )  # fmt: skip
            tl.store(logprobs_ptr + row, (z - peak) / tau - log_total)
            tl.store(statistics_ptr + row, peak)
            tl.store(statistics_ptr + n + row, log_total)
            tl.store(statistics_ptr + 2 * n + row, entropy)
            tl.store(statistics_ptr + 3 * n + row, log_total_kl)
            tl.store(statistics_ptr + 4 * n + row, z)
            if gradient_ptr is not None:
                _write_gradient(logits, gradient, tiles, token, peak, log_total, 0.0, 0.0, 1.0 / tau, 0.0, None,
                                LOG2E / tau, 0.0, settings.softcap, least, False, tile)  # fmt: skip
        else:
            tl.store(logprobs_ptr + row, 0.0)
            for i in tl.static_range(5):
                tl.store(statistics_ptr + i * n + row, 0.0)
            if gradient_ptr is not None:
                _write_zeros(logits, gradient, tiles, tile)


@triton.jit(
    do_not_specialize=["n_rows", "row_length", "tiles", "num_completions"],
    do_not_specialize_on_alignment=["grad_logprobs_ptr", "grad_kl_ptr", "grad_entropy_ptr", "statistics_ptr"],
)
def _logprobs_backward_kernel(
    grad_logprobs_ptr, grad_kl_ptr, grad_entropy_ptr, logits_ptr, rows, is_per_row, settings, statistics_ptr,
    gradient_ptr, n_rows, row_length, tiles, num_completions, stride_lb, stride_ll, stride_gb, stride_gl, tile,
):  # fmt: skip
    """∂ℓ/∂x = (onehot - p) / τ, times the incoming gradient of each row's ℓ; zeros where that is 0.

    With grad_kl: plus the same at the KL's temperature, times that of ℓ there. With grad_entropy: plus it times
    -∂H/∂x = p (log p + H) / τ. The gradient may lie over x.
    """
    first = tl.program_id(0)
    for index in range(first, n_rows if tile.persistent else first + 1, tl.num_programs(0) if tile.persistent else 1):
        row = tl.cast(index, tl.int64)
        logits = _row_at(logits_ptr, row, row_length, stride_lb, stride_ll, tile.axis == 1)
        gradient = _row_at(gradient_ptr, row, row_length, stride_gb, stride_gl, tile.write_axis == 1 and not tile.wraps)
        c = tl.load(grad_logprobs_ptr + row).to(tl.float32)
        if rows.mask is not None:
            c = tl.where(_kept(rows, row), c, 0.0)
        c_kl = 0.0
        if grad_kl_ptr is not None:
            c_kl = tl.load(grad_kl_ptr + row).to(tl.float32) / settings.kl_temperature
            if rows.mask is not None:
                c_kl = tl.where(_kept(rows, row), c_kl, 0.0)
        idle = (c == 0.0) & (c_kl == 0.0)
        b = None
        if grad_entropy_ptr is not None:
            b = tl.load(grad_entropy_ptr + row).to(tl.float32)
            if rows.mask is not None:
                b = tl.where(_kept(rows, row), b, 0.0)
            idle = idle & (b == 0.0)
        if idle:
            _write_zeros(logits, gradient, tiles, tile)
        else:
            completion, _ = _completion_of(rows, row, row_length, num_completions)
            tau = _temperature(rows, is_per_row, settings, completion, row, True)
            peak = tl.load(statistics_ptr + row)
            log_total = tl.load(statistics_ptr + n_rows + row)
            log_total_kl = tl.load(statistics_ptr + 3 * tl.cast(n_rows, tl.int64) + row)
            least = _least(rows, row, tl.load(statistics_ptr + 4 * tl.cast(n_rows, tl.int64) + row))
            entropy = 0.0
            if grad_entropy_ptr is not None:
                entropy = tl.load(statistics_ptr + 2 * tl.cast(n_rows, tl.int64) + row)
                b /= tau
            _write_gradient(logits, gradient, tiles, _token(rows.tokens, row, tile), peak, log_total, log_total_kl,
                            entropy, c / tau, c_kl, b, LOG2E / tau, LOG2E / settings.kl_temperature, settings.softcap,
                            least, grad_kl_ptr is not None, tile)  # fmt: skip


def launch_logprobs(
    logits: Tensor, rows: Rows, settings: Settings, num_completions: int, gradient: Tensor | None = None, *,
    tile_of: TileSource,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ℓ (N,) and statistics (5, N), float32, of the N = B * L rows of logits (B, L, V) with unit stride in V.

    num_completions: B, or 0 where every knob has one value per row and rows have no completions. gradient (B, L, V): is
    given ∂ℓ/∂x; it may be the logits themselves. Not with two temperatures, which have weights.
    """
    assert gradient is None or not settings.two_temperatures, "the gradient of two temperatures needs their weights"
    b, length, vocab = logits.shape
    n = b * length
    logprobs = torch.empty(n, dtype=torch.float32, device=logits.device)
    statistics = torch.empty(NUM_STATISTICS, n, dtype=torch.float32, device=logits.device)
    if n == 0:
        return logprobs, statistics
    tile = tile_of()
    with on_device(logits.device):
        _logprobs_kernel[grid_for(tile, n, logits.device)](
            logits, gradient, *kernel_rows(rows, num_completions, READS_ROWS),
            kernel_settings(settings, READS_SETTINGS), logprobs, statistics, n, length, vocab // tile.block,
            num_completions, *logits.stride()[:2], *((0, 0) if gradient is None else gradient.stride()[:2]),
            row_tile(tile, logits, gradient), **compiler_options(tile),
        )  # fmt: skip
    return logprobs, statistics


def launch_logprobs_backward(
    logits: Tensor, grad_logprobs: Tensor, rows: Rows, settings: Settings, num_completions: int, statistics: Tensor,
    grad_kl: Tensor | None = None, gradient: Tensor | None = None, *, grad_entropy: Tensor | None = None,
    tile_of: TileSource,
) -> Tensor:  # fmt: skip
    """Gradient of the logits (B, L, V) from that of ℓ (N,); the rest as in `launch_logprobs`.

    grad_kl (N,): of ℓ at the KL's temperature too; grad_entropy (N,): of -H. gradient: where it is written, the logits
    themselves if need be.
    """
    b, length, vocab = logits.shape
    if gradient is None:
        gradient = torch.empty((b, length, vocab), dtype=logits.dtype, device=logits.device)
    if b * length == 0:
        return gradient
    tile = tile_of()
    with on_device(logits.device):
        _logprobs_backward_kernel[grid_for(tile, b * length, logits.device)](
            grad_logprobs, grad_kl, grad_entropy, logits, *kernel_rows(rows, num_completions, READS_ROWS),
            kernel_settings(settings, BACKWARD_READS_SETTINGS), statistics, gradient, b * length, length,
            vocab // tile.block, num_completions, *logits.stride()[:2], *gradient.stride()[:2],
            row_tile(tile, logits, gradient), **compiler_options(tile),
        )  # fmt: skip
    return gradient
