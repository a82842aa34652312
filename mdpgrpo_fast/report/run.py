"""Read a run directory: its files, and the numbers in them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ConfigError

FILES = ("config.yaml", "metrics.jsonl", "summary.json", "completions.jsonl")


NAN = math.nan


@dataclass
class Run:
    """What a run directory holds; `notes` says what it lacks or what could not be read."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_run(path: Path) -> Run:
    """Every part that is there. Raises ConfigError where nothing of a run is."""
    if not path.is_dir():
        raise ConfigError(f"run directory {str(path)!r} {'is no directory' if path.exists() else 'does not exist'}")
    if not any((path / name).is_file() for name in FILES):
        raise ConfigError(f"{str(path)!r} is not a run directory: it has none of {', '.join(FILES)}")
    run = Run(path)
    run.config, run.summary = _mapping(run, "config.yaml"), _mapping(run, "summary.json")
    for row in _lines(run, "metrics.jsonl"):
        if isinstance(row.get("eval"), dict):
            run.evals.append(row)
        else:
            # A list of slots becomes a mapping by temperature, so that one path of keys reaches every number.
            slots = [s for s in entries(row.get("slots")) if isinstance(s, dict)]
            run.train.append({**row, "slots": {f"τ {number(s.get('temperature')):g}": s for s in slots}})
    run.completions = _lines(run, "completions.jsonl")
    if not run.summary:
        planned = at(run.config, "run", "steps")
        so_far = f"after step {last_step(run)}" + (f" of {planned}" if planned else "")
        run.notes.append(
            f"The run has no summary: it is still going, or was stopped {so_far}. Numbers are those so far."
        )
    elif run.summary.get("interrupted"):
        run.notes.append(
            f"The run was interrupted after step {last_step(run)}; its summary covers the part that was run."
        )
    if not run.train:
        run.notes.append("No training step has been recorded: there are no curves to show.")
    if not run.evals:
        run.notes.append("No held-out evaluation has been recorded: HSR and SSR before and after are unknown.")
    bad = [row.get("step") for row in run.train if "loss" in row and math.isnan(number(row["loss"]))]
    if bad:
        run.notes.append(f"The loss is not a finite number in {len(bad)} of {len(run.train)} steps, first {bad[0]}.")
    return run


def _mapping(run: Run, name: str) -> dict[str, Any]:
    import yaml

    try:
        text = (run.path / name).read_text(encoding="utf-8")
        value = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except FileNotFoundError:
        value = {}
        if name != "summary.json":
            run.notes.append(f"{name} is missing.")
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        value = None
    if not isinstance(value, dict):
        run.notes.append(f"{name} could not be read.")
    return value if isinstance(value, dict) else {}


def _lines(run: Run, name: str) -> list[dict[str, Any]]:
    try:
        lines = (run.path / name).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        run.notes.append(f"{name} is missing.")
        return []
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            bad.append(number)
        elif row:
            rows.append(row)
    if bad:
        cut = ", the last one: writing it was probably cut short" if bad == [len(lines)] else f", first line {bad[0]}"
        run.notes.append(f"{name}: {len(bad)} unreadable line{'s' if len(bad) > 1 else ''} left out{cut}.")
    return rows


def at(row: Any, *path: str) -> Any:
    for key in path:
        row = row.get(key) if isinstance(row, dict) else None
    return row


def entries(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def number(value: Any) -> float:
    """A finite number, or NaN for whatever is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return NAN
    return number if math.isfinite(number) else NAN


def series(rows: list[dict[str, Any]], *path: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows whose value at `path` is a finite number."""
    pairs = [(number(row.get("step")), number(at(row, *path))) for row in rows]
    kept = np.array([p for p in pairs if not (math.isnan(p[0]) or math.isnan(p[1]))]).reshape(-1, 2)
    return kept[:, 0], kept[:, 1]


def last_step(run: Run) -> int:
    return int(max(series(run.train, "step")[0], default=0))


def before_after(run: Run, name: str) -> tuple[float, float]:
    """From the summary, else the evaluations so far."""
    first = run.evals[0] if run.evals and run.evals[0].get("step") == 0 else {}
    last = run.evals[-1] if run.evals and run.evals[-1].get("step") != 0 else {}
    found = [number(run.summary.get(f"{name}_{side}")) for side in ("before", "after")]
    spare = [number(at(row, "eval", name)) for row in (first, last)]
    return tuple(b if math.isnan(a) else a for a, b in zip(found, spare, strict=True))  # type: ignore[return-value]


def type_rates(run: Run) -> list[tuple[str, float, float, int]]:
    """(instruction type, rate before, rate after, count), the largest change first."""
    table = run.summary.get("types")
    if not table and run.evals:
        first, last = (at(run.evals[i], "eval", "types") or {} for i in (0, -1))
        later = last if len(run.evals) > 1 else {}
        table = {
            t: {"before": at(first, t, "rate"), "after": at(later, t, "rate"), "count": at(last, t, "count")}
            for t in last
        }
    rows = []
    for name, row in table.items() if isinstance(table, dict) else ():
        count = number(at(row, "count"))
        shown = str(name).encode("utf-8", "replace").decode()
        rows.append(
            (shown, number(at(row, "before")), number(at(row, "after")), 0 if math.isnan(count) else int(count))
        )
    return sorted(rows, key=lambda r: (-np.nan_to_num(r[2] - r[1]), r[0]))
