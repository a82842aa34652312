"""The result of an evaluation as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..log import counted
from .answers import MUCH_TRUNCATED, truncation_note
from .followbench import CATEGORIES, LEVELS

LABEL, NARROW, CELL = 52, 20, 16


def _score(value: float | None, half: float | None) -> str:
    if value is None:
        return f"{'-':>{CELL}}"
    return f"{value:.3f}{'' if half is None else f' ± {half:.3f}'}".rjust(CELL)


def _row(label: str, *cells: str, width: int = LABEL) -> str:
    return f"{label:{width}}{''.join(f'{cell:>{CELL}}' for cell in cells)}".rstrip()


def table(result: dict[str, Any]) -> str:
    """All parts that were evaluated, each score with its ±."""
    parts = [_prompts(result)] if "prompts" in result else []
    parts += [_followbench(result["followbench"])] if "followbench" in result else []
    parts += [_suite(result["suite"])] if "tasks" in result.get("suite", {}) else []
    return "\n\n".join(["\n".join(lines) for lines in parts])


def _prompts(result: dict[str, Any]) -> list[str]:
    halves, g = result["intervals"], result["samples"]
    lines = [f"{counted(result['prompts'], 'prompt')}, {_drawn(result)}"]
    if result["count"]:
        labels = {"prompt": "prompt level (all constraints, HSR)", "instruction": "instruction level"}
        labels["ssr"] = "share per prompt (SSR)"
        lines.append(_row(f"{result['count']} with constraints", "strict", "loose"))
        for name, label in labels.items():
            keys = (f"{name}_strict", f"{name}_loose")
            lines.append(_row(label, *(_score(result[key], halves[key]) for key in keys)))
        for name, row in result["types"].items():
            cells = (_score(row[mode], halves["types"][name][mode]) for mode in ("strict", "loose"))
            lines.append(_row(f"{row['count']:>5} {name}", *cells))
    lines.append(_row("reward", _score(result["reward"], halves["reward"])))
    if len(result["rewards"]) > 1:
        for name, row in result["rewards"].items():
            lines.append(_row(f"  {name}", _score(row["mean"], halves["rewards"][name])))
    lines.append(_row("cut at the length limit", _score(result["truncated"], halves["truncated"])))
    if g > 1:
        lines += _samples(result)
    if result["truncated"] > MUCH_TRUNCATED:
        lines.append(truncation_note(result["truncated"], result["max_completion_length"]))
    if result["dropped"]:
        lines.append(
            f"{counted(result['dropped'], 'completion')} without a reward, the first because {result['dropped_reason']}"
        )
    if result["unchecked"]:
        lines.append(
            f"{counted(result['unchecked'], 'check')} ended without an answer and satisfied nothing, the first "
            f"as {result['unchecked_reason']}"
        )
    return _explained(lines, "half of the 95 % interval, bootstrap over prompts")


def _explained(lines: list[str], meaning: str) -> list[str]:
    """The first line says what ± means, where a score has one."""
    return [f"{lines[0]}; ±: {meaning}", *lines[1:]] if any("±" in line for line in lines) else lines


def _drawn(result: dict[str, Any]) -> str:
    taus = [f"{tau:g}" for tau in dict.fromkeys(result["temperatures"])]
    if taus == ["0"]:
        return "answered greedily"
    cut = [
        f", {name} {result[name]:g}" for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)) if result[name] != off
    ]
    return f"{result['samples']} sampled each at temperature {', '.join(taus)}{''.join(cut)}"


def _samples(result: dict[str, Any]) -> list[str]:
    found, halves = result["sampled"], result["intervals"]["sampled"]
    lines = ["", "pass: all constraints hold (strict); for a prompt without any, reward ≥ 1"]
    for k, value in found["pass_at_k"].items():
        lines.append(_row(f"pass@{k}", _score(value, halves["pass_at_k"][k])))
    lines.append(_row("", f"best of {result['samples']}"))  # the means stand above
    names = found["best_of"] if len(found["best_of"]) > 2 else ["reward"]
    for name in names:
        lines.append(_row(name, _score(found["best_of"][name]["best"], halves["best_of"][name]["best"])))
    if found["incomplete"]:
        lines.append(
            f"{counted(found['incomplete'], 'prompt')} with a completion that has no reward: left out of best of "
            f"{result['samples']} and, without constraints, of pass@k"
        )
    lines.append(_row("by temperature", "HSR", "SSR", "reward", "cut", width=NARROW))
    for tau, row in found["by_temperature"].items():
        cells = (_score(row[n], halves["by_temperature"][tau][n]) for n in ("hsr", "ssr", "reward", "truncated"))
        lines.append(_row(f"{tau:>5}, {row['samples']} a prompt", *cells, width=NARROW))
    return lines


def _followbench(found: dict[str, Any]) -> list[str]:
    whole = found["all"]
    lines = [
        f"FollowBench, {whole['groups']} groups that rules check; HSR by level (SSR is the same under a rule); CSL: "
        "levels in a row, of 5",
        _row("groups", *(f"level {n}" for n in range(1, LEVELS + 1)), "CSL", width=NARROW),
    ]
    for name in (*CATEGORIES, "all"):
        row = found[name]
        halves: Sequence[float | None] = row["intervals"]["hsr"]
        cells = [_score(value, half) for value, half in zip(row["hsr"], halves, strict=True)]
        cells.append(_score(row["csl"], row["intervals"]["csl"]))
        lines.append(_row(f"{row['groups']:>5} {name}", *cells, width=NARROW))
    lines.append(f"cut at the length limit: {found['truncated']:.3f}")
    if found["truncated"] > MUCH_TRUNCATED:
        lines.append(truncation_note(found["truncated"], found["max_completion_length"]))
    return lines


def _suite(found: dict[str, Any]) -> list[str]:
    lines = [f"lm-eval {found['lm_eval']}, at most {found['max_length']} tokens"]
    for name, row in found["tasks"].items():
        shots = "" if row["fewshot"] is None else f", {row['fewshot']}-shot"
        lines.append(f"{name} ({counted(row['count'], 'document')}{shots})")
        for metric, value in row["metrics"].items():
            lines.append(_row(f"  {metric}", _score(value, row["intervals"][metric])))
    return _explained(lines, "1.96 standard errors of lm-eval")
