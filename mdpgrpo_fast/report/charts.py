"""Small charts over training steps as inline SVG: real text, values on hover, colours of the page's stylesheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 176, 48, 332, 8, 152  # the drawing and its frame, in SVG units
COLOURS = 7  # in the stylesheet; the next curves are dashed
MOST_POINTS, MOST_HOVERS = 400, 100  # of a curve and of a chart: a page of a long run stays small


@dataclass(frozen=True)
class Curve:
    """Values y over steps x, both (N,). noisy: thin, under a bold moving mean; line: as it is; points: joined marks,
    each with an interval of ± half (N,), NaN where there is none."""

    label: str
    x: np.ndarray
    y: np.ndarray
    kind: Literal["noisy", "line", "points"] = "noisy"
    half: np.ndarray | None = None


class Key(NamedTuple):
    """A line of a legend: the curve's classes, its label, what it was and became."""

    colour: str
    label: str
    values: str


class Figure(NamedTuple):
    """A titled chart; where there is nothing to draw, `remark` says why and `svg` is None."""

    title: str
    caption: str
    svg: Markup | None
    legend: list[Key]
    remark: str | None = None


def smooth(y: np.ndarray) -> np.ndarray:
    """Centred moving mean over a twelfth of the run; the window shrinks at the ends."""
    window = np.ones(min(len(y), max(1, len(y) // 12) | 1))
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")


def figure(
    title: str, caption: str, curves: Sequence[Curve], *, percent: bool = False, from_zero: bool = True,
    stacked: bool = False,
) -> Figure:  # fmt: skip
    """The chart of curves that have at least one point each. stacked: they have the same x, and none is negative."""
    zero = [not c.y.any() for c in curves]
    said = "0 in all evaluations" if all(c.kind == "points" for c in curves) else "0 in all steps"
    if all(zero):
        return Figure(title, caption, None, [], said)
    legend = []
    for i, (c, nothing) in enumerate(zip(curves, zero, strict=True)):
        shown = smooth(c.y) if c.kind == "noisy" else c.y
        ends = list(dict.fromkeys(value(v, percent) for v in (shown[0], shown[-1])))
        values = said if nothing else "" if stacked else " → ".join(ends)
        legend.append(Key(_colour(i), c.label if len(curves) > 1 else "", values))
    return Figure(title, caption, _draw(curves, percent, from_zero, stacked), legend)


def value(v: float, percent: bool = False) -> str:
    """A measured number in a few characters."""
    return f"{v:.1%}" if percent else f"{v:,.0f}" if 1000 <= abs(v) < 1e7 else f"{v:.3g}"


def _colour(i: int) -> str:
    return f"c{i % COLOURS}" + " dashed" * (i >= COLOURS)


def _draw(curves: Sequence[Curve], percent: bool, from_zero: bool, stacked: bool) -> Markup:
    # Beyond these a tick has no place and a float no difference.
    ys = [np.where(np.abs(c.y) < 1e-100, 0.0, np.clip(c.y, -1e100, 1e100)) for c in curves]
    halves = [np.zeros_like(c.y) if c.half is None else np.nan_to_num(c.half) for c in curves]
    tops: Any = np.cumsum([smooth(y) for y in ys], axis=0) if stacked else []
    values = np.concatenate([*(y + s * h for y, h in zip(ys, halves, strict=True) for s in (-1, 1)), *tops])
    low, high = _limits(values.min(), values.max(), percent, from_zero)
    steps = np.unique(np.concatenate([c.x for c in curves]))
    first, last = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 0.5, steps[0] + 0.5)

    def at_x(x: Any) -> Any:
        return LEFT + (x - first) / (last - first) * (RIGHT - LEFT)

    def at_y(y: Any) -> Any:
        return BOTTOM - (y - low) / (high - low) * (BOTTOM - TOP)

    parts = [*_axes(_ticks(low, high, 5), _ticks(first, last, 5, whole=True), at_x, at_y, percent)]
    for i, (c, y) in enumerate(zip(curves, ys, strict=True)):
        kept, colour = _extremes(y), _colour(i)
        x = at_x(c.x)
        if stacked:
            top, bottom = at_y(tops[i]), at_y(tops[i - 1] if i else np.zeros_like(y))
            if len(x) == 1:
                x, top, bottom = np.array([LEFT, RIGHT]), top.repeat(2), bottom.repeat(2)
                kept = [0, 1]
            around = [*kept, *kept[::-1]]
            outline = np.concatenate([top[kept], bottom[kept[::-1]]])
            parts.append(_element('<path class="area {}" d="{}Z"/>', colour, _path(x[around], outline)))
        elif c.kind == "points":
            x = x + 3 * (i - (len(curves) - 1) / 2)  # beside each other, where intervals would hide each other
            for a, b, h in zip(x, y, halves[i], strict=True):
                bar = _path(np.array([a, a]), at_y(np.array([b - h, b + h])))
                parts.append(_element('<path class="bar {}" d="{}"/>', colour, bar) * bool(h))
            parts += [_element('<path class="{}" d="{}"/>', colour, _path(x, at_y(y))), _dots(colour, x, at_y(y))]
        else:
            mean = at_y(smooth(y) if c.kind == "noisy" else y)
            if c.kind == "noisy":
                parts.append(_element('<path class="thin {}" d="{}"/>', colour, _path(x[kept], at_y(y)[kept])))
            few = np.unique(np.linspace(0, len(x) - 1, MOST_POINTS).astype(int))
            parts.append(_element('<path class="{}" d="{}"/>', colour, _path(x[few], mean[few])))
            parts += [_dots(colour, x, mean)] if len(x) < 3 else []
    return Markup("\n").join([*parts, *_hovers(curves, steps, at_x, percent)])


def _element(template: str, *values: Any) -> Markup:
    """Every value escaped: labels are names that users chose."""
    return Markup(template).format(*values)


def _limits(low: float, high: float, percent: bool, from_zero: bool) -> tuple[float, float]:
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.02 if percent else 0.0)
    room = 0.05 * (high - low)
    if room < 1e-7 * max(abs(low), abs(high)) or room == 0:
        room = 0.05 * max(abs(low), abs(high)) or 1.0
    top = min(high + room, 1.02) if percent and high <= 1 else high + room
    return low if from_zero and low == 0 else low - room, top


def _ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """At most `most` + 1 round numbers from low to high."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(k * power for k in (1, 2, 5, 10) if (high - low) / (k * power) <= most * (1 + 1e-9))
    step = max(step, 1.0) if whole else step
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick_labels(ticks: list[float], percent: bool) -> list[str]:
    """With as many digits as tell neighbours apart."""
    places = -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9) if len(ticks) > 1 else 1
    if percent:
        return [f"{t:.{max(0, places - 2)}%}" for t in ticks]
    if places > 4 or max(map(abs, ticks)) >= 1e6:
        return [f"{t:.3g}" for t in ticks]
    return [f"{t:,.{max(0, places)}f}" for t in ticks]


def _axes(
    y_ticks: list[float], x_ticks: list[float], at_x: Callable[[Any], Any], at_y: Callable[[Any], Any], percent: bool
) -> list[Markup]:
    parts = [_element('<text class="end" x="{}" y="{}">step</text>', LEFT - 6, HEIGHT - 6)]
    for tick, label in zip(y_ticks, _tick_labels(y_ticks, percent), strict=True):
        y = round(float(at_y(tick)), 1)
        parts.append(_element('<path class="rule" d="M{} {}H{}"/>', LEFT, y, RIGHT))
        parts.append(_element('<text class="end" x="{}" y="{:.1f}">{}</text>', LEFT - 6, y + 4, label))
    for tick in x_ticks:
        parts.append(
            _element('<text class="middle" x="{:.1f}" y="{}">{:,.0f}</text>', float(at_x(tick)), HEIGHT - 6, tick)
        )
    return parts


def _extremes(y: np.ndarray) -> list[int]:
    """Indices of the lowest and the highest of each stretch of values: a long curve keeps its outline."""
    stretches = np.array_split(np.arange(len(y)), min(len(y), MOST_POINTS // 2))
    return sorted({int(s[pick(y[s])]) for s in stretches for pick in (np.argmin, np.argmax)})


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def _dots(colour: str, x: np.ndarray, y: np.ndarray) -> Markup:
    dot = '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>'
    return Markup("").join(_element(dot, colour, float(a), float(b)) for a, b in zip(x, y, strict=True))


def _hovers(curves: Sequence[Curve], steps: np.ndarray, at_x: Callable[[Any], Any], percent: bool) -> list[Markup]:
    """A strip per step, of at most MOST_HOVERS evenly spread ones, with the values there."""
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, MOST_HOVERS).astype(int))]
    centres = at_x(steps)
    edges = [LEFT, *(centres[1:] + centres[:-1]) / 2, RIGHT]
    places = [{float(x): i for i, x in enumerate(c.x)} for c in curves]
    strips = []
    for step, left, right in zip(steps, edges[:-1], edges[1:], strict=True):
        lines = [f"step {step:,.0f}"]
        for c, place in zip(curves, places, strict=True):
            if (i := place.get(float(step))) is not None:
                half = "" if c.half is None or not c.half[i] > 0 else f" ± {value(c.half[i], percent)}"
                lines.append(f"{c.label} {value(c.y[i], percent)}{half}")
        box = '<rect class="at" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>'
        strips.append(_element(box, left, TOP, right - left, BOTTOM - TOP, "\n".join(lines)))
    return strips
