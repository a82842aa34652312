"""A LoRA adapter alone goes to vLLM."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from helpers.vllm import ARGS, GENERATE, PROMPTS, FakeServer, client, weights

from mdpgrpo_fast.config import ConfigError, MDPGRPOConfig, TrainConfig, without_effect
from mdpgrpo_fast.rollout.vllm.completion import RestartedError, RolloutError
from mdpgrpo_fast.rollout.vllm.local import VLLMEngine, max_lora_rank


def write(directory: str) -> None:
    (Path(directory) / "adapter_config.json").write_text("{}")


def test_the_base_goes_once_and_the_adapter_each_time(engine: Any) -> None:
    for version in (3, 4):
        engine.sync_adapter(weights().items(), write, version)
        assert engine.version == version and engine.label == f"{engine.run_id}-3"
        assert engine.generate(PROMPTS, **ARGS).tokens.shape == (6, 4)
    assert engine.fake.workers[0].model.loads == 1, "the model's own weights, checked"
    fake = engine.fake._llm if hasattr(engine.fake, "_llm") else engine.fake
    names = [a if isinstance(a, str) else a[0] for a in fake.adapters]
    assert names[-1] == f"{engine.run_id}-adapter-4.1"
    engine.sync(weights(1).items(), 5)
    assert engine.adapter is None and engine.label == f"{engine.run_id}-5"
    engine.sync_adapter(weights().items(), write, 6)
    assert engine.fake.workers[0].model.loads == 3, "what vLLM held may have been merged"


def test_rows_are_asked_of_the_newest_adapter_locally(local: Any, log: list[Any]) -> None:
    for version in (1, 2):
        local.sync_adapter(weights().items(), write, version)
        local.generate(PROMPTS, **ARGS)
    asked = [kwargs["lora_request"] for name, _, kwargs in log if name == "generate"]
    assert [(r.lora_name, r.lora_int_id) for r in asked] == [
        (f"{local.run_id}-adapter-1.0", 1), (f"{local.run_id}-adapter-2.1", 2)
    ]  # fmt: skip
    assert [Path(r.lora_path).exists() for r in asked] == [False, True], "the newest's are kept: vLLM may look again"
    local._adapter_files.close()
    assert not Path(asked[1].lora_path).exists()
    assert [files for *_, files in local._llm.adapters] == [{"adapter_config.json": 0o600}] * 2


def test_rows_are_asked_of_the_newest_adapter_of_a_server(server: FakeServer, tmp_path: Path) -> None:
    engine = client(server, sync_dir=str(tmp_path))
    seen = []

    def look(handler: Any, path: str, body: Any) -> bool:
        if path == "/v1/load_lora_adapter":
            seen.append(os.stat(body["lora_path"]).st_mode & 0o777)
        return False

    server.fault = look
    for version in (1, 2):
        engine.sync_adapter(weights().items(), write, version)
        engine.generate(PROMPTS, **ARGS)
    asked = [body["model"] for _, path, body in server.log if path == GENERATE]
    assert asked == [f"{engine.run_id}-adapter-1.0"] * 6 + [f"{engine.run_id}-adapter-2.1"] * 6
    assert server.adapters == {f"{engine.run_id}-adapter-2.1": {"adapter_config.json": 0o600}}, "the former is unloaded"
    assert seen == [0o700] * 2 and len(list(tmp_path.iterdir())) == 1, "the newest's are kept: vLLM may look again"
    before = server.count("/v1/load_lora_adapter")

    def answer_is_lost(handler: Any, path: str, body: Any) -> bool:
        if path != "/v1/load_lora_adapter" or body["lora_name"] in server.adapters:
            return False
        server.adapters[body["lora_name"]] = {}
        handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    server.fault = answer_is_lost
    engine.sync_adapter(weights().items(), write, 3)
    assert server.count("/v1/load_lora_adapter") == before + 2
    del engine
    gc.collect()
    assert not any(tmp_path.iterdir())


def test_sleep_keeps_the_model_s_own_weights(log: list[Any]) -> None:
    local = VLLMEngine("some/model", device="cpu", lora_rank=12)
    made = log[0][2]
    assert made["enable_lora"] is True and made["max_lora_rank"] == 16 and made["max_loras"] == 1
    local.sync_adapter(weights().items(), write, 0)
    local.sleep()
    with pytest.raises(RolloutError, match=r"sync\(\) must come before generate\(\)"):
        local.generate(PROMPTS, **ARGS)
    local.sync_adapter(weights().items(), write, 1)
    local.generate(PROMPTS, **ARGS)
    calls = [kw.get("level") or kw.get("tags") for name, _, kw in log if name in ("sleep", "wake_up")]
    assert calls == [1, ["weights"], ["kv_cache"]]
    assert local._llm.workers[0].model.loads == 1


def test_ranks_of_an_adapter() -> None:
    assert [max_lora_rank(r) for r in (1, 2, 8, 9, 257, 512)] == [1, 8, 8, 16, 320, 512]
    with pytest.raises(ConfigError, match="lora_r must be at most 512 with vllm_lora = adapter; got 513"):
        max_lora_rank(513)


def test_a_server_without_adapters(server: FakeServer) -> None:
    with pytest.raises(ConfigError, match=r"--max-lora-rank 8 or more must be given with vllm_lora = adapter; got no"):
        client(server, lora_rank=8)
    server.lora = {"max_lora_rank": 4}
    with pytest.raises(ConfigError, match="--max-lora-rank 8 or more must be given with vllm_lora = adapter; got 4"):
        client(server, lora_rank=8)
    assert client(server, lora_rank=4).version is None


def test_a_server_that_forgot_gets_base_and_adapter_again(server: FakeServer) -> None:
    engine = client(server)
    engine.sync_adapter(weights().items(), write, 1)
    server.restart()
    with pytest.raises(RestartedError, match=f"does not know {engine.run_id}-adapter-1.0: was it restarted") as e:
        engine.generate(PROMPTS, **ARGS)
    assert e.value.partial == [None] * 6
    engine.sync_adapter(weights().items(), write, 1)
    assert server.workers[0].model.loads == 1 and engine.generate(PROMPTS, **ARGS).tokens.shape == (6, 4)
    server.restart()
    engine.sync_adapter(weights().items(), write, 2)
    with pytest.raises(RestartedError, match="6 of 6 completions were drawn with weights 'default'"):
        engine.generate(PROMPTS, **ARGS)
    engine.sync_adapter(weights().items(), write, 2)
    assert server.workers[0].model.loads == 1 and engine.generate(PROMPTS, **ARGS).tokens.shape == (6, 4)


def test_an_adapter_that_cannot_be_written_is_an_error_of_one_line(engine: Any) -> None:
    def full(directory: str) -> None:
        raise OSError(28, "No space left on device")

    engine.sync_adapter(weights().items(), write, 1)
    with pytest.raises(RolloutError, match=r"the adapter for vLLM cannot be written to .*No space left") as e:
        engine.sync_adapter(weights().items(), full, 2)
    assert "\n" not in str(e.value)
    with pytest.raises(RolloutError, match=r"does not hold the weights of the last sync\(\)"):
        engine.generate(PROMPTS, **ARGS)  # with the adapter of before


def test_a_knob_without_effect() -> None:
    run = TrainConfig(rollout="vllm", vllm_lora="adapter")
    (line,) = without_effect(run, MDPGRPOConfig(), {"vllm_lora"})
    assert line.startswith("--vllm-lora has no effect") and "--lora" in line
