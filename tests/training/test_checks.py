"""What is refused before a model is loaded, each in one line and with status 2."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mdpgrpo_fast.train as train
from mdpgrpo_fast.config import ConfigError, TrainConfig, preset
from mdpgrpo_fast.demo import SEED_POLICY
from mdpgrpo_fast.models.load import read_config
from mdpgrpo_fast.training.before import checks, memory
from mdpgrpo_fast.training.before.checks import check
from mdpgrpo_fast.training.guard.claim import check_output_dir

CPU = torch.device("cpu")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*args: Any, **knobs: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("mdpgrpo_fast.training.task.load", loaded)


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """All that a command line says before it ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train.main(list(flags))
    assert end.value.code == 2
    return capsys.readouterr().err


FLASH = "attention = flash_attention_2 needs a GPU; sdpa works on the CPU"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--report-to all", r"report_to must be none or among aim, .*, trackio; got 'all'"),
        ("--report-to none wandb", r"report_to must be none or among aim, .*, trackio; got 'none'"),
        ("--backend cuda", r"backend 'cuda' cannot run: it runs on CUDA devices, not on the CPU"),
        ("--reward no.module:f", r"reward 'no.module:f' .*No module named 'no'"),
        ("--attention flash_attention_2", re.escape(FLASH)),
        ("--rollout vllm", r"rollout = vllm needs the package vllm: pip install 'mdpgrpo-fast\[vllm\]'"),
        ("--rollout vllm --vllm-url host:1", "vllm_url must be an http:// or https:// address; got 'host:1'"),
        (
            "--rollout vllm --vllm-url http://h --temperatures 0.001 1",
            r"temperatures must be at least 0.01 \(vLLM's floor\); got 0.001",
        ),
        ("--max-completion-length 2048", r"max_completion_length must be below the model's \d+ positions; got 2048"),
        ("--model /no/such --train-file x", "model '/no/such' cannot be loaded: there is no such directory"),
        ("--model /no/such", "train_file, or prompts, is required with a model of your own"),
        ("--train-file /no/such.jsonl", "prompt file '/no/such.jsonl' does not exist"),
        ("--eval-file /no/such.jsonl", "prompt file '/no/such.jsonl' does not exist"),
        ("--mixed-precision fp16", "mixed_precision fp16 needs a GPU; bf16 works on the CPU too"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_work_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None, flags: str, said: str
) -> None:
    text = refused(capsys, "--output-dir", str(tmp_path / "run"), "--cpu", *flags.split())
    assert re.fullmatch(f"error: {said}\n", text), text
    assert not (tmp_path / "run").exists()


def test_no_tracker_is_none() -> None:
    assert TrainConfig(report_to=["none"]).report_to == []


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    said = "flash_attention_2 needs the package flash-attn: pip install --no-build-isolation 'mdpgrpo-fast[flash]'"
    with pytest.raises(ConfigError, match=re.escape(said)):
        checks.check_attention(TrainConfig(attention="flash_attention_2"), torch.device("cuda"))

    def no_peft() -> None:
        raise ConfigError("lora needs the package peft")

    monkeypatch.setattr(checks, "import_peft", no_peft)
    with pytest.raises(ConfigError, match="lora needs the package peft"):
        check(TrainConfig(lora=True, output_dir="runs/none"), preset("paper"))


def test_where_a_run_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    for name, why in (
        ("file", "is a file"), ("thesis", "exists and is no earlier run"),
        ("file/run", f"cannot be made: '{tmp_path}/file' is a file"),
    ):  # fmt: skip
        assert refused(capsys, "--output-dir", f"{tmp_path}/{name}") == f"error: output_dir '{tmp_path}/{name}' {why}\n"
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    said = f"error: output_dir '{tmp_path}/a/b' cannot be made: '{tmp_path}' cannot be written to\n"
    assert refused(capsys, "--output-dir", f"{tmp_path}/a/b") == said
    (tmp_path / "empty").mkdir()
    assert not check_output_dir(tmp_path / "empty"), "it is not made, only filled"


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_memory_that_cannot_suffice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, size = memory.stored_weights(str(SEED_POLICY), read_config(None)) or (0, 0)
    weights = 4 * count
    assert size in (weights, weights // 2) and count > 100_000
    monkeypatch.setattr(memory, "device_bytes", lambda device: 5 * weights - 1)
    one, two, five, has = (memory.gigabytes(x * weights) for x in (1, 2, 5, 5 - 1 / weights))
    said = refused(capsys, "--output-dir", str(tmp_path / "run"), "--cpu")
    assert said == (
        f"error: the memory cannot suffice: weights {one} + gradients {one} + AdamW {two} + reference {one} = {five}, "
        f"and a process on the CPU has {has}; --lora, --dtype bfloat16, --kl-beta-pos 0 --kl-beta-neg 0 lower it\n"
    )
    config = read_config(None)

    def refuse(method: str = "grpo", **knobs: Any) -> str | None:
        zero = {"kl_beta_pos": 0.0} if method == "grpo" else {}
        try:
            memory.check_memory(TrainConfig(**knobs), preset(method, **zero), str(SEED_POLICY), config, CPU)
        except ConfigError as e:
            return str(e)
        return None

    assert refuse() is None, "without a reference it is four fifths"
    assert refuse("paper", dtype="bfloat16") is refuse("paper", lora=True) is None
    monkeypatch.setattr(memory, "device_bytes", lambda device: weights - 1)
    assert str(refuse(lora=True)).endswith("; --dtype bfloat16 lower it")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert refuse("paper") is None, "a shard is less"


def test_sizes_of_weights_and_machines(tmp_path: Path) -> None:
    has = memory.device_bytes(CPU)
    assert has is not None and has > 1 << 28
    assert memory.stored_weights(str(tmp_path), None) is None
    (tmp_path / "model.safetensors").write_bytes(b"nonsense" * 9)
    assert memory.stored_weights(str(tmp_path), None) is None, "what is wrong with it the loading says"
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 12)
    assert memory.stored_weights(str(tmp_path), None) == (6, 12)
    assert [memory.gigabytes(x) for x in (2.5e6, 1.5e8, 1.2e12)] == ["2.5 MB", "0.1 GB", "1,200.0 GB"]
