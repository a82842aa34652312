"""The README's tables of a whole step: against TRL, generation, packing, and the demonstration with and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
WAYS = {
    "separate": "`model.generate` once per temperature, as the released code",
    "one_call": "`model.generate` once, all rows",
    "static": "the same, static cache",
    "ours_plain": "ours, PyTorch's linear layers",
    "ours": "ours",
    "vllm": "vLLM for CPUs, in this process",
}
STEP_WAYS = {
    "trl": "TRL {trl}",
    "trl_kernels": "TRL, our kernels",
    "trl_packed": "TRL, our kernels, packed",
    "ours": "ours",
}
STEP_NOTES = {
    "trl_kernels": "Our kernels in TRL are `accelerate_trl`; ",
    "trl_packed": "packed, `MDPGRPOTrainer` without the method's components, which keeps a group together in a pass; ",
}


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def source(document: dict[str, Any]) -> str:
    """The recorded command and its commit; and where the script is now, if it has moved since."""
    text = f"`{document['command']}` at {document['commit'][:10]}"
    for word in document["command"].split():
        if word.startswith("benchmarks/") and word.endswith(".py") and not (ROOT / word).exists():
            moved = next((ROOT / "benchmarks").rglob(Path(word).name))
            text += f" (now `{moved.relative_to(ROOT)}`)"
    return text


def _step(name: str) -> list[str]:
    document = _read(name)
    names = ("generate", "reference", "forward", "backward", "optimizer", "other")
    lines = ["| case | seconds | whole step | " + " | ".join(names) + " | peak MB |", "|---" * (len(names) + 4) + "|"]
    for case in document["results"]:
        for who, step in case["steps"].items():
            stages = [step["stages"].get(n, {"seconds": 0}) for n in names]
            cells = [f"{x['seconds']:.2f} ({x['share']:.0%})" if x["seconds"] else "" for x in stages]
            label = f"{case['case']} | {STEP_WAYS[who].format(**document['versions'])}"
            total, ratio = f"{step['seconds']:.2f}", case["steps"]["trl"]["seconds"] / step["seconds"]
            total = total if who == "trl" else f"**{total}, {ratio:.1f} ×**"
            lines.append(f"| {label} | {total} | {' | '.join(cells)} | {step['peak_mb']:.0f} |")
    size = document["size"]
    return [
        *lines,
        "",
        f"One step of {size['prompts']} prompts of {size['prompt_length']} tokens, G = {size['generations']}, "
        f"{size['completion_length']} new tokens each, with a Llama of {size['parameters'] / 1e6:.0f}M parameters "
        f"in float32, V = {size['vocab']}, on {document['machine']}; medians of steps taken in turn, and the share of "
        f"each stage; with our kernels the head's gradients are made in the forward pass. "
        f"{''.join(note for way, note in STEP_NOTES.items() if way in document['results'][0]['steps'])}"
        f"TRL's passes have {size['micro_batch']} completions, ours all of the step, packed; TRL without gradient "
        f"checkpointing, which is faster. {source(document)}.",
    ]


def _generation() -> list[str]:
    document = _read("generate")
    lines = ["| generation | tokens/s | × separate calls |", "|---|---|---|"]
    for row in document["results"]:
        for way, label in WAYS.items():
            if (entry := row["candidates"].get(way)) is None:
                continue
            where = f"{label}, {row['parameters'] / 1e6:.0f}M, {row['prompt']} + {row['completion']} tokens"
            lines.append(f"| {where} | {entry['tokens_per_second']:.0f} | {entry['x_separate']:.1f} |")
    return [
        *lines,
        "",
        f"G = {document['results'][0]['group']}, a call for each, at four temperatures. {source(document)}.",
    ]


def _packing() -> list[str]:
    document = _read("packing")
    lines = [
        "| V | prompt + completion | padded ms | packed ms | time | kept for the backward pass |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["cases"]:
        lines.append(
            f"| {row['vocabulary']} | {row['prompt']} + {row['completion']} | {row['padded']['ms']:.0f} "
            f"| {row['packed']['ms']:.0f} | **{row['time_ratio']:.2f} ×** "
            f"| {row['padded']['kept_mb']:.0f} → {row['packed']['kept_mb']:.0f} MB, {row['kept_ratio']:.2f} × |"
        )
    return [
        *lines,
        "",
        "Reference log-probs, forward and backward pass of one group of eight. Half of the model's weights are in the "
        "head at V = 32000, which packing does not touch, and a fifth at V = 8192, as in a model of a billion. "
        f"{source(document)}.",
    ]


def _demonstration() -> list[str]:
    document = _read("optimizations")
    lines = [
        "| optimisations | seed | HSR before → after | SSR after | seconds | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for run in document["runs"]:
        lines.append(
            f"| {run['optimizations']} | {run['seed']} | {run['hsr_before']:.3f} → {run['hsr_after']:.3f} "
            f"| {run['ssr_after']:.3f} | {run['train_seconds']:.0f} | {run['peak_memory_mb']:.0f} |"
        )
    off = " ".join(document["flags_off"])
    return [*lines, "", f"The embedded demonstration, one thread per run; off: `{off}`. {source(document)}."]


def section() -> str:
    return "\n".join([*_step("step"), "", *_generation(), "", *_packing(), "", *_demonstration()])


def ways() -> str:
    """A step of TRL, with and without our kernels, and of ours."""
    return "\n".join(_step("step_ways"))
