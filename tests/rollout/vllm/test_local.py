"""vLLM in this process, against a stand-in; the calls against its real sources."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
from helpers.vllm import ARGS, PROMPTS, TAUS, class_body, class_fields, method_signature, vllm_sources, weights

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.rollout.vllm.completion import Completion, RolloutError
from mdpgrpo_fast.rollout.vllm.local import VLLMEngine
from mdpgrpo_fast.rollout.vllm.worker import WeightSync


def test_one_generate_call_with_a_list_of_sampling_parameters(local: Any, log: list[Any]) -> None:
    local.generate(PROMPTS, **ARGS)
    ((_, (prompts, params), kwargs),) = [call for call in log if call[0] == "generate"]
    assert [p["prompt_token_ids"] for p in prompts] == [p for p in PROMPTS for _ in range(2)]
    assert [p.temperature for p in params] == TAUS
    assert not any(p.detokenize for p in params) and kwargs == {"use_tqdm": False, "lora_request": None}


def test_the_engine_runs_in_this_process_and_leaves_the_environment(
    local: Any, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dict(log[0][2])
    assert local._llm.multiprocessing == "0" and "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
    assert made["logprobs_mode"] == "processed_logprobs" and made["generation_config"] == "vllm"
    assert made["worker_extension_cls"] == f"{WeightSync.__module__}.{WeightSync.__qualname__}"
    assert "distributed_executor_backend" not in made
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    VLLMEngine("some/model", device="cpu", max_num_seqs=8)
    assert log[-1][2]["distributed_executor_backend"] == "external_launcher" and log[-1][2]["max_num_seqs"] == 8
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"


def test_sleep_sync_and_generate_follow_each_other(local: Any, log: list[Any]) -> None:
    local.sync(weights(0).items(), 0)
    local.generate(PROMPTS, **ARGS)
    del log[:]
    local.sleep()
    local.sleep()
    with pytest.raises(RolloutError, match=r"sync\(\) must come before generate\(\)"):
        local.generate(PROMPTS, **ARGS)
    local.sync(weights(1).items(), 1)
    local.generate(PROMPTS, **ARGS)
    steps = [
        (kw.get("level") or kw.get("tags") or (args[:1] if name == "collective_rpc" else name))
        for name, args, kw in log
    ]
    assert steps == [
        2,
        ["weights"],
        "update_weight_version",
        ("mdpgrpo_start",),
        ("mdpgrpo_load",),
        ("mdpgrpo_finish",),
        "reset_prefix_cache",
        "update_weight_version",
        ("mdpgrpo_finish",),
        ["kv_cache"],
        "generate",
    ]


def test_without_sleep_mode_nothing_is_freed(log: list[Any]) -> None:
    local = VLLMEngine("some/model", device="cpu", sleep_mode=False)
    local.sleep()
    local.generate(PROMPTS, **ARGS)
    assert log[0][2]["enable_sleep_mode"] is False
    assert [name for name, *_ in log] == ["__init__", "generate"]


def test_completions_that_came_are_kept_when_vllm_aborts_some(local: Any) -> None:
    local._llm.lose = lambda i: i in (1, 4)
    with pytest.raises(RolloutError, match="returned 4 of 6 completions: finish_reason must be stop or length") as e:
        local.generate(PROMPTS, **ARGS)
    assert [c is None for c in e.value.partial] == [False, True, False, False, True, False]
    assert e.value.partial[2] == Completion([28, 29, 30, 31], [-0.5, -0.625, -0.75, -0.875], False, "default")


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="needs the package vllm"):
        VLLMEngine("some/model", device="cpu")


def test_colocated_calls_fit_the_installed_vllm(local: Any, log: list[Any]) -> None:
    root = vllm_sources()
    local.sync(weights(0).items(), 0)
    local.generate(PROMPTS, **ARGS, seed=1)
    local.sleep()
    local.sync_adapter(weights(1).items(), lambda directory: None, 1)
    assert {"lora_name", "lora_int_id", "lora_path"} <= class_fields(root / "lora/request.py", "LoRARequest")
    engine = method_signature(class_body(root / "v1/engine/llm_engine.py", "LLMEngine"), "add_lora")
    assert list(engine.parameters) == ["lora_request"]
    llm = class_body(root / "entrypoints/llm.py", "LLM")
    llm += class_body(root / "entrypoints/rl/offline.py", "RLOfflineMixin")
    for name, args, kwargs in log:
        method_signature(llm, name).bind(*args, **kwargs)
    assert {name for name, *_ in log} >= {"generate", "collective_rpc", "reset_prefix_cache", "sleep", "wake_up"}
    named = set(method_signature(llm, "__init__").parameters)
    assert set(log[0][2]) <= named | class_fields(root / "engine/arg_utils.py", "EngineArgs")
    params = next(args[1][0] for name, args, _ in log if name == "generate")
    assert set(vars(params)) <= class_fields(root / "sampling_params.py", "SamplingParams")
    assert "prompt_token_ids" in class_fields(root / "inputs/llm.py", "TokensPrompt")
    output = {"token_ids", "logprobs", "finish_reason", "weight_versions"}
    assert output <= class_fields(root / "outputs.py", "CompletionOutput")
    assert "logprob" in class_fields(root / "logprobs.py", "Logprob")
    assert "processed_logprobs" in (root / "config/model.py").read_text(encoding="utf-8")
