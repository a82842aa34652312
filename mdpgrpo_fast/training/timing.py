"""Times of a step: seconds by stage, tokens per second, and the share of the device's peak that models use."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .batch import MicroBatch

STAGES = ("generate", "score", "reference", "forward", "backward", "optimizer")

# Dense bfloat16 (and float16) FLOP/s of a device without sparsity, from the vendors' data sheets; the first name that
# is part of the device's name counts. H100 and A100 in their SXM form where PCIe is not named.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
}


class StageClock:
    """Seconds of named stages and of the whole; on a GPU each stage ends when its work is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._start = time.perf_counter()
        self._seconds = dict.fromkeys(STAGES, 0.0)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds what runs inside to a stage of STAGES; stages do not nest."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - start

    def read(
        self, model: Any, generated: list[int], micro_batches: list[MicroBatch], updates: int, peak: float | None,
        without: Sequence[MicroBatch] = (),
    ) -> dict[str, Any]:  # fmt: skip
        """What a step's metrics say of its time since the clock was made.

        seconds: of each stage, and as "other" what no stage claims. tokens_per_second: completion tokens over the whole
        step; stage_tokens_per_second: tokens that went through the model. mfu: model FLOP utilisation of the forward
        and backward passes; None where the peak (FLOP/s of the device) is unknown.

        generated: tokens of each completion; micro_batches: those of each of the `updates` passes over the batch;
        without: those that went through a model without a gradient, in the stage "reference".
        """
        total = self._now() - self._start
        seconds = {**self._seconds, "other": total - sum(self._seconds.values())}
        work, before = Work.of(micro_batches), Work.of(without)
        through = {"reference": before.tokens, "forward": work.tokens * updates, "backward": work.tokens * updates}
        through["generate"] = sum(generated)
        rates = {n: through[n] / seconds[n] for n in through if through[n] and seconds[n] > 0}
        busy = seconds["forward"] + seconds["backward"]
        # A frozen weight has no gradient of its own to compute.
        sizes = [(_size(p), p.requires_grad) for p in model.parameters()] if peak else [(1, True)]
        passes = 2 + sum(n for n, trained in sizes if trained) / sum(n for n, _ in sizes)
        return {
            "seconds": seconds,
            "tokens_per_second": sum(generated) / total,
            "stage_tokens_per_second": rates,
            "mfu": passes * work.flops(model) * updates / busy / peak if peak and busy > 0 else None,
        }


@dataclass
class Work:
    """What a model did in a step: tokens through it, rows through its head, and pairs of a query with a key."""

    tokens: int = 0
    rows: int = 0
    pairs: int = 0

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch]) -> Work:
        work = cls()
        for m in micro_batches:
            work.add(m.prompts, m.completions)
        return work

    def add(self, prompts: list[int], completions: list[list[int]]) -> None:
        """Packed groups: the tokens of each prompt, and of each of its completions."""
        for s, lengths in zip(prompts, completions, strict=True):
            self.tokens += s + sum(lengths)
            self.rows += sum(lengths)
            self.pairs += s * (s + 1) // 2 + sum(n * s + n * (n + 1) // 2 for n in lengths)

    def flops(self, model: Any) -> float:
        """Of one forward pass: two per weight and token (the head on its rows alone, the embedding's reading none),
        and four per head dimension and attended pair. A backward pass has twice that, without recomputation."""
        config = model.config.get_text_config()
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        outside = {id(p) for module in (head, embedding) if module is not None for p in module.parameters()}
        body = sum(_size(p) for p in model.parameters() if id(p) not in outside)
        width = getattr(config, "num_attention_heads", 0) * (
            getattr(config, "head_dim", None) or config.hidden_size // max(1, getattr(config, "num_attention_heads", 1))
        )
        attention = 4 * getattr(config, "num_hidden_layers", 0) * width * self.pairs
        return float(2 * body * self.tokens + 2 * config.vocab_size * config.hidden_size * self.rows + attention)


def _size(parameter: torch.Tensor) -> int:
    """Elements of a parameter; of all of it where ZeRO-3 has partitioned it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def peak_flops(device: torch.device, half: bool) -> float | None:
    """FLOP/s of the device's matrix units in half precision; None for others, and where the run is in float32."""
    if device.type != "cuda" or not half:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


@contextmanager
def _trace(path: Path) -> Iterator[Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    path.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(path), use_gzip=True),
    ) as profiler:
        yield profiler


def traced(path: Path | None) -> Any:
    """A context whose value's `step()` is to be called after each step: with a path it traces the third and fourth."""
    return nullcontext(None) if path is None else _trace(path)
