"""One temperature for each completion, however TRL generates: by transformers, by vLLM in the process or its server."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


class Numbered(list[int]):
    """A prompt's ids that know which completion of the batch they are for, and keep it when more are appended."""

    def __init__(self, ids: Sequence[int], number: int) -> None:
        super().__init__(ids)
        self.number = number

    def __add__(self, more: Any) -> Numbered:  # type: ignore[override]
        return Numbered(super().__add__(more), self.number)


def numbers(prompt_ids: Sequence[Any]) -> list[int]:
    """Which completion of the batch each prompt is for: its place, where it does not say."""
    return [getattr(ids, "number", i) for i, ids in enumerate(prompt_ids)]


class TemperaturePerRow(LogitsProcessor):
    """Divides the logits of each row by its own temperature. temperatures: (B,)."""

    def __init__(self, temperatures: Tensor) -> None:
        self.temperatures = temperatures

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        beams = len(scores) // len(self.temperatures)  # of each row, which follow on each other
        return scores / self.temperatures.to(scores).repeat_interleave(beams)[:, None]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object is another inside."""
    own = vars(owner).get(name, replaced)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is replaced:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def through_transformers(trainer: Any, taus: Sequence[float]) -> Iterator[None]:
    """The model's `generate` samples each row at its own temperature."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    generate, per_row = model.generate, LogitsProcessorList([TemperaturePerRow(torch.tensor(taus))])

    def call(*args: Any, **more: Any) -> Any:
        # Given processors come before transformers' own temperature, top-k, top-p and min-p.
        return generate(*args, logits_processor=per_row, **more)

    at_one = {**trainer.generation_kwargs, "temperature": 1.0}
    with (
        replaced(model, "generate", call),
        replaced(trainer, "generation_kwargs", at_one),
        replaced(trainer.generation_config, "temperature", 1.0),
    ):
        yield


@contextmanager
def through_vllm(vllm: Any, taus: Sequence[float]) -> Iterator[None]:
    """vLLM in this process: each request has its own temperature. vllm: TRL's VLLMGeneration; taus: of this rank's
    rows."""
    everyone = list(taus)
    if vllm.tensor_parallel_size > 1:
        parts: list[Any] = [None] * vllm.tensor_parallel_size
        torch.distributed.all_gather_object(parts, everyone, group=vllm.tp_group)
        everyone = [tau for part in parts for tau in part]
    generate = vllm.llm.generate

    def call(prompts: list[Any], sampling_params: Any, **more: Any) -> Any:
        each = [copy.copy(sampling_params) for _ in prompts]
        for params, tau in zip(each, everyone, strict=True):
            params.temperature = tau
        return generate(prompts, sampling_params=each, **more)

    with replaced(vllm.llm, "generate", call):
        yield


@contextmanager
def through_server(vllm: Any, taus: Sequence[float]) -> Iterator[None]:
    """TRL's vLLM server, which has one temperature a call: a call for each temperature, one after the other."""
    everyone = gather_object(list(taus))
    client = getattr(vllm, "vllm_client", None)
    if client is None:  # on all ranks but the first
        yield
        return
    generate = client.generate

    def call(
        prompts: list[Any], n: int, temperature: float, features: Any = None, generation_kwargs: Any = None, **more: Any
    ) -> dict[str, Any]:
        # One among them would go before the argument.
        more["generation_kwargs"] = {k: v for k, v in (generation_kwargs or {}).items() if k != "temperature"}
        slots = [everyone[i * n : (i + 1) * n] for i in range(len(prompts))]
        merged: dict[str, Any] = {}
        # After a tool's turn prompts have one completion each, and temperatures differ between them.
        for tau, count in sorted({(tau, s.count(tau)) for s in slots for tau in s}):
            chosen = [i for i, s in enumerate(slots) if s.count(tau) == count]
            part = None if features is None else [features[i] for i in chosen]
            found = generate(prompts=[prompts[i] for i in chosen], n=count, temperature=tau, features=part, **more)
            rows = [i * n + j for i in chosen for j, t in enumerate(slots[i]) if t == tau]
            for name, values in found.items():
                if values is None:
                    merged[name] = None
                    continue
                places, size = (chosen, len(prompts)) if name == "prompt_ids" else (rows, len(everyone))
                into = merged.setdefault(name, [None] * size)
                for place, value in zip(places, values, strict=True):
                    into[place] = value
        return merged

    with replaced(client, "generate", call):
        yield
