"""What the logs of `gpu.sh` say of the row kernels, as result files: the profiler's counters, and every tile's time.

    python benchmarks/tables/gpu_logs.py counters counters.log FOLDER   # ncu over compiled/profiled_rows.py
    python benchmarks/tables/gpu_logs.py tiles warm.log FOLDER          # warm.py

write FOLDER/counters.json and FOLDER/tile_times.json. BENCH_COMMIT names the commit that was measured; percentages are
of the copy in FOLDER/roofline.json, for one read and one write of the logits.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HEAD = ("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
METRICS = {  # ncu's name -> ours
    "Duration": "us",
    "Memory Throughput Tbyte/s": "dram_tb_s",
    "L2 Hit Rate": "l2_hit_percent",
    "Compute (SM) Throughput": "sm_percent",
    "Executed Instructions": "instructions",
    "Registers Per Thread": "registers",
    "Achieved Occupancy": "occupancy_percent",
}


def rounded(x: float) -> float:
    return float(f"{x:.4g}")


def percent_of_copy(n_bytes: int, us: float, copy_gb_s: float) -> float:
    return rounded(100 * n_bytes / us / 1e3 / copy_gb_s)


def counters(text: str, copy_gb_s: float) -> list[dict[str, Any]]:
    """One entry per profiled launch, in the order in which profiled_rows.py says what it launched."""
    launched = re.findall(r"^(triton|cuda) (\d+)(?: Tile\(([^)]*)\))? (\d+) rows$", text, re.M)
    sections = re.split(r"^  \S.*token_loss_kernel.*Context \d+.*$", text, flags=re.M)[1:]
    if len(launched) != len(sections) or not sections:
        raise SystemExit(f"gpu_logs.py: {len(launched)} launches are named and {len(sections)} profiled")
    found = []
    for (backend, vocab, tile, rows), section in zip(launched, sections, strict=True):
        values = {}
        for name, unit, value in re.findall(r"^ {4}(\S.*?) {2,}(\S+)? {2,}([\d.,]+)$", section, re.M):
            for key in (name, f"{name} {unit}"):
                if key in METRICS:
                    values[METRICS[key]] = float(value.replace(",", ""))
        n = int(vocab) * int(rows)
        values["instructions_per_logit"] = rounded(32 * values.pop("instructions") / n)
        values["gb_moved"] = rounded(values["dram_tb_s"] * values["us"] / 1e3)
        values["gb_needed"] = rounded(4 * n / 1e9)
        values["percent_of_copy"] = percent_of_copy(4 * n, values["us"], copy_gb_s)
        numbers = "/".join(re.findall(r"=(\d+)", tile))
        found.append({"backend": backend, "vocab": int(vocab), "rows": int(rows), "tile": numbers or None, **values})
    return found


def tiles(text: str, copy_gb_s: float, multiprocessors: int) -> list[dict[str, Any]]:
    """Every candidate's time on the scratch rows of `tuning`, small launches included, and the one that was taken."""
    found = []
    for times, vocab, taken in re.findall(r"^tiles by \S+, ms: (.*)\nV (\d+): Tile\((.*)\)$", text, re.M):
        rows = max(1, min(16 * multiprocessors, (512 << 20) // (2 * int(vocab))))
        each = dict(re.findall(r"(\d+/\d+/\d+/\d+) ([\d.]+)", times))
        entries = {
            tile: {
                "ms": float(ms),
                "percent_of_copy": percent_of_copy(4 * rows * int(vocab), 1e3 * float(ms), copy_gb_s),
            }
            for tile, ms in each.items()
        }
        taken = "/".join(re.findall(r"=(\d+)", taken))
        found.append({"vocab": int(vocab), "rows": rows, "taken": taken, "tiles": entries})
    return found


def main() -> int:
    if len(sys.argv) != 4 or sys.argv[1] not in ("counters", "tiles"):
        sys.exit(__doc__)
    kind, text, folder = sys.argv[1], Path(sys.argv[2]).read_text(encoding="utf-8"), Path(sys.argv[3])
    roofline = json.loads((folder / "roofline.json").read_text(encoding="utf-8"))
    document: dict[str, Any] = {
        "command": f"python benchmarks/tables/gpu_logs.py {kind} LOG FOLDER",
        "commit": os.environ.get("BENCH_COMMIT") or subprocess.run(HEAD, capture_output=True, text=True).stdout.strip(),
        "machine": roofline["machine"],
        "versions": roofline["versions"],
        "copy_gb_s": roofline["copy_gb_s"],
    }
    if kind == "counters":
        document["kernels"] = counters(text, roofline["copy_gb_s"])
    else:
        found = re.search(r"(\d+) multiprocessors", roofline["machine"])
        document["vocabularies"] = tiles(text, roofline["copy_gb_s"], int(found[1]) if found else 132)
    path = folder / {"counters": "counters.json", "tiles": "tile_times.json"}[kind]
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
