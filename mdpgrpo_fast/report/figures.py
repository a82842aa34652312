"""A run directory's numbers, and their charts as inline SVG and PNG; `report` makes the page."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from .run import Run, at, number, series

COLOURS = ("#3b72d9", "#2a9d8f", "#e0982f", "#d1495b", "#8a63d2", "#7d8894", "#a8763e")
BEFORE, AFTER = "#a3acb8", COLOURS[0]


# ---- reading --------------------------------------------------------------------------------------------------------


def _smooth(y: np.ndarray) -> np.ndarray:
    """Centred moving mean over a twelfth of the run; the window shrinks at the ends."""
    window = np.ones(min(len(y), max(1, len(y) // 12) | 1))
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")


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
