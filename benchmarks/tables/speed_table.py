"""Tables and the plot of the operation benchmarks, from their result files.

`python benchmarks/tables/speed_table.py` prints all results of this machine's device (or of the folder given as
argument); `--folder` prints that folder's path. `readme.py` takes the README's section and the plot from here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pictures

RESULTS = Path(__file__).resolve().parents[1] / "results"
COMPILED = RESULTS / "compiled" / "kernel_resources.json"
HOPPER = RESULTS / "compiled" / "cuda_resources.json"
OPS = ("token_loss", "logprobs", "advantages")
LINEAR_OPS = ("linear_token_loss", "linear_logprobs")  # their tables: linear_table.py
# What a GPU result is held against, at 8192 tokens of bf16: shown in the headings.
COLUMNS = {
    "ms": "ms",
    "gb_s": "GB/s",
    "percent_of_copy": "% of copy",
    "in_place": "in place, ms (% of copy)",
    "reference": "× reference",
    "compile": "× compile",
    "liger": "× Liger",
    "trl": "× TRL",
    "flash_attn": "× flash-attn",
    "peak": "peak / logits",
}
TARGETS = {
    "percent_of_copy": "≥ 85",
    "reference": "≥ 10",
    "compile": "≥ 2.5",
    "liger": "≥ 1",
    "peak": "≤ 1, in place 0",
}
# The picture's words for the candidates.
LABELS = {
    "reference": "plain PyTorch",
    "compile": "torch.compile",
    "liger": "Liger",
    "trl": "TRL",
    "flash_attn": "flash-attn",
    "triton": "ours, Triton",
    "triton in place": "ours, Triton, over the logits",
    "cpu": "ours, C++",
    "cpu in place": "ours, C++, over the logits",
    "cuda": "ours, CUDA for Hopper",
    "cuda in place": "ours, CUDA, over the logits",
    "copy": "a mere copy of the logits",
}
# Reads and writes of the whole logits by one launch, at the least.
PASSES = {"token_loss": (1, 1), "logprobs": (1, 0), "logprobs_backward": (1, 1), "scale": (1, 1)}
FLOOR_TOKENS, FLOOR_VOCAB, FLOOR_TB_S = 8192, 128256, 4.3


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """op -> its result file, for those that are there."""
    paths = {op: folder / f"{op}.json" for op in ("roofline", *OPS, *LINEAR_OPS)}
    return {op: json.loads(path.read_text(encoding="utf-8")) for op, path in paths.items() if path.exists()}


def gpu_folders() -> list[Path]:
    return sorted(p.parent for p in RESULTS.glob("*/token_loss.json") if p.parent.name != "cpu")


# ---- one row --------------------------------------------------------------------------------------------------------


def figures(row: dict[str, Any]) -> dict[str, str]:
    """Column -> text, of the candidate that `auto` takes; ratios above 1 mean that it is faster."""
    entries = row["candidates"]
    ours = entries.get(row["auto"], {})
    if "ms" not in ours:
        return {}
    found = {k: f"{ours[k]:.4g}" for k in ("ms", "gb_s") if k in ours}
    if "percent_of_copy" in ours:
        found["percent_of_copy"] = f"{ours['percent_of_copy']:.0f}"
    for name in ("reference", "compile", "liger", "trl", "flash_attn"):
        other = entries.get(name, {})
        if name != row["auto"] and "ms" in other:
            found[name] = f"{other['ms'] / ours['ms']:.2f}"
    in_place = entries.get(f"{row['auto']} in place", {})
    if "ms" in in_place:
        found["in_place"] = f"{in_place['ms']:.4g} ({in_place['percent_of_copy']:.0f})"
    if "peak_over_logits" in ours:
        found["peak"] = f"{ours['peak_over_logits']:.2f}"
        if "peak_over_logits" in in_place:
            found["peak"] += f", in place {in_place['peak_over_logits']:.2f}"
    return found


def markdown(rows: list[dict[str, Any]], title: str, targets: bool) -> list[str]:
    """Of the rows that have numbers, with the columns that any of them has."""
    measured = [(row, figures(row)) for row in rows]
    measured = [(row, f) for row, f in measured if f]
    used = [c for c in COLUMNS if any(c in f for _, f in measured)]
    if not measured:
        return []
    heads = [COLUMNS[c] + (f" ({TARGETS[c]})" if targets and c in TARGETS else "") for c in used]
    lines = [f"| {title} | T | V | " + " | ".join(heads) + " |", "|---|---|---|" + "---|" * len(used)]
    lines += [
        f"| {row['case']} | {row['tokens']} | {row['vocab']} | " + " | ".join(f.get(c, "–") for c in used) + " |"
        for row, f in measured
    ]
    return [*lines, ""]


# ---- the README's section -------------------------------------------------------------------------------------------


def commit(document: dict[str, Any]) -> str:
    name, _, more = document["commit"].partition(" ")
    return f"{name[:10]} {more}".strip()


def origin(document: dict[str, Any]) -> str:
    shown = ("torch", "triton", "liger_kernel", "trl", "flash_attn")
    found = ", ".join(f"{n} {document['versions'][n]}" for n in shown if n in document["versions"])
    return f"`{document['command']}` at {commit(document)}; {document['machine']}; {found}."


def missing(documents: dict[str, dict[str, Any]]) -> str:
    """What failed, so that a table does not hide it by leaving it out."""
    failed = [
        f"{document['op']} {row['case']} {row.get('tokens', '')}x{row.get('vocab', '')}, {name}: {entry['failed']}"
        for document in documents.values()
        for row in document.get("results", [])
        for name, entry in row["candidates"].items()
        if "failed" in entry
    ]
    return "Failed: " + "; ".join(failed) + "." if failed else ""


def of_device(folder: Path) -> list[str]:
    documents, name = load(folder), folder.name
    rows = {op: documents[op]["results"] if op in documents else [] for op in OPS}
    gpu = name != "cpu"
    lines = [f"**{name if gpu else 'CPU'}.**"]
    if "roofline" in documents:
        ceiling = documents["roofline"]
        lines[0] += f" Measured ceilings: copy {ceiling['copy_gb_s']:.4g} GB/s, read and written"
        lines[0] += f"; bf16 matmul {ceiling['matmul_tflop_s']:.4g} TFLOP/s." if "matmul_tflop_s" in ceiling else "."
    lines += ["", *markdown(rows["token_loss"], "objective, forward + gradient", gpu)]
    lines += markdown(rows["logprobs"], "log-probs", False)
    inside = [row for row in rows["advantages"] if "share_percent" in row]
    for row in inside:
        lines.append(
            f"Advantages from rewards inside the objective, T = {row['tokens']}, V = {row['vocab']}: "
            f"{row['share_percent']:+.2f} % of the launch (calls scatter by {row['scatter_percent']:.1f} %"
            + ("; target: under 2 %)." if gpu else ").")
        )
    lines += [""] if inside else []
    if gpu:
        lines += [*against_prediction(rows["token_loss"]), *profiled(folder)]
    if (folder / "speed.png").exists():
        lines += [pictures.picture(f"Speed on {name}", f"benchmarks/results/{name}/speed.png"), ""]
    lines += [text for text in (missing({op: documents[op] for op in OPS if op in documents}),) if text]
    first = next((documents[op] for op in OPS if op in documents), None)
    if first is not None:
        kind = "of the GPU alone, from cold caches" if gpu else "wall-clock"
        lines.append(
            f"Times are {kind}, medians of calls in turn; every candidate was verified against the reference before. "
            "“× peer” is the peer's time over ours, “–” not measured, the reason is in the result file. “% of copy” "
            "of the objective: of a copy into memory that is there, measured in turn. " + origin(first)
        )
    return lines


def profiled(folder: Path) -> list[str]:
    """What the profiler counted in the row kernels, and each tile's time, where `gpu_logs.py` made files of them."""
    lines: list[str] = []
    if (folder / "counters.json").exists():
        document = json.loads((folder / "counters.json").read_text(encoding="utf-8"))
        lines += [
            "| one launch, bf16, on-policy | T | V | µs | % of copy | moved / needed, GB | memory, TB/s | L2 hits, % "
            "| instructions per logit | multiprocessors busy, % |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for k in document["kernels"]:
            name = f"Triton, tile {k['tile']}" if k["tile"] else "Hopper kernel"
            lines.append(
                f"| {name} | {k['rows']} | {k['vocab']} | {k['us']:.0f} | {k['percent_of_copy']:.0f} "
                f"| {k['gb_moved']:.2f} / {k['gb_needed']:.2f} | {k['dram_tb_s']:.2f} | {k['l2_hit_percent']:.0f} "
                f"| {k['instructions_per_logit']:.1f} | {k['sm_percent']:.0f} |"
            )
        lines += [
            "",
            f"Counted by ncu from cold caches at {commit(document)}; a tile is block/warps/stages/programs.",
            "",
        ]
    if (folder / "tile_times.json").exists():
        document = json.loads((folder / "tile_times.json").read_text(encoding="utf-8"))
        for entry in document["vocabularies"]:
            best = sorted(entry["tiles"].items(), key=lambda x: x[1]["ms"])
            each = ", ".join(f"{tile} {x['percent_of_copy']:.0f} %" for tile, x in best)
            lines.append(f"Triton's tiles at V = {entry['vocab']}, T = {entry['rows']}, in % of a copy: {each}.")
        lines += [f"Caches warm, small launches included, at {commit(document)}.", ""]
    return lines


def against_prediction(rows: list[dict[str, Any]]) -> list[str]:
    """The prediction of the compiled code beside what was measured at the same size."""
    measured = [r for r in rows if (r["case"], r["tokens"], r["vocab"]) == ("on-policy", FLOOR_TOKENS, FLOOR_VOCAB)]
    if not measured or "triton" not in measured[0]["candidates"] or not COMPILED.exists():
        return []
    size = FLOOR_TOKENS * FLOOR_VOCAB * 2
    predicted, third = (n * size / FLOOR_TB_S / 1e9 for n in (2, 3))
    found = {n: e["ms"] for n, e in measured[0]["candidates"].items() if n in ("triton", "cuda") and "ms" in e}
    said = " and ".join(f"{ms:.2f} ms ({n})" for n, ms in found.items())
    return [
        f"Predicted from the compiled code: {predicted:.2f} ms, one read and one write at {FLOOR_TB_S} TB/s; measured "
        f"{said}; three passes would take {third:.2f} ms.",
        "",
    ]


def compiled() -> list[str]:
    """What the compiled kernels say where no GPU has been measured."""
    if not COMPILED.exists():
        return []
    document = json.loads(COMPILED.read_text(encoding="utf-8"))
    size = FLOOR_TOKENS * FLOOR_VOCAB * 2
    lines = [
        "What the code compiled for sm_90 says (bf16, V = 128256):",
        "",
        "| kernel | case | registers | spilled, B | shared, B | occupancy | 128-bit loads | 128-bit stores | moved, GB "
        "| predicted, ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for k in document["kernels"]:
        if k["sm"] != 90 or "bfloat16" not in k["case"] or f"V={FLOOR_VOCAB}" not in k["case"]:
            continue
        # With its gradient in the same launch, log-probs write too.
        passes = 2 if "unit gradient" in k["case"] else sum(PASSES.get(k["kernel"], (0, 0)))
        if not passes:  # no logits pass through it
            continue
        bytes_moved = passes * size
        wide = [f"{k[x].get('128', 0)} of {sum(k[x].values())}" for x in ("loads", "stores")]
        case = k["case"].split(", ", 1)[-1]
        lines.append(
            f"| {k['kernel']} | {case} | {k['registers']} | {k['spilled']} | {k['shared']} | {k['occupancy']:.0%} "
            f"| {wide[0]} | {wide[1]} | {bytes_moved / 1e9:.1f} | {bytes_moved / FLOOR_TB_S / 1e9:.2f} |"
        )
    found = ", ".join(f"{n} {v}" for n, v in document["versions"].items())
    lines += [
        "",
        f"Predicted is arithmetic, not a measurement: T = {FLOOR_TOKENS} rows read once and written once, over "
        f"{FLOOR_TB_S} TB/s, about what a copy reaches on an H200. The gradient's second look at a row is taken to hit "
        "a cache, and costs up to half as much again where it does not. Off-policy at sequence level is the sum of its "
        "two lines. Loads and stores that are not 128 bits wide are of single numbers of a row. The small kernels "
        f"around them have no spills either. `python benchmarks/compiled/kernel_resources.py`; {found}.",
    ]
    return lines


def hopper() -> list[str]:
    """What csrc/cuda compiles to, in one paragraph."""
    document = json.loads(HOPPER.read_text(encoding="utf-8"))
    kernels = document["kernels"]
    registers = [k["registers"] for k in kernels]
    spilled = sum(k["spilled"] + k["local"] for k in kernels)
    where = " and ".join(f"sm_{sm}" for sm in dict.fromkeys(k["sm"] for k in kernels))
    return [
        f"The Hopper kernel, not measured on a GPU either: {len(kernels)} variants for {where}, {min(registers)} to "
        f"{max(registers)} registers, {spilled} bytes spilled or in local memory, logits read by bulk copies alone. "
        f"`{document['command']}`; nvcc {document['nvcc']}."
    ]


def section() -> str:
    """Every device measured; without a GPU among them, that, and what can be said without one."""
    folders = gpu_folders()
    parts = [of_device(folder) for folder in folders]
    if not folders:
        parts.append(["No GPU has been measured yet."])
        parts += [compiled(), hopper()]
    if (RESULTS / "cpu" / "token_loss.json").exists():
        parts.append(of_device(RESULTS / "cpu"))
    return "\n\n".join("\n".join(p).strip() for p in parts if p)


# ---- the plot -------------------------------------------------------------------------------------------------------


def plot(folder: Path) -> None:
    """speed.png and speed-dark.png beside the result files: times over T where there are several, else bars."""
    document = load(folder).get("token_loss")
    rows = [r for r in document["results"] if r["case"] == "on-policy"] if document else []
    rows = [r for r in rows if any("ms" in e for e in r["candidates"].values())]
    if document is None or not rows:
        return
    sizes = [r["vocab"] for r in rows]
    vocab = max(sizes, key=sizes.count)
    rows = sorted((r for r in rows if r["vocab"] == vocab), key=lambda r: r["tokens"])
    curves = {}
    for name, label in LABELS.items():
        found = [(r["tokens"], r["candidates"].get(name, {})) for r in rows]
        found = [(t, e["ms"]) for t, e in found if "ms" in e]
        if found:
            curves[label] = ([t for t, _ in found], [ms for _, ms in found])
    ours = {label for label in curves if label.startswith("ours")}

    def draw(figure: Any, style: pictures.Style) -> None:
        ax = figure.subplots()
        if len(rows) > 1:
            style.lines(ax, curves, ours, LABELS["copy"])
            ax.set_ylabel("ms")
        else:
            style.bars(ax, {label: ms for label, (_, (ms,)) in curves.items()}, ours, LABELS["copy"], "ms")

    tokens = f"{rows[0]['tokens']:,} tokens, " if len(rows) == 1 else ""
    machine = "CPU" if document["device"] == "cpu" else document["device"].upper()
    title = f"Loss and its gradient, on-policy: {tokens}vocabulary of {vocab:,}, {rows[0]['dtype']}, {machine}"
    pictures.save(folder, "speed", (7.6, 3.6 if len(rows) > 1 else 0.7 + 0.29 * len(curves)), title, draw)


def plot_all() -> None:
    for path in RESULTS.glob("*/token_loss.json"):
        plot(path.parent)


# ---- the terminal's table -------------------------------------------------------------------------------------------


def text(folder: Path) -> str:
    """Short: a line per case, ms of each candidate, then why the others have none."""
    lines, reasons = [], {}
    documents = load(folder)
    for op, document in documents.items():
        if op == "roofline":
            lines.append(f"copy {document['copy_gb_s']:.4g} GB/s, matmul {document.get('matmul_tflop_s', '-')} TFLOP/s")
            continue
        lines.append(f"{op} at {commit(document)}, ms")
        for row in document["results"]:
            size = f"{row['tokens']}x{row['vocab']}" if "tokens" in row else f"{row['prompts']}x{row['group']}"
            times = [f"{n} {e['ms']:.4g}" for n, e in row["candidates"].items() if "ms" in e]
            f = figures(row)
            extra = f"  {f['percent_of_copy']} % of copy, peak {f.get('peak', '-')}" if "percent_of_copy" in f else ""
            bare = [f"{n} {e['x_matmuls']:.2f}" for n, e in row["candidates"].items() if "x_matmuls" in e]
            extra = f"  x matmuls: {'  '.join(bare)}" if bare else extra
            if "share_percent" in row:
                extra = f"  share {row['share_percent']:+.2f} %, scatter {row['scatter_percent']:.1f} %"
            lines.append(f"  {row['case']:10} {size:13} {'  '.join(times)}{extra}")
            for name, entry in row["candidates"].items():
                for kind in ("skipped", "failed"):
                    if kind in entry:
                        reasons.setdefault((kind, name, entry[kind]), []).append(f"{op} {row['case']} {size}")
    for (kind, name, reason), where in sorted(reasons.items()):
        lines.append(
            f"{kind} {len(where)}x {name}: {reason[:160]}" + (f" ({', '.join(where)})" if kind == "failed" else "")
        )
    return "\n".join(lines)


def main() -> int:
    from harness import results_folder

    arguments = sys.argv[1:]
    if arguments == ["--folder"]:
        print(results_folder())
        return 0
    print(text(Path(arguments[0]) if arguments else results_folder()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
