"""Rollouts one step ahead, on and off, with a vLLM server on one core of a CPU and the trainer on another.

`python benchmarks/studies/async_rollout.py --vllm-python PYTHON` starts a server for the embedded policy with the
interpreter of an environment that has vLLM, trains the embedded demonstration with `--async-rollout` 0 and 1 in turn
for every seed, and writes benchmarks/results/cpu/async_rollout.json. Both ways have importance weights, or the curves
would differ by them too. Needs two cores that nothing else uses, and Linux.

A step that samples at once takes sync + sampling + work. One that samples ahead may take no less than
sync + scoring + max(sampling, work - scoring): the server is not sampling while completions are scored, as groups that
have no gradient are drawn again then, and while it gets weights. Seconds are medians over a run's steps, without the
first two and the last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import provenance, short, write_json
from learning import RESULTS, ROOT

from mdpgrpo_fast.demo import DEMO_DIR

TRAINER, SERVER = 0, 1  # cores
FLAGS = ["--cpu", "--temperature-objective", "corrected", "--no-save-model", "--rollout", "vllm"]
SERVED = ["--dtype", "float32", "--max-model-len", "320", "--enforce-eager"]
SERVER_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
READY = 600  # seconds until the server must answer


def on_core(core: int) -> dict[str, Any]:
    """Arguments of a process on one core with one thread of torch."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1"}
    return {"env": env, "cwd": ROOT, "preexec_fn": lambda: os.sched_setaffinity(0, {core})}


@contextlib.contextmanager
def server(python: str, log: Path) -> Iterator[str]:
    """The address of a vLLM server for the embedded policy."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url, there = f"http://127.0.0.1:{port}", on_core(SERVER)
    there["env"] |= SERVER_ENV
    command = [python, "-m", "mdpgrpo_fast", "vllm-serve", str(DEMO_DIR / "seed_policy"), *SERVED]
    with log.open("w") as out:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=out, **there)
    try:
        end = time.monotonic() + READY
        while not answers(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server does not answer:\n{log.read_text()[-3000:]}")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def timed_run(argv: list[str], seconds_to: str) -> int:
    """A run of the command line whose syncs, completions of a step and waits for these are timed."""
    import mdpgrpo_fast.train as train
    from mdpgrpo_fast.rollout.vllm.server import VLLMServer
    from mdpgrpo_fast.training.collect import Collector

    seconds: dict[str, list[float]] = {}
    for owner, name in ((VLLMServer, "sync"), (VLLMServer, "complete"), (Collector, "drawn")):
        setattr(owner, name, timed(getattr(owner, name), seconds.setdefault(name, [])))
    status = train.main(argv)
    Path(seconds_to).write_text(json.dumps(seconds))
    return status


def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def measured(*args: Any, **knobs: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*args, **knobs)
        finally:
            seconds.append(time.perf_counter() - started)

    return measured


def one_run(url: str, ahead: int, seed: int, flags: list[str], folder: Path) -> dict[str, Any]:
    out, measured = folder / f"{ahead}-{seed}", folder / f"{ahead}-{seed}.json"
    argv = [*FLAGS, "--vllm-url", url, "--async-rollout", str(ahead), "--seed", str(seed), "--output-dir", str(out)]
    command = [sys.executable, __file__, "--timed", str(measured), *argv, *flags]
    done = subprocess.run(command, capture_output=True, text=True, **on_core(TRAINER))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps, seconds = [r for r in rows if "eval" not in r], json.loads(measured.read_text())
    summary = json.loads((out / "summary.json").read_text())
    if summary["dropped_samples"]:
        raise RuntimeError(
            f"{summary['dropped_samples']} samples lost their reward: is the machine busy?\n{done.stderr[-3000:]}"
        )
    result = {
        "async_rollout": ahead,
        "seed": seed,
        **{k: summary[k] for k in ("hsr_before", "hsr_after", "ssr_before", "ssr_after", "steps", "train_seconds")},
        "seconds": {k: short(v) for k, v in step_seconds(steps, seconds).items()},
        "staleness": statistics.fmean(r["staleness"] for r in steps),
        "reward": in_tenths([r["reward"] for r in steps]),
        "hsr": in_tenths([r["hsr"] for r in steps]),
        "ess": {
            f"{slot['temperature']:g}": in_tenths([r["slots"][i]["ess"] for r in steps])
            for i, slot in enumerate(steps[0]["slots"])
        },
    }
    s = result["seconds"]
    print(
        f"async_rollout {ahead}, seed {seed}: {s['step']:.3f} s a step (sampling {s['sampling']:.3f}, sync "
        f"{s['sync']:.3f}, other work {s['work']:.3f}), HSR {summary['hsr_before']:.3f} -> {summary['hsr_after']:.3f}",
        flush=True,
    )
    return result


def step_seconds(steps: list[dict[str, Any]], seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians over steps: the whole, the server's sampling, what the trainer waits for that, sync, scoring, and work:
    whatever is neither sync nor wait, scoring among it."""
    whole = [sum(r["seconds"].values()) for r in steps]
    wait = seconds["drawn"]  # at once, as long as sampling takes; ahead, for what of it is left
    work = [a - b - c for a, b, c in zip(whole, wait, seconds["sync"], strict=False)]  # the last one ahead has no sync
    found = {
        "step": whole, "sampling": seconds["complete"], "wait": wait, "sync": seconds["sync"],
        "score": [r["seconds"]["score"] for r in steps], "work": work,
    }  # fmt: skip
    return {name: statistics.median(values[2 : len(steps) - 1]) for name, values in found.items()}


def in_tenths(values: list[float | None]) -> list[float | None]:
    """Means of ten parts of a run."""
    parts = [values[len(values) * i // 10 : len(values) * (i + 1) // 10] for i in range(10)]
    known = [[v for v in part if v is not None] for part in parts]
    return [short(statistics.fmean(part)) if part else None for part in known]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", default=sys.executable, help="interpreter of an environment that has vLLM")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "async_rollout.json")
    parser.add_argument("--timed", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags for every run")
    args = parser.parse_args()
    if args.timed:
        return timed_run(args.timed[1:], args.timed[0])
    runs = []
    with tempfile.TemporaryDirectory() as name, server(args.vllm_python, Path(name) / "server.log") as url:
        for i, seed in enumerate(args.seeds):
            for ahead in (0, 1) if i % 2 == 0 else (1, 0):
                runs.append(one_run(url, ahead, seed, args.flags, Path(name)))
    summary = summarized(runs)
    words = ["python benchmarks/studies/async_rollout.py --vllm-python PYTHON --seeds", *map(str, args.seeds)]
    document = {
        **provenance(" ".join([*words, *(["--flags", *args.flags] if args.flags else [])])),
        "server": {"vllm": vllm_version(args.vllm_python), "flags": SERVED, "core": SERVER},
        "trainer": {"flags": [*FLAGS, *args.flags], "core": TRAINER},
        "summary": summary,
        "runs": runs,
    }
    write_json(args.output, document)
    print(json.dumps(summary, indent=1))
    return 0


def summarized(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over runs: what a step takes both ways, and what overlap allows it to take."""
    at_once, ahead = (
        {k: statistics.median(r["seconds"][k] for r in runs if r["async_rollout"] == way) for k in runs[0]["seconds"]}
        for way in (0, 1)
    )
    allowed = at_once["sync"] + at_once["score"] + max(at_once["sampling"], at_once["work"] - at_once["score"])
    found = {
        "step_at_once": at_once["step"],
        "step_ahead": ahead["step"],
        "step_that_overlap_allows": allowed,
        "ahead_over_at_once": ahead["step"] / at_once["step"],
        "allowed_over_at_once": allowed / at_once["step"],
        "share_of_what_overlap_allows": (at_once["step"] - ahead["step"]) / (at_once["step"] - allowed),
    }
    return {k: short(v) for k, v in found.items()}


def vllm_version(python: str) -> str:
    """Name and version of the distribution that has vLLM."""
    code = (
        "from importlib.metadata import packages_distributions as p, version; "
        "name = p()['vllm'][0]; print(name, version(name))"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
