"""Fixtures: vLLM in this process and as a server, each with its stand-in."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.inputs import unavailable
from helpers.vllm import FakeLLM, FakeServer, client

from mdpgrpo_fast.rollout.vllm.local import VLLMEngine


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The calls that a stand-in vllm package receives."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    fake: Any = types.ModuleType("vllm")
    fake.LLM = lambda *args, **kwargs: FakeLLM(calls, *args, **kwargs)
    fake.SamplingParams = lambda **kwargs: types.SimpleNamespace(**kwargs)
    fake.TokensPrompt = dict
    request: Any = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: types.SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path=path
    )
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return calls


@pytest.fixture
def local(log: list[Any]) -> Any:
    return VLLMEngine("some/model", device="cpu")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fake = FakeServer()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()


@pytest.fixture(params=["local", "server"])
def engine(request: pytest.FixtureRequest) -> Any:
    """Either mode, with its stand-in as `.fake`."""
    if request.param == "local":
        made = request.getfixturevalue("local")
        made.fake = made._llm
    else:
        fake = request.getfixturevalue("server")
        made = client(fake)
        made.fake = fake
    return made


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and server.pem with its key, for 127.0.0.1."""
    if shutil.which("openssl") is None:
        unavailable("there is no openssl to make certificates with")
    made = tmp_path_factory.mktemp("certificates")
    common = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2".split()
    ca = "-subj /CN=authority -keyout ca.key -out ca.pem -addext keyUsage=critical,keyCertSign".split()
    leaf = "-subj /CN=server -keyout server.key -out leaf.pem -CA ca.pem -CAkey ca.key".split()
    extensions = ["subjectAltName=IP:127.0.0.1", "basicConstraints=critical,CA:FALSE"]
    for words in (ca, [*leaf, *(w for e in extensions for w in ("-addext", e))]):
        done = subprocess.run([*common, *words], cwd=made, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    (made / "server.pem").write_text((made / "leaf.pem").read_text() + (made / "server.key").read_text())
    return made
