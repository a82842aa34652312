"""Charts of a run over its training steps: inline SVG for the page, PNG files for the run directory."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from .run import Run, TypeRates, as_mapping, as_number, drawable, lookup, series

COLOURS = ("#3b72d9", "#2a9d8f", "#e0982f", "#d1495b", "#8a63d2", "#7d8894", "#a8763e")
BEFORE, AFTER = "#a3acb8", COLOURS[0]
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 9,
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "axes.formatter.limits": (-3, 5),
}


def _smooth(y: np.ndarray) -> np.ndarray:
    """Centred moving mean over a twelfth of the run; the window shrinks at the ends."""
    window = np.ones(min(len(y), max(1, len(y) // 12) | 1))
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")


@dataclass(frozen=True)
class Panel:
    """One small chart; `curves` maps a label to the keys of its value in a row of metrics."""

    title: str
    caption: str
    curves: Mapping[str, tuple[str, ...]]
    percent: bool = False
    held_out: bool = False
    stacked: bool = False
    from_zero: bool = True

    def data(self, run: Run) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """(label, steps, values) of the curves that the run has numbers for."""
        rows = run.evals if self.held_out else run.train
        curves = [(label, *series(rows, *keys)) for label, keys in self.curves.items()]
        return [curve for curve in curves if len(curve[1])]

    def draw(self, ax: Any, run: Run) -> None:
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        data = self.data(run)
        bottom: Any = 0.0
        for (label, x, y), colour in zip(data, cycle(COLOURS)):
            style: dict[str, Any] = {"color": colour, "label": label, "linewidth": 1.6, "markersize": 4}
            if self.stacked:
                # The stages are all written with every step; a stage that lacks some is drawn alone.
                bottom = bottom if np.shape(bottom) == x.shape else np.zeros_like(x)
                top = bottom + _smooth(y)
                edges = x if len(x) > 1 else np.array([x[0] - 0.5, x[0] + 0.5])
                low, high = (np.resize(v, edges.shape) for v in (bottom, top))
                ax.fill_between(edges, low, high, color=colour, label=label, linewidth=0)
                bottom = top
            elif self.held_out:
                ax.plot(x, y, marker="o", **style)
            else:
                ax.plot(x, y, color=colour, alpha=0.28, linewidth=0.8)
                ax.plot(x, _smooth(y), marker="o" if len(x) < 3 else None, **style)
        if len(data) > 1:
            many = len(data) > 4  # in smaller letters on the one line that there is
            ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=len(data), frameon=False,
                      handlelength=0.7 if many else 1, columnspacing=0.6 if many else 1, handletextpad=0.3,
                      fontsize=6.8 if many else None)  # fmt: skip
        low, high = ax.get_ylim()
        if self.from_zero:
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


def _learning(run: Run) -> list[Panel]:
    quality = {"HSR": ("hsr",), "SSR": ("ssr",)}
    checked = any(not math.isnan(as_number(lookup(row, "eval", "hsr"))) for row in run.evals)
    held_out = {k: ("eval", *v) for k, v in quality.items()} if checked else {"reward": ("eval", "reward")}
    return [
        Panel("Held-out HSR and SSR" if checked else "Held-out reward", "Greedy answers to prompts that training does "
              "not see.", held_out, percent=checked, held_out=True),
        Panel("Training HSR and SSR", "Sampled completions of each step; thin: as measured, bold: moving mean.",
              quality, percent=True),
        Panel("Training reward", "Mean over the completions of a step.", {"reward": ("reward",)}, from_zero=False),
        *_each_reward(run, beside_shares=checked),
        Panel("Loss", "Near zero by construction while the policy is the one that sampled; its gradient is not.",
              {"loss": ("loss",)}, from_zero=False),
        Panel("KL to the reference", "How far the policy has moved, in nats per token.", {"kl": ("kl",)}),
        Panel("Entropy", "Of the next token, in nats; a collapse to 0 ends exploration.", {"entropy": ("entropy",)}),
        Panel("Clip share", "Tokens whose ratio is clipped and gives no policy gradient.",
              {"low": ("clip_low",), "high": ("clip_high",)}, percent=True),
        Panel("Gradient norm", "Before clipping.", {"grad_norm": ("grad_norm",)}),
        Panel("Completion length", "Mean, in tokens.", {"completion_length": ("completion_length",)}),
    ]  # fmt: skip


def _each_reward(run: Run, beside_shares: bool) -> list[Panel]:
    """A chart for each reward, whose scales may differ, and the held-out sum beside HSR and SSR; none where the one
    reward is the share of constraints, which those show."""
    names = list(dict.fromkeys(name for row in run.train for name in as_mapping(row.get("rewards"))))
    if names in ([], ["constraints"]):
        return []
    held_out = Panel("Held-out reward", "Weighted sum, mean over the held-out answers.", {"reward": ("eval", "reward")},
                     held_out=True, from_zero=False)  # fmt: skip
    return [held_out] * beside_shares + [
        Panel(f"Reward {drawable(name)}", "Over the completions that it applies to; no spread, no signal.",
              {"mean": ("rewards", name, "mean"), "spread": ("rewards", name, "std")}, from_zero=False)
        for name in names
    ]  # fmt: skip


def _group_health(run: Run) -> list[Panel]:
    temperatures = sorted({t for row in run.train for t in row["slots"]}, key=lambda t: float(t[2:]))
    slot = {key: {t: ("slots", t, key) for t in temperatures} for key in ("reward", "reward_std", "ess")}
    return [
        Panel("Groups with equal rewards", "Here z is 0 for all: plain GRPO learns nothing from such a group. Second "
              "line: groups in which every advantage is 0 and no KL term acts, so that nothing is learned at all.",
              {"equal rewards": ("zero_variance_groups",), "no gradient": ("zero_gradient_groups",)}, percent=True),
        Panel("Groups with |z| > 2", "A tiny spread blown up to a large step; shaping bounds it.",
              {"large_z_groups": ("large_z_groups",)}, percent=True),
        Panel("Failing groups rewarded by z", "All members under the goal of 0.5, and z alone would still reinforce "
              "the best of them.", {"gain_below_goal_groups": ("gain_below_goal_groups",)}, percent=True),
        Panel("Reward by temperature", "Mean over the completions of each sampling temperature.", slot["reward"]),
        Panel("Reward spread by temperature", "Standard deviation over the same completions.", slot["reward_std"]),
        Panel("Effective sample size", "Share of tokens that count after importance weighting, by temperature.",
              slot["ess"], percent=True),
    ]  # fmt: skip


def _pace(run: Run) -> list[Panel]:
    # Earlier runs have "train" for all from reference to optimizer.
    known = ("generate", "reference", "forward", "backward", "train", "optimizer", "score", "other")
    seconds = {stage: series(run.train, "seconds", stage)[1] for stage in known}
    totals = {stage: float(values.sum()) for stage, values in seconds.items() if len(values)}
    total = sum(totals.values())
    shares = ", ".join(f"{stage} {t / total:.0%}" for stage, t in totals.items()) if total else ""
    return [
        Panel("Seconds per step", f"Stacked by stage. Over the run: {shares}.",
              {stage: ("seconds", stage) for stage in totals}, stacked=True),
        Panel("Tokens per second", "Generated tokens over the time of the whole step.",
              {"tokens_per_second": ("tokens_per_second",)}),
        Panel("Truncated completions", "Stopped by the length limit.", {"truncated": ("truncated",)}, percent=True),
    ]  # fmt: skip


def _write_png(run: Run, stem: str, panels: list[Panel]) -> None:
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(12, 2.9 * rows), facecolor="white")
    for i, panel in enumerate(panels, 1):
        ax = figure.add_subplot(rows, 3, i)
        panel.draw(ax, run)
        ax.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", pad=20)
    figure.subplots_adjust(0.045, 0.26 / rows / 2.9, 0.99, 1 - 0.5 / rows / 2.9, wspace=0.16, hspace=0.42)
    figure.savefig(run.path / f"{stem}.png", dpi=150)


def _write_types_png(run: Run, types: TypeRates) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 0.9 + 0.34 * len(types)), layout="constrained", facecolor="white")
    ax, y = figure.subplots(), np.arange(len(types))
    names, before, after, counts = zip(*types, strict=True)
    for offset, rates, colour, label in ((-0.19, before, BEFORE, "before"), (0.19, after, AFTER, "after")):
        ax.barh(y + offset, np.nan_to_num(rates), 0.36, color=colour, label=label)
    ax.set_yticks(y, [f"{name}  ({count})" for name, count in zip(names, counts, strict=True)])
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(length=0)
    figure.savefig(run.path / "types.png", dpi=150)


def _svg(run: Run, panel: Panel) -> str:
    """What stands inside the page's own <svg> element; colour and font come from the page too."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 1.9))  # the page's viewBox, in inches of 72 points
    ax = figure.subplots()
    panel.draw(ax, run)
    figure.subplots_adjust(left=0.135, right=0.99, bottom=0.13, top=0.87 if ax.get_legend() else 0.96)
    buffer, undated = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=undated)
    svg = buffer.getvalue()
    svg = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    prefix = re.sub(r"\W", "", panel.title)
    for pattern, new in (
        (r"<defs>\s*<style.*?</style>\s*</defs>", ""),
        (r'<g id="[^"]*">', "<g>"),
        (r"font-family: [^;\"]*;? ?", ""),
        ("#000000", "currentColor"),
        (r"(\d\.\d\d)\d{3,}", r"\1"),
        # Identifiers of clip paths and marks are unique in a figure, not in a page.
        (r'(id="|url\(#|href="#)', rf"\g<1>{prefix}"),
    ):
        svg = re.sub(pattern, new, svg, flags=re.S)
    return svg


def draw_figures(run: Run, types: TypeRates) -> dict[str, list[tuple[Panel, str]]]:
    """Write curves.png, group_health.png, pace.png and types.png, those that have something to show.

    Returns the same charts for the page: stem of the PNG file → (panel, SVG).
    """
    import matplotlib

    drawn = {}
    # No pyplot and a context for the settings: whoever imported matplotlib before keeps backend and style.
    with matplotlib.rc_context(STYLE):
        for stem, panels in (("curves", _learning(run)), ("group_health", _group_health(run)), ("pace", _pace(run))):
            panels = [panel for panel in panels if panel.data(run)]
            if panels:
                _write_png(run, stem, panels)
                drawn[stem] = [(panel, _svg(run, panel)) for panel in panels]
        if types:
            _write_types_png(run, types)
    return drawn
