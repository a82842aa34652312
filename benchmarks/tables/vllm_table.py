"""How fast vLLM generates, and what sampling a step ahead gains, from their result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import step_table

RESULTS = Path(__file__).resolve().parents[1] / "results" / "cpu"


def ahead() -> str:
    study = json.loads((RESULTS / "async_rollout.json").read_text(encoding="utf-8"))
    lines = [
        "| `--async-rollout` | seconds a step | sampling | wait for it | weights | other work | HSR after | "
        "effective sample size, τ = 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in (0, 1):
        runs = [r for r in study["runs"] if r["async_rollout"] == way]
        seconds = {k: middle([r["seconds"][k] for r in runs]) for k in runs[0]["seconds"]}
        columns = [f"{seconds[k]:.2f}" for k in ("step", "sampling", "wait", "sync", "work")]
        hsr = [r["hsr_after"] for r in runs]
        near = min(runs[0]["ess"], key=lambda tau: abs(float(tau) - 1))
        ess = middle([x for r in runs for x in r["ess"][near] if x is not None])
        lines.append(f"| {way} | {' | '.join(columns)} | {min(hsr):.3f} to {max(hsr):.3f} | {ess:.3f} |")
    summary = study["summary"]
    lines += [
        "",
        f"Medians over {len(study['runs']) // 2} seeds each, in turn; {study['runs'][0]['steps']} steps of the "
        "embedded demonstration with `--temperature-objective corrected`, the server on one core and the trainer on "
        f"the other. A step ahead takes {summary['ahead_over_at_once']:.2f} of one at once; overlap allows "
        f"{summary['allowed_over_at_once']:.2f}. {study['server']['vllm']}. {step_table.source(study)}; "
        f"{study['machine']}.",
    ]
    return "\n".join(lines)


def generation() -> str:
    document = json.loads((RESULTS / "generate_vllm.json").read_text(encoding="utf-8"))
    lines = ["| generation | tokens/s | × separate calls |", "|---|---|---|"]
    for row in document["results"]:
        for way, entry in row["candidates"].items():
            where = (
                f"{step_table.WAYS[way]}, {row['parameters'] / 1e6:.0f}M, {row['prompt']} + {row['completion']} tokens"
            )
            lines.append(f"| {where} | {entry['tokens_per_second']:.0f} | {entry['x_separate']:.1f} |")
    return "\n".join([*lines, "", f"In turn, in one process. {step_table.source(document)}; {document['machine']}."])


def middle(values: list[Any]) -> float:
    return float(sorted(values)[len(values) // 2])
