"""The one style of the benchmarks' pictures: ours highlighted, names beside what they name, a light and a dark file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Suffix of the file -> ours, others, the bound that a copy or the matmuls set, text, soft text, lines, background.
PALETTES = {
    "": ("#3069d6", "#9aa4af", "#c9d0d7", "#1c2127", "#5c6670", "#e2e6ea", "#ffffff"),
    "-dark": ("#74a3fa", "#7d8894", "#4a525c", "#e4e8ec", "#a0a9b3", "#2f353d", "#0d1117"),
}
CUT = 4  # a bar this many times as long as the next is cut, or the others could not be told apart
Draw = Callable[[Any, "Style"], None]


def picture(text: str, path: str) -> str:
    """The picture on a page: the dark one where the reader's page is dark."""
    dark = path.replace(".png", "-dark.png")
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture>{source}<img alt="{text}" src="{path}"></picture>'


class Style:
    """The colours of one picture, and the two kinds of chart in them."""

    def __init__(self, palette: Sequence[str]) -> None:
        self.ours, self.others, self.bound, self.text, self.soft, self.line, self.background = palette

    def bars(self, ax: Any, values: Mapping[str, float], ours: set[str], bound: str, unit: str) -> None:
        """A horizontal bar per label, the longest on top."""
        labels = sorted(values, key=values.__getitem__)
        longest = sorted(values.values())
        end = longest[-2] * 1.3 if longest[-1] > CUT * longest[-2] else longest[-1]
        for place, label in enumerate(labels):
            value, mine = values[label], label in ours
            colour = self.ours if mine else self.bound if label == bound else self.others
            ax.barh(place, min(value, end), 0.66, color=colour)
            said = f"{value:.3g} {unit}" + ("  (bar cut)" if value > end else "")
            ax.text(
                min(value, end) + end / 80, place, said, va="center", color=self.text if mine else self.soft,
                weight="bold" if mine else "normal",
            )  # fmt: skip
        ax.set_yticks(range(len(labels)), labels)
        for tick, label in zip(ax.get_yticklabels(), labels, strict=True):
            tick.set(color=self.text, weight="bold" if label in ours else "normal")
        ax.set(xlim=(0, end * 1.26), xticks=[])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)

    def lines(self, ax: Any, curves: Mapping[str, tuple[list[float], list[float]]], ours: set[str], bound: str) -> None:
        """Curves over tokens, both axes logarithmic, each named at its end."""
        from matplotlib.ticker import LogLocator, ScalarFormatter

        markers = iter("soD^vP*X")
        for label, (x, y) in curves.items():
            if label in ours:
                ax.plot(x, y, color=self.ours, marker="o", linewidth=2.6, zorder=3)
            elif label == bound:
                ax.plot(x, y, color=self.others, linestyle=(0, (4, 3)), linewidth=1.4)
            else:
                ax.plot(x, y, color=self.others, marker=next(markers), linewidth=1.4)
        ticks = sorted({t for x, _ in curves.values() for t in x})
        ax.set(xscale="log", yscale="log", xlabel="tokens")
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.grid(axis="y", color=self.line)
        ax.set_axisbelow(True)
        ax.tick_params(length=0, colors=self.soft)
        ax.spines[:].set_visible(False)
        to_share = ax.transData + ax.transAxes.inverted()
        ends = sorted((float(to_share.transform((x[-1], y[-1]))[1]), label) for label, (x, y) in curves.items())
        lowest = -1.0
        for share, label in ends:  # from below, each above the one before it
            lowest = max(share, lowest + 0.085)
            mine = label in ours
            ax.text(
                1.03, lowest, label, transform=ax.transAxes, va="center", color=self.ours if mine else self.soft,
                weight="bold" if mine else "normal",
            )  # fmt: skip


def save(folder: Path, stem: str, size: tuple[float, float], title: str, draw: Draw) -> None:
    """`stem`.png and `stem`-dark.png: what `draw` puts into a figure of this size in inches, under a title."""
    import matplotlib
    from matplotlib.figure import Figure

    for suffix, palette in PALETTES.items():
        style = Style(palette)
        with matplotlib.rc_context({"font.size": 9, "text.color": style.text, "axes.labelcolor": style.soft,
                                    "axes.facecolor": style.background, "axes.titlecolor": style.text}):  # fmt: skip
            figure = Figure(figsize=size, facecolor=style.background, layout="constrained")
            figure.suptitle(title, x=0.01, ha="left", fontsize=10, weight="bold")
            draw(figure, style)
            figure.savefig(folder / f"{stem}{suffix}.png", dpi=160, metadata={"Software": None})
