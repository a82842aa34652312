"""vLLM as the rollout engine in the trainer's own process; `server` is the client of a vLLM elsewhere.

vLLM is optional and imported only where an engine is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...config import ConfigError, needs_package, require
from ...log import reason_of
from .completion import Completion, RolloutError, completion
from .files import adapter_files, remove_leftovers
from .sampler import LOGPROBS_MODE, RolloutEngine
from .worker import EXTENSION

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's buffers


def max_lora_rank(rank: int) -> int:
    """vLLM's setting for adapters of this rank. Raises: ConfigError for one above all."""
    require(rank <= LORA_RANKS[-1], "lora_r", rank, f"at most {LORA_RANKS[-1]} with vllm_lora = adapter")
    return next(r for r in LORA_RANKS if r >= rank)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous


class VLLMEngine(RolloutEngine):
    """vLLM in the trainer's process and on its device, one engine per rank.

    model: directory or hub id. device: of the Rollout's tensors. sleep_mode: `sleep()` frees the engine's memory;
    the next `sync` wakes it. gpu_memory_utilization: share of the device's memory that vLLM may take while awake.
    lora_rank: of the adapters that `sync_adapter` brings; None: it is not called. engine_args: further ones of vLLM's
    `LLM`.

    Raises: ConfigError where vLLM is not installed or does not start.
    """

    def __init__(
        self,
        model: str,
        *,
        device: torch.device | str,
        dtype: str = "auto",
        sleep_mode: bool = True,
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        seed: int = 0,
        lora_rank: int | None = None,
        **engine_args: Any,
    ) -> None:
        super().__init__(device)
        try:
            import vllm
        except ImportError as e:
            raise ConfigError(f"rollout = vllm {needs_package('vllm', reason_of(e))}") from None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            engine_args.setdefault("distributed_executor_backend", "external_launcher")
        if lora_rank is not None:
            remove_leftovers(None)
            engine_args |= {"enable_lora": True, "max_lora_rank": max_lora_rank(lora_rank), "max_loras": 1}
        self._vllm, self._sleep_mode = vllm, sleep_mode
        # The model's own weights come back from the host where adapters alone are sent.
        self._sleep_level = 2 if lora_rank is None else 1
        self._asleep, self._lora = False, None
        # In this process, so that weights are handed over as they are.
        try:
            with _environment("VLLM_ENABLE_V1_MULTIPROCESSING", "0"):
                self._llm = vllm.LLM(
                    model=model,
                    dtype=dtype,
                    enable_sleep_mode=sleep_mode,
                    gpu_memory_utilization=gpu_memory_utilization,
                    max_model_len=max_model_len,
                    seed=seed,
                    logprobs_mode=LOGPROBS_MODE,
                    generation_config="vllm",  # not the model's own
                    worker_extension_cls=EXTENSION,
                    **engine_args,
                )
        except (ValueError, RuntimeError) as e:
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise ConfigError(f"rollout = vllm: vLLM cannot start with {model!r}: {reason}") from e

    def sleep(self) -> None:
        """Free weights and cache, after the completions are drawn; the next `sync` brings them back."""
        if self._sleep_mode and not self._asleep:
            self._llm.sleep(level=self._sleep_level)
            self._asleep, self.version = True, None

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        # The cache wakes after the weights are in, or it would take the room of what is on its way.
        with self._woken():
            super().sync(named_parameters, version)

    def sync_adapter(self, base: Iterable[tuple[str, Tensor]], write: Callable[[str], None], version: int) -> None:
        with self._woken():
            super().sync_adapter(base, write, version)

    @contextmanager
    def _woken(self) -> Iterator[None]:
        slept, self._asleep = self._asleep, False
        if slept:
            self._llm.wake_up(tags=["weights"])
        try:
            yield
        finally:
            if slept:
                self._llm.wake_up(tags=["kv_cache"])

    def _complete(self, prompts: list[list[int]], settings: list[dict[str, Any]]) -> list[Completion]:
        if self._asleep:
            raise RolloutError("vLLM's weights were freed by sleep(): sync() must come before generate()")
        answers = self._llm.generate(
            [self._vllm.TokensPrompt(prompt_token_ids=p) for p in prompts],
            [self._vllm.SamplingParams(**s, detokenize=False) for s in settings],
            use_tqdm=False,
            lora_request=self._lora if self.adapter else None,
        )
        completions: list[Completion | None] = []
        problem = ""
        for answer in answers:
            output = answer.outputs[0]
            try:
                logprobs = [step[t].logprob for t, step in zip(output.token_ids, output.logprobs, strict=True)]
                labels = [span.version for span in output.weight_versions]
                completions.append(completion(list(output.token_ids), logprobs, output.finish_reason, labels))
            except (ValueError, LookupError, TypeError) as e:
                completions.append(None)
                problem = problem or str(e)
        kept = [c for c in completions if c is not None]
        if len(kept) < len(prompts):
            raise RolloutError(f"vLLM returned {len(kept)} of {len(prompts)} completions: {problem}", completions)
        return kept

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        return list(self._llm.collective_rpc(method, args=args))

    def _send(self, update: str, weights: list[tuple[str, Tensor]]) -> list[Any]:
        return self._rpc("mdpgrpo_load", update, weights)

    def _load_adapter(self, name: str, write: Callable[[str], None]) -> None:
        from vllm.lora.request import LoRARequest

        with ExitStack() as files:
            directory = files.enter_context(adapter_files(write, None))
            self._lora = LoRARequest(name, self._adapters + 1, directory)  # numbers begin with 1
            try:
                added = self._llm.llm_engine.add_lora(self._lora)
            except (ValueError, RuntimeError) as e:
                raise RolloutError(f"vLLM does not take the adapter: {reason_of(e)}") from e
            if not added:
                raise RolloutError(f"vLLM does not take the adapter {name}")
            self._keep(files.pop_all())

    def _reset_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM did not drop its prefix cache, which is of the old weights")

    def _set_label(self, label: str) -> None:
        self._llm.update_weight_version(label)
