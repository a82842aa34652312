"""Attention of one token a row over a cache of fixed length: only what is filled is read, by several programs a row.

A program takes the query heads that share a key head, so that each key is read once, and one part of the row's places.
How many parts there are is fixed, as a captured launch is; where they lie follows from the newest place, which is read
on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import LOG2E, NEG_INF, _logit, _softcap
from ..tiles import FP_FUSION, on_device

PROGRAMS = 512  # that keep a GPU's memory busy: rows times key heads times parts
MOST_PARTS = 32


@triton.jit(do_not_specialize_on_alignment=["first_ptr", "last_ptr"])
def _attention_kernel(
    query_ptr, keys_ptr, values_ptr, first_ptr, last_ptr, out_ptr, lse_ptr, stride_q, stride_h, stride_k, stride_kh,
    scale, softcap, window, GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out (R, H, parts, D) in out's dtype and lse (R, H, parts) to the base 2, where there is more than one part."""
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kv_heads, parts = tl.num_programs(1), tl.num_programs(2)
    end = (tl.load(last_ptr) + 1).to(tl.int32)
    begin = tl.load(first_ptr + row).to(tl.int32)
    if window is not None:
        begin = tl.maximum(begin, end - window)
    each = tl.cdiv(tl.cdiv(end - begin, BLOCK), parts) * BLOCK
    begin += part * each
    end = tl.minimum(end, begin + each)

    # 16 rows are what a tensor core takes; those beyond the group are copies of its first.
    members = tl.arange(0, 16 if GROUP < 16 else GROUP)
    member = tl.where(members < GROUP, members, 0)
    columns = tl.arange(0, BLOCK_SIZE)
    inside = columns < SIZE
    query = tl.load(
        query_ptr + row * stride_q + (head * GROUP + member[:, None]) * stride_h + columns,
        mask=inside[None, :],
        other=0,
    )
    places = tl.arange(0, BLOCK)
    keys = keys_ptr + row * stride_k + head * stride_kh.to(tl.int64)
    values = values_ptr + row * stride_k + head * stride_kh.to(tl.int64)
    top = tl.full((members.shape[0],), NEG_INF, tl.float32)
    total = tl.zeros((members.shape[0],), tl.float32)
    out = tl.zeros((members.shape[0], BLOCK_SIZE), tl.float32)
    for start in tl.range(begin, end, BLOCK):
        there = start + places < end
        # Beside what is filled there may be anything, and 0 times NaN is NaN.
        mask = there[:, None] & inside[None, :]
        at = (start + places)[:, None] * SIZE + columns[None, :]
        key = tl.load(keys + at, mask=mask, other=0)
        value = tl.load(values + at, mask=mask, other=0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        if softcap is not None:
            capped, _ = _softcap(scores, softcap)
            scores = _logit(capped, softcap)
        scores = tl.where(there[None, :], scores * LOG2E, NEG_INF)
        new = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        rest = tl.exp2(top - new)
        total = total * rest + tl.sum(weights, 1)
        out = out * rest[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        top = new
    # A part beyond what is filled has read nothing and weighs nothing.
    out = out / tl.where(total == 0, 1.0, total)[:, None]
    place = ((row * kv_heads + head) * GROUP + members) * parts + part
    own = members < GROUP
    tl.store(
        out_ptr + place[:, None] * SIZE + columns[None, :], out.to(out_ptr.dtype.element_ty),
        mask=own[:, None] & inside[None, :],
    )  # fmt: skip
    if lse_ptr is not None:
        tl.store(lse_ptr + place, tl.where(total == 0, NEG_INF, top + tl.log2(total)), mask=own)


@triton.jit
def _combine_kernel(parts_ptr, lse_ptr, out_ptr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, PARTS: tl.constexpr):
    """The parts (R * H, PARTS, D) of a head's softmax into out (R * H, D)."""
    head = tl.program_id(0).to(tl.int64)
    part, columns = tl.arange(0, PARTS), tl.arange(0, BLOCK_SIZE)
    lse = tl.load(lse_ptr + head * PARTS + part)
    weight = tl.exp2(lse - tl.max(lse, 0))
    weight = weight / tl.sum(weight, 0)
    inside = columns < SIZE
    at = (head * PARTS + part[:, None]) * SIZE + columns[None, :]
    x = tl.load(parts_ptr + at, mask=inside[None, :] & (weight > 0)[:, None], other=0)
    tl.store(out_ptr + head * SIZE + columns, tl.sum(x * weight[:, None], 0).to(out_ptr.dtype.element_ty), mask=inside)


def takes(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel takes query (R, H, D), keys and values (R, H', C, D)."""
    known = query.dtype in (torch.bfloat16, torch.float16, torch.float32) and query.dtype == keys.dtype == values.dtype
    alike = keys.shape == values.shape and keys.stride() == values.stride() and keys[0].is_contiguous()
    return known and alike and keys.shape[3] <= 256 and query.shape[1] // keys.shape[1] <= 16


def launch_attention(
    query: Tensor, keys: Tensor, values: Tensor, first: Tensor, last: Tensor,
    scale: float, softcap: float | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """query (R, H, D), keys and values (R, H', C, D) of one dtype to (R, H, D).

    first (R,) and last (1,), int64: each row's first place in the cache and the newest of all; none is waited for.
    """
    rows, heads, size = query.shape
    kv_heads, length = keys.shape[1:3]
    if query.stride(2) != 1:
        query = query.contiguous()
    block_size = max(16, triton.next_power_of_2(size))
    block = max(16, 8192 // (block_size * query.element_size()))
    parts = 1
    while parts < MOST_PARTS and 2 * parts * block <= length and rows * kv_heads * parts < PROGRAMS:
        parts *= 2
    out = query.new_empty(rows, heads, size)
    partial, lse = out, None
    if parts > 1:
        partial = torch.empty(rows, heads, parts, size, dtype=torch.float32, device=query.device)
        lse = torch.empty(rows, heads, parts, dtype=torch.float32, device=query.device)
    with on_device(query.device):
        _attention_kernel[(rows, kv_heads, parts)](
            query, keys, values, first, last, partial, lse, query.stride(0), query.stride(1), keys.stride(0),
            keys.stride(1), scale, softcap, window, heads // kv_heads, size, block_size, block,
            "ieee" if query.dtype == torch.float32 else "tf32", num_warps=4,
            num_stages=3 if block_size * query.element_size() <= 256 else 2, **FP_FUSION,
        )  # fmt: skip
        if lse is not None:
            _combine_kernel[(rows * heads,)](
                partial, lse, out, size, block_size, parts, num_warps=max(1, parts * block_size // 1024), **FP_FUSION,
            )  # fmt: skip
    return out
