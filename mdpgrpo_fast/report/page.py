"""Run directory → one self-contained page and its curves as PNG: python -m mdpgrpo_fast.report RUN_DIR"""

from __future__ import annotations

import argparse
import html
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from ..cli import report_errors
from ..config import ConfigError, MDPGRPOConfig, TrainConfig
from .figures import sections, svg, write_png, write_types_png
from .run import Run, at, before_after, entries, last_step, number, read_run, type_rates

PAIRS_SHOWN, TEXT_SHOWN = 12, 1600
FIGURE_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 9,
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "axes.formatter.limits": (-3, 5),
}


def _e(value: Any) -> str:
    return html.escape(str(value))


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    return f"{seconds:.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _headline(run: Run) -> str:
    s = run.summary
    names = {"hsr": "responses that satisfy every constraint", "ssr": "constraints satisfied, mean over responses"}
    if all(math.isnan(v) for name in names for v in before_after(run, name)) and run.evals:
        names = {"reward": "mean over responses"}
    steps = s.get("steps", last_step(run))
    count = at(run.evals[0], "eval", "count") if run.evals else None
    held_out = s.get("eval_file", at(run.config, "run", "eval_file"))
    memory, versions = number(s.get("peak_memory_mb")), s.get("versions")
    facts = {
        "Steps": steps,
        "Training": _duration(number(s.get("train_seconds"))),
        "Total with evaluation": _duration(number(s.get("total_seconds"))),
        "Device": s.get("device"),
        "Model": s.get("model", at(run.config, "run", "model")),
        "Training prompts": s.get("train_file", at(run.config, "run", "train_file")),
        "Held-out prompts": f"{held_out} ({count})" if held_out and count else held_out or count,
        "Peak memory": None if math.isnan(memory) else f"{memory:,.0f} MB",
        "Dropped samples": s.get("dropped_samples"),
        "Seed": s.get("seed", at(run.config, "run", "seed")),
        "Versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else versions,
    }
    tiles = "".join(_tile(name, meaning, *before_after(run, name)) for name, meaning in names.items())
    listed = "".join(
        f'<div class="{k.split()[0].lower()}"><dt>{k}</dt><dd>{_e(v)}</dd></div>'
        for k, v in facts.items()
        if v not in (None, "", "–")
    )
    notes = "".join(f"<li>{_e(note)}</li>" for note in run.notes)
    method = s.get("method", at(run.config, "run", "preset"))
    return (
        f'<header><p class="eyebrow">MDP-GRPO run{f" · preset {_e(method)}" if method else ""}</p>'
        f"<h1>{_e(run.path.resolve().name)}</h1></header>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + f'<div class="tiles">{tiles}</div><dl class="facts">{listed}</dl>'
    )


def _tile(name: str, meaning: str, before: float, after: float) -> str:
    if name == "reward":
        shown = " <i>→</i> ".join("–" if math.isnan(v) else f"{v:.3f}" for v in (before, after))
        return f'<div class="tile"><p>Held-out <b>reward</b>, {meaning}</p><p class="big">{shown}</p></div>'
    # Of the rounded shares, so that the three numbers agree.
    points = round(after * 100, 1) - round(before * 100, 1)
    gain = "" if math.isnan(points) else f"<em>{points:+.1f} points</em>"
    return (
        f'<div class="tile"><p>Held-out <b>{name.upper()}</b>, {meaning}</p><p class="big">{_percent(before)} '
        f"<i>→</i> <b>{_percent(after)}</b> {gain}</p>{_bars(before, after)}</div>"
    )


def _bars(before: float, after: float) -> str:
    widths = [("before", before), ("after", after)]
    return '<div class="bars">' + "".join(
        f'<span class="{side}" style="width:{min(max(v, 0), 1) * 100:.1f}%"></span>' for side, v in widths if v == v
    ) + "</div>"  # fmt: skip


def _figures(run: Run) -> Iterator[str]:
    for stem, heading, introduction, panels in sections(run):
        if not write_png(run, stem, panels):
            continue
        drawn = [(panel, svg(panel, run)) for panel in panels]
        yield f'<section><h2>{heading}</h2><p class="lede">{introduction}</p><div class="grid">' + "".join(
            f"<figure><h3>{p.title}</h3>{svg}<figcaption>{p.caption}</figcaption></figure>" for p, svg in drawn if svg
        ) + "</div>"  # fmt: skip
        if stem == "group_health":
            reasons = Counter(str(row["note"]) for row in run.train if row.get("note"))
            items = "".join(
                f"<li>{n} of {len(run.train)} steps: {_e(text)}.</li>" for text, n in reasons.most_common(5)
            )
            yield f"<ul>{items}</ul>" if items else ""
        yield "</section>"


def _type_table(run: Run) -> str:
    rows = type_rates(run)
    if not rows:
        return '<p class="lede">No instruction types: the held-out prompts name none, or were not evaluated.</p>'
    write_types_png(run, rows)
    body = "".join(
        f'<tr><th scope="row">{_e(name)}</th><td class="wide">{_bars(before, after)}</td><td>{_percent(before)}</td>'
        f"<td>{_percent(after)}</td><td>{count}</td></tr>"
        for name, before, after, count in rows
    )
    return (
        '<p class="lede">Share of held-out constraints satisfied, by type; the largest gain first.</p>'
        '<table class="types"><thead><tr><th>Type</th><td class="wide"></td>'
        '<td><span class="key before"></span>before</td>'
        f'<td><span class="key after"></span>after</td><td>count</td></tr></thead><tbody>{body}</tbody></table>'
    )


def _score(row: dict[str, Any] | None) -> float:
    marks = at(row, "satisfied")
    return sum(map(bool, marks)) / len(marks) if isinstance(marks, list) and marks else number(at(row, "reward"))


def _pairs(run: Run) -> list[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """The same prompt before and after; the largest changes first, in either direction."""
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for row in run.completions:
        phase = row.get("phase")
        if phase in ("before", "after"):
            key = json.dumps([row.get("prompt"), row.get("instruction_ids")])
            found.setdefault((key, seen[phase, key]), {})[phase] = row
            seen[phase, key] += 1
    pairs = [(sides.get("before"), sides.get("after")) for sides in found.values()]
    changes = [_score(after) - _score(before) for before, after in pairs]
    order = sorted(range(len(pairs)), key=lambda i: 0.0 if math.isnan(changes[i]) else -abs(changes[i]))
    return [pairs[i] for i in order]


def _prompt(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    messages = [m for m in value if isinstance(m, dict)]
    return "\n".join((f"{m.get('role')}: " * (len(messages) > 1)) + str(m.get("content")) for m in messages)


def _side(name: str, row: dict[str, Any] | None) -> str:
    if row is None:
        return f'<div><h4>{name}</h4><p class="lede">not recorded</p></div>'
    text = str(row.get("response"))
    if len(text) > TEXT_SHOWN:
        text = f"{text[:TEXT_SHOWN]} … ({len(text) - TEXT_SHOWN} more characters)"
    marks = "".join(
        f'<li class="{"yes" if ok else "no"}">{"✓" if ok else "✗"} {_e(constraint)}</li>'
        for constraint, ok in zip(entries(row.get("instruction_ids")), entries(row.get("satisfied")), strict=False)
    )
    reward = number(row.get("reward"))
    head = name + ("" if math.isnan(reward) else f" · reward {reward:.2f}")
    head += "" if row.get("finished", True) else " · stopped by the length limit"
    return f'<div><h4>{head}</h4><ul class="marks">{marks}</ul><pre dir="auto">{_e(text)}</pre></div>'


def _completions(run: Run) -> str:
    pairs = _pairs(run)
    if not pairs:
        return '<p class="lede">No held-out completions have been recorded.</p>'
    changes = [_score(b) - _score(a) for a, b in pairs]
    better, worse = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    cards = "".join(
        f'<article><p class="prompt" dir="auto">{_e(_prompt(at(a or b, "prompt")))}</p><div class="sides">'
        f"{_side('Before', a)}{_side('After', b)}</div></article>"
        for a, b in pairs[:PAIRS_SHOWN]
    )
    return (
        f'<p class="lede">{better} of {len(pairs)} satisfy more than before, {worse} fewer; the largest changes first, '
        f"{min(len(pairs), PAIRS_SHOWN)} shown.</p>{cards}"
    )


def _configuration(run: Run) -> str:
    parts = []
    for name, kind in (("method", MDPGRPOConfig), ("run", TrainConfig)):
        values, default, known = at(run.config, name), kind(), {f.name: f for f in fields(kind)}
        if isinstance(values, dict):
            rows = "".join(
                f'<tr class="{"" if getattr(default, str(k), v) == v else "set"}"><th scope="row">{_e(k)}</th>'
                f"<td>{_e('–' if v is None else v)}</td>"
                f"<td>{_e(known[k].metadata['help'] if k in known else '')}</td></tr>"
                for k, v in values.items()
            )
            parts.append(f"<details><summary>{name}</summary><table>{rows}</table></details>")
    return "".join(parts) or '<p class="lede">No configuration has been recorded.</p>'


CSS = """
:root{--ink:#1c2127;--soft:#616b76;--line:#e2e6ea;--paper:#fff;--card:#f6f7f9;--before:#a3acb8;--after:#3b72d9;
--good:#1c7d52;--bad:#bb3a36;--warn:#fff6e0}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#98a2ad;--line:#2f353d;--paper:#14171b;
--card:#1c2026;--before:#66707c;--after:#6c9cf5;--good:#5cc795;--bad:#f08580;--warn:#332b16}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:40px 28px 64px;background:var(--paper);color:var(--ink);
font:.94rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums;-webkit-print-color-adjust:exact;print-color-adjust:exact}
h1{font-size:2.1rem;line-height:1.15;letter-spacing:-.02em;margin:2px 0 20px;overflow-wrap:anywhere}
h2{font-size:1.4rem;letter-spacing:-.01em;margin:3.2rem 0 2px;padding-top:14px;border-top:2px solid var(--ink)}
h3{font-size:.88rem;margin:0 0 4px}h4{font-size:.81rem;margin:0 0 6px;color:var(--soft);font-weight:600}
p{margin:0}.lede,.eyebrow,figcaption,dt{color:var(--soft)}.lede{margin-bottom:18px;max-width:100ch}
.eyebrow{font-size:.81rem;font-weight:600;letter-spacing:.02em}
.notes{background:var(--warn);border-radius:8px;padding:12px 16px 12px 34px;margin:0 0 20px}
.tiles,.sides{display:grid;grid-template-columns:1fr 1fr;gap:16px}
.tile{background:var(--card);border-radius:10px;padding:18px 20px;break-inside:avoid}
.tile p{color:var(--soft);font-size:.88rem}
.tile .big{font-size:2rem;letter-spacing:-.02em;line-height:1.3;margin:2px 0 10px}
.big b{color:var(--ink)}.big i{font-style:normal;font-weight:300}.big em{font-style:normal;font-size:1rem;
color:var(--after);font-weight:600;letter-spacing:0;white-space:nowrap}
.bars{background:var(--line);border-radius:3px;overflow:hidden}.bars span{display:block;height:6px}
.bars .before,.key.before{background:var(--before)}.bars .after,.key.after{background:var(--after)}
.key{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:14px 24px;margin:24px 0 0}
.facts .versions{grid-column:1/-1}dt{font-size:.75rem}dd{margin:0;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:30px 28px}
figure{margin:0;break-inside:avoid}figcaption{font-size:.78rem;line-height:1.4;margin-top:4px}
svg{display:block;width:100%;height:auto;overflow:visible}svg text{fill:currentColor}
table{border-collapse:collapse;width:100%;font-size:.84rem}tr{break-inside:avoid}
td,th{padding:6px 10px 6px 0;border-bottom:1px solid var(--line);text-align:left;overflow-wrap:anywhere;font-weight:400}
.types th{width:1%;white-space:nowrap;padding-right:18px}.types td:not(.wide){width:6.2em;text-align:right;
white-space:nowrap;padding-right:0}thead td,thead th{color:var(--soft);font-size:.78rem}
article{border:1px solid var(--line);border-radius:10px;padding:16px 18px;margin-bottom:14px;break-inside:avoid}
.prompt{font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere;margin-bottom:12px}.sides>div{min-width:0}
.marks{list-style:none;padding:0;margin:0 0 8px;display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.78rem}
.yes{color:var(--good)}.no{color:var(--bad)}
pre{margin:0;padding:10px 12px;background:var(--card);border-radius:6px;font-family:inherit;font-size:.84rem;
white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;max-height:340px;overflow-y:auto}
details{margin:10px 0}summary{cursor:pointer;font-weight:600}details table{margin-top:6px}
details td:last-child{color:var(--soft);width:55%}.set td:nth-child(2){font-weight:700;color:var(--after)}
@media screen and (max-width:680px){body{padding:24px 16px 40px}.tiles,.sides{grid-template-columns:1fr}
.types th{width:auto;white-space:normal}.types .wide{width:22%}.types td:not(.wide){width:auto;padding-left:8px}
.tile .big{font-size:1.7rem}details td:last-child{display:none}}
@page{margin:13mm}
@media print{html{font-size:11px}body{max-width:none;padding:0}.grid{grid-template-columns:1fr 1fr;gap:16px 28px}
h2{margin-top:2rem}pre{max-height:none;overflow:visible}h2,h3,h4,.lede,thead{break-after:avoid}
td,th{padding-top:3px;padding-bottom:3px}article{padding:10px 12px;margin-bottom:9px}
details::details-content{content-visibility:visible;height:auto}}
"""


def write_report(run_dir: Path | str) -> Path:
    """Write report.html, curves.png, group_health.png, pace.png and types.png into the run directory.

    Parts that the directory lacks are named on the page. Raises ConfigError where it is no run directory.
    """
    import matplotlib

    run = read_run(Path(run_dir))
    # No pyplot and a context for the settings: whoever imported matplotlib before keeps backend and style.
    with matplotlib.rc_context(FIGURE_STYLE):
        body = "".join(_figures(run))
        types = _type_table(run)
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        'initial-scale=1"><meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{_e(run.path.resolve().name)} · MDP-GRPO run</title><style>{CSS}</style></head><body>"
        f"{_headline(run)}{body}"
        f"<section><h2>Instruction types</h2>{types}</section>"
        f"<section><h2>Held-out completions</h2>{_completions(run)}</section>"
        f'<section><h2>Configuration</h2><p class="lede">Bold: not the default.</p>{_configuration(run)}</section>'
        "</body></html>\n"
    )
    out = run.path / "report.html"
    out.write_text(page, encoding="utf-8", errors="replace")
    return out


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(prog="python -m mdpgrpo_fast.report", description="Write the page of a run into its directory.")
    parser.add_argument("run_dir", type=Path, help="run directory, as the trainer writes it")
    with report_errors():
        path = parser.parse_args(argv).run_dir
        try:
            print(write_report(path))
        except OSError as e:
            raise ConfigError(f"the report of {str(path)!r} cannot be written: {e}") from None
    return 0
