"""Fixtures of what runs against a real vLLM: `make test-vllm`. Without vLLM it fails, and nothing here is skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["no_proxy"] = "127.0.0.1"
os.environ["VLLM_API_KEY"] = "key-of-these-tests"  # every request here goes through the door

import vllm
from helpers.vllm_real import MAX_LENGTH, Server

from mdpgrpo_fast.config import TrainConfig
from mdpgrpo_fast.demo import SEED_POLICY
from mdpgrpo_fast.models.load import load
from mdpgrpo_fast.rollout.vllm.local import VLLMEngine
from mdpgrpo_fast.rollout.vllm.server import VLLMServer
from mdpgrpo_fast.training.task import Task, prepare


@pytest.fixture(scope="session", autouse=True)
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """The server that runs, the last of the list. It starts while the first tests run."""
    folder = tmp_path_factory.mktemp("servers")
    started = [Server(folder / "0.log")]
    yield started
    for server in started:
        server.stop()


@pytest.fixture
def server(servers: list[Server]) -> Server:
    """A server that answers; where a test killed it, another."""
    if not servers[-1].alive:
        servers.append(Server(servers[0].log.with_name(f"{len(servers)}.log")))
    servers[-1].wait()
    return servers[-1]


@pytest.fixture(scope="session")
def local() -> VLLMEngine:
    """vLLM in this process, in float32."""
    assert vllm.__version__
    return VLLMEngine(
        str(SEED_POLICY),
        device="cpu",
        dtype="float32",
        sleep_mode=False,
        max_model_len=MAX_LENGTH,
        enforce_eager=True,
        max_num_batched_tokens=16384,
    )


@pytest.fixture(params=["local", "server"])
def engine(request: pytest.FixtureRequest) -> Any:
    """Either mode, with whatever weights the test before left in it."""
    if request.param == "local":
        return request.getfixturevalue("local")
    return VLLMServer(request.getfixturevalue("server").url, device="cpu", sync_dir=_shared_memory())


def _shared_memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.fixture(scope="session")
def task() -> Task:
    """The embedded prompts."""
    return prepare(TrainConfig(max_completion_length=64, max_prompt_length=256))


@pytest.fixture
def model() -> Any:
    """The embedded policy, with weights of the test's own."""
    return load(None, "float32", TrainConfig.attention)[0].eval()
