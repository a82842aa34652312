"""Checkpoints: resumed to the bit, whole ones alone, of the settings and processes that wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import accelerate.accelerator
import pytest
import torch
from helpers.runs import SMALL, make_trainer, parameters, rows, run_small

from mdpgrpo_fast import train
from mdpgrpo_fast.config import ConfigError, TrainConfig, preset
from mdpgrpo_fast.training import checkpoint
from mdpgrpo_fast.training.run_dir import RunDir


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in (path / "checkpoints").iterdir())


def test_a_killed_save_leaves_the_checkpoint_before_and_the_run_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = {"steps": 4, "save_every": 1, "warmup_steps": 1, "updates_per_rollout": 2}
    whole = run_small(tmp_path, name="whole", **knobs)
    assert folders(whole.out.path) == ["checkpoint_3", "checkpoint_4"], "the newest two are kept"
    saved, write = [0], accelerate.accelerator.save_accelerator_state

    def killed(folder: str, *args: Any, **kwargs: Any) -> Any:
        saved[0] += 1
        if saved[0] == 3:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(folder, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(accelerate.accelerator, "save_accelerator_state", killed)
        run_small(tmp_path, name="parts", **knobs)
    path = tmp_path / "parts"
    assert folders(path) == ["checkpoint_2", "checkpoint_3"] and len(rows(whole)) == 4
    newest = checkpoint.newest(path)
    assert newest is not None and newest.name == "checkpoint_2"
    with (path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 3, "lo')  # a line that was cut off
    resumed = run_small(tmp_path, name="parts", resume=True, **knobs)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert [(r["step"], r["loss"], r["learning_rate"]) for r in rows(resumed)] == [
        (r["step"], r["loss"], r["learning_rate"]) for r in rows(whole)
    ]
    assert folders(path) == ["checkpoint_3", "checkpoint_4"]
    summary = json.loads((path / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["hsr_before"] is not None

    progress = path / "checkpoints" / "checkpoint_4" / "progress.json"
    progress.write_text(json.dumps({"step": 4, "processes": 2}))
    with pytest.raises(ConfigError, match=r"resume needs the 2 processes that wrote .*checkpoint_4; got 1"):
        make_trainer(tmp_path, name="parts", resume=True, **knobs)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("step-2", "resume needs checkpoints named checkpoint_N; those in .* are of an earlier version .*step-N"),
        ("checkpoint_2", r"resume needs a checkpoint in .*checkpoints., and there is none \(save_every\)"),
    ],
)
def test_checkpoints_of_another_kind_or_not_whole_are_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=said):
        checkpoint.check_resume(TrainConfig(output_dir=str(tmp_path)), preset("exact"))


def test_a_resumed_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    method, run = preset("exact"), TrainConfig(**SMALL, output_dir=str(tmp_path))
    RunDir(tmp_path).write_config(run, method)
    folder = tmp_path / "checkpoints" / "checkpoint_1"
    folder.mkdir(parents=True)
    (folder / "progress.json").touch()
    checkpoint.check_resume(run, method)
    checkpoint.check_resume(TrainConfig(**SMALL, output_dir=str(tmp_path), eval_every=1), method)
    with pytest.raises(ConfigError, match=r"settings of the run before: learning_rate was 0.001; got 0.0005"):
        checkpoint.check_resume(TrainConfig(**{**SMALL, "learning_rate": 5e-4}, output_dir=str(tmp_path)), method)
    with pytest.raises(ConfigError, match="settings of the run before: top_k was 0; got 5"):
        checkpoint.check_resume(run, preset("exact", top_k=5))


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    flags = ["--output-dir", str(tmp_path / "run"), "--steps", "1", "--max-completion-length", "8", "--save-every", "1",
             "--prompts-per-step", "1", "--eval-samples", "1"]  # fmt: skip
    assert train.main(flags) == 0
    assert train.main([*flags, "--resume"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
