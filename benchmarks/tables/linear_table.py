"""Tables and the plot of the benchmarks on hidden states and a head, from their result files; used by `readme.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pictures
from speed_table import RESULTS, missing, origin

OPS = {"linear_token_loss": "objective, forward + gradients", "linear_logprobs": "log-probs"}
# What a GPU result at 8192 tokens is held against.
TARGETS = {"trained": 1.15, "frozen": 1.2, "scoring": 1.2}
COUNTS = RESULTS / "compiled" / "linear_counts.json"
PEERS = {"logits": "× logits", "liger": "× Liger", "liger logits": "× logits + Liger", "trl": "× TRL"}


def load(folder: Path) -> dict[str, dict[str, Any]]:
    paths = {op: folder / f"{op}.json" for op in OPS}
    return {op: json.loads(path.read_text(encoding="utf-8")) for op, path in paths.items() if path.exists()}


def table(op: str, rows: list[dict[str, Any]], gpu: bool) -> list[str]:
    """A line per case that has a time of ours."""
    measured = [(row, row["candidates"].get(own_name(row), {})) for row in rows]
    names = list(dict.fromkeys(row["case"] for row in rows))
    measured.sort(key=lambda pair: (names.index(pair[0]["case"]), pair[0]["vocab"], pair[0]["tokens"]))
    measured = [(row, ours) for row, ours in measured if "ms" in ours]
    used = {n: head for n, head in PEERS.items() if any("ms" in r["candidates"].get(n, {}) for r, _ in measured)}
    if not measured:
        return []
    heads = [OPS[op], "T", "V", "D", "ms", "× matmuls alone", "TFLOP/s", "peak MB", *used.values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row, ours in measured:
        target = f" (≤ {TARGETS[row['case']]})" if gpu and row["case"] in TARGETS and row["tokens"] == 8192 else ""
        cells = [row["case"], row["tokens"], row["vocab"], row["width"], f"{ours['ms']:.4g}"]
        cells += [
            f"{ours.get('x_matmuls', float('nan')):.2f}{target}",
            f"{ours['tflop_s']:.3g}",
            f"{ours['peak_mb']:.0f}",
        ]
        for name in used:
            other = row["candidates"].get(name, {})
            cells.append(f"{other['ms'] / ours['ms']:.2f} ({other['peak_mb']:.0f} MB)" if "ms" in other else "–")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def own_name(row: dict[str, Any]) -> str:
    """The backend that `auto` takes, by its own name."""
    return "torch" if row["auto"] == "reference" else row["auto"]


def prediction() -> list[str]:
    """What the counts say of a GPU that has not been measured."""
    document = json.loads(COUNTS.read_text(encoding="utf-8"))
    shape, chunk, assumed = document["shape"], document["chunk"], document["assumed"]
    lines = [
        "| case | matmuls | kernels | other small launches, at most | matmuls alone, ms | predicted, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in document["cases"].items():
        kernels = ", ".join(f"{n} {k}" for k, n in case["kernels"].items())
        ms = case["predicted_ms"]
        low, high = f"{ms['sums_hidden']:.1f}", f"{ms['nothing_hidden']:.1f}"
        lines.append(
            f"| {name} | {case['matmuls']:.0f} | {kernels} | {case['other_launches_at_most']} | {ms['matmuls']:.1f} "
            f"| {low if low == high else f'{low} to {high}'} |"
        )
    return [
        *lines,
        "",
        f"Counted, and predicted by arithmetic, not measured: T = {shape['tokens']}, V = {shape['vocab']}, D = "
        f"{shape['width']} in {chunk['chunks']} chunks of {chunk['rows']} rows, bf16, at {assumed['matmul_tflop_s']} "
        f"TFLOP/s of matmul and {assumed['copy_tb_s']} TB/s of copy, about what one H200 reaches. The passes of the "
        "row kernels and the rounding of d weight are taken to hide behind nothing; where there are two numbers, the "
        f"float32 sums of d weight hide behind its matmul, or do not. `{document['command']}`; torch "
        f"{document['versions']['torch']}, triton {document['versions']['triton']}.",
        "",
    ]


def section() -> str:
    """Every device that has results, GPUs first."""
    folders = sorted({p.parent for op in OPS for p in RESULTS.glob(f"*/{op}.json")}, key=lambda f: (f.name == "cpu", f))
    lines: list[str] = []
    if not any(folder.name != "cpu" for folder in folders):
        lines += ["No GPU has been measured yet.", "", *prediction()]
    for folder in folders:
        documents, gpu = load(folder), folder.name != "cpu"
        lines += [f"**{folder.name if gpu else 'CPU'}.**", ""]
        for op, document in documents.items():
            lines += table(op, document["results"], gpu)
        if (folder / "linear.png").exists():
            lines += [
                pictures.picture(
                    f"Time and memory over T on {folder.name}", f"benchmarks/results/{folder.name}/linear.png"
                ),
                "",
            ]
        lines += [text for text in (missing(documents),) if text]
        first = next(iter(documents.values()))
        lines += [
            "“× peer” is the peer's time over ours, in brackets the peer's peak; peaks are what a call allocates, its "
            "gradients included. “–” not measured, the reason is in the result file. Every candidate was verified "
            "against float32 logits before. " + origin(first),
            "",
        ]
    return "\n".join(lines).strip()


def plot(folder: Path) -> None:
    """linear.png and linear-dark.png beside the result file: time and peak memory over T with a trained head."""
    document = load(folder).get("linear_token_loss")
    rows = [r for r in document["results"] if r["case"] == "trained"] if document else []
    sizes = [(r["vocab"], r["width"]) for r in rows]
    rows = [r for r in rows if (r["vocab"], r["width"]) == max(sizes, key=sizes.count)]
    rows = sorted((r for r in rows if "ms" in r["candidates"][own_name(r)]), key=lambda r: r["tokens"])
    if document is None or len(rows) < 2:
        return
    ours, bound = "ours", "matmuls alone"
    labels = {
        own_name(rows[0]): ours,
        "logits": "through the logits",
        "liger": "Liger",
        "liger logits": "the logits and Liger",
        "trl": "TRL",
        "matmuls": bound,
    }
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {"ms": {}, "peak_mb": {}}
    for name, label in labels.items():
        entries = [(r["tokens"], r["candidates"].get(name, {})) for r in rows]
        entries = [(t, e) for t, e in entries if "ms" in e]
        for unit, found in curves.items():
            if entries and (unit, label) != ("peak_mb", bound):
                found[label] = ([t for t, _ in entries], [e[unit] for _, e in entries])

    def draw(figure: Any, style: pictures.Style) -> None:
        titles = ("Time, ms", "Peak memory with the gradients, MB")
        for ax, found, title in zip(figure.subplots(1, 2), curves.values(), titles, strict=True):
            style.lines(ax, found, {ours}, bound)
            ax.set_title(title, loc="left", fontsize=9)

    row, machine = rows[0], "CPU" if document["device"] == "cpu" else document["device"].upper()
    title = (
        f"Loss and its gradients from hidden states, trained head: vocabulary of {row['vocab']:,}, width "
        f"{row['width']:,}, {row['dtype']}, {machine}"
    )
    pictures.save(folder, "linear", (9.4, 3.5), title, draw)


def plot_all() -> None:
    for path in RESULTS.glob("*/linear_token_loss.json"):
        plot(path.parent)
