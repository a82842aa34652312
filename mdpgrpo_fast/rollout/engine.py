"""The rollout engine of a run: the model itself, or vLLM in this process or as a server."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ..config import MDPGRPOConfig, TrainConfig, require
from ..models.load import base_model
from .vllm.completion import RolloutError
from .vllm.local import VLLMEngine
from .vllm.sampler import MIN_TEMPERATURE, RolloutEngine
from .vllm.server import VLLMServer

PASSES = {"bf16": "bfloat16", "fp16": "float16"}  # the dtype of a pass by mixed_precision, where it is not the weights'


def make_engine(
    run: TrainConfig, method: MDPGRPOConfig, context: int | None, accelerator: Accelerator
) -> RolloutEngine | None:
    """vLLM as the run asks for it; None: the model itself samples. context: positions of the model, None: no limit.

    Raises: ConfigError where vLLM cannot be had, or a temperature is below its floor.
    """
    if run.rollout == "transformers":
        return None
    lowest = min(method.slot_temperatures)
    require(lowest >= MIN_TEMPERATURE, "temperatures", lowest, f"at least {MIN_TEMPERATURE} (vLLM's floor)")
    lora_rank = run.lora_r if run.lora and run.vllm_lora == "adapter" else None
    if run.vllm_url is not None:
        return VLLMServer(
            run.vllm_url,
            device=accelerator.device,
            timeout=run.vllm_timeout,
            retries=run.vllm_retries,
            sync_dir=run.vllm_sync_dir,
            run_id=broadcast_object_list([uuid.uuid4().hex[:12]])[0],
            lora_rank=lora_rank,
        )
    more: dict[str, Any] = {"trust_remote_code": True} if run.trust_remote_code else {}
    if run.tokenizer is not None:
        more["tokenizer"] = run.tokenizer
    return VLLMEngine(
        base_model(run.model),  # an adapter is in the weights that it is given
        device=accelerator.device,
        dtype=PASSES.get(run.mixed_precision, run.dtype),  # vLLM's own choice rounds float32 weights
        sleep_mode=run.vllm_sleep,
        gpu_memory_utilization=run.vllm_memory,
        # Not the model's whole context, for which the memory may not do.
        max_model_len=min(run.max_prompt_length + run.max_completion_length, context or sys.maxsize),
        seed=run.seed + accelerator.process_index,
        lora_rank=lora_rank,
        **more,
    )


def sync_weights(
    engine: RolloutEngine, accelerator: Accelerator, named: Iterable[tuple[str, Tensor]], version: int,
    write_adapter: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """The engine's weights become these, checked; with a server all ranks have one, and the first sends.

    write_adapter: as of `RolloutEngine.sync_adapter`, named being the weights without it; None: there is none.

    Raises: RolloutError, on all ranks where it is raised on one.
    """
    problem = None
    follows = isinstance(engine, VLLMServer) and not accelerator.is_main_process
    try:
        if write_adapter is None:
            (engine.follow_sync if follows else engine.sync)(named, version)
        elif follows:
            engine.follow_adapter(named, version)
        else:
            engine.sync_adapter(named, write_adapter, version)
    except RolloutError as e:
        problem = e
    raise_on_all_ranks(accelerator, problem)


def raise_on_all_ranks(accelerator: Accelerator, problem: BaseException | None) -> None:
    """Raises a problem of the same class on all ranks, this rank's own or another's: none goes on to a collective call
    that the others do not make."""
    said = None if problem is None else (type(problem), str(problem), getattr(problem, "trace", None))
    for kind, message, trace in filter(None, gather_object([said])):
        alike = isinstance(problem, RolloutError) and issubclass(kind, RolloutError)  # its own has its completions
        if problem is not None and (type(problem) is kind or alike):
            raise problem
        another: BaseException = kind(message) if trace is None else kind(message, trace)
        raise another
