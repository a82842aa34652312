"""Small pieces of a decoder layer in one launch each: on a row or a few, a launch costs more than what it does."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import FP_FUSION, on_device

LONGEST_NORM = 16384


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, ONE_PLUS: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < SIZE
    x = tl.load(x_ptr + row * SIZE + columns, mask=inside, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    # As models have it: rounded before the weight comes, where that is all of it.
    y = y * (1.0 + weight) if ONE_PLUS else y.to(out_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(out_ptr + row * SIZE + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> Tensor:
    """x (..., D) / sqrt(mean x² + eps) times weight (D,), or times 1 + weight, in x's dtype; sums in float32."""
    size = x.shape[-1]
    x = x.contiguous()
    out, block = torch.empty_like(x), triton.next_power_of_2(size)
    with on_device(x.device):
        _rms_norm_kernel[(x.numel() // size,)](
            x, weight, out, eps, size, block, one_plus, num_warps=max(1, min(8, block // 256)), **FP_FUSION
        )
    return out


@triton.jit
def _rotate_kernel(
    query_ptr, key_ptr, cos_ptr, sin_ptr, query_out_ptr, key_out_ptr, stride_q, stride_qh, stride_k, stride_kh, heads,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head, columns = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    kv_heads = tl.num_programs(1) - heads
    inside = columns < HALF
    if head < heads:
        source = query_ptr + row * stride_q + head * stride_qh
        target = query_out_ptr + (row * heads + head) * (2 * HALF)
    else:
        source = key_ptr + row * stride_k + (head - heads) * stride_kh
        target = key_out_ptr + (row * kv_heads + head - heads) * (2 * HALF)
    cos, sin = cos_ptr + row * (2 * HALF) + columns, sin_ptr + row * (2 * HALF) + columns
    a = tl.load(source + columns, mask=inside, other=0).to(tl.float32)
    b = tl.load(source + HALF + columns, mask=inside, other=0).to(tl.float32)
    first = a * tl.load(cos, mask=inside, other=0).to(tl.float32) - b * tl.load(sin, mask=inside, other=0).to(
        tl.float32
    )
    cos, sin = cos + HALF, sin + HALF
    last = b * tl.load(cos, mask=inside, other=0).to(tl.float32) + a * tl.load(sin, mask=inside, other=0).to(tl.float32)
    tl.store(target + columns, first.to(query_out_ptr.dtype.element_ty), mask=inside)
    tl.store(target + HALF + columns, last.to(query_out_ptr.dtype.element_ty), mask=inside)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """query (R, H, 1, D) and key (R, H', 1, D) turned by cos and sin (R, 1, D), halves against halves; one dtype."""
    rows, heads, _, size = query.shape
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    out = tuple(x.new_empty(x.shape) for x in (query, key))
    with on_device(query.device):
        _rotate_kernel[(rows, heads + key.shape[1])](
            query, key, cos.contiguous(), sin.contiguous(), *out, query.stride(0), query.stride(1), key.stride(0),
            key.stride(1), heads, size // 2, triton.next_power_of_2(size // 2), num_warps=1, **FP_FUSION,
        )  # fmt: skip
    return out[0], out[1]


@triton.jit(do_not_specialize_on_alignment=["place_ptr"])
def _append_kernel(
    key_ptr, value_ptr, keys_ptr, values_ptr, place_ptr, stride_k, stride_kh, stride_v, stride_vh, length,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head, columns = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    inside = columns < SIZE
    to = ((row * tl.num_programs(1) + head) * length + tl.load(place_ptr)) * SIZE + columns
    key = tl.load(key_ptr + row * stride_k + head * stride_kh + columns, mask=inside, other=0)
    value = tl.load(value_ptr + row * stride_v + head * stride_vh + columns, mask=inside, other=0)
    tl.store(keys_ptr + to, key, mask=inside)
    tl.store(values_ptr + to, value, mask=inside)


def append(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, place: Tensor) -> None:
    """key and value (R, H, 1, D) into contiguous keys and values (R, H, C, D) at place (1,) int64, below C."""
    rows, heads, length, size = keys.shape
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    with on_device(key.device):
        _append_kernel[(rows, heads)](
            key, value, keys, values, place, key.stride(0), key.stride(1), value.stride(0), value.stride(1), length,
            size, triton.next_power_of_2(size), num_warps=1, **FP_FUSION,
        )  # fmt: skip


@triton.jit
def _gated_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(x_ptr + row * 2 * size + columns, mask=inside, other=0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * size + size + columns, mask=inside, other=0).to(tl.float32)
    # Rounded between, as two operations are.
    gate = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * size + columns, (gate * up).to(out_ptr.dtype.element_ty), mask=inside)


def gated(x: Tensor) -> Tensor:
    """silu of the first half of x (..., 2 * D), contiguous, times the second: (..., D)."""
    size = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], size)
    with on_device(x.device):
        _gated_kernel[(out.numel() // size, triton.cdiv(size, 1024))](x, out, size, 1024, num_warps=4, **FP_FUSION)
    return out
