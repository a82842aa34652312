"""CPU seconds to an answer of the command line, from benchmarks/results/cpu/start.json."""

from __future__ import annotations

import json
from pathlib import Path

import step_table

RESULT = Path(__file__).resolve().parents[1] / "results" / "cpu" / "start.json"


def section() -> str:
    document = json.loads(RESULT.read_text(encoding="utf-8"))
    versions = ", ".join(f"{k} {v}" for k, v in document["versions"].items() if v != "not installed")
    return "\n".join(
        [
            "| command | CPU seconds |",
            "|---|---|",
            *(f"| {row['command']} | {row['cpu_seconds']:.2f} |" for row in document["rows"]),
            "",
            f"User and system time of a fresh process, medians of {document['rounds']} rounds in turn. "
            f"{step_table.source(document)}; {document['machine']}; {versions}.",
        ]
    )
