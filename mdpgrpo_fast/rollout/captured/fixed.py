"""Decode steps of fixed shapes and addresses, which a CUDA graph can hold: nothing in them waits for the device."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..record import Record, Sampling
from .attention import attention_of, decode_attention, has_kernels
from .fused import Fused

ROOM = 256  # the cache's length is a multiple: prompts of other lengths often fit without another capture
SMALLEST = 8  # rows below which a smaller batch saves nothing: a step then takes as long as reading the weights
FREE_SHARE = 1 / 2  # of the free memory, for the cache; the rest is for what a step computes and for copies of rows


class Unfit(Exception):
    """Why a model's steps cannot be of fixed shapes."""


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU that nobody uses, those that torch holds for later among them; no limit elsewhere."""
    if device.type != "cuda":
        return math.inf
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


class FixedLayer(DynamicLayer):
    """Keys and values (R, heads, C, D), the newest token's at `place` (1,)."""

    keys: Any
    values: Any

    def __init__(self, keys: Tensor, values: Tensor, window: int | None, place: Tensor, has_kernels: bool) -> None:
        super().__init__()
        self.has_kernels = has_kernels
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device
        self.keys, self.values, self.window, self.place = keys, values, window, place
        self.is_updated = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.has_kernels:
            from ...kernels.triton.decode.blocks import append

            append(key_states, value_states, self.keys, self.values, self.place)
        else:
            self.keys.index_copy_(2, self.place, key_states)
            self.values.index_copy_(2, self.place, value_states)
        self.is_updated = True
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Places in use, as a tensor (1,): a number would stay that of the step that was captured."""
        return self.place + self.is_updated


class FixedSteps:
    """Steps over the first R of B rows, each with room for `length` tokens in the cache.

    model: looked at for what has kernels; like: the cache of its prompts, for sizes and dtypes. The rows of smaller
    batches begin where those of larger ones do, so that one set of buffers serves all of them.

    Raises: Unfit where the cache is another than of attention; torch.OutOfMemoryError where it would leave too little
    of the free memory.
    """

    def __init__(self, model: Any, like: Any, num_rows: int, length: int, num_steps: int, sampling: Sampling) -> None:
        kinds = {type(x) for x in like.layers} if type(like) is DynamicCache else {type(like)}
        if kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
            raise Unfit(f"its cache has {', '.join(sorted(k.__name__ for k in kinds))}")
        if any(x.keys.shape != x.values.shape for x in like.layers):
            raise Unfit("its keys and values have different shapes")
        device = like.layers[0].keys.device
        self.has_kernels = has_kernels(device, like.layers[0].keys.dtype)
        self.fused = Fused(model) if self.has_kernels else None
        self.length = -(-length // ROOM) * ROOM
        self.record = Record(num_rows, num_steps, sampling, device)
        self.rows, self.newest, self.position, self.first = torch.zeros(4, num_rows, dtype=torch.int64, device=device)
        self.place, self.step_index = torch.zeros(2, 1, dtype=torch.int64, device=device)
        # Four dimensions: for a finished mask, which our attention does not look at.
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        token = sum(x[0, :, 0].nbytes for layer in like.layers for x in (layer.keys, layer.values))
        self.nbytes = num_rows * self.length * token  # of the cache
        if self.nbytes > FREE_SHARE * free_memory(device):
            raise torch.OutOfMemoryError("its cache would take too much of the free memory")
        self.layers: list[tuple[Tensor, Tensor, int | None]] = []
        for layer in like.layers:
            keys, values = (
                torch.zeros(num_rows, x.shape[1], self.length, x.shape[3], dtype=x.dtype, device=device)
                for x in (layer.keys, layer.values)
            )
            self.layers.append((keys, values, layer.sliding_window if layer.is_sliding else None))

    def start(self, cache: Any, origin: Tensor, prompt_mask: Tensor, drawn: Tensor) -> None:
        """After the prompts: their cache, the prompt of each row (B,), (P, S) bool, and the first tokens (B,)."""
        if self.fused:
            self.fused.refresh()
        width, lengths = prompt_mask.shape[1], prompt_mask.sum(1)[origin]
        for (*buffers, _), layer in zip(self.layers, cache.layers, strict=True):
            for buffer, filled in zip(buffers, (layer.keys, layer.values), strict=True):
                buffer.zero_()  # what a call before left may be no number
                # Of a sliding window there are only the newest.
                buffer[:, :, width - filled.shape[2] : width] = filled[origin]
        self.rows.copy_(torch.arange(len(origin), device=origin.device))
        self.newest.copy_(drawn)
        self.position.copy_(lengths)
        self.first.copy_(width - lengths)
        self.place.fill_(width)
        self.step_index.fill_(1)

    def forward(self, model: Any, num_rows: int) -> Tensor:
        """Logits (R, V) after the newest token of each row, whose key and value are added to the cache."""
        layers = [
            FixedLayer(k[:num_rows], v[:num_rows], window, self.place, self.has_kernels) for k, v, window in self.layers
        ]
        # Older versions of transformers leave a soft-cap out where attention is sdpa; newer ones refuse.
        is_sdpa = model.config.get_text_config()._attn_implementation.startswith("sdpa")
        with (
            attention_of(model, partial(self._attend, layers, not is_sdpa)),
            self.fused() if self.fused else nullcontext(),
        ):
            out = model(
                input_ids=self.newest[:num_rows, None],
                position_ids=self.position[:num_rows, None],
                attention_mask=self.mask,
                past_key_values=Cache(layers=[*layers]),
                use_cache=True,
            )
        logits: Tensor = out.logits
        return logits[:, -1]

    def step(self, model: Any, num_rows: int) -> None:
        """One more token of each row."""
        logits = self.forward(model, num_rows)
        self.newest[:num_rows] = self.record.draw(logits, self.rows[:num_rows], self.step_index)
        for counter in (self.position, self.place, self.step_index):
            counter += 1

    def run(self, model: Any, num_rows: int) -> None:
        """As `step`, by whatever is fastest."""
        self.step(model, num_rows)

    def keep(self, index: Tensor, filled: int) -> None:
        """The rows of index (R,), none twice, become the first R; filled: places of the cache in use."""
        for x in (self.rows, self.newest, self.position, self.first):
            x[: len(index)] = x[index]
        for *buffers, _ in self.layers:
            for x in buffers:
                x[: len(index), :, :filled] = x[:, :, :filled][index]

    def size_for(self, num_alive: int, size: int) -> int:
        """The least of size, its half, its quarter ... that holds the rows which go on."""
        while size > SMALLEST and -(-size // 2) >= num_alive:
            size = -(-size // 2)
        return size

    def _attend(
        self, layers: list[FixedLayer], has_softcap: bool, module: Any, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Any, scaling: float | None = None, softcap: float | None = None,
        sliding_window: int | None = None, **more: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """As transformers' attention functions: query (R, H, 1, D) to (R, 1, H, D)."""
        layer = layers[module.layer_idx]
        if key is not layer.keys or query.shape[2] != 1:
            raise Unfit("its attention is over something else than its cache")
        for name in ("position_bias", "s_aux", "head_mask"):
            if more.get(name) is not None:
                raise Unfit(f"its attention has a {name}")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        softcap = softcap if has_softcap else None
        window = sliding_window if layer.window is None else layer.window
        return decode_attention(
            query[:, :, 0], key, value, self.first[: len(query)], self.place, scale, softcap, window
        )[:, None], None
