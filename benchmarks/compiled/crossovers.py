"""Where the Hopper kernel is faster than Triton's, from the result files: what `auto` goes by.

    python benchmarks/compiled/crossovers.py    # results/*/token_loss.json -> mdpgrpo_fast/kernels/crossovers.json

A vocabulary is in the table where `cuda` won in every measured case, at every length from some length on. No
GPU measured: an empty table, and `auto` takes Triton.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = ROOT / "mdpgrpo_fast" / "kernels" / "crossovers.json"
MARGIN = 0.98  # of Triton's time: less is no win


def rows_from(measured: list[tuple[int, bool]]) -> int | None:
    """The length from which on every measured one was won; None where the longest was not."""
    found = None
    for n_rows, won in sorted(measured, reverse=True):
        if not won:
            break
        found = n_rows
    return found


def crossovers(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Of one result file: dtype, vocabulary and the rows from which `cuda` is faster."""
    by_size: dict[tuple[str, int], dict[int, bool]] = {}
    for row in document["results"]:
        ms = {n: row["candidates"].get(n, {}).get("ms") for n in ("cuda", "triton")}
        if all(ms.values()):
            lengths = by_size.setdefault((row["dtype"], row["vocab"]), {})
            won = ms["cuda"] < MARGIN * ms["triton"]
            lengths[row["tokens"]] = lengths.get(row["tokens"], True) and won
    found = [(dtype, vocab, rows_from(list(measured.items()))) for (dtype, vocab), measured in sorted(by_size.items())]
    return [{"dtype": d, "vocab": v, "rows": n} for d, v, n in found if n is not None]


def table(results: Path) -> dict[str, list[dict[str, Any]]]:
    """Name of the GPU, as in the results' `machine` -> its crossovers."""
    found = {}
    for path in sorted(results.glob("*/token_loss.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["device"] != "cpu":
            found[document["machine"].split(",")[0]] = crossovers(document)
    return found


def main() -> int:
    found = table(RESULTS)
    TABLE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
