"""Files of a run directory and the numbers in them, whatever is missing or damaged."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import ConfigError, MDPGRPOConfig

FILES = ("config.yaml", "metrics.jsonl", "summary.json", "completions.jsonl")
Row = dict[str, Any]
TypeRates = list[tuple[str, float, float, int]]  # (instruction type, rate before, rate after, count)


@dataclass
class Run:
    """What a run directory holds; `notes` says what it lacks or what could not be read."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    train: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    completions: list[Row] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_run(path: Path) -> Run:
    """Every part that is there. Raises ConfigError where nothing of a run is."""
    if not path.is_dir():
        raise ConfigError(f"run directory {str(path)!r} {'is no directory' if path.exists() else 'does not exist'}")
    if not any((path / name).is_file() for name in FILES):
        raise ConfigError(f"{str(path)!r} is not a run directory: it has none of {', '.join(FILES)}")
    run = Run(path)
    run.config, run.summary = _read_mapping(run, "config.yaml"), _read_mapping(run, "summary.json")
    for row in _read_rows(run, "metrics.jsonl"):
        if isinstance(row.get("eval"), dict):
            run.evals.append(row)
        else:
            # A list of slots becomes a mapping by temperature, so that one path of keys reaches every number.
            slots = [s for s in as_list(row.get("slots")) if isinstance(s, dict)]
            run.train.append({**row, "slots": {f"τ {as_number(s.get('temperature')):g}": s for s in slots}})
    run.completions = _read_rows(run, "completions.jsonl")
    note, step = run.notes.append, last_step(run)
    if not run.summary:
        steps = lookup(run.config, "run", "steps")
        so_far = f"{step} of {steps}" if steps else step
        note(
            f"The run has no summary: it is still going, or was stopped after step {so_far}. Numbers are those so far."
        )
    elif run.summary.get("failure"):
        note(f"The run stopped after step {step}: {run.summary['failure']}.")
    elif run.summary.get("interrupted"):
        note(f"The run was interrupted after step {step}; its summary covers the part that was run.")
    if not run.train:
        note("No training step has been recorded: there are no curves to show.")
    if not run.evals:
        note("No held-out evaluation has been recorded: HSR and SSR before and after are unknown.")
    bad = [row.get("step") for row in run.train if "loss" in row and math.isnan(as_number(row["loss"]))]
    if bad:
        note(f"The loss is not a finite number in {len(bad)} of {len(run.train)} steps, first {bad[0]}.")
    return run


def _read_mapping(run: Run, name: str) -> dict[str, Any]:
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


def _read_rows(run: Run, name: str) -> list[Row]:
    try:
        lines = (run.path / name).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        run.notes.append(f"{name} is missing.")
        return []
    rows, unreadable = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            unreadable.append(number)
        elif row:
            rows.append(row)
    if unreadable:
        last = unreadable == [len(lines)]
        place = "the last one: writing it was probably cut short" if last else f"first line {unreadable[0]}"
        plural = "s" if len(unreadable) > 1 else ""
        run.notes.append(f"{name}: {len(unreadable)} unreadable line{plural} left out, {place}.")
    return rows


def lookup(row: Any, *keys: str) -> Any:
    """The value under a path of keys, None where it ends early."""
    for key in keys:
        row = row.get(key) if isinstance(row, dict) else None
    return row


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def as_mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_number(value: Any) -> float:
    """A finite number, or NaN for whatever is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def series(rows: list[Row], *keys: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows whose value under `keys` is a finite number."""
    points = [(as_number(row.get("step")), as_number(lookup(row, *keys))) for row in rows]
    finite = np.array([p for p in points if not (math.isnan(p[0]) or math.isnan(p[1]))]).reshape(-1, 2)
    return finite[:, 0], finite[:, 1]


def last_step(run: Run) -> int:
    return int(max(series(run.train, "step")[0], default=0))


def method_of(run: Run) -> MDPGRPOConfig | None:
    """The run's method settings; None where they are not recorded or are none."""
    known = {f.name for f in fields(MDPGRPOConfig)}
    values = {k: v for k, v in as_mapping(run.config.get("method")).items() if k in known}
    try:
        return MDPGRPOConfig(**values) if values else None
    except (ConfigError, TypeError, ValueError):
        return None


class Score(NamedTuple):
    """A held-out score before and after training, each with half of its 95 % interval; NaN where unknown."""

    name: str
    before: float
    after: float
    before_half: float
    after_half: float

    @property
    def gain(self) -> float:
        """In percentage points of the rounded shares, so that the three numbers agree."""
        return round(self.after * 100, 1) - round(self.before * 100, 1)


def score(run: Run, name: str) -> Score:
    """From the summary, else from the evaluations so far."""
    first, last, key = (*((run.evals[0], run.evals[-1]) if run.evals else ({}, {})), name.lower())
    found = []
    for side, row, there in (
        ("before", first, first.get("step") == 0),
        ("after", last, last.get("step") != 0 and bool(last)),
    ):
        mean = as_number(run.summary.get(f"{key}_{side}"))
        half = as_number(lookup(run.summary, "intervals", side, key))
        if there:
            mean = as_number(lookup(row, "eval", key)) if math.isnan(mean) else mean
            half = as_number(lookup(row, "eval", "intervals", key)) if math.isnan(half) else half
        found.append((mean, half))
    (before, before_half), (after, after_half) = found
    return Score(name, before, after, before_half, after_half)


def scores(run: Run) -> list[Score]:
    """HSR and SSR, and the reward where it is not the share of constraints or nothing else is known."""
    known = [s for name in ("HSR", "SSR", "reward") if not all(map(math.isnan, (s := score(run, name))[1:3]))]
    alone = list(as_mapping(run.summary.get("rewards"))) in ([], ["constraints"])
    return known[:-1] if alone and len(known) == 3 else known


def type_rates(run: Run) -> TypeRates:
    """The largest gain first; from the summary, else from the evaluations so far."""
    table = run.summary.get("types")
    if not table and run.evals:
        first, last = (lookup(run.evals[i], "eval", "types") or {} for i in (0, -1))
        after = last if len(run.evals) > 1 else {}
        table = {
            t: {
                "before": lookup(first, t, "rate"),
                "after": lookup(after, t, "rate"),
                "count": lookup(last, t, "count"),
            }
            for t in last
        }
    rates = []
    for name, row in table.items() if isinstance(table, dict) else ():
        before, after, count = (as_number(lookup(row, key)) for key in ("before", "after", "count"))
        rates.append((str(name), before, after, int(np.nan_to_num(count))))
    return sorted(rates, key=lambda r: (-np.nan_to_num(r[2] - r[1]), r[0]))
