"""The rollout engine of a run: the model itself, or vLLM in this process or as a server."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from .config import TrainConfig
from .models import SEED_POLICY
from .runlog import RunDir
from .vllm_client import VLLMServer
from .vllm_rollout import VLLMEngine
from .vllm_sampler import RolloutError, Sampler


def make_engine(run: TrainConfig, accelerator: Accelerator) -> Sampler | None:
    """vLLM as the run asks for it; None: the model itself samples. Raises ConfigError where vLLM cannot be had."""
    if run.rollout == "transformers":
        return None
    if run.vllm_url is not None:
        return VLLMServer(
            run.vllm_url,
            device=accelerator.device,
            timeout=run.vllm_timeout,
            retries=run.vllm_retries,
            sync_dir=run.vllm_sync_dir,
        )
    return VLLMEngine(
        run.model or str(SEED_POLICY),
        device=accelerator.device,
        sleep_mode=run.vllm_sleep,
        gpu_memory_utilization=run.vllm_memory,
        seed=run.seed + accelerator.process_index,
    )


def sync(engine: Sampler, accelerator: Accelerator, named: Iterable[tuple[str, Tensor]], version: int) -> None:
    """The engine's weights become these, checked; with a server all ranks have one, and the first sends."""
    if not isinstance(engine, VLLMServer):
        engine.sync(named, version)
        return
    if accelerator.is_main_process:
        engine.sync(named, version)
    else:
        engine.follow(named, version)
    accelerator.wait_for_everyone()


def keep_partial(out: RunDir, error: RolloutError, step: int, tokenizer: Any) -> str | None:
    """Completions that came before an engine failed, as partial_rollout.jsonl; its path where there are any."""
    kept = [(i, c) for i, c in enumerate(error.partial) if c is not None]
    for i, c in kept:
        row = {
            "step": step,
            "row": i,
            "tokens": c.tokens,
            "response": tokenizer.decode(c.tokens),
            "finished": c.finished,
        }
        out.append("partial_rollout.jsonl", row)
    return str(out.path / "partial_rollout.jsonl") if kept else None
