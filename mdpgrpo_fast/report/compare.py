"""`mdpgrpo compare RUN RUN ...`: one page of several runs, and one table of them on the terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cli import Parser, report_errors
from ..config import ConfigError
from ..log import printable
from .page import duration, listed, moment
from .run import Run, Score, as_mapping, as_number, last_step, lookup, read_run, score, scores

SCORES = ("HSR", "SSR", "reward")
SAME = ("output_dir", "resume")  # of a run by itself: no setting of its learning
CONTENTS = {"scores": "Held-out scores", "curves": "Curves", "settings": "Settings that differ", "runs": "Runs"}


def names(paths: list[Path]) -> list[str]:
    """Of each path its last part, with as many before it as it takes to tell it from the other paths.

    Raises ConfigError where two are the same directory."""
    parts = [path.resolve().parts for path in paths]
    for i, mine in enumerate(parts):
        if mine in parts[:i]:
            raise ConfigError(f"run directory {str(paths[i])!r} is given twice")
    found = []
    for mine in parts:
        others = [p for p in parts if p is not mine]
        n = next(n for n in range(1, len(mine) + 1) if all(p[-n:] != mine[-n:] for p in others))
        found.append("/".join(mine[-n:]))
    return found


def settings_that_differ(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(knob, its value in each run): of configurations, then of what they ran on and with."""
    every: list[dict[str, Any]] = []
    for run in runs:
        knobs = {**as_mapping(run.config.get("method")), **as_mapping(run.config.get("run"))}
        ran = {name: run.summary.get(name) for name in ("device", "processes", "backend", "versions", "commit")}
        every.append({**{k: v for k, v in knobs.items() if k not in SAME}, **{k: v for k, v in ran.items() if v}})
    rows = [(name, [_setting(knobs, name) for knobs in every]) for name in dict.fromkeys(k for e in every for k in e)]
    return [(str(name), values) for name, values in rows if len(set(values)) > 1]


def _setting(knobs: dict[str, Any], name: str) -> str:
    """As the configuration says it; lists of numbers may be of whole ones or not."""
    if name not in knobs:
        return "not recorded"
    value = knobs[name]
    return "unset" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(listed(value))


def cells(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Heads and one row per run: its scores before and after with their intervals, steps and times."""
    known = {s.name for run in runs for s in scores(run)}
    shown = [name for name in SCORES if name in known]
    heads = [f"{name} {side}" for name in shown for side in ("before", "after")]
    rows = [[text for name in shown for text in _score_cells(score(run, name))] for run in runs]
    for row, run in zip(rows, runs, strict=True):
        seconds = [as_number(run.summary.get(f"{name}_seconds")) for name in ("train", "total")]
        row += [str(run.summary.get("steps", last_step(run))), *(duration(s) or "–" for s in seconds)]
    return [*heads, "steps", "training", "total"], rows


def _score_cells(s: Score) -> list[str]:
    factor, form, unit = (1.0, ".3f", "") if s.name == "reward" else (100.0, ".1f", "%")

    def text(mean: float, half: float) -> str:
        interval = "" if math.isnan(half) else f" ± {factor * half:{form}}"
        return "–" if math.isnan(mean) else f"{factor * mean:{form}}{unit}{interval}"

    return [text(s.before, s.before_half), text(s.after, s.after_half)]


def table(labels: list[str], heads: list[str], rows: list[list[str]]) -> str:
    """Plain text in aligned columns."""
    lines = [["run", *heads], *([label, *row] for label, row in zip(labels, rows, strict=True))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _figures(labels: list[str], runs: list[Run]) -> list[Any]:
    from .charts import Curve, figure, smooth
    from .panels import held_out_curve
    from .run import series

    def held_out(key: str) -> Callable[[str, Run], Curve]:
        return lambda label, run: held_out_curve(label, run.evals, ("eval", key))

    def trained(*keys: str) -> Callable[[str, Run], Curve]:
        def curve(label: str, run: Run) -> Curve:
            x, y = series(run.train, *keys)
            return Curve(label, x, smooth(y) if len(y) else y, "line")

        return curve

    def step_seconds(label: str, run: Run) -> Curve:
        rows = [{**row, "seconds": _total(row.get("seconds"))} for row in run.train]
        return trained("seconds")(label, Run(run.path, train=rows))

    drawn = []
    for title, caption, curve, percent, from_zero in (
        ("Held-out HSR", "Greedy answers that satisfy every constraint.", held_out("hsr"), True, True),
        ("Held-out SSR", "Constraints satisfied, mean over greedy answers.", held_out("ssr"), True, True),
        ("Held-out reward", "Mean over greedy answers.", held_out("reward"), False, False),
        ("Training HSR", "Sampled completions of a step.", trained("hsr"), True, True),
        ("Training SSR", "Sampled completions of a step.", trained("ssr"), True, True),
        ("Training reward", "Mean over the completions of a step.", trained("reward"), False, False),
        ("Entropy", "Of the next token, in nats.", trained("entropy"), False, True),
        ("KL to the reference", "In nats per token; 0 where no reference is loaded.", trained("kl"), False, True),
        ("Completion length", "Mean, in tokens.", trained("completion_length"), False, True),
        ("Groups with equal rewards", "z is 0 for all of them.", trained("zero_variance_groups"), True, True),
        ("Gradient norm", "Before clipping.", trained("grad_norm"), False, True),
        ("Loss", "Comparable only between runs with the same method settings.", trained("loss"), False, False),
        ("Seconds per step", "All stages.", step_seconds, False, True),
        ("Tokens per second", "Generated tokens over the whole step.", trained("tokens_per_second"), False, True),
    ):
        curves = [c for label, run in zip(labels, runs, strict=True) if len((c := curve(label, run)).x)]
        if curves:
            drawn.append(figure(title, caption, curves, percent=percent, from_zero=from_zero))
    return drawn


def _total(seconds: Any) -> float:
    return sum(as_number(v) for v in seconds.values()) if isinstance(seconds, dict) and seconds else math.nan


def notes(labels: list[str], runs: list[Run]) -> list[str]:
    """What the runs lack, and why their scores may not be comparable."""
    found = [f"{label}: {note}" for label, run in zip(labels, runs, strict=True) for note in run.notes]
    if len(set(_held_out([run for run in runs if run.evals]))) > 1:
        found.append("The runs have different held-out prompts: their scores are not comparable.")
    return found


def _held_out(runs: list[Run]) -> list[str]:
    """Of each run its held-out prompts' file and number; where a run, older or without its end, has recorded the number
    of those with constraints alone, that number of every run."""
    files = [run.summary.get("eval_file", lookup(run.config, "run", "eval_file")) for run in runs]
    counts = [run.summary.get("held_out") for run in runs]
    if None in counts:
        counts = [lookup(run.evals[0], "eval", "count") for run in runs]
    return [str(pair) for pair in zip(files, counts, strict=True)]


def write_comparison(paths: list[Path], out: Path) -> tuple[str, list[str]]:
    """Write the page; returns the table, and the notes. Raises ConfigError for a directory that is no run, or is given
    twice."""
    from .template import write_page

    labels, runs = names(paths), [read_run(path) for path in paths]
    (heads, rows), said = cells(runs), notes(labels, runs)
    write_page(
        out,
        "compare.html.jinja",
        labels=labels,
        notes=said,
        headings=CONTENTS,
        contents=list(CONTENTS.items()),
        heads=heads,
        rows=rows,
        figures=_figures(labels, runs),
        settings=settings_that_differ(runs),
        facts=[(run.path.resolve(), moment(run.summary.get("started")), run.summary.get("command")) for run in runs],
    )
    return table(labels, heads, rows), said


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mdpgrpo compare", description="Compare runs: a table here, and a page of their curves.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, as the trainer writes it")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")
    with report_errors():
        options = parser.parse_args(argv)
        if len(options.runs) < 2:
            raise ConfigError(f"compare needs two run directories or more; got {str(options.runs[0])!r} alone")
        if options.output.exists() and not options.overwrite:
            raise ConfigError(f"output {str(options.output)!r} exists; --overwrite replaces it")
        text, said = write_comparison(options.runs, options.output)
        for note in said:
            print(printable(f"note: {note}"), file=sys.stderr)
        print(printable(text))
        print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
