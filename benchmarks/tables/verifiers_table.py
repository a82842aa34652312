"""The speed of the verifiers, from benchmarks/results/cpu/verifiers.json."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import step_table

RESULT = Path(__file__).resolve().parents[1] / "results" / "cpu" / "verifiers.json"


def section() -> str:
    document = json.loads(RESULT.read_text(encoding="utf-8"))
    rows = [row for row in document["types"] if "skipped" not in row]
    versions = ", ".join(f"{k} {v}" for k, v in document["versions"].items() if v != "not installed")
    return "\n".join(
        [
            *_rule_sets(rows),
            "",
            *_types([row for row in rows if row["rules"] == "ifeval"]),
            "",
            "Strict. Short: `verify_all` on up to 10,000 responses of 1,000 characters. Long: 200,000 characters, of "
            "prose and of the hostile text that takes longest. “×” is a peer's time over ours on the short ones, in "
            "turn; all verdicts compared were the same. Below 1 a check is a line or two, and what a call of "
            "`verify_all` takes by itself decides. What langdetect said of a text is not remembered from one call to "
            f"the next here. {step_table.source(document)}; {document['machine']}; {versions}.",
        ]
    )


def _rule_sets(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| rules, types | short, µs: median, most | long prose, ms: median, most | hostile, ms: median, most |",
        "|---|---|---|---|",
    ]
    for rules in dict.fromkeys(row["rules"] for row in rows):
        own = [row for row in rows if row["rules"] == rules]
        columns = (
            [1e3 * row["strict"]["ms"]["ours"] for row in own],
            [row["long_ms"]["prose"] for row in own],
            [row["long_ms"]["hostile"] for row in own],
        )
        cells = [f"{_short(statistics.median(column))}, {_short(max(column))}" for column in columns]
        lines.append(f"| `{rules}`, {len(own)} | {' | '.join(cells)} |")
    return lines


def _short(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _types(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| type | short, µs | × lm-eval | × open-instruct | long prose, ms | hostile, ms | text |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = row["strict"].get("x", {})
        peers = [_short(times[name]) if name in times else "–" for name in ("lm_eval", "open_instruct")]
        long = row["long_ms"]
        text = long["hostile_text"].replace("|", "\\|")
        cells = [1e3 * row["strict"]["ms"]["ours"], *peers, long["prose"], long["hostile"]]
        shown = " | ".join(cell if isinstance(cell, str) else _short(cell) for cell in cells)
        lines.append(f"| `{row['type']}` | {shown} | `{text}` |")
    return lines
