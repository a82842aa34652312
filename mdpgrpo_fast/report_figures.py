"""A run directory's numbers, and their charts as inline SVG and PNG; `report` makes the page."""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from .config import ConfigError

COLOURS = ("#3b72d9", "#2a9d8f", "#e0982f", "#d1495b", "#8a63d2", "#7d8894", "#a8763e")
BEFORE, AFTER = "#a3acb8", COLOURS[0]
FILES = ("config.yaml", "metrics.jsonl", "summary.json", "completions.jsonl")
NAN = math.nan


# ---- reading --------------------------------------------------------------------------------------------------------


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


def _smooth(y: np.ndarray) -> np.ndarray:
    """Centred moving mean over a twelfth of the run; the window shrinks at the ends."""
    window = np.ones(min(len(y), max(1, len(y) // 12) | 1))
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")


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


# ---- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One small chart over training steps: label → path of keys in a metrics row."""

    title: str
    caption: str
    lines: Mapping[str, tuple[str, ...]]
    percent: bool = False
    held_out: bool = False
    stacked: bool = False
    free: bool = False  # the axis need not start at 0

    def draw(self, ax: Any, run: Run) -> bool:
        """Whether there was anything to draw."""
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        data = [(label, *series(run.evals if self.held_out else run.train, *p)) for label, p in self.lines.items()]
        data = [d for d in data if len(d[1])]
        base: Any = 0.0
        for (label, x, y), colour in zip(data, cycle(COLOURS)):
            style: dict[str, Any] = {"color": colour, "label": label, "linewidth": 1.6}
            if self.stacked:
                # The stages are all written with every step; a stage that lacks some is drawn alone.
                base = base if np.shape(base) == x.shape else np.zeros_like(x)
                top = base + _smooth(y)
                edges = x if len(x) > 1 else np.array([x[0] - 0.5, x[0] + 0.5])
                low, high = (np.resize(v, edges.shape) for v in (base, top))
                ax.fill_between(edges, low, high, color=colour, label=label, linewidth=0)
                base = top
            elif self.held_out:
                ax.plot(x, y, marker="o", markersize=4, **style)
            else:
                ax.plot(x, y, color=colour, alpha=0.28, linewidth=0.8)
                ax.plot(x, _smooth(y), marker="o" if len(x) < 3 else None, markersize=4, **style)
        if len(data) > 1:
            many = len(data) > 4  # in smaller letters on the one line that there is
            ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=len(data), frameon=False,
                      handlelength=0.7 if many else 1, columnspacing=0.6 if many else 1, handletextpad=0.3,
                      fontsize=6.8 if many else None)  # fmt: skip
        low, high = ax.get_ylim()
        if not self.free:
            negative = any(y.min() < 0 for _, _, y in data)
            ax.set_ylim(low if negative else 0, 1.05 * (max(high, 0.02) if self.percent else high if high > 0 else 1))
        if self.percent:
            ax.set_ylim(top=min(ax.get_ylim()[1], 1.02))
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.grid(axis="y", alpha=0.35, linewidth=0.6)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(length=0)
        return bool(data)


def _one(key: str) -> dict[str, tuple[str, ...]]:
    return {key: (key,)}


def sections(run: Run) -> list[tuple[str, str, str, list[Panel]]]:
    """(file stem, heading, introduction, panels)."""
    taus = sorted({t for row in run.train for t in row["slots"]}, key=lambda t: float(t[2:]))
    slot = {key: {t: ("slots", t, key) for t in taus} for key in ("reward", "reward_std", "ess")}
    quality = {"HSR": ("hsr",), "SSR": ("ssr",)}
    checked = any(not math.isnan(number(at(row, "eval", "hsr"))) for row in run.evals)
    held_out = {k: ("eval", *v) for k, v in quality.items()} if checked else {"reward": ("eval", "reward")}
    learning = [
        Panel("Held-out HSR and SSR" if checked else "Held-out reward", "Greedy answers to prompts that training does "
              "not see.", held_out, percent=checked, held_out=True),
        Panel("Training HSR and SSR", "Sampled completions of each step; thin: as measured, bold: moving mean.",
              quality, percent=True),
        Panel("Training reward", "Mean over the completions of a step.", _one("reward"), free=True),
        Panel("Loss", "Near zero by construction while the policy is the one that sampled; its gradient is not.",
              _one("loss"), free=True),
        Panel("KL to the reference", "How far the policy has moved, in nats per token.", _one("kl")),
        Panel("Entropy", "Of the next token, in nats; a collapse to 0 ends exploration.", _one("entropy")),
        Panel("Clip share", "Tokens whose ratio is clipped and gives no policy gradient.",
              {"low": ("clip_low",), "high": ("clip_high",)}, percent=True),
        Panel("Gradient norm", "Before clipping.", _one("grad_norm")),
        Panel("Completion length", "Mean, in tokens.", _one("completion_length")),
    ]  # fmt: skip
    health = [
        Panel("Groups with equal rewards", "Here z is 0 for all: plain GRPO learns nothing from such a group. Second "
              "line: groups in which every advantage is 0 and no KL term acts, so that nothing is learned at all.",
              {"equal rewards": ("zero_variance_groups",), "no gradient": ("zero_gradient_groups",)}, percent=True),
        Panel("Groups with |z| > 2", "A tiny spread blown up to a large step; shaping bounds it.",
              _one("large_z_groups"), percent=True),
        Panel("Failing groups rewarded by z", "All members under the goal of 0.5, and z alone would still reinforce "
              "the best of them.", _one("gain_below_goal_groups"), percent=True),
        Panel("Reward by temperature", "Mean over the completions of each sampling temperature.", slot["reward"]),
        Panel("Reward spread by temperature", "Standard deviation over the same completions.", slot["reward_std"]),
        Panel("Effective sample size", "Share of tokens that count after importance weighting, by temperature.",
              slot["ess"], percent=True),
    ]  # fmt: skip
    # Earlier runs have "train" for all from reference to optimizer.
    known = ("generate", "reference", "forward", "backward", "train", "optimizer", "score", "other")
    stages = [s for s in known if len(series(run.train, "seconds", s)[1])]
    totals = [float(series(run.train, "seconds", s)[1].sum()) for s in stages]
    shares = ", ".join(f"{s} {t / sum(totals):.0%}" for s, t in zip(stages, totals, strict=True)) if sum(totals) else ""
    pace = [
        Panel("Seconds per step", f"Stacked by stage. Over the run: {shares}.", {s: ("seconds", s) for s in stages},
              stacked=True),
        Panel("Tokens per second", "Generated tokens over the time of the whole step.", _one("tokens_per_second")),
        Panel("Truncated completions", "Stopped by the length limit.", _one("truncated"), percent=True),
    ]  # fmt: skip
    return [
        ("curves", "Learning", "Over training steps. HSR: share of responses that satisfy every constraint; SSR: mean "
         "share of constraints satisfied.", learning),
        ("group_health", "Group health", "Where z-score GRPO goes wrong, and how often it would have here.", health),
        ("pace", "Pace", "Where the time goes.", pace),
    ]  # fmt: skip


def svg(panel: Panel, run: Run) -> str:
    """The chart as inline SVG in the page's own font and ink, or nothing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 1.9))
    ax = figure.subplots()
    if not panel.draw(ax, run):
        return ""
    figure.subplots_adjust(left=0.135, right=0.99, bottom=0.13, top=0.87 if ax.get_legend() else 0.96)
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    head = f'<svg role="img" aria-label="{html.escape(panel.title)}" viewBox="0 0 259.2 136.8">'
    text = head + text[text.index(">") + 1 :]
    for pattern, new in (
        (r"<defs>\s*<style.*?</style>\s*</defs>", ""),
        (r'<g id="[^"]*">', "<g>"),
        (r"font-family: [^;\"]*;? ?", ""),
        ("#000000", "currentColor"),
        (r"(\d\.\d\d)\d{3,}", r"\1"),
    ):
        text = re.sub(pattern, new, text, flags=re.S)
    # Identifiers of clip paths and marks are unique in a figure, not in a page.
    own = re.sub(r"\W", "", panel.title)
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}", text)


def write_png(run: Run, stem: str, panels: list[Panel]) -> bool:
    from matplotlib.figure import Figure

    def drawable(panel: Panel) -> bool:
        rows = run.evals if panel.held_out else run.train
        return any(len(series(rows, *path)[0]) for path in panel.lines.values())

    panels = [p for p in panels if drawable(p)]
    if panels:
        rows = math.ceil(len(panels) / 3)
        figure = Figure(figsize=(12, 2.9 * rows), facecolor="white")
        for i, panel in enumerate(panels):
            ax = figure.add_subplot(rows, 3, i + 1)
            panel.draw(ax, run)
            ax.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", pad=20)
        figure.subplots_adjust(0.045, 0.26 / rows / 2.9, 0.99, 1 - 0.5 / rows / 2.9, wspace=0.16, hspace=0.42)
        figure.savefig(run.path / f"{stem}.png", dpi=150)
    return bool(panels)


def write_types_png(run: Run, rows: list[tuple[str, float, float, int]]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 0.9 + 0.34 * len(rows)), layout="constrained", facecolor="white")
    ax, y = figure.subplots(), np.arange(len(rows))
    for offset, column, colour, label in ((-0.19, 1, BEFORE, "before"), (0.19, 2, AFTER, "after")):
        ax.barh(y + offset, np.nan_to_num([r[column] for r in rows]), 0.36, color=colour, label=label)  # type: ignore[misc]
    ax.set_yticks(y, [f"{name}  ({count})" for name, _, _, count in rows])
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(length=0)
    figure.savefig(run.path / "types.png", dpi=150)
