"""A stand-in for flash-attn on the CPU: its functions by their definition, under the signatures of 2.8.3."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as utils
from torch import Tensor
from transformers import PreTrainedModel


def _segments(cu_q: Tensor, cu_k: Tensor) -> list[tuple[int, int, int, int]]:
    """[start, end) of the queries and of the keys of each sequence that has both."""
    bounds = [x.tolist() for x in (cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:])]
    return [(a, b, c, d) for a, b, c, d in zip(*bounds, strict=True) if a < b and c < d]


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, window: int, softcap: float) -> tuple[Tensor, Tensor]:
    """(H, n, m) of q (n, H, d) and k (m, H', d), -inf where not looked at; and their slope by what they are made of.

    Masks are aligned at the last query and the last key, as since 2.1.
    """
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("nhd,mhd->hnm", q, keys) * scale
    slope = torch.full_like(scores, scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
        slope = scale * (1 - (scores / softcap) ** 2)
    gap = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    hidden = (gap < 0) & causal | (gap > window) & (window >= 0)
    return scores.masked_fill(hidden, -torch.inf), slope.masked_fill(hidden, 0)


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, causal: bool,
    window: int = -1, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """On (T, H, d): the output and the log-sum-exp (H, T); of rows without keys 0 and inf."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    assert cu_q[-1] == len(q) and cu_k[-1] == len(k), "the segments tile all rows"
    assert max_q >= cu_q.diff().max() and max_k >= cu_k.diff().max()
    # For single queries the packages have a path of its own, which takes one of every sequence.
    assert max_q > 1 or len(q) == len(cu_q) - 1
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], len(q)), torch.inf, dtype=q.dtype)
    for a, b, c, d in _segments(cu_q, cu_k):
        scores, _ = _scores(q[a:b], k[c:d], scale, causal, window, softcap)
        lse[:, a:b] = scores.logsumexp(-1)
        p = (scores - lse[:, a:b, None]).exp()
        out[a:b] = torch.einsum("hnm,mhd->nhd", p, v[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1))
    return out, lse


def varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float,
    causal: bool, window: int = -1, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the algorithm has it: from the output and the log-sum-exp that it is given."""
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for a, b, c, d in _segments(cu_q, cu_k):
        scores, slope = _scores(q[a:b], k[c:d], scale, causal, window, softcap)
        p = (scores - lse[:, a:b, None]).exp()
        dp = torch.einsum("nhd,mhd->hnm", grad[a:b], v[c:d].repeat_interleave(group, 1))
        ds = p * (dp - (grad[a:b] * out[a:b]).sum(-1).T[..., None]) * slope
        dq[a:b] += torch.einsum("hnm,mhd->nhd", ds, k[c:d].repeat_interleave(group, 1))
        dk[c:d] += torch.einsum("hnm,nhd->mhd", ds, q[a:b]).unflatten(1, (-1, group)).sum(2)
        dv[c:d] += torch.einsum("hnm,nhd->mhd", p, grad[a:b]).unflatten(1, (-1, group)).sum(2)
    return dq, dk, dv


# ---- the package ----------------------------------------------------------------------------------------------------


def _flash_attn_varlen_forward(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Any = None, return_softmax: bool = False, block_table: Any = None,
    leftpad_k: Any = None, seqused_k: Any = None, zero_tensors: bool = False,
) -> Any:  # fmt: skip
    assert dropout_p == 0 and alibi_slopes is None and block_table is None
    found = varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size_left,
        softcap,
    )  # fmt: skip
    return *found, torch.zeros(0), torch.zeros(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, dq: Any, dk: Any, dv: Any, cu_seqlens_q: Any,
    cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Any, deterministic: bool,
    rng_state: Any = None, zero_tensors: bool = False,
) -> Any:  # fmt: skip
    assert dropout_p == 0 and alibi_slopes is None and isinstance(deterministic, bool)
    assert all(x.is_contiguous() for x in (dout, dq, dk, dv))
    found = varlen_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size_left, softcap
    )
    # Only rows that a segment with queries and keys covers are sure to be written.
    used = [torch.zeros(len(x), dtype=torch.bool) for x in (dq, dk, dv)]
    for a, b, c, d in _segments(cu_seqlens_q, cu_seqlens_k):
        used[0][a:b], used[1][c:d], used[2][c:d] = True, True, True
    for into, x, rows in zip((dq, dk, dv), found, used, strict=True):
        into[rows] = x[rows]
    return torch.zeros(0)


def flash_attn_varlen_func(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False, return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:  # fmt: skip
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    parts, group = [], q.shape[1] // k.shape[1]
    for a, b, c, d in _segments(cu_seqlens_q, cu_seqlens_k):
        scores, _ = _scores(q[a:b], k[c:d], scale, causal, window_size[0], softcap)
        parts.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v[c:d].repeat_interleave(group, 1)))
    return torch.cat(parts)


def flash_attn_func(
    q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
    window_size: Any = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    bounds = [torch.arange(0, (len(x) + 1) * x.shape[1], x.shape[1], dtype=torch.int32) for x in (q, k)]
    rows = (x.flatten(0, 1) for x in (q, k, v))
    longest = (q.shape[1], k.shape[1])
    return flash_attn_varlen_func(
        *rows, *bounds, *longest, dropout_p, softmax_scale, causal, window_size, softcap
    ).unflatten(0, q.shape[:2])


def flash_attn_with_kvcache(q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None) -> Any:
    raise NotImplementedError


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is there, and transformers takes it on the CPU too."""
    package, interface, padding = (
        ModuleType(f"flash_attn{name}") for name in ("", ".flash_attn_interface", ".bert_padding")
    )
    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache):
        setattr(package, function.__name__, function)
    for function in (_flash_attn_varlen_forward, _flash_attn_varlen_backward):
        setattr(interface, function.__name__, function)
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input  # type: ignore[attr-defined]
    package.flash_attn_interface, package.bert_padding = interface, padding  # type: ignore[attr-defined]
    for module in (package, interface, padding):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
