"""Log-probabilities of given tokens and the entropy of each row: one read of the logits, and their gradient.

The gradient is written in the same launch where nothing has to weigh it (`unit`), or by a second one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schemas import STATISTICS
from .rows import LOG2E, _completion_of, _read_row, _target, _temperature, _token, _write_gradient, _write_zeros
from .tiles import grid_for, launch_options, on_device, per_row
from .tuning import tile_for

# Pointers to vectors that may begin anywhere (see token_loss).
SMALL = """tokens_ptr mask_ptr completion_ptr temperature_ptr logprobs_ptr statistics_ptr grad_logprobs_ptr
grad_kl_ptr""".split()


@triton.jit(
    do_not_specialize=["n_rows", "row_length", "tiles", "n_completions"],
    do_not_specialize_on_alignment=[name for name in SMALL if not name.startswith("grad_")],
)
def _logprobs_kernel(
    logits_ptr, gradient_ptr, tokens_ptr, mask_ptr, completion_ptr, temperature_ptr, logprobs_ptr, statistics_ptr,
    n_rows, row_length, tiles, n_completions, stride_lb, stride_ll, stride_gb, stride_gl, temperature_per_row,
    temperature, kl_temperature, softcap, HAS_GRADIENT: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TWO: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, WIDTH: tl.constexpr, AXIS: tl.constexpr, STAGES: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """ℓ and the statistics of rows; masked rows cost no read and give 0. HAS_GRADIENT: ∂ℓ/∂x too, over x if asked."""
    n = tl.cast(n_rows, tl.int64)
    first = tl.program_id(0)
    for index in range(first, n_rows if PERSISTENT else first + 1, tl.num_programs(0) if PERSISTENT else 1):
        row = tl.cast(index, tl.int64)
        kept = True
        if HAS_MASK:
            kept = tl.load(mask_ptr + row) != 0
        if kept:
            logits = logits_ptr + row // row_length * stride_lb + row % row_length * stride_ll
            completion, known = _completion_of(completion_ptr, row, row_length, n_completions, PACKED)
            tau = _temperature(temperature_ptr, temperature, completion, row, temperature_per_row, HAS_TEMPERATURE)
            token = _token(tokens_ptr, row, V)
            z = tl.where(known, _target(logits, token, softcap, HAS_SOFTCAP), float("nan"))
            peak, log_total, entropy, log_total_kl = _read_row(
                logits, tiles, LOG2E / tau, LOG2E / kl_temperature, softcap,
                "evict_last" if HAS_GRADIENT else "evict_first", TWO, HAS_SOFTCAP, V, BLOCK_V, WIDTH, AXIS, STAGES,
            )  # fmt: skip
            tl.store(logprobs_ptr + row, (z - peak) / tau - log_total)
            tl.store(statistics_ptr + row, peak)
            tl.store(statistics_ptr + n + row, log_total)
            tl.store(statistics_ptr + 2 * n + row, entropy)
            tl.store(statistics_ptr + 3 * n + row, log_total_kl)
            tl.store(statistics_ptr + 4 * n + row, z)
            if HAS_GRADIENT:
                gradient = gradient_ptr + row // row_length * stride_gb + row % row_length * stride_gl
                _write_gradient(logits, gradient, tiles, token, peak, log_total, 0.0, 1.0 / tau, 0.0, LOG2E / tau, 0.0,
                                softcap, False, HAS_SOFTCAP, V, BLOCK_V, WIDTH, AXIS, STAGES)  # fmt: skip
        else:
            tl.store(logprobs_ptr + row, 0.0)
            for i in tl.static_range(5):
                tl.store(statistics_ptr + i * n + row, 0.0)
            if HAS_GRADIENT:
                gradient = gradient_ptr + row // row_length * stride_gb + row % row_length * stride_gl
                _write_zeros(gradient, tiles, V, BLOCK_V, WIDTH, AXIS)


@triton.jit(
    do_not_specialize=["n_rows", "row_length", "tiles", "n_completions"],
    do_not_specialize_on_alignment=[name for name in SMALL if name != "logprobs_ptr"],
)
def _logprobs_backward_kernel(
    grad_logprobs_ptr, grad_kl_ptr, logits_ptr, tokens_ptr, mask_ptr, completion_ptr, temperature_ptr, statistics_ptr,
    gradient_ptr, n_rows, row_length, tiles, n_completions, stride_lb, stride_ll, stride_gb, stride_gl,
    temperature_per_row, temperature, kl_temperature, softcap, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TWO: tl.constexpr, V: tl.constexpr,
    BLOCK_V: tl.constexpr, WIDTH: tl.constexpr, AXIS: tl.constexpr, STAGES: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """∂ℓ/∂x = (onehot - p) / τ, times the incoming gradient of each row's ℓ; zeros where that is 0.

    TWO: plus the same at the KL's temperature, times the incoming gradient of ℓ there. The gradient may lie over x.
    """
    first = tl.program_id(0)
    for index in range(first, n_rows if PERSISTENT else first + 1, tl.num_programs(0) if PERSISTENT else 1):
        row = tl.cast(index, tl.int64)
        gradient = gradient_ptr + row // row_length * stride_gb + row % row_length * stride_gl
        c = tl.load(grad_logprobs_ptr + row).to(tl.float32)
        if HAS_MASK:
            c = tl.where(tl.load(mask_ptr + row) != 0, c, 0.0)
        c_kl = 0.0
        if TWO:
            c_kl = tl.load(grad_kl_ptr + row).to(tl.float32) / kl_temperature
            if HAS_MASK:
                c_kl = tl.where(tl.load(mask_ptr + row) != 0, c_kl, 0.0)
        if (c == 0.0) & (c_kl == 0.0):
            _write_zeros(gradient, tiles, V, BLOCK_V, WIDTH, AXIS)
        else:
            logits = logits_ptr + row // row_length * stride_lb + row % row_length * stride_ll
            completion, _ = _completion_of(completion_ptr, row, row_length, n_completions, PACKED)
            tau = _temperature(temperature_ptr, temperature, completion, row, temperature_per_row, HAS_TEMPERATURE)
            peak = tl.load(statistics_ptr + row)
            log_total = tl.load(statistics_ptr + n_rows + row)
            log_total_kl = tl.load(statistics_ptr + 3 * tl.cast(n_rows, tl.int64) + row)
            _write_gradient(logits, gradient, tiles, _token(tokens_ptr, row, V), peak, log_total, log_total_kl, c / tau,
                            c_kl, LOG2E / tau, LOG2E / kl_temperature, softcap, TWO, HAS_SOFTCAP, V, BLOCK_V, WIDTH,
                            AXIS, STAGES)  # fmt: skip


def launch_logprobs(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    completion: Tensor | None,
    n_completions: int,
    temperature: Tensor | None,
    temperature_value: float,
    kl_temperature: float,
    softcap: float,
    two: bool,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ℓ (N,) and statistics (5, N), float32, of the N = B * L rows of logits (B, L, V) with unit stride in V.

    All else is flat and contiguous: tokens, mask (uint8), completion (N,), temperature (B,) or (N,). softcap 0: none.
    gradient (B, L, V): is given ∂ℓ/∂x; it may be the logits themselves. Not with `two`, where ℓ has two temperatures.
    """
    assert gradient is None or not two, "the gradient of two temperatures needs their weights"
    b, length, vocab = logits.shape
    n = b * length
    logprobs = torch.empty(n, dtype=torch.float32, device=logits.device)
    statistics = torch.empty(STATISTICS, n, dtype=torch.float32, device=logits.device)
    if n == 0:
        return logprobs, statistics
    tile = tile_for(vocab, logits.dtype, logits.device)
    with on_device(logits.device):
        _logprobs_kernel[grid_for(tile, n, logits.device)](
            logits, gradient, tokens, mask, completion, temperature, logprobs, statistics, n, length,
            vocab // tile.block_v, n_completions, logits.stride(0), logits.stride(1),
            *((0, 0) if gradient is None else gradient.stride()[:2]), per_row(temperature, n_completions),
            temperature_value, kl_temperature, softcap, HAS_GRADIENT=gradient is not None, HAS_MASK=mask is not None,
            PACKED=completion is not None, HAS_TEMPERATURE=temperature is not None, HAS_SOFTCAP=softcap > 0, TWO=two,
            **launch_options(tile, logits),
        )  # fmt: skip
    return logprobs, statistics


def launch_logprobs_backward(
    grad_logprobs: Tensor,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    completion: Tensor | None,
    n_completions: int,
    temperature: Tensor | None,
    temperature_value: float,
    softcap: float,
    statistics: Tensor,
    grad_kl: Tensor | None = None,
    kl_temperature: float = 1.0,
    gradient: Tensor | None = None,
) -> Tensor:
    """Gradient of the logits (B, L, V) from that of ℓ (N,); the rest as in `launch_logprobs`.

    grad_kl (N,): of ℓ at the KL's temperature too. gradient: where it is written, the logits themselves if need be.
    """
    b, length, vocab = logits.shape
    if gradient is None:
        gradient = torch.empty((b, length, vocab), dtype=logits.dtype, device=logits.device)
    if b * length == 0:
        return gradient
    tile = tile_for(vocab, logits.dtype, logits.device)
    with on_device(logits.device):
        _logprobs_backward_kernel[grid_for(tile, b * length, logits.device)](
            grad_logprobs, grad_kl, logits, tokens, mask, completion, temperature, statistics, gradient, b * length,
            length, vocab // tile.block_v, n_completions, logits.stride(0), logits.stride(1), gradient.stride(0),
            gradient.stride(1), per_row(temperature, n_completions), temperature_value, kl_temperature, softcap,
            HAS_MASK=mask is not None, PACKED=completion is not None, HAS_TEMPERATURE=temperature is not None,
            HAS_SOFTCAP=softcap > 0, TWO=grad_kl is not None, **launch_options(tile, logits),
        )  # fmt: skip
    return gradient
