"""`python benchmarks/optimizations.py`: the embedded demonstration with all optimisations on and off, three seeds each.

Off: padded rows, logits as a whole, the plain PyTorch objective, AdamW one parameter at a time. Runs of a seed go side
by side, one thread each. Writes benchmarks/results/cpu/optimizations.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import provenance, write_json
from learning import RESULT, train

WAYS: dict[str, list[str]] = {
    "on": [],
    "off": ["--packing", "off", "--lm-head", "logits", "--backend", "torch", "--fused-adamw", "false"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=RESULT.with_name("optimizations.json"))
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        order = [(way, seed) for seed in args.seeds for way in WAYS]

        def one(job: tuple[str, int]) -> dict[str, object]:
            way, seed = job
            found = train("paper", seed, Path(folder) / way, WAYS[way])
            return {"optimizations": way, **{k: found[k] for k in KEPT}}

        runs = list(pool.map(one, order))
    write_json(
        args.output, {**provenance("python benchmarks/optimizations.py"), "flags_off": WAYS["off"], "runs": runs}
    )


KEPT = ("seed", "hsr_before", "hsr_after", "ssr_before", "ssr_after", "steps", "train_seconds", "peak_memory_mb")

if __name__ == "__main__":
    main()
