"""The command line of training: real models and prompts, a complete run directory, bad settings in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mdpgrpo_fast.train as train
from mdpgrpo_fast import api, evaluate
from mdpgrpo_fast.config import TrainConfig, preset


def test_run_directory_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    argv = ["--steps", "2", "--prompts-per-step", "2", "--eval-samples", "6", "--eval-every", "1"]
    assert train.main([*argv, "--output-dir", str(out), "--report-to", "tensorboard"]) == 0
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "completions.jsonl", "report.html", "model"):
        assert (out / name).exists(), name
    assert list(out.rglob("events.out.tfevents*"))
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in metrics] == [0, 1, 1, 2, 2]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["hsr_before"] == metrics[0]["eval"]["hsr"] and summary["ssr_after"] == metrics[-1]["eval"]["ssr"]
    wanted = "hsr_before hsr_after ssr_before ssr_after steps train_seconds method device versions".split()
    assert all(summary[k] is not None for k in wanted)
    completions = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    phases = [c["phase"] for c in completions]
    assert phases.count("before") == phases.count("after") == 6 and phases.count("train") == 16
    again = train.resolve(["--config", str(out / "config.yaml")])
    assert again[1] == preset("paper", num_generations=4) and again[0].steps == 2
    assert train.main([*argv, "--output-dir", str(out), "--steps", "1"]) == 0
    assert (tmp_path / "demo.1" / "summary.json").exists(), "the earlier run is moved aside, not lost"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_real_architectures_train_from_the_command_line(
    tmp_path: Path, model_dirs: dict[str, str], family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "trl.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"number {i}", "answer": i}) for i in range(6)) + "\n")
    out = tmp_path / "run"
    argv = ["--model", model_dirs[family], "--train-file", str(data), "--eval-file", str(data), "--steps", "2"]
    argv += ["--reward", "helpers.rewards:vowels", "--max-completion-length", "6", "--max-prompt-length", "64"]
    assert train.main([*argv, "--prompts-per-step", "1", "--output-dir", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["hsr_before"] is None
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (model_dirs[family], out / "model"))
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert any(moved)
    if family == "gemma2":
        assert after.config.final_logit_softcapping == before.config.final_logit_softcapping
    assert "report" in capsys.readouterr().out


@pytest.mark.parametrize(("family", "template"), [("llama", True), ("qwen2", False), ("gemma2", False)])
def test_real_prompts_train_and_evaluate(
    tmp_path: Path, model_dirs: dict[str, str], shared_data: Any, family: str, template: bool
) -> None:
    """The authors' prompts under their rules, IFEval's held out, with each architecture."""
    model = AutoModelForCausalLM.from_pretrained(model_dirs[family])
    model.config.max_position_embeddings = 4096
    model.save_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(model_dirs[family])
    if template:
        tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(tmp_path / "m")
    files = []
    for name in ("mdpgrpo_test.jsonl", "ifeval_prompts.jsonl"):
        lines = sorted(shared_data(name).read_text(encoding="utf-8").splitlines(), key=len)[:6]
        files.append(tmp_path / name)
        files[-1].write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "run"
    argv = ["--model", str(tmp_path / "m"), "--train-file", str(files[0]), "--eval-file", str(files[1])]
    argv += ["--rules", "mdpgrpo", "--steps", "1", "--prompts-per-step", "2", "--max-completion-length", "8"]
    assert train.main([*argv, "--output-dir", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert 0 <= summary["ssr_before"] <= 1 and summary["dropped_samples"] == 0
    argv = ["--model", str(out / "model"), "--file", str(files[1]), "--max-completion-length", "8"]
    assert evaluate.main([*argv, "--output", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["count"] == 6 and scores["unchecked"] == 0


def test_a_child_that_imports_the_script_does_not_train(tmp_path: Path) -> None:
    """A script without a main guard, and a process spawned by anything: one line there, and one run, one directory."""
    out = tmp_path / "run"
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\nimport mdpgrpo_fast.train as train\n"
        f"argv = ['--output-dir', {str(out)!r}, '--steps', '1', '--max-completion-length', '8', '--eval-samples', '2',"
        " '--prompts-per-step', '1', '--save-model', 'false']\n"
        "print('status', train.main(argv))\n"
        "child = multiprocessing.get_context('spawn').Process(target=print)\nchild.start()\nchild.join()\n"
        "print('child', child.exitcode)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-2:] == ["status 0", "child 2"], done.stderr
    assert "error: this script starts a run when a child process imports it" in done.stderr.splitlines()[-1]
    assert (out / "summary.json").exists() and not (tmp_path / "run.1").exists()


@pytest.mark.parametrize(
    ("saved", "main", "said"),
    [
        (True, True, "what was learned until then is in OUT"),
        (False, True, "its weights are not saved; checkpoints of before are in OUT/checkpoints, where there are any"),
        (False, False, "checkpoints of before are in OUT/checkpoints, where there are any"),
    ],
)
def test_a_run_that_fails_names_what_is_there(
    saved: bool, main: bool, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = SimpleNamespace(done=3, saved=saved, accelerator=SimpleNamespace(is_main_process=main, num_processes=2))
    trainer: Any = SimpleNamespace(result=None, out=SimpleNamespace(path=tmp_path), loop=loop, run=TrainConfig())
    train._say_failure(trainer, RuntimeError("another rank is lost"))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: another rank is lost; {said.replace('OUT', str(tmp_path))}"


def test_a_rank_that_is_lost_before_the_run_ends_it_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begin(**options: Any) -> None:
        raise RuntimeError("[x/gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:4000")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(api, "Trainer", begin)
    assert train.main([]) == 1
    said = "error: another rank is lost, its own host says why (Connection closed by peer [10.0.0.2]:4000)"
    assert capsys.readouterr().err.splitlines()[-1] == said


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *flags: str) -> str:
    """The one line that a command line ends with."""
    defaults = ["--output-dir", str(tmp_path / "run"), "--steps", "2", "--max-completion-length", "8"]
    with pytest.raises(SystemExit) as end:
        train.main([*defaults, *flags])
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resume"], r"resume needs a checkpoint in .*checkpoints.* \(save_every\)"),
        (["--attention", "flash_attention_2"], "attention = flash_attention_2 needs "),
        (["--rollout", "vllm"], "rollout = vllm needs the package vllm"),
        (
            ["--rollout", "vllm", "--vllm-url", "host:1"],
            "vllm_url must be an http:// or https:// address; got 'host:1'",
        ),
        (["--tokens-per-micro-batch", "60"], "tokens_per_micro_batch must hold a whole group"),
        (["--lora", "--lora-target-modules", "nose"], "nose"),
        (["--packing", "off", "--tokens-per-micro-batch", "9000"], "tokens_per_micro_batch needs packing"),
        (["--refill", "-1"], "refill must be 0 or above; got -1"),
        (["--vllm-memory", "2"], r"vllm_memory must be in \(0, 1\); got 2.0"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_settings_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:

    line = refused(capsys, tmp_path, *flags)
    assert line.startswith("error: ") and re.search(said, line), line
