"""Report of a run: its page, and the command `mdpgrpo report RUN_DIR` that writes it."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import fields
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from ..cli import Parser, report_errors
from ..config import MDPGRPOConfig, TrainConfig
from .panels import figures
from .run import Row, Run, as_list, as_mapping, as_number, last_step, lookup, read_run, scores, type_rates
from .template import write_page

PAIRS_SHOWN, CHARACTERS_SHOWN = 12, 1600
SECTIONS = {"learning": "Learning", "group-health": "Group health", "pace": "Pace", "types": "Instruction types",
            "completions": "Held-out completions", "configuration": "Configuration"}  # fmt: skip
DRAWN = ("learning", "group-health", "pace")  # these are left out where there is no chart


def duration(seconds: float) -> str | None:
    if math.isnan(seconds):
        return None
    return f"{seconds:.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _facts(run: Run) -> dict[str, Any]:
    summary = run.summary

    def recorded(name: str) -> Any:
        return summary.get(name, lookup(run.config, "run", name))

    prompts, count = recorded("eval_file"), summary.get("held_out")
    if count is None and run.evals:  # an older run, or one without its end: the prompts with constraints
        count = lookup(run.evals[0], "eval", "count")
    memory = as_number(summary.get("peak_memory_mb"))
    facts = {
        "Steps": summary.get("steps", last_step(run)),
        "Training": duration(as_number(summary.get("train_seconds"))),
        "Total with evaluation": duration(as_number(summary.get("total_seconds"))),
        "Started": moment(summary.get("started")),
        "Device": summary.get("device"),
        "Peak memory": None if math.isnan(memory) else f"{memory:,.0f} MB",
        "Model": recorded("model"),
        "Parameters": _parameters(summary),
        "Training prompts": recorded("train_file"),
        "Held-out prompts": f"{prompts} ({count})" if prompts and count else prompts or count,
        "Dropped samples": summary.get("dropped_samples"),
        "Rows left out": summary.get("dropped_rows") or None,
        "Seed": recorded("seed"),
        "Commit": summary.get("commit"),
        "Backend": listed(summary.get("backend")),
        "Versions": listed(summary.get("versions")),
        "Command": summary.get("command"),
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def moment(value: Any) -> Any:
    """An ISO date to the minute, anything else as it is."""
    try:
        return datetime.fromisoformat(value).strftime("%Y-%m-%d %H:%M %Z").strip()
    except (TypeError, ValueError):
        return value


def listed(value: Any) -> Any:
    """A mapping as text, anything else as it is."""
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value


def _parameters(summary: Row) -> str | None:
    every, trained = (as_number(summary.get(name)) for name in ("parameters", "trained_parameters"))
    if math.isnan(every):
        return None
    return f"{every:,.0f}" + ("" if math.isnan(trained) or trained == every else f", {trained:,.0f} of them trained")


def _completion(row: Row | None) -> dict[str, Any] | None:
    if row is None:
        return None
    response = str(row.get("response"))
    if len(response) > CHARACTERS_SHOWN:
        response = f"{response[:CHARACTERS_SHOWN]} … ({len(response) - CHARACTERS_SHOWN} more characters)"
    constraints = zip(as_list(row.get("instruction_ids")), as_list(row.get("satisfied")), strict=False)
    return {
        "response": response,
        "constraints": list(constraints),
        "reward": as_number(row.get("reward")),
        "rewards": _each_reward(row),
        "finished": row.get("finished", True),
    }


def _each_reward(row: Row) -> list[tuple[str, float]]:
    """The rewards of a completion by name, where there are several."""
    rewards = as_mapping(row.get("rewards"))
    return [(name, as_number(value)) for name, value in rewards.items()] if len(rewards) > 1 else []


def _prompt(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    messages = [m for m in value if isinstance(m, dict)]
    return "\n".join((f"{m.get('role')}: " * (len(messages) > 1)) + str(m.get("content")) for m in messages)


def _score(row: Row | None) -> float:
    satisfied = lookup(row, "satisfied")
    if isinstance(satisfied, list) and satisfied:
        return sum(map(bool, satisfied)) / len(satisfied)
    return as_number(lookup(row, "reward"))


Pair = tuple[float, Row | None, Row | None]


def _pairs(run: Run) -> list[Pair]:
    """(change of the score, row before, row after) by prompt."""
    rows: dict[tuple[str, int], dict[str, Row]] = {}
    repeats: Counter[tuple[str, str]] = Counter()
    for row in run.completions:
        phase = row.get("phase")
        if phase in ("before", "after"):
            prompt = json.dumps([row.get("prompt"), row.get("instruction_ids")])
            rows.setdefault((prompt, repeats[phase, prompt]), {})[phase] = row
            repeats[phase, prompt] += 1
    sides = [(pair.get("before"), pair.get("after")) for pair in rows.values()]
    return [(_score(after) - _score(before), before, after) for before, after in sides]


def _by_change(pairs: list[Pair]) -> dict[str, tuple[list[Pair], int]]:
    """What got better and what got worse, the largest changes first: heading → (those shown, how many there are).

    Each has half of the room, and what the other leaves; the rest is shown where nothing changed.
    """
    better = sorted((p for p in pairs if p[0] > 0), key=lambda p: -p[0])
    worse = sorted((p for p in pairs if p[0] < 0), key=lambda p: p[0])
    room = max(PAIRS_SHOWN // 2, PAIRS_SHOWN - len(better))
    groups = {"Worse than before": worse[:room], "Better than before": better[: PAIRS_SHOWN - min(room, len(worse))]}
    totals = {"Worse than before": len(worse), "Better than before": len(better)}
    if not better and not worse:
        groups, totals = {"As before": pairs[:PAIRS_SHOWN]}, {"As before": len(pairs)}
    return {name: (groups[name], totals[name]) for name in sorted(groups) if groups[name]}


def _configuration(run: Run) -> dict[str, list[tuple[Any, Any, str, bool]]]:
    """Section of the configuration → (knob, value, help, whether it is not the default)."""
    sections = {}
    for name, kind in (("method", MDPGRPOConfig), ("run", TrainConfig)):
        values, default, helps = lookup(run.config, name), kind(), {f.name: f.metadata["help"] for f in fields(kind)}
        if isinstance(values, dict):
            sections[name] = [
                (k, "–" if v is None else v, helps.get(k, ""), getattr(default, str(k), v) != v)
                for k, v in values.items()
            ]
    return sections


def write_report(run_dir: Path | str) -> Path:
    """Write report.html into the run directory.

    Parts that the directory lacks are named on the page. Raises ConfigError where it is no run directory, or where the
    page cannot be written.
    """
    run = read_run(Path(run_dir))
    out, pairs, held_out, drawn = run.path / "report.html", _pairs(run), scores(run), figures(run)
    reasons = Counter(str(row["note"]) for row in run.train if row.get("note")).most_common(5)
    if reasons:
        drawn.setdefault("group-health", [])  # where they stand
    write_page(
        out,
        "page.html.jinja",
        name=run.path.resolve().name,
        method=run.summary.get("method", lookup(run.config, "run", "preset")),
        notes=run.notes,
        scores=held_out,
        intervals=not all(map(math.isnan, chain.from_iterable(s[3:] for s in held_out))),
        facts=_facts(run),
        headings=SECTIONS,
        contents=[(id, heading) for id, heading in SECTIONS.items() if id in drawn or id not in DRAWN],
        figures=drawn,
        reasons=reasons,
        steps=len(run.train),
        types=type_rates(run),
        changes={
            heading: ([(_prompt(lookup(b or a, "prompt")), _completion(b), _completion(a)) for _, b, a in shown], total)
            for heading, (shown, total) in _by_change(pairs).items()
        },
        compared=len(pairs),
        configuration=_configuration(run),
    )
    return out


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mdpgrpo report", description="Write the page of a run into its directory.")
    parser.add_argument("run_dir", type=Path, help="run directory, as the trainer writes it")
    with report_errors():
        print(write_report(parser.parse_args(argv).run_dir))
    return 0
