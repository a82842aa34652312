"""The door in Python: one call, a Trainer, in a script without a main guard, with models and prompts in memory."""

from __future__ import annotations

import ast
import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.inputs import ROOT

import mdpgrpo_fast
from mdpgrpo_fast import ConfigError, RewardError, TrainConfig, Trainer, TrainResult, api, preset
from mdpgrpo_fast.durable import StorageError

ROWS = [{"prompt": f"Say number {i}.", "answer": str(i)} for i in range(6)]


def settings(tmp_path: Path, **knobs: Any) -> TrainConfig:
    small = {"steps": 2, "prompts_per_step": 2, "max_completion_length": 8, "save_model": False}
    return TrainConfig(**{**small, "output_dir": str(tmp_path / "run"), **knobs})


def answered(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def test_one_call_with_functions_lambdas_and_a_callback(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    result = api.train(
        prompts=ROWS,
        rewards=[answered, lambda completions, **_: [len(c) / 99 for c in completions]],
        reward_weights=[1, 0.5],
        eval_prompts=ROWS[:3],
        config=preset("grpo", num_generations=4),
        run=settings(tmp_path, steps=4),
        on_step=lambda row: rows.append(row) or row["step"] == 2,
    )
    assert isinstance(result, TrainResult) and [r["step"] for r in rows] == [1, 2] == [
        r["step"] for r in result.history
    ]
    assert result.summary["steps"] == 2 and result.summary["method"] == "grpo" and result.model_path is None
    assert list(result.summary["rewards"]) == ["answered", "<lambda>"] and result.report.is_file()
    assert str(result).startswith("held-out reward ") and result.path == tmp_path / "run"
    assert rows[0]["reward"] == pytest.approx(
        rows[0]["rewards"]["answered"]["mean"] + 0.5 * rows[0]["rewards"]["<lambda>"]["mean"]
    )


def test_a_trainer_evaluates_trains_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    # Another length for every completion: a reward with a spread.
    trainer = Trainer(
        prompts=["Name a colour.", "Name a city."],
        rewards=lambda completions, **_: [hash(c) % 97 / 97 for c in completions],
        run=settings(tmp_path, learning_rate=1e-3),
    )
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    first = trainer.evaluate(ROWS[:4])
    assert not (tmp_path / "run").exists(), "nothing is written before it trains"
    assert first["reward"] is not None and first["intervals"]["reward"] >= 0
    trainer.train()
    assert any(not torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert trainer.evaluate(ROWS[:4])["truncated"] >= 0
    saved = AutoModelForCausalLM.from_pretrained(trainer.save(tmp_path / "saved"))
    assert all(torch.equal(v, trainer.model.state_dict()[k]) for k, v in saved.state_dict().items())
    assert trainer.tokenizer.eos_token is not None and (tmp_path / "saved" / "tokenizer.json").exists()
    with pytest.raises(ConfigError, match=r"path '.*saved' exists; a model is written into a new directory"):
        trainer.save(tmp_path / "saved")
    with (
        monkeypatch.context() as patch,
        pytest.raises(StorageError, match="saved too' cannot be written: No space left"),
    ):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(trainer.tokenizer, "save_pretrained", mock.Mock(side_effect=full))
        trainer.save(tmp_path / "saved too")
    assert not list(tmp_path.glob("*saved too*"))
    for name in ("beside.old", "beside.new"):
        (tmp_path / name).mkdir()
    trainer.save(tmp_path / "beside")
    assert all((tmp_path / name).is_dir() for name in ("beside", "beside.old", "beside.new"))
    with pytest.raises(ConfigError, match="prompts must be given where the run has no eval_prompts"):
        trainer.evaluate()
    with pytest.raises(RuntimeError, match=r"train\(\) runs once"):
        trainer.train()


def test_a_loaded_model_is_trained_in_place(tmp_path: Path, model_dirs: dict[str, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dirs["qwen2"])
    tokenizer = AutoTokenizer.from_pretrained(model_dirs["qwen2"])
    before = [p.clone() for p in model.parameters()]
    run = settings(tmp_path, steps=1, learning_rate=1e-3)
    reward = {"rewards": lambda completions, **_: [float(len(c)) for c in completions]}
    result = api.train(model, ROWS, tokenizer=tokenizer, run=run, **reward)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert result.summary["model"] == "Qwen2ForCausalLM" and result.summary["method"] == "paper"


def test_the_embedded_demonstration_is_the_default() -> None:
    run, config = api._demonstration()
    train = importlib.import_module("mdpgrpo_fast.train")
    assert (run, config) == train.resolve([])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": "/no/such"}, "train_file, or prompts, is required with a model of your own"),
        ({"prompts": []}, "prompts must have at least one row; got none"),
        ({"prompts": 3}, "prompts must be a path, a hub id, a list of texts or rows, or a data set; got int"),
        ({"prompts": "none.jsonl"}, "prompt file 'none.jsonl' does not exist"),
        ({"prompts": ["a", 3]}, "prompts row 2: a row must be a JSON object; got int"),
        ({"prompts": ["a"]}, "prompt 1 has no instruction_id_list, which the reward 'constraints' needs: 'a'"),
        ({"prompts": ["a"], "rewards": "nowhere:f"}, "reward 'nowhere:f' cannot be loaded"),
        (
            {"prompts": ["a"], "rewards": [answered], "reward_weights": [1, 2]},
            "reward_weights must have one weight",
        ),
        ({"prompts": ["a"], "rewards": [3]}, "rewards must be functions or names of rewards; got 3"),
        ({"prompts": ["a"], "rewards": answered, "reward_weights": ["a"]}, "reward_weights must be a number; got 'a'"),
        ({"config": "grpo"}, "config must be a MDPGRPOConfig; got str"),
        ({"model": object(), "prompts": ["a"], "rewards": answered}, "model must be a directory, a hub id or a causal"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: str, tmp_path: Path) -> None:
    run = settings(tmp_path, reward_check=False)
    with pytest.raises(ConfigError) as raised:
        Trainer(**arguments, run=run)
    assert str(raised.value).startswith(error) and "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_fails_is_found_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdpgrpo_fast.training.task.load", lambda *_, **__: pytest.fail("it is loaded"))
    with pytest.raises(RewardError, match=r"test_api:<lambda>' raised KeyError: 'nothing'"):
        Trainer(None, ["a"], lambda completions, **columns: columns["nothing"], run=settings(tmp_path))


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    """As a notebook's cells do: the main module cannot be imported by workers, and is not."""
    script = (
        "from mdpgrpo_fast import train, TrainConfig, preset\n"
        f"small = dict(steps=1, prompts_per_step=1, output_dir={str(tmp_path / 'run')!r})\n"
        "run = TrainConfig(max_completion_length=8, **small)\n"
        "print('once')\n"
        "rows = [{'prompt': 'Hi', 'instruction_id_list': ['punctuation:no_comma'], 'kwargs': [{}]}]\n"
        "print(train(prompts=rows, config=preset('paper'), run=run).summary['steps'])\n"
    )
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.splitlines()[0] == "once" and done.stdout.splitlines()[-1] == "1" and done.stdout.count("once") == 1
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["hsr_before"] is None
    assert not (tmp_path / "run.1").exists()


def test_train_can_be_called_whether_its_module_is_loaded_or_not() -> None:
    code = (
        "from mdpgrpo_fast import train\nassert train.__module__ == 'mdpgrpo_fast.api'\n"
        "import mdpgrpo_fast.train\nfrom mdpgrpo_fast import train as module\n"
        "try:\n    module(prompts=[])\nexcept ValueError as e:\n    print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout == "prompts must have at least one row; got none\n", done.stderr


def test_every_public_name_is_there_for_readers_and_type_checkers() -> None:
    tree = ast.parse((ROOT / "mdpgrpo_fast" / "__init__.py").read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and isinstance(n.test, ast.Name)]
    typed = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert sorted(typed) == sorted(mdpgrpo_fast.__all__)
    assert typed == {name: home for home, names in mdpgrpo_fast._HOME.items() for name in names.split()}
    assert all(getattr(mdpgrpo_fast, name).__name__ == name for name in typed if name != "train")
    with pytest.raises(AttributeError, match="no attribute 'zzz'"):
        mdpgrpo_fast.zzz  # noqa: B018
