"""Linear layers of float32 on a CPU through oneDNN, where that is faster than the BLAS which PyTorch calls.

PyTorch's own float32 matmuls go to MKL, which on other vendors' processors does not use AVX-512. PyTorch carries oneDNN
too, which does; the op is the one that its compiler takes. Sums are of the same precision, in another order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def _op(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) weightᵀ (N, K) + bias."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


# Most shapes that each cache of compiled kernels keeps. A shape takes 0.4 to 1.5 MB, and a run over packed
# micro-batches, each of another number of tokens, fills all of the caches' own 1024. A kernel is made again in half a
# millisecond.
SHAPES = 128


def _bound_caches() -> None:
    """oneDNN's cache and that of PyTorch's calls of it, which read their bounds when they are first used; those that
    the environment has stay."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(SHAPES))


@cache
def prefers_onednn() -> bool:
    """Whether this is a CPU on which oneDNN was measured to be the faster one: AMD's with AVX-512. Where it is, the
    caches of its kernels are bounded (`SHAPES`), as many lengths would fill memory with kernels of each."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.cpu._is_avx512_supported():
        return False
    try:
        found = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    if found:
        _bound_caches()
    return found


def _plain(*tensors: Tensor | None) -> bool:
    return all(
        x is None
        or (type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0)
        for x in tensors
    )


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (K, N)."""
    return _op(a, b.t()) if prefers_onednn() and _plain(a, b) else torch.mm(a, b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = _op(x.reshape(-1, x.shape[-1]), weight if packed is None else packed, bias)
        found: Tensor = torch.ops.aten._unsafe_view(out, [*x.shape[:-1], len(weight)])
        return found  # none that autograd takes for a view: models write into what they get

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]).contiguous()
        return (
            _op(g, weight.t()).view_as(x) if needs[0] else None,
            _op(g.t(), rows.t()) if needs[1] else None,
            g.sum(0) if needs[2] else None,
            None,
        )


def _forward(module: Any, x: Tensor) -> Tensor:
    parameters, packed_weight = module._parameters, module.__dict__.get("_packed_weight")
    weight, bias = parameters["weight"], parameters["bias"]
    other = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if packed_weight is not None and not (other or torch.is_grad_enabled()) and x.dtype == torch.float32 and x.numel():
        # A step of sampling is many small layers: as little as can be in between.
        return _op(x, packed_weight, bias)
    if other or not _plain(x, weight, bias):
        return nn.functional.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias, packed_weight)
    return out


def install(model: nn.Module) -> None:
    """Make this the forward pass of the model's linear layers, where the CPU is one that it is for; else nothing.

    Other dtypes, devices and kinds of tensors (shards), autocast and torch.compile go the usual way. In place.
    """
    if not prefers_onednn():
        return
    for module in _layers(model):
        module.forward = partial(_forward, module)


def _layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if type(m).forward is nn.Linear.forward]


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """While weights do not change and passes are short: each is kept in oneDNN's own layout too, a second copy."""
    layers = [m for m in _layers(model) if "forward" in m.__dict__ and _plain(m.weight)]
    try:
        for m in layers:
            m._packed_weight = torch.ops.mkldnn._reorder_linear_weight(m.weight.detach(), 16)
        yield
    finally:
        for m in layers:
            m.__dict__.pop("_packed_weight", None)
