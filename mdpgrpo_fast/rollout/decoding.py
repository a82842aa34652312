"""Forward passes of decoding: each prompt prefilled once, its cache shared out to its rows and written in place."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..log import say_once

BLOCK = 128  # tokens a cache grows by at least
ATTENTION_CACHE, STATE_CACHE = CACHE_NAMES = ("past_key_values", "cache_params")


# ---- cache ----------------------------------------------------------------------------------------------------------


class _InPlace:
    """Keys and values (R, heads, length, D) as views of buffers with room at the end, in place of concatenation.

    A mixin of the layers of transformers' DynamicCache. Attention gets a view of what is filled, so nothing masked.
    """

    keys: Any
    values: Any
    cumulative_length: int  # of sliding-window layers
    buffers: list[Tensor]
    begin: int
    end: int
    kept: int | None  # most tokens kept between steps; None: all

    def adopt(self, layer: Any, kept: int | None) -> Any:
        vars(self).update(vars(layer))
        self.kept = kept
        self._hold(self.keys, self.values)
        return self

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """Buffers that are full: the next update makes room."""
        self.keys, self.values, self.buffers = keys, values, [keys, values]
        self.begin, self.end = 0, keys.shape[-2]

    def _make_room(self, new: int) -> None:
        length = self.keys.shape[-2]
        room = length + max(new + BLOCK, length // 4)
        for i, x in enumerate((self.keys, self.values)):
            self.buffers[i] = x.new_empty(*x.shape[:2], room, x.shape[3])
            self.buffers[i][:, :, :length] = x
        self.begin, self.end = 0, length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, new = self.end, key_states.shape[-2]
        if start + new > self.buffers[0].shape[-2]:
            self._make_room(new)
            start = self.end
        self.end = start + new
        keys, values = (x[:, :, self.begin : self.end] for x in self.buffers)
        keys[:, :, -new:], values[:, :, -new:] = key_states, value_states
        self.keys, self.values = keys, values
        if self.kept is not None:
            self.cumulative_length += new
            drop = max(0, self.end - self.begin - self.kept)
            self.begin += drop
            self.keys, self.values = keys[:, :, drop:], values[:, :, drop:]
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._hold(*(x.index_select(0, beam_idx.to(x.device)) for x in (self.keys, self.values)))


class InPlaceLayer(_InPlace, DynamicLayer):
    """Full attention."""


class InPlaceSlidingWindowLayer(_InPlace, DynamicSlidingWindowLayer):
    """Sliding-window attention: the last window - 1 tokens are kept."""


def can_reorder(cache: Any) -> bool:
    """Whether rows of a cache may be repeated and left out; MiniMax's leaves those of its linear layers as they are."""
    return hasattr(cache, "reorder_cache") and not hasattr(cache, "linear_cache")


def write_in_place(cache: Any) -> None:
    """Gives the attention layers of a filled DynamicCache buffers with room; layers of other kinds stay as they are."""
    if type(cache) is not DynamicCache:
        return
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[i] = InPlaceLayer().adopt(layer, None)
        elif type(layer) is DynamicSlidingWindowLayer and layer.is_initialized:
            window = layer.sliding_window
            cache.layers[i] = InPlaceSlidingWindowLayer(sliding_window=window).adopt(layer, window - 1)


# ---- forward passes -------------------------------------------------------------------------------------------------


def _parameters(model: Any) -> set[str] | None:
    """Names of the arguments that the forward pass takes; None where a wrapper hides them: then it has to take all."""
    if not hasattr(model, "get_base_model"):
        base = model
    elif model.active_peft_config.is_prompt_learning:
        raise ValueError(f"model must not be a PeftModel of a prompt; got {model.active_peft_config.peft_type}")
    else:
        base = model.get_base_model()
    names = set(inspect.signature(base.forward).parameters)
    return names if "input_ids" in names else None


def _last(out: Any) -> Tensor:
    """Logits (B, V) of the last token."""
    logits: Tensor = out.logits
    return logits[:, -1]


class Decoder:
    """Forward passes over rows that share prompts: `prefill`, `share`, then one token a row with `step`.

    prompt_ids (P, S) left-padded, prompt_mask (P, S) bool, origin (B,): the prompt of each row. After `keep(index)`
    the rows are those of index. Where the model has no cache, each step runs over all tokens again; where its cache
    cannot be shared out, each row is prefilled by itself. Both are said once.
    """

    def __init__(self, model: Any, prompt_ids: Tensor, prompt_mask: Tensor, origin: Tensor) -> None:
        self.model = model
        self.accepted = _parameters(model)
        # Without padding there is nothing to say about positions and attention, and fewer masks to build.
        padded = not bool(prompt_mask.all())
        if padded and self.accepted is not None and "attention_mask" not in self.accepted:
            raise ValueError(
                f"prompts must be of one length: {type(model).__name__} takes no attention mask for padding"
            )
        self.mask = prompt_mask.long() if padded else None  # (R, S + t), all tokens so far
        self.ids: Tensor | None = None  # (R, S + t) where there is no cache
        self.length = prompt_ids.shape[1]  # S + t
        self.cache: Any = None
        self.cache_name = ATTENTION_CACHE
        self.prompts, self.origin = (prompt_ids, self.mask), origin
        self.prompt_mask = prompt_mask
        self.is_shared = False

    def _forward(self, ids: Tensor, use_cache: bool) -> Any:
        options: dict[str, Any] = {"use_cache": use_cache, "logits_to_keep": 1}
        # A state alone has padding behind it, and its model would multiply the new token by the whole mask.
        if self.mask is not None and (self.cache is None or self.cache_name != STATE_CACHE):
            # Left padding shifts positions unless they are told; a model without position ids derives its own.
            options["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            options["attention_mask"] = self.mask
        elif self.mask is None and self.cache is not None:
            # Models of several kinds of layers (Bamba) may take the length from a cache that has none.
            options["position_ids"] = ids.new_full(ids.shape, self.length - 1)
        if self.cache is not None:
            options[self.cache_name] = self.cache
        if self.accepted is not None:
            options = {k: v for k, v in options.items() if k in self.accepted}
        return self.model(input_ids=ids, **options)

    def prefill(self) -> Tensor:
        """Logits (B, V) of the first token of every row."""
        ids, mask = self.prompts
        out = self._forward(ids, True)
        cache = self._found(out)
        if can_reorder(cache):
            self.cache = cache
            return _last(out).index_select(0, self.origin)
        kind = type(self.model).__name__
        self.is_shared = True
        ids = ids.index_select(0, self.origin)
        self.mask = None if mask is None else mask.index_select(0, self.origin)
        if cache is None:
            say_once(logging.WARNING, f"{kind} returns no cache: every step runs over all tokens of its rows again")
            self.ids = ids
            return _last(self._forward(ids, False))
        say_once(logging.WARNING, f"the cache of {kind} cannot be shared out: each row is prefilled by itself")
        out = self._forward(ids, True)
        self.cache = self._found(out)
        return _last(out)

    def share(self) -> None:
        """Makes each prompt's cache that of its rows, as `step` needs it."""
        if not self.is_shared:
            write_in_place(self.cache)
            self.keep(self.origin)
            self.is_shared = True

    def _found(self, out: Any) -> Any:
        for name in CACHE_NAMES:
            if getattr(out, name, None) is not None:
                self.cache_name = name
                return getattr(out, name)
        return None

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (R, V) after one more token (R,) of each row."""
        new = tokens[:, None]
        self.length += 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(new)], 1)
        if self.ids is not None:
            new = self.ids = torch.cat([self.ids, new], 1)
        return _last(self._forward(new, self.cache is not None))

    @property
    def can_drop_rows(self) -> bool:
        """Whether rows may be dropped."""
        return self.ids is not None or can_reorder(self.cache)

    def keep(self, index: Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder_cache(index)
        self.mask = None if self.mask is None else self.mask.index_select(0, index)
        self.ids = None if self.ids is None else self.ids.index_select(0, index)
