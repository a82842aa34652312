"""What every loss makes of the embedded demonstration, from benchmarks/results/cpu/losses.json."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import step_table

RESULT = Path(__file__).resolve().parents[1] / "results" / "cpu" / "losses.json"
# What each is good for, in one line.
GOOD_FOR = {
    "ppo_clip": "the default; near on-policy all others come to it",
    "ppo_clip, sequence (GSPO)": "mixtures of experts and long completions, where single tokens' ratios are noise",
    "cispo": "rare tokens that a clip would drop: every token keeps a gradient",
    "sapo": "a clip without an edge: tokens fade out of the gradient by how far off-policy they are",
    "gmpo": "outliers among a completion's ratios, which a geometric mean damps; wide clip ranges",
    "luspo": "GSPO where long completions are to count by their length",
    "vespo": "old samples: whole completions fade out of the gradient, both ways",
}


def section() -> str:
    document = json.loads(RESULT.read_text(encoding="utf-8"))
    variants: dict[str, list[dict[str, Any]]] = {}
    for run in document["runs"]:
        variants.setdefault(run["variant"], []).append(run)
    lines = ["| loss | HSR before | HSR after (range) | SSR after | largest ratio | entropy | good for |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, runs in variants.items():
        after = [r["hsr_after"] for r in runs]
        lines.append(
            f"| {name} | {fmean([r['hsr_before'] for r in runs]):.3f} | {fmean(after):.3f} ({min(after):.3f} to "
            f"{max(after):.3f}) | {fmean([r['ssr_after'] for r in runs]):.3f} "
            f"| {fmean([r['ratio_max'][1] for r in runs]):.2f} | {fmean([r['entropy'][1] for r in runs]):.2f} "
            f"| {GOOD_FOR[name]} |"
        )
    seeds, steps = len({r["seed"] for r in document["runs"]}), document["runs"][0]["steps"]
    versions = ", ".join(f"{k} {v}" for k, v in document["versions"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"The embedded demonstration, {steps} steps of four updates each (two passes over a batch in two "
            f"mini-batches), {seeds} seeds; advantages, learning rate and KL are those of `--preset exact`, which was "
            "chosen for none of them: that all learn is what the table shows, not which is best. Largest ratio and "
            "entropy: means over the last tenth of the steps; vespo's ratio is a token's. "
            f"{step_table.source(document)}; {document['machine']}; {versions}.",
        ]
    )
