"""Report of a run: its page, and the command `python -m mdpgrpo_fast.report RUN_DIR` that writes it."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..cli import report_errors
from ..config import ConfigError, MDPGRPOConfig, TrainConfig
from .figures import draw_figures
from .run import Row, Run, as_list, as_mapping, as_number, before_after, last_step, lookup, read_run, type_rates

PAIRS_SHOWN, CHARACTERS_SHOWN = 12, 1600


def _scores(run: Run) -> list[tuple[str, float, float, float]]:
    """(name, before, after, gain in percentage points) of the held-out scores; the reward where there are no others."""
    scores = {name: before_after(run, name.lower()) for name in ("HSR", "SSR")}
    if run.evals and all(map(math.isnan, chain(*scores.values()))):
        scores = {"reward": before_after(run, "reward")}
    elif list(as_mapping(run.summary.get("rewards"))) not in ([], ["constraints"]):
        scores["reward"] = before_after(run, "reward")
    # The gain of the rounded shares, so that the three numbers agree.
    return [(name, b, a, round(a * 100, 1) - round(b * 100, 1)) for name, (b, a) in scores.items()]


def _duration(seconds: float) -> str | None:
    if math.isnan(seconds):
        return None
    return f"{seconds:.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _facts(run: Run) -> dict[str, Any]:
    summary = run.summary

    def recorded(name: str) -> Any:
        return summary.get(name, lookup(run.config, "run", name))

    prompts, count = recorded("eval_file"), lookup(run.evals[0], "eval", "count") if run.evals else None
    memory, versions = as_number(summary.get("peak_memory_mb")), summary.get("versions")
    facts = {
        "Steps": summary.get("steps", last_step(run)),
        "Training": _duration(as_number(summary.get("train_seconds"))),
        "Total with evaluation": _duration(as_number(summary.get("total_seconds"))),
        "Device": summary.get("device"),
        "Model": recorded("model"),
        "Training prompts": recorded("train_file"),
        "Held-out prompts": f"{prompts} ({count})" if prompts and count else prompts or count,
        "Peak memory": None if math.isnan(memory) else f"{memory:,.0f} MB",
        "Dropped samples": summary.get("dropped_samples"),
        "Rows left out": summary.get("dropped_rows") or None,
        "Seed": recorded("seed"),
        "Versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else versions,
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


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


def _pairs(run: Run) -> list[tuple[float, Row | None, Row | None]]:
    """(change of the score, row before, row after) by prompt; the largest changes first, in either direction."""
    rows: dict[tuple[str, int], dict[str, Row]] = {}
    repeats: Counter[tuple[str, str]] = Counter()
    for row in run.completions:
        phase = row.get("phase")
        if phase in ("before", "after"):
            prompt = json.dumps([row.get("prompt"), row.get("instruction_ids")])
            rows.setdefault((prompt, repeats[phase, prompt]), {})[phase] = row
            repeats[phase, prompt] += 1
    sides = [(pair.get("before"), pair.get("after")) for pair in rows.values()]
    pairs = [(_score(after) - _score(before), before, after) for before, after in sides]
    return sorted(pairs, key=lambda pair: 0.0 if math.isnan(pair[0]) else -abs(pair[0]))


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


def _number(value: float, spec: str) -> str:
    return "–" if math.isnan(value) else format(value, spec)


def _render(**content: Any) -> str:
    """The page. Prompts and responses are hostile text: the template escapes whatever it is given."""
    environment = Environment(loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, keep_trailing_newline=True)  # fmt: skip
    environment.filters["number"] = _number
    environment.tests["nan"] = math.isnan
    return environment.get_template("page.html.jinja").render(content)


def write_report(run_dir: Path | str) -> Path:
    """Write report.html, curves.png, group_health.png, pace.png and types.png into the run directory.

    Parts that the directory lacks are named on the page. Raises ConfigError where it is no run directory.
    """
    run = read_run(Path(run_dir))
    types, pairs = type_rates(run), _pairs(run)
    page = _render(
        name=run.path.resolve().name,
        method=run.summary.get("method", lookup(run.config, "run", "preset")),
        notes=run.notes,
        scores=_scores(run),
        facts=_facts(run),
        figures=draw_figures(run, types),
        reasons=Counter(str(row["note"]) for row in run.train if row.get("note")).most_common(5),
        steps=len(run.train),
        types=types,
        pairs=[
            (_prompt(lookup(before or after, "prompt")), _completion(before), _completion(after))
            for _, before, after in pairs[:PAIRS_SHOWN]
        ],
        compared=len(pairs),
        better=sum(change > 0 for change, _, _ in pairs),
        worse=sum(change < 0 for change, _, _ in pairs),
        configuration=_configuration(run),
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
