"""TRL's own tests on its trainer and on ours, from benchmarks/results/cpu/trl_suite.json."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import step_table

RESULT = Path(__file__).resolve().parents[1] / "results" / "cpu" / "trl_suite.json"
KINDS = ("passed", "failed", "xfailed", "skipped")


def section() -> str:
    document = json.loads(RESULT.read_text(encoding="utf-8"))
    baseline = document["runs"][0]
    lines = [
        "| trainer, config | passed | failed | expected to fail | not run | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for run in document["runs"]:
        counts = " | ".join(str(run["counts"].get(kind, 0)) for kind in KINDS)
        lines.append(f"| {_named(run)} | {counts} | {run['seconds'] / 60:.0f} |")
    for run in document["runs"][1:]:
        lost = run["passes_on_baseline_only"]
        lines += ["", _sentence(run, len(lost))]
        if lost:
            lines += ["", "| test | on it |", "|---|---|"]
            lines += [f"| `{test}` | {_cell(run['failed'].get(test, 'not run'))} |" for test in lost]
    lines += ["", f"What fails on {_named(baseline)} itself:", "", "| why | tests |", "|---|---|"]
    lines += _grouped(_by_reason(baseline["failed"]))
    lines += ["", "What is not run:", "", "| why | tests |", "|---|---|", *_grouped(document["not_run"])]
    suite = document["suite"]
    versions = ", ".join(f"{k} {v}" for k, v in document["versions"].items() if v != "not installed")
    return "\n".join(
        [
            *lines,
            "",
            f"The tests are those of {suite['file']} of TRL {suite['trl']} (git blob {suite['git_blob'][:10]}), the "
            "nearest to this version that could be had, in float32, with small random models of the same architectures "
            "and the Zen of Python for a data set. "
            f"{step_table.source(document)}; {document['machine']}, {document['workers']} at once; {versions}.",
        ]
    )


def _named(run: dict[str, Any]) -> str:
    config, brace, settings = run["config"].partition("{")
    name = f"`{run['trainer'].rpartition(':')[2]}`, `{config.rpartition(':')[2]}`"
    return name + (f" with `{brace}{settings}`" if brace else "")


def _sentence(run: dict[str, Any], lost: int) -> str:
    if not lost:
        return f"Every test that passes on TRL's trainer passes on {_named(run)}."
    return f"{lost} of the tests that pass on TRL's trainer do not on {_named(run)}:"


def _by_reason(failed: dict[str, str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for test, why in failed.items():
        groups[why].append(test)
    return groups


def _grouped(groups: dict[str, list[str]]) -> list[str]:
    rows = []
    for why, tests in groups.items():
        # Of a test with several parameters, the number.
        counted: dict[str, int] = {}
        for test in tests:
            name = test.rpartition("::")[2].partition("[")[0]
            counted[name] = counted.get(name, 0) + 1
        said = ", ".join(f"`{name}`" + (f" ({n})" if n > 1 else "") for name, n in counted.items())
        rows.append(f"| {_cell(why)} | {len(tests)}: {said} |")
    return rows


def _cell(text: str) -> str:
    short = text if len(text) <= 120 else text[:120] + "…"
    return short.replace("|", "\\|")
