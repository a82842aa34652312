"""Training on several devices: launch settings checked, models wrapped, weights gathered for sampling and saving."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from torch import Tensor, nn

from ..config import ConfigError, TrainConfig
from ..log import reason_of
from ..rewards.pool import longest_wait
from ..rewards.scorer import CALL_TIMEOUT, COMPLETION_TIMEOUT

T = TypeVar("T")
_GONE = re.compile(
    r"closed by|closure|reset by peer|timed? ?out|broken pipe|refused|(read|write) error|remote process exited", re.I
)


class RankLostError(RuntimeError):
    """Another rank has ended, or does not answer any more."""


def lost_rank(error: Exception) -> RankLostError | None:
    """What the failure of a collective call says of the rank that it waited for; None for any other error."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or isinstance(error, RankLostError):
        return None
    text = str(error)
    # gloo has no class of its own for it. Both it and NCCL fail for other reasons too.
    by_backend = isinstance(error, dist.DistBackendError) or (type(error) is RuntimeError and "/gloo/" in text)
    if not isinstance(error, dist.DistNetworkError | dist.DistStoreError) and not (by_backend and _GONE.search(text)):
        return None
    said = re.sub(r"^\[\S+:\d+\] |\. This is typically caused by.*", "", text, flags=re.DOTALL)
    lost = RankLostError(f"another rank is lost, its own host says why ({reason_of(RuntimeError(said))})")
    lost.__cause__ = error
    return lost


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no rank holds all weights between forward passes."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return bool(accelerator.state.deepspeed_plugin.zero_stage == 3)
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def accelerator(run: TrainConfig, path: Path, completions: int) -> Accelerator:
    """accelerate as it was launched, its settings held against the run's. Raises ConfigError where they contradict.

    completions: most that a rank scores at once.
    """
    # Ranks wait for the one whose rewards take longest, and then for each other's answer to that.
    timeout = timedelta(seconds=waiting_time(run, completions))
    if run.cpu and os.environ.get("ACCELERATE_USE_FSDP") == "true" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # accelerate shards on accelerators alone: on a CPU it would train whole models, and not say so. Nothing else of
        # it asks for one.
        PartialState(cpu=True, timeout=timeout)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    if run.cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ConfigError("cpu: accelerate has DeepSpeed for accelerators alone; on a CPU take ddp.yaml or fsdp2.yaml")
    try:
        made = Accelerator(
            mixed_precision=run.mixed_precision,
            cpu=run.cpu,
            log_with=run.report_to or None,
            project_config=ProjectConfiguration(project_dir=str(path)),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
    except (ValueError, ImportError) as e:
        raise ConfigError(f"accelerate refuses its configuration: {reason_of(e)}") from None
    check(made, run)
    return made


def waiting_time(run: TrainConfig, completions: int) -> float:
    """Seconds that a rank may wait for another: rank_timeout, and what the rewards of a step may take at most."""
    calls = (run.reward_timeout or CALL_TIMEOUT) * len(run.reward)
    workers = longest_wait(completions, run.reward_workers, run.reward_timeout or COMPLETION_TIMEOUT)
    return run.rank_timeout + (calls + workers) * (1 + run.refill)


def check(accelerator: Accelerator, run: TrainConfig) -> None:
    """Settles what accelerate's own configuration leaves open. Raises ConfigError where it contradicts the run."""
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            "gradient_accumulation_steps of accelerate must be 1, micro-batches are accumulated here "
            f"(tokens_per_micro_batch); got {accelerator.gradient_accumulation_steps}"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(accelerator, run)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, run)


def _check_fsdp(accelerator: Accelerator, run: TrainConfig) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if not accelerator.is_fsdp2:
        raise ConfigError("fsdp_version of accelerate's configuration must be 2; got 1")
    plugin = accelerator.state.fsdp_plugin
    # Every rank has loaded the weights. From one rank's copy accelerate would untie a tied head.
    plugin.cpu_ram_efficient_loading = False
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.mixed_precision)
    if dtype is not None:
        # The weights of the passes alone: not the advantages and log-probs that go in and come out, nor the sums.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )


def _check_deepspeed(config: dict[str, Any], run: TrainConfig) -> None:
    if "optimizer" in config:
        raise ConfigError("the DeepSpeed configuration must have no optimizer section: the run has its own AdamW")
    wanted = {"gradient_accumulation_steps": 1, "gradient_clipping": run.max_grad_norm}
    for name, value in wanted.items():
        given = config.get(name, "auto")
        if given != "auto" and float(given) != value:
            knob = " (max_grad_norm)" if name == "gradient_clipping" else ""
            raise ConfigError(f"{name} of the DeepSpeed configuration must be {value}{knob}; got {given}")
        config[name] = value
    for name in ("bf16", "fp16"):
        given, expected = config.get(name, {}).get("enabled", "auto"), run.mixed_precision == name
        if given not in ("auto", expected):
            raise ConfigError(
                f"{name} of the DeepSpeed configuration must be {str(expected).lower()} (mixed_precision = "
                f"{run.mixed_precision}); got {str(given).lower()}"
            )
    config["train_micro_batch_size_per_gpu"] = 1  # it asks for a number; ours are counted in tokens
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    # Or the model at the end of a run could not be saved.
    config.setdefault("zero_optimization", {})["stage3_gather_16bit_weights_on_model_save"] = True


def check_adapted_start(accelerator: Accelerator, starts_adapted: bool) -> None:
    """Raises ConfigError where the adapters that a run came with cannot be put back for the reference."""
    if starts_adapted and is_sharded(accelerator) and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ConfigError(
            "the training of a LoRA adapter cannot go on under ZeRO-3 with a KL term, whose reference is that adapter: "
            "take ZeRO-2, DDP or FSDP, or merge_adapter"
        )


def prepare(
    accelerator: Accelerator, policy: nn.Module, optimizer: Any, reference: nn.Module | None
) -> tuple[Any, Any]:
    """The policy and its optimiser as accelerate wraps them; a reference goes to the device, in shards under FSDP."""
    model, optimizer = accelerator.prepare(policy, optimizer)
    if accelerator.distributed_type != DistributedType.FSDP:
        if reference is not None:
            # In the policy's dtype, which DeepSpeed may have changed: the KL of two equal models is 0.
            reference.to(accelerator.device, next(policy.parameters()).dtype)
        return model, optimizer
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import register_fsdp_forward_method

    if reference is not None:
        register_fsdp_forward_method(fsdp2_prepare_model(accelerator, reference), "logprobs")
    # Whatever runs the model goes through the root, which has to be the first whose forward pass runs.
    for name in ("call", "logprobs"):
        register_fsdp_forward_method(model, name)
    return model, optimizer


def call_whole(accelerator: Accelerator, model: nn.Module, function: Callable[[], T]) -> T:
    """function(), which runs forward passes of the language model in `model`, as many as it likes on each rank.

    Sharded weights are gathered once for all of them and let go afterwards; called by all ranks together.
    """
    if not is_sharded(accelerator):
        return function()
    if accelerator.distributed_type == DistributedType.FSDP:
        return _call_unsharded(model, function, bool(accelerator.state.fsdp_plugin.reshard_after_forward))
    with _gathered(model):
        return function()


def _call_unsharded(model: Any, function: Callable[[], T], reshard: bool) -> T:
    from torch.distributed.fsdp import FSDPModule

    model.set_reshard_after_forward(False)
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]

    def gathered() -> T:
        for m in parts:
            m.unshard()
        return function()

    try:
        found: T = model.call(gathered)
        return found
    finally:
        model.set_reshard_after_forward(reshard)
        model.set_reshard_after_forward(False, recurse=False)  # the root, as torch itself has it
        for m in parts:
            m.reshard()


@contextmanager
def _gathered(engine: Any) -> Iterator[None]:
    """All parameters of a DeepSpeed engine, with its hooks off, which would let them go after each layer."""
    import deepspeed

    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)


def whole_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor] | None:
    """State of the language model in a `Policy`, gathered on the main process; None where it needs no gathering."""
    if not is_sharded(accelerator):
        return None
    state = accelerator.get_state_dict(model)
    return {k.removeprefix("model."): v for k, v in (state or {}).items()}


def loss_and_norm(accelerator: Accelerator, loss: Tensor, norm: Any) -> tuple[float, float]:
    """The mean loss of all ranks, and the norm of their common gradient, finite on all or on none; read from the device
    at once. norm: of a tensor, sharded or not, or DeepSpeed's own (None, 0 here, before its first step)."""
    if not isinstance(norm, Tensor):
        return accelerator.reduce(loss, "mean").item(), float(norm or 0.0)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    dtype = torch.promote_types(norm.dtype, torch.float32)
    found = accelerator.reduce(torch.stack([loss.to(dtype), norm.to(loss.device, dtype)]), "mean")
    return tuple(found.tolist())


def max_over_ranks(accelerator: Accelerator, number: int) -> int:
    """The largest number of all ranks."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
