"""Attention of one token a row over a cache of fixed length, of which only the tokens that are there are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from ...models.shared_prompt import attention_named
from ...ops import backends

NAME = "mdpgrpo_decode"


def plain_attention(
    query: Tensor, keys: Tensor, values: Tensor, first: Tensor, last: Tensor,
    scale: float, softcap: float | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """query (R, H, D), keys and values (R, H', C, D) to (R, H, D); H is a multiple of H'.

    first (R,) and last (1,), int64: each row's first token and the newest of all, as places in the cache. What lies
    beside them must be finite. softcap: scores become softcap * tanh(score / softcap); window: only the newest tokens.
    """
    place = torch.arange(keys.shape[2], device=keys.device)
    allowed = (place >= first[:, None]) & (place <= last)
    if window is not None:
        allowed &= place > last - window
    scores = query.unflatten(1, (keys.shape[1], -1)) @ keys.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~allowed[:, None, None], -torch.inf).softmax(-1, dtype=_sum_dtype(scores))
    out: Tensor = (weights.to(values.dtype) @ values).flatten(1, 2)
    return out


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return backends.choose("auto", device, dtype) == "triton"


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, *more: Any) -> Tensor:
    """As `plain_attention`, on a GPU by a kernel that reads only what is there, whatever lies beside it."""
    if has_kernels(query.device, query.dtype):
        from ...kernels.triton.decode.attention import launch_attention, takes

        if takes(query, keys, values):
            return launch_attention(query, keys, values, *more)
    return plain_attention(query, keys, values, *more)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


_attends: list[Callable[..., Any]] = []
# Registered once: what stays registered would keep a cache alive.
AttentionInterface.register(NAME, lambda *args, **kwargs: _attends[-1](*args, **kwargs))


@contextmanager
def attention_of(model: Any, attend: Callable[..., Any]) -> Iterator[None]:
    """Makes `attend` the attention of all parts of the model. transformers makes no masks for it, as it knows none."""
    _attends.append(attend)
    try:
        with attention_named(model, NAME):
            yield
    finally:
        _attends.pop()
