"""Settings that cannot work, found before the model is loaded, those first that are cheapest to find."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from ...config import ConfigError, MDPGRPOConfig, TrainConfig, needs_package, require
from ...data.chat import prompt_limit
from ...models.load import base_model, positions_of, read_config
from ...models.lora import import_peft
from ...ops import backends
from ...rollout.processors import check_generation_kwargs, generation_kwargs
from ...rollout.vllm.sampler import MIN_TEMPERATURE
from ..checkpoint import check_resume
from ..guard.claim import check_output_dir, check_unused
from ..hub.repository import check_hub
from .memory import check_memory


def device_of(run: TrainConfig) -> torch.device:
    """Where the run will be, as accelerate chooses it."""
    if run.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def check(run: TrainConfig, method: MDPGRPOConfig, *, model: bool = False, prompts: bool = False) -> None:
    """Everything that is known before the model is loaded. model, prompts: whether they are given, in memory.

    Raises: ConfigError in one line.
    """
    device = device_of(run)
    check_settings(run, model, prompts)
    if run.resume:
        check_resume(run, method)
    else:
        check_output_dir(Path(run.output_dir))
    check_unused(Path(run.output_dir))
    check_backend(run, device)
    if run.lora:
        import_peft()
    check_attention(run, device)
    check_ahead(run)
    check_vllm(run, method)
    check_truncated(run, method)
    if not model:
        config = read_config(run.model, run.trust_remote_code)
        check_generation_kwargs(run, getattr(config.get_text_config(), "vocab_size", None))
        prompt_limit(run, positions_of(config))
        check_memory(run, method, base_model(run.model), config, device)


def check_settings(run: TrainConfig, model: bool = False, prompts: bool = False) -> None:
    """What needs no look at anything else. model, prompts: whether they are given, in memory. Raises: ConfigError."""
    check_trackers(run.report_to)
    check_hub(run)
    check_generation_kwargs(run)
    if run.mixed_precision == "fp16" and device_of(run).type == "cpu":
        raise ConfigError("mixed_precision fp16 needs a GPU; bf16 works on the CPU too")
    if run.train_file is None and not prompts and (run.model is not None or model):
        raise ConfigError("train_file, or prompts, is required with a model of your own")


def check_trackers(names: list[str]) -> None:
    """Raises ConfigError for a tracker that accelerate does not know or whose package is missing."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, available = [str(n) for n in LOGGER_TYPE_TO_CLASS], [str(n) for n in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(f"report_to must be none or among {', '.join(known)}; got {name!r}")
        if name not in available:
            raise ConfigError(f"report_to {name!r} needs the package {name}, which is not installed")


def check_backend(run: TrainConfig, device: torch.device) -> None:
    """Raises ConfigError for a backend that cannot run on the device."""
    dtype = torch.bfloat16 if run.mixed_precision == "bf16" or run.dtype == "bfloat16" else torch.float32
    try:
        backends.choose(run.backend, device, dtype)
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(str(e)) from None


def check_attention(run: TrainConfig, device: torch.device) -> None:
    """Raises ConfigError for an attention whose package or device is missing."""
    if run.attention == "flash_attention_2":
        if device.type == "cpu":
            raise ConfigError("attention = flash_attention_2 needs a GPU; sdpa works on the CPU")
        if importlib.util.find_spec("flash_attn") is None:
            raise ConfigError(f"attention = flash_attention_2 {needs_package('flash-attn')}")


def check_truncated(run: TrainConfig, method: MDPGRPOConfig) -> None:
    """Raises ConfigError where the sampler does not tell which tokens truncation kept."""
    if run.rollout == "vllm" and method.truncated_logprobs:
        raise ConfigError(
            "truncated_logprobs needs rollout = transformers: vLLM does not tell which tokens top-k, top-p and min-p "
            "kept"
        )
    per_row = method.sampler_correction and method.temperature_objective == "per_row"
    if run.rollout == "vllm" and per_row and method.truncates:
        raise ConfigError(
            "sampler_correction with temperature_objective = per_row needs rollout = transformers where top_p, top_k "
            "or min_p cut tokens: vLLM does not tell what mass they kept, which would be the weight; "
            "--temperature-objective corrected needs it not"
        )
    if method.truncated_logprobs and generation_kwargs(run):
        raise ConfigError(
            "truncated_logprobs needs a sampler without repetition_penalty and generation_kwargs: which tokens they "
            "leave follows from logits that the loss has not"
        )


def check_ahead(run: TrainConfig) -> None:
    """Raises ConfigError where async_rollout is asked for and nothing can sample beside the trainer."""
    if run.async_rollout and (run.rollout != "vllm" or run.vllm_url is None):
        what = "vLLM in this process" if run.rollout == "vllm" else "the model itself"
        raise ConfigError(
            f"async_rollout needs a server (--rollout vllm --vllm-url URL): {what} samples in the trainer's own thread "
            f"and on its device; got rollout = {run.rollout}, vllm_url = {run.vllm_url}"
        )


def check_vllm(run: TrainConfig, method: MDPGRPOConfig) -> None:
    """Raises ConfigError where vLLM is asked for and cannot be had."""
    if run.rollout != "vllm":
        return
    lowest = min(method.slot_temperatures)
    require(lowest >= MIN_TEMPERATURE, "temperatures", lowest, f"at least {MIN_TEMPERATURE} (vLLM's floor)")
    if run.vllm_url is not None:
        ok = run.vllm_url.startswith(("http://", "https://"))
        require(ok, "vllm_url", run.vllm_url, "an http:// or https:// address")
    elif importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"rollout = vllm {needs_package('vllm')}")
