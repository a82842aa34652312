"""Checkpoints of a run: everything that the next step depends on, written whole or not at all, and read back."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from ..config import ConfigError, MDPGRPOConfig, TrainConfig

KEPT = 2
# Knobs that a resumed run may be given anew: they change what is written, not what is learned.
FREE = ("output_dir", "resume", "save_every", "eval_every", "log_completions", "report_to", "profile", "save_model")


def newest(path: Path) -> Path | None:
    """The checkpoint of the most steps in a run directory; None where there is none that was finished."""
    found = [p for p in (path / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return max(found, key=lambda p: int(p.name[5:]), default=None)


def save(accelerator: Accelerator, path: Path, step: int) -> None:
    """Model, optimiser, schedule and every rank's random state after `step` steps; called by all ranks."""
    folder = path / "checkpoints"
    unfinished = folder / f"unfinished-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        progress = {"step": step, "processes": accelerator.num_processes}
        (unfinished / "progress.json").write_text(json.dumps(progress) + "\n", encoding="utf-8")
        unfinished.rename(folder / f"step-{step}")
        done = sorted(folder.glob("step-*"), key=lambda p: int(p.name[5:]))
        for old in done[:-KEPT]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load(accelerator: Accelerator, path: Path) -> int:
    """Reads the newest checkpoint back; returns its step. Raises ConfigError for one of another number of processes."""
    folder = newest(path)
    assert folder is not None, "check_resume has found one"
    progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    if progress["processes"] != accelerator.num_processes:
        raise ConfigError(
            f"resume needs the {progress['processes']} processes that wrote {folder}; got {accelerator.num_processes}"
        )
    accelerator.load_state(str(folder))
    if accelerator.is_main_process:
        cut(path, progress["step"])
        for unfinished in (path / "checkpoints").glob("unfinished-*"):
            shutil.rmtree(unfinished)
    accelerator.wait_for_everyone()
    return int(progress["step"])


def check_resume(run: TrainConfig, method: MDPGRPOConfig) -> None:
    """Raises ConfigError where output_dir holds no checkpoint, or one of a run with other settings."""
    path = Path(run.output_dir)
    if newest(path) is None:
        raise ConfigError(f"resume needs a checkpoint in {str(path / 'checkpoints')!r}, and there is none (save_every)")
    before = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    now = {"run": asdict(run), "method": asdict(method)}
    for part, values in now.items():
        for name, value in values.items():
            if name not in FREE and before[part].get(name) != value:
                raise ConfigError(
                    f"resume needs the settings of the run before: {name} was {before[part].get(name)!r}; got {value!r}"
                )


def cut(path: Path, step: int) -> None:
    """Take lines of later steps, and of the evaluation at the end, out of the run's JSON lines."""
    for name in ("metrics.jsonl", "completions.jsonl"):
        file = path / name
        if not file.exists():
            continue
        kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _of(line, step)]
        file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _of(line: str, step: int) -> bool:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # a line cut off by what ended the run
        return False
    return bool(row["step"] <= step and row.get("phase") != "after")


def first_evaluation(path: Path) -> dict[str, Any] | None:
    """The held-out result of step 0, from metrics.jsonl."""
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return next((r["eval"] for r in map(json.loads, lines) if r["step"] == 0 and "eval" in r), None)
