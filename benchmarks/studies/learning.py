"""Learning curves of the embedded demonstration under several settings and seeds, at the same budget.

`python benchmarks/studies/learning.py` trains each variant of the comparison with every seed and each ablation
with the first (one thread per run, as many at once as there are cores) and writes benchmarks/results/cpu/learning.json;
`python benchmarks/studies/learning.py losses` trains every loss with every seed, two passes over each batch in two
mini-batches so that ratios are not 1, and writes losses.json. `python benchmarks/tables/readme.py` puts them into the
README and docs/losses.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import cpu_name

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"

FULL = ["--top-p", "1", "--top-k", "0"]
# name -> flags; the first three are the comparison, the others take the paper's settings apart.
VARIANTS: dict[str, list[str]] = {
    "paper": ["--preset", "paper"],
    "exact": ["--preset", "exact"],
    "grpo": ["--preset", "grpo"],
    "paper, full vocabulary": ["--preset", "paper", *FULL],
    "paper, full vocabulary, per_row": ["--preset", "paper", *FULL, "--temperature-objective", "per_row"],
    "paper, full vocabulary, z only": ["--preset", "paper", *FULL, "--dual-anchor", "false"],
}
MAIN = ("paper", "exact", "grpo")
# The advantages of `exact`, so that only the loss differs; off-policy by three updates on older samples.
OFF_POLICY = ["--preset", "exact", "--steps", "20", "--updates-per-rollout", "2", "--mini-batches", "2"]
LOSSES: dict[str, list[str]] = {
    "ppo_clip": [],
    "ppo_clip, sequence (GSPO)": [
        "--importance-level",
        "sequence",
        "--epsilon-low",
        "0.003",
        "--epsilon-high",
        "0.004",
    ],
    "cispo": ["--loss", "cispo", "--aggregation", "dapo", "--epsilon-low", "1", "--epsilon-high", "4"],
    "sapo": ["--loss", "sapo"],
    "gmpo": ["--loss", "gmpo", "--epsilon-low", "0.4", "--epsilon-high", "0.4"],
    "luspo": ["--loss", "luspo", "--epsilon-low", "0.003", "--epsilon-high", "0.004"],
    "vespo": ["--loss", "vespo", "--aggregation", "dapo"],
}
STUDIES: dict[str, dict[str, list[str]]] = {
    "learning": VARIANTS,
    "losses": {name: [*OFF_POLICY, *flags] for name, flags in LOSSES.items()},
}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def train(name: str, flags: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """One run in its own process; its summary and the state of the policy at the start and the end."""
    out = folder / f"{name.replace(' ', '_')}-{seed}"
    command = [sys.executable, "-m", "mdpgrpo_fast.train", "--output-dir", str(out), "--seed", str(seed)]
    command += ["--no-save-model", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "eval" not in r]
    tenth = max(1, len(steps) // 10)

    def ends(key: str) -> list[float]:
        return [mean([r[key] for r in part]) for part in (steps[:tenth], steps[-tenth:])]

    print(f"{name}, seed {seed}: HSR {summary['hsr_before']:.3f} -> {summary['hsr_after']:.3f}", flush=True)
    keys = ("hsr_before", "hsr_after", "ssr_before", "ssr_after", "steps", "train_seconds", "total_seconds")
    return {
        "variant": name,
        "seed": seed,
        **{k: summary[k] for k in (*keys, "peak_memory_mb", "types", "versions")},
        **{k: ends(k) for k in ("entropy", "zero_variance_groups", "reward", "kl", "gain_below_goal_groups")},
        **{k: ends(k) for k in ("ratio_max", "clip_low", "clip_high", "grad_norm")},
        "slots": [steps[0]["slots"], steps[-1]["slots"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", nargs="?", default="learning", choices=list(STUDIES))
    parser.add_argument("--variants", nargs="*", help="some of the study's")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags for every run")
    args = parser.parse_args()
    study = STUDIES[args.study]
    variants, main = args.variants or list(study), MAIN if args.study == "learning" else tuple(study)
    output = args.output or RESULTS / f"{args.study}.json"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    started = time.time()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        order = [(v, s) for s in args.seeds for v in variants if v in main]
        order += [(v, args.seeds[0]) for v in variants if v not in main]
        runs = list(pool.map(lambda job: train(job[0], [*study[job[0]], *args.flags], job[1], Path(folder)), order))
    result = {
        "command": f"python benchmarks/studies/learning.py {' '.join(sys.argv[1:])}".strip(),
        "commit": commit,
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, one thread per run, {args.jobs} runs at once",
        "versions": runs[0]["versions"],
        "minutes": round((time.time() - started) / 60, 1),
        "runs": [{k: v for k, v in r.items() if k != "versions"} for r in runs],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
