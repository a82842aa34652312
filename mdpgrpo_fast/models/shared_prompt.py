"""Attention over groups whose prompt is stored once: completions see the prompt and themselves, nothing else.

What a completion attends to are two blocks without holes: all of the prompt, and its own tokens causally. Each block is
one call of flash attention (PyTorch's, or flash-attn's); the softmax over both follows from their log-sum-exps, and so
do the gradients: flash attention's backward pass takes the output and the log-sum-exp of the whole row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Span = tuple[int, int]


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that nobody waits for: to a GPU from pinned memory, from any other the host waits."""
    pinned = device.type == "cuda" and host.device.type == "cpu"  # which torch's default device may not be
    return (host.pin_memory() if pinned else host).to(device, non_blocking=True)


@dataclass(frozen=True)
class PackedLayout:
    """Where the T tokens of a packed row lie: of each group the prompt, then its completions, then the next group.

    prompts: [start, end) of each prompt; completions: [start, end) of those of each group, adjacent, none empty.
    """

    prompts: list[Span]
    completions: list[list[Span]]
    _bounds: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def own(self) -> list[Span]:
        """Every prompt and every completion, in order."""
        return [s for p, group in zip(self.prompts, self.completions, strict=True) for s in (p, *group)]

    @property
    def tails(self) -> list[Span]:
        """[start, end) of all completions of each group together; empty for a group that has none."""
        return [(p[1], g[-1][1] if g else p[1]) for p, g in zip(self.prompts, self.completions, strict=True)]

    @property
    def longest(self) -> int:
        """Positions of the longest prompt with a completion."""
        groups = zip(self.prompts, self.completions, strict=True)
        return max(b - a + max((d - c for c, d in g), default=0) for (a, b), g in groups)

    def bounds(self, device: torch.device) -> tuple[Tensor, ...]:
        """Cumulative lengths for variable-length attention, int32: of `own`; and queries and keys of `tails` to
        `prompts`, tiled over all rows by segments without keys (prompts) and without queries (completions). And the
        rows of `tails`, int64."""
        if device not in self._bounds:
            own = [0, *(end for _, end in self.own)]
            queries, keys = [0], [0]
            for (start, end), (_, last) in zip(self.prompts, self.tails, strict=True):
                queries += [end, last, last]
                keys += [start, end, last]
            rows = torch.cat([torch.arange(*t) for t in self.tails])
            host = (*(torch.tensor(x, dtype=torch.int32) for x in (own, queries, keys)), rows)
            self._bounds[device] = tuple(upload(x, device) for x in host)
        return self._bounds[device]


class _SharedPromptAttention(torch.autograd.Function):
    """query (H, T, d), key, value (H', T, d) to (T, H, d); H is a multiple of H'."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, kernels: Any
    ) -> Tensor:  # fmt: skip
        inputs = (query.detach(), key.detach(), value.detach())
        out: Tensor
        out, lse, seeds = kernels.forward(*inputs, layout, scale, own=True)
        more, lse_more, seeds_more = kernels.forward(*inputs, layout, scale, own=False)
        for rows in kernels.rows(layout, query.device):
            both = torch.logaddexp(lse[:, rows], lse_more[:, rows])
            weight, weight_more = ((x[:, rows] - both).exp().T[..., None] for x in (lse, lse_more))
            out[rows] = (out[rows] * weight + more[rows] * weight_more).to(out.dtype)
            lse[:, rows] = both
        ctx.save_for_backward(*inputs, out, lse, *seeds, *seeds_more)
        ctx.layout, ctx.scale, ctx.kernels = layout, scale, kernels
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *seeds = ctx.saved_tensors
        half = len(seeds) // 2
        args = (grad, query, key, value, out, lse)
        found = ctx.kernels.backward(*args, seeds[:half], ctx.layout, ctx.scale, own=True)
        more = ctx.kernels.backward(*args, seeds[half:], ctx.layout, ctx.scale, own=False)
        return *(a.add_(b) for a, b in zip(found, more, strict=True)), None, None, None


def runs_on(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether the attention below has kernels there: on a GPU those of PyTorch's flash attention."""
    if device.type == "cpu":
        return True
    half = dtype in (torch.bfloat16, torch.float16)
    # AMD's GPUs have kernels of their own, which were not tried.
    known = device.type == "cuda" and torch.version.hip is None
    return (
        known
        and half
        and head_size <= 256
        and head_size % 8 == 0
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def shared_prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, kernels: Any = None
) -> Tensor:
    """query (1, H, T, d), key and value (1, H', T, d) to (1, T, H, d), as transformers' attention functions have it.

    float32, bfloat16 and float64 on the CPU; bfloat16 and float16 on a GPU. H must be a multiple of H'.
    kernels: `FlashAttn`; None: PyTorch's of the device.
    """
    kind = query.device.type
    # As PyTorch's own attention: rotary embeddings may have made queries and keys float32 again.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    assert len(query) == 1 and query.shape[2] == layout.own[-1][1], "one packed row, of the layout's length"
    kernels = kernels or (_cuda if query.is_cuda else _cpu)
    out: Tensor = _SharedPromptAttention.apply(query[0], key[0], value[0], layout, scale, kernels)
    return out[None]


# ---- the CPU: a call for each block ---------------------------------------------------------------------------------


class _cpu:
    """Blocks cut out as views; the heads that share a key are a dimension that the key is expanded over."""

    @staticmethod
    def rows(layout: PackedLayout, device: torch.device) -> list[slice]:
        """Where completions are."""
        return [slice(*t) for t in layout.tails if t[1] > t[0]]

    @staticmethod
    def _spans(layout: PackedLayout, own: bool) -> list[tuple[Span, Span]]:
        if own:
            return [(s, s) for s in layout.own]
        return [(t, p) for t, p in zip(layout.tails, layout.prompts, strict=True) if t[1] > t[0]]

    @staticmethod
    def _block(query: Tensor, key: Tensor, value: Tensor, queries: Span, keys: Span) -> tuple[Tensor, Tensor, Tensor]:
        heads = len(key)
        q = query[:, slice(*queries)].unflatten(0, (heads, -1))
        k, v = (x[:, None, slice(*keys)].expand(-1, q.shape[1], -1, -1) for x in (key, value))
        return q, k, v

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, own: bool) -> Any:
        heads, length, size = query.shape
        out = query.new_empty(length, heads, size)
        real = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = query.new_empty(heads, length, dtype=real)
        for queries, keys in _cpu._spans(layout, own):
            block = _cpu._block(query, key, value, queries, keys)
            found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*block, 0.0, own, scale=scale)
            out[slice(*queries)] = found.flatten(0, 1).transpose(0, 1)
            lse[:, slice(*queries)] = sums.flatten(0, 1)
        return out, lse, ()

    @staticmethod
    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, seeds: Any,
        layout: PackedLayout, scale: float, own: bool,
    ) -> list[Tensor]:  # fmt: skip
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        heads = len(key)
        for queries, keys in _cpu._spans(layout, own):
            q, k, v = _cpu._block(query, key, value, queries, keys)
            g, o = (x[slice(*queries)].transpose(0, 1).unflatten(0, (heads, -1)) for x in (grad, out))
            sums = lse[:, slice(*queries)].unflatten(0, (heads, -1))
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, q, k, v, o, sums, 0.0, own, scale=scale
            )
            grads[0][:, slice(*queries)] += found[0].flatten(0, 1)
            for whole, one in zip(grads[1:], found[1:], strict=True):
                whole[:, slice(*keys)] += one.sum(1)
        return grads


# ---- a GPU: one call for all blocks ---------------------------------------------------------------------------------


class _cuda:
    """PyTorch's variable-length flash attention, which takes (T, H, d) and fewer heads of keys than of queries."""

    @staticmethod
    def rows(layout: PackedLayout, device: torch.device) -> list[Tensor]:
        return [layout.bounds(device)[3]]

    @staticmethod
    def lengths(layout: PackedLayout, own: bool, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
        """Cumulative lengths of queries and keys, and the longest of both, as variable-length functions take them.

        The longest is at least 2: for single queries they have another path, which takes no segment without one.
        """
        bounds, queries, keys, _ = layout.bounds(device)
        if own:
            longest = max(2, *(b - a for a, b in layout.own))
            return bounds, bounds, longest, longest
        longest = max(2, *(b - a for a, b in itertools.chain(layout.tails, layout.prompts)))
        return queries, keys, longest, longest

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, own: bool) -> Any:
        inputs = [x.transpose(0, 1) for x in (query, key, value)]
        lengths = _cuda.lengths(layout, own, query.device)
        out, lse, *seeds, _ = torch.ops.aten._flash_attention_forward(*inputs, *lengths, 0.0, own, False, scale=scale)
        return out, lse, tuple(seeds)

    @staticmethod
    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, seeds: Any,
        layout: PackedLayout, scale: float, own: bool,
    ) -> list[Tensor]:  # fmt: skip
        inputs = [x.transpose(0, 1) for x in (query, key, value)]
        lengths = _cuda.lengths(layout, own, query.device)
        found = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), *inputs, out, lse, *lengths, 0.0, own, *seeds, scale=scale
        )
        return [x.transpose(0, 1) for x in found]


@dataclass(frozen=True)
class FlashAttn:
    """flash-attn's, of 2.7 or newer: those below its public functions, as a backward pass has to take a log-sum-exp."""

    package: Any  # flash_attn.flash_attn_interface
    softcap: float = 0.0

    rows = staticmethod(_cuda.rows)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, own: bool) -> Any:
        inputs = [x.transpose(0, 1) for x in (query, key, value)]
        out, lse, _, _ = self.package._flash_attn_varlen_forward(
            *inputs, *_cuda.lengths(layout, own, query.device), 0.0, scale, own, softcap=self.softcap
        )
        return out, lse, ()

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, seeds: Any,
        layout: PackedLayout, scale: float, own: bool,
    ) -> list[Tensor]:  # fmt: skip
        inputs = [x.transpose(0, 1) for x in (query, key, value)]
        make = torch.empty_like if own else torch.zeros_like  # where no query has looked, or none is
        found = [make(x, memory_format=torch.contiguous_format) for x in inputs]
        self.package._flash_attn_varlen_backward(
            grad.contiguous(), *inputs, out, lse, *found, *_cuda.lengths(layout, own, query.device), 0.0, scale, own,
            -1, -1, self.softcap, None, torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return [x.transpose(0, 1) for x in found]


_attention = shared_prompt_attention


def stay_outside() -> None:
    """From now on models call the attention outside of what torch.compile makes: a layout would be compiled into it."""
    global _attention
    # Not at import: it loads the compiler.
    _attention = torch.compiler.disable(shared_prompt_attention)


# ---- in models of transformers --------------------------------------------------------------------------------------


@contextmanager
def attention_named(model: Any, name: str) -> Iterator[None]:
    """Makes this the attention of all parts of the model, without a look at whether it can be."""
    from transformers import PreTrainedModel

    parts = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    before = [config._attn_implementation_internal for config in parts]
    try:
        for config in parts:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, one in zip(parts, before, strict=True):
            config._attn_implementation_internal = one


_installed: set[str] = set()


def install(name: str) -> None:
    """Lets models whose attention is `name` take `shared_prompt=PackedLayout`; a call without it is as before.

    name: "sdpa" or "flash_attention_2".
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if name in _installed:
        return
    original = ALL_ATTENTION_FUNCTIONS[name]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, shared_prompt: Any = None,
        **more: Any,
    ) -> Any:  # fmt: skip
        if shared_prompt is None:
            return original(module, query, key, value, attention_mask, **more)
        scale = more.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        kernels = None
        if name == "flash_attention_2":
            from flash_attn import flash_attn_interface

            kernels = FlashAttn(flash_attn_interface, float(more.get("softcap") or 0.0))
        return _attention(query, key, value, shared_prompt, float(scale), kernels), None

    AttentionInterface.register(name, attend)
    _installed.add(name)
