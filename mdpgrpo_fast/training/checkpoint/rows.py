"""The files of a run that goes on: JSON lines of the steps that it goes on from, whole folders of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ... import durable
from ...config import ConfigError
from .checkpoints import set_aside_later


def drop_what_came_later(path: Path, step: int) -> None:
    """Takes lines of later steps, and of the evaluation at the end, out of the run's JSON lines; a model that a kill
    left without its name has it again.

    Raises: StorageError.
    """
    with durable.storing(path):
        set_aside_later(path, step)
    for name in ("model", "adapters", "best"):
        durable.put_back_folder(path / name)
    for name in ("metrics.jsonl", "completions.jsonl", "bad_steps.jsonl"):
        file = path / name
        if file.exists():
            durable.write_text(file, "".join(line + "\n" for line in _lines(file) if _row(line, step) is not None))


def _lines(file: Path) -> list[str]:
    """Raises: ConfigError."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
    except OSError as e:
        raise ConfigError(f"{str(file)!r} cannot be read: {e.strerror or e}") from None


def _row(line: str, step: int) -> dict[str, Any] | None:
    """The row of a line where it is of a step up to this one."""
    try:
        row = json.loads(line)
        kept = row["step"] <= step and row.get("phase") != "after"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # cut off by what ended the run
        return None
    return row if kept else None


def metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl up to a step."""
    return [row for line in _lines(path / "metrics.jsonl") if (row := _row(line, step)) is not None]


def logged_rows(accelerator: Accelerator, path: Path, step: int) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl up to a step, on every rank."""
    found: list[list[dict[str, Any]]] = [[]]
    if accelerator.is_main_process:
        found = [metrics(path, step)]
    broadcast_object_list(found)
    return found[0]


def lost_rows(rows: list[dict[str, Any]], step: int) -> str | None:
    """What is to be said where metrics.jsonl has not all steps up to this one."""
    missing = step - len({r["step"] for r in rows if "eval" not in r})
    if not missing:
        return None
    return f"metrics.jsonl lacks {missing} of the {step} steps that are done: log_history of rewards begins later"


def first_evaluation(path: Path) -> dict[str, Any] | None:
    """The held-out result of step 0, from metrics.jsonl."""
    return next((r["eval"] for r in metrics(path, 0) if "eval" in r), None)
