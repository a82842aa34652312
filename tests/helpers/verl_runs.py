"""Short runs of verl's own trainer, with two ranks and no GPU (`helpers.verl_cpu`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from helpers.inputs import ROOT
from ray.cluster_utils import Cluster

from mdpgrpo_fast.demo import DEMO_DIR, SEED_POLICY
from mdpgrpo_fast.integrations.verl.__main__ import CONFIGS
from mdpgrpo_fast.integrations.verl.data import write_parquet

RANKS = 2


def overrides(
    folder: Path, *, steps: int, prompts: int = 16, per_prompt: int = 4, held_out: int = 64
) -> dict[str, Any]:
    """Settings of verl for a run of the embedded policy on the embedded prompts, each of which it sees once; the held
    out ones are answered greedily before and after. Keys that begin with + are not in verl's own configuration."""
    write_parquet(
        {
            folder / "train.parquet": ("train", json_lines(DEMO_DIR / "train.jsonl")[: steps * prompts]),
            folder / "heldout.parquet": ("val", json_lines(DEMO_DIR / "heldout.jsonl")[:held_out]),
        }
    )
    precision = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
    actor, ref, rollout = (f"actor_rollout_ref.{part}" for part in ("actor", "ref", "rollout"))
    return {
        "data.train_files": folder / "train.parquet",
        "data.val_files": folder / "heldout.parquet",
        "data.train_batch_size": prompts,
        "data.max_prompt_length": 128,
        "data.max_response_length": 64,
        "data.dataloader_num_workers": 0,
        "data.shuffle": False,
        "actor_rollout_ref.model.path": SEED_POLICY,
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        "actor_rollout_ref.model.use_remove_padding": False,
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        f"+{actor}.fsdp_config.mixed_precision": precision,
        f"{actor}.fsdp_config.use_torch_compile": False,
        f"{actor}.optim.lr": 5e-4,
        f"{actor}.ppo_micro_batch_size_per_gpu": prompts * per_prompt // RANKS,
        f"+{ref}.fsdp_config.mixed_precision": precision,
        f"{ref}.fsdp_config.use_torch_compile": False,
        f"{ref}.log_prob_micro_batch_size_per_gpu": prompts * per_prompt // RANKS,
        f"{rollout}.name": "cpu",
        f"{rollout}.n": per_prompt,
        f"{rollout}.tensor_model_parallel_size": RANKS,  # one server for all ranks
        f"{rollout}.free_cache_engine": False,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": prompts * per_prompt // RANKS,
        f"{rollout}.agent.num_workers": 1,
        "reward.num_workers": 1,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "trainer.device": "cpu",
        "trainer.n_gpus_per_node": RANKS,
        "trainer.total_training_steps": steps,
        "trainer.test_freq": steps,
        "trainer.resume_mode": "disable",
        "trainer.logger": "[console,file]",
        "trainer.default_local_dir": folder / "checkpoints",
        "ray_kwargs.ray_init.num_cpus": 16,  # to count with: verl wants some for each worker, and they are not used
        "+ray_kwargs.ray_init.num_gpus": RANKS,  # helpers.verl_cpu.Platform
        "+ray_kwargs.ray_init.include_dashboard": False,
        "+ray_kwargs.ray_init.object_store_memory": 200_000_000,
        "hydra.run.dir": folder,
    }


def run(folder: Path, settings: dict[str, Any], config: str = "one_node", timeout: int = 500) -> list[dict[str, Any]]:
    """Runs verl's trainer by one of our configs. Returns the metrics that it logs, a dict a step; that of step 0 is the
    evaluation before the first. folder/log has all that it said, folder/record what `helpers.verl_cpu` recorded.

    Raises: RuntimeError with the end of the log where verl stops, or lost an answer or its reward."""
    (folder / "record").mkdir()
    env = _environment(folder)
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", CONFIGS, "--config-name", config]
    command += [*(f"{k}={v}" for k, v in settings.items())]
    with (folder / "log").open("w") as log:
        done = subprocess.run(command, env=env, stdout=log, stderr=log, cwd=folder, timeout=timeout)
    said = (folder / "log").read_text()
    # verl goes on where an answer or its reward fails, with fewer answers and with empty ones in their place.
    if done.returncode or "Error in _run_prompt" in said:
        raise RuntimeError(f"verl's trainer failed: {said[-4000:]}")
    return [{"step": row["step"], **row["data"]} for row in json_lines(folder / "metrics.jsonl")]


def _environment(folder: Path) -> dict[str, str]:
    """Of every process of a run."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "helpers.verl_cpu",
        "VERL_CPU_RECORD": str(folder / "record"),
        "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
        "RAY_ADDRESS": "local",  # not a cluster that this machine is part of
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TQ_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # each of ten processes imports verl, seconds that are mostly compiling
    return env


@contextmanager
def two_nodes(folder: Path) -> Iterator[dict[str, Any]]:
    """A Ray cluster of two nodes, both of this machine, with one rank each; what a run's settings are then."""
    of_node = {"num_cpus": 8, "num_gpus": 1, "object_store_memory": 200_000_000}
    with patch.dict(os.environ, _environment(folder)):  # which workers have of their node, and not of the driver
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        cluster = Cluster(initialize_head=True, head_node_args={**of_node, "include_dashboard": False})
        try:
            cluster.add_node(**of_node)
            yield {
                "trainer.nnodes": 2, "trainer.n_gpus_per_node": 1, "+ray_kwargs.ray_init.address": cluster.address,
                "ray_kwargs.ray_init.num_cpus": "null", "+ray_kwargs.ray_init.num_gpus": "null",
                "+ray_kwargs.ray_init.object_store_memory": "null",
            }  # fmt: skip
        finally:
            cluster.shutdown()


def json_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
