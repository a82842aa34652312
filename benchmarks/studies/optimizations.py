"""The embedded demonstration with all optimisations on and off: `python benchmarks/studies/optimizations.py`.

Off: padded rows, logits as a whole, the plain PyTorch objective, AdamW one parameter at a time, PyTorch's linear
layers. What has no switch stays on: the decode loop with its shared prefill. The two runs of a seed go side by side,
one thread each. Writes benchmarks/results/cpu/optimizations.json.
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import provenance, write_json
from learning import RESULTS, VARIANTS, train

WAYS: dict[str, list[str]] = {
    "on": [],
    "off": "--packing off --lm-head logits --backend torch --fused-adamw false --cpu-linear torch".split(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "optimizations.json")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(WAYS)) as pool:
        for seed in args.seeds:
            # Side by side, so that both have the same machine; the next seed when both are done.
            pair = [
                pool.submit(train, "paper", [*VARIANTS["paper"], *flags], seed, Path(folder) / way)
                for way, flags in WAYS.items()
            ]
            for way, job in zip(WAYS, pair, strict=True):
                runs.append({"optimizations": way, **{k: job.result()[k] for k in KEPT}})
    write_json(
        args.output,
        {**provenance("python benchmarks/studies/optimizations.py"), "flags_off": WAYS["off"], "runs": runs},
    )


KEPT = ("seed", "hsr_before", "hsr_after", "ssr_before", "ssr_after", "steps", "train_seconds", "peak_memory_mb")

if __name__ == "__main__":
    main()
