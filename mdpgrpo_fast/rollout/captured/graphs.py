"""Captured decode steps: a CUDA graph for each size of batch, kept from one call to the next."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...log import say_once
from ..decoding import Decoder
from ..record import Sampling
from .fixed import FixedSteps, Unfit

FEWEST_STEPS = 16  # of a call for which a capture pays: it takes as long as a few steps of the model as it is
# Of the GPU's memory, for a cache that stays between calls, beside weights copied together (`fused.MERGED_SHARE`); a
# larger one is given back, and each call captures anew.
KEPT_SHARE = 1 / 16

_kept: WeakKeyDictionary[Any, CapturedSteps] = WeakKeyDictionary()
# By the model's attention: why its steps are not tried again; None: they do what the model does.
_trials: WeakKeyDictionary[Any, dict[str, str | None]] = WeakKeyDictionary()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one that captures are made on: libraries hold memory for each stream they have seen."""
    return torch.cuda.Stream(device)


class CapturedSteps(FixedSteps):
    """Steps by replaying a graph: of all rows from the start, of fewer from the second such step on.

    Raises: whatever keeps the steps of all rows from being captured; a step that waits for the device does so before a
    capture begins.
    """

    def __init__(self, key: Any, model: Any, *sizes: Any) -> None:
        super().__init__(model, *sizes)
        self.key = key  # what the graphs depend on beside the buffers
        # One pool for all: nothing that a graph makes is needed after it.
        self.pool, self.stream = torch.cuda.graph_pool_handle(), _stream(self.place.device)
        num_rows = len(self.rows)
        self._aside(lambda: self.step(model, num_rows))  # compiles and tunes, which may wait
        self._aside(lambda: self._without_waits(model, num_rows))
        self.graphs = {num_rows: self._capture(model, num_rows)}

    def _aside(self, work: Callable[[], None]) -> None:
        """On the stream of captures, which need one of their own, in order with the current one."""
        current = torch.cuda.current_stream(self.place.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                work()
        finally:  # what a step that failed has launched still uses memory which is given out again
            current.wait_stream(self.stream)

    def _without_waits(self, model: Any, num_rows: int) -> None:
        """A step in which a wait for the device is an error, in other threads of the process too."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.step(model, num_rows)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def _capture(self, model: Any, num_rows: int) -> Any:
        graph = torch.cuda.CUDAGraph()

        def capture() -> None:
            # Other threads (data loading, NCCL's) may do as they like meanwhile.
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                self.step(model, num_rows)
            finally:
                graph.capture_end()

        self._aside(capture)
        return graph

    def run(self, model: Any, num_rows: int) -> None:
        graph = self.graphs.get(num_rows)
        if graph is not None:
            graph.replay()
        elif num_rows in self.graphs:
            self.step(model, num_rows)
        else:
            # Libraries set things up when a size is new to them, which a capture does not allow.
            self._aside(lambda: self.step(model, num_rows))
            try:
                self.graphs[num_rows] = self._capture(model, num_rows)
            except Exception as e:
                say_once(logging.WARNING, f"decode steps of {num_rows} rows are not captured: {type(e).__name__}: {e}")
                self.graphs[num_rows] = None


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def prepare(decoder: Decoder, sampling: Sampling, num_steps: int, capture: bool) -> FixedSteps | None:
    """Steps of fixed shapes for the rows of a decoder after its prefill; None, and why once, where they cannot be had.

    capture: as CUDA graphs, on a GPU alone; else run as they are.
    """
    if capture and (not _has_graphs(decoder.origin.device) or num_steps < FEWEST_STEPS):
        return None
    try:
        _check(decoder)
        return _tried(decoder, sampling, num_steps, capture)
    except Exception as e:  # whatever it is: the model as it is can do without
        kind = type(decoder.model).__name__
        say_once(logging.WARNING, f"decode steps of {kind} are not captured in a CUDA graph: {_reason(e)}")
        return None


def _reason(e: Exception) -> str:
    return str(e) if isinstance(e, Unfit) else f"{type(e).__name__}: {e}"


def _tried(decoder: Decoder, sampling: Sampling, num_steps: int, capture: bool) -> FixedSteps:
    """Raises Unfit where the model has failed before; for memory alone it is tried again."""
    model, length = decoder.model, decoder.prompt_mask.shape[1] + num_steps
    attention = model.config.get_text_config()._attn_implementation
    trials = _trials.setdefault(model, {})
    if reason := trials.get(attention):
        raise Unfit(reason)
    try:
        if attention not in trials:
            _trial(model, decoder.origin.device)
            trials[attention] = None
        if capture:
            return _captured(decoder, sampling, length, num_steps, attention)
        return FixedSteps(model, decoder.cache, len(decoder.origin), length, num_steps, sampling)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        trials[attention] = _reason(e)
        raise


def _captured(decoder: Decoder, sampling: Sampling, length: int, num_steps: int, attention: str) -> CapturedSteps:
    model, num_rows = decoder.model, len(decoder.origin)
    # Weights that are updated in place stay where the graphs read them. What is made in inference mode cannot be
    # written outside of it.
    key = (
        (num_rows, num_steps, sampling.temperature is None, sampling.truncation),
        (attention, torch.is_inference_mode_enabled()),
        *(x.data_ptr() for part in (model.parameters(), model.buffers()) for x in part),
    )
    steps = _kept.get(model)
    if steps is not None and steps.key == key and steps.length >= length:
        return steps
    steps = None
    _kept.pop(model, None)  # before the next takes memory
    steps = CapturedSteps(key, model, decoder.cache, num_rows, length, num_steps, sampling)
    # An adapter can be turned off without a trace in the weights.
    memory = torch.cuda.get_device_properties(steps.place.device).total_memory
    if not hasattr(model, "peft_config") and steps.nbytes <= KEPT_SHARE * memory:
        _kept[model] = steps
    return steps


def _check(decoder: Decoder) -> None:
    """Raises Unfit where fixed steps would not do what the model does, or a capture would miss something."""
    model = decoder.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel) or decoder.accepted is None:
        raise Unfit("it is wrapped")
    if missing := {"position_ids", "attention_mask", "past_key_values"} - decoder.accepted:
        raise Unfit(f"its forward pass takes no {', '.join(sorted(missing))}")
    if decoder.is_shared:
        raise Unfit("its cache cannot be shared out")
    if model.training:
        raise Unfit("it is in training mode")
    device = decoder.origin.device
    if torch.is_autocast_enabled(device.type):
        raise Unfit("autocast is on")
    if any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in model.modules()):
        raise Unfit("its modules have hooks")
    if any(type(p) not in (nn.Parameter, Tensor) or p.device != device for p in model.parameters()):
        raise Unfit("its weights are not plain tensors on one device")
    config = base.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or []
    # Its cache is that of a sliding window, and the trial's prompts are too short to show the difference.
    if getattr(config, "attention_chunk_size", None) is not None or "chunked_attention" in layer_types:
        raise Unfit("its attention is over chunks")


def _trial(model: Any, device: torch.device) -> None:
    """Raises Unfit where fixed steps do not give the logits of the model as it is, on two small prompts."""
    ids = torch.tensor([[1, 2, 3, 4], [0, 0, 3, 1]], device=device)
    decoder = Decoder(model, ids, ids > 0, torch.tensor([0, 1, 1], device=device))
    decoder.prefill()
    tokens = torch.tensor([[2, 3, 1], [4, 2, 3]], device=device)
    steps = FixedSteps(model, decoder.cache, 3, 8, 3, Sampling(None))
    steps.start(decoder.cache, decoder.origin, decoder.prompt_mask, tokens[0])
    decoder.share()
    for drawn in tokens:
        steps.newest.copy_(drawn)
        found, expected = steps.forward(model, 3), decoder.step(drawn)
        steps.position += 1
        steps.place += 1
    gap, size = (found.float() - expected.float()).abs().amax(), expected.float().abs().amax()
    # Rounding grows over the layers: in bfloat16 random models of 64 differ by 2 to 19 on the CPU, so that only gross
    # differences can be told from it.
    ulps = 200 if expected.dtype in (torch.float32, torch.float64) else 16
    if not bool(gap <= size * torch.finfo(expected.dtype).eps * ulps):
        raise Unfit(f"its logits differ by {gap:.1e} of {size:.1e}")
