"""What verl 0.9.1 lacks to train without a GPU, each piece through a hook that verl has.

With tests/ on PYTHONPATH, VERL_USE_EXTERNAL_MODULES=helpers.verl_cpu loads it in every process of verl, and
VERL_PLATFORM=cpu chooses its platform (`helpers.verl_runs`):
- a platform (PlatformRegistry): device "cpu", gloo, no memory to measure;
- an engine (EngineRegistry): ours over verl's FSDP2 engine, both registered for CUDA and NPU alone;
- a rollout named "cpu" (RolloutReplicaRegistry and verl's table of adapters): a transformers model in a Ray actor.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import ray
import torch
import torch.distributed as dist
from helpers.verl_sampler import sample
from torch import Tensor
from verl.plugin.platform import PlatformBase, PlatformRegistry

RECORD = "VERL_CPU_RECORD"  # a folder: what each rank did, a line of JSON a step

# ---- the platform ---------------------------------------------------------------------------------------------------

# verl asks torch for the backend "cpu:gloo,<device>:<its backend>". With the CPU as the device that names a device
# twice, which torch refuses; a backend of that very name it takes.
dist.Backend.register_backend(
    "cpu:gloo,cpu:gloo",
    lambda store, rank, size, timeout: dist.ProcessGroupGloo(store, rank, size, timeout=timeout),
    devices=["cpu"],
)


class _Device(ModuleType):
    """torch.cpu, and the functions of torch.cuda that verl calls without asking whether there is a GPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        return False

    def empty_cache(self) -> None:
        pass

    def max_memory_allocated(self) -> int:
        return 0

    max_memory_reserved = memory_allocated = memory_reserved = max_memory_allocated

    def mem_get_info(self) -> tuple[int, int]:
        return 0, 0

    def get_device_name(self) -> str:
        return "CPU"  # of which verl knows how many operations a second it promises


@PlatformRegistry.register("cpu")
class Platform(PlatformBase):
    """One CPU per worker. Ray counts workers as GPUs: verl looks for no other resource but NPU before it starts."""

    device_name = vendor_name = "cpu"
    device_module = _Device("verl_cpu_device")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")  # verl passes it to Tensor.to(), where a number means a GPU

    def device_count(self) -> int:
        return 1

    def nothing(self, *_: Any) -> None:
        pass

    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = nothing

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield


# verl asks for the platform while it is imported: what needs more of verl comes after.
from verl.workers.engine import EngineRegistry  # noqa: E402
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout  # noqa: E402
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput  # noqa: E402

from mdpgrpo_fast.integrations.verl.engine import MDPGRPOEngine  # noqa: E402
from mdpgrpo_fast.integrations.verl.method import VENDOR  # noqa: E402

# ---- the engine -----------------------------------------------------------------------------------------------------


def record(name: str, **values: Any) -> None:
    """Adds a line to this process's file of that name, where a folder for them is set."""
    if folder := os.environ.get(RECORD):
        with open(os.path.join(folder, f"{name}.jsonl"), "a") as f:
            f.write(json.dumps(values) + "\n")


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu", vendor=VENDOR)
class Engine(MDPGRPOEngine):
    """Our engine. It records each rank's steps."""

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Without the offloading to pinned memory that verl forces on a reference policy: pinning needs a GPU."""
        config = self.engine_config
        forward_only = config.forward_only
        config.forward_only = False
        try:
            return super()._build_fsdp_module(module)
        finally:
            config.forward_only = forward_only

    def optimizer_step(self) -> float:
        norm = super().optimizer_step()
        shards = [p.to_local() for p in self.module.parameters()]
        record(
            f"rank{self.rank}",
            world=dist.get_world_size(),
            node=ray.get_runtime_context().get_node_id(),
            backend=dist.get_backend(),
            fuses_head=self.fuses_head,
            grad_norm=norm,
            numbers=sum(shard.numel() for shard in shards),  # of this rank's shards
            whole=sum(p.numel() for p in self.module.parameters()),
            trained=sum(p.numel() for p in self.module.parameters() if p.requires_grad)
            / sum(p.numel() for p in self.module.parameters()),
        )
        return norm


# ---- the rollout ----------------------------------------------------------------------------------------------------


class Server:
    """The Ray actor that answers. It samples only with weights that it was sent since it slept, as verl's engines."""

    def __init__(self, config: Any, model_config: Any) -> None:
        from transformers import AutoModelForCausalLM

        self.config = config
        self.model = AutoModelForCausalLM.from_pretrained(model_config.path, dtype=torch.float32).eval()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.steps: int | None = None
        self.waiting: list[tuple[list[int], dict[str, Any], asyncio.Future]] = []
        self.one_at_a_time = asyncio.Lock()

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        if self.steps is None:
            raise RuntimeError("the server sleeps: it has no weights")
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((list(prompt_ids), sampling_params, future))
        if len(self.waiting) == 1:
            task = asyncio.ensure_future(self._answer())
            future.add_done_callback(lambda _: task)  # which keeps it alive
        return await future

    async def _answer(self) -> None:
        """What comes in within a quarter of a second is sampled together."""
        async with self.one_at_a_time:
            await asyncio.sleep(0.25)
            waiting, self.waiting = self.waiting, []
            prompts, sampling, futures = zip(*waiting, strict=True)
            record("server", steps=self.steps, temperatures=[params["temperature"] for params in sampling])
            most = self.config.response_length
            try:
                answers = await asyncio.to_thread(sample, self.model, prompts, sampling, self.generator, most)
            except Exception as e:
                for future in futures:
                    future.set_exception(e)
                return
        for future, (tokens, logps) in zip(futures, answers, strict=True):
            extra = {"global_steps": self.steps}
            future.set_result(
                TokenOutput(token_ids=tokens, log_probs=logps, stop_reason="completed", extra_fields=extra)
            )

    async def load(self, weights: dict[str, Tensor], steps: int) -> None:
        self.model.load_state_dict(weights)
        self.steps = steps

    async def sleep(self) -> None:
        self.steps = None


class Replica(RolloutReplica):
    """One server. Its calls that the synchronous trainer does not make are not there."""

    async def launch_servers(self) -> None:
        name = _server_name(self.replica_rank)
        actor = ray.remote(Server).options(name=name, num_cpus=1, max_concurrency=self.max_concurrency)
        self._server_handle, self._server_address = actor.remote(self.config, self.model_config), name
        self.servers = [self._server_handle]


class Adapter(BaseRollout):
    """Runs in each rank of the actor: all gather the weights, and the first of a replica sends them."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any) -> None:
        super().__init__(config, model_config, device_mesh)
        _, tensor, pipeline = device_mesh.shape
        self.replica_rank, self.rank = divmod(dist.get_rank(), tensor * pipeline)

    async def resume(self, tags: list[str]) -> None:
        raise NotImplementedError("free_cache_engine must be False: there is no memory to give back")

    async def release(self) -> None:
        raise NotImplementedError("free_cache_engine must be False: there is no memory to give back")

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        whole = {name: tensor.detach().cpu() for name, tensor in weights}
        if self.rank == 0:
            await ray.get_actor(_server_name(self.replica_rank)).load.remote(whole, global_steps)


def _server_name(replica: int) -> str:
    return f"cpu_server_{replica}"


RolloutReplicaRegistry.register("cpu", lambda: Replica)
_ROLLOUT_REGISTRY["cpu", "async"] = f"{__name__}.Adapter"
