"""`make fuzz`: inputs drawn at random, by hypothesis and by atheris for each target, and the compiled kernels under
AddressSanitizer and UndefinedBehaviorSanitizer with four threads against float64.

Seeded and bounded in time: SECONDS in all, of which each target has its share. Nothing may be raised, take over 5
seconds an input, or differ from the peer; the first input of each fault is written in hexadecimal digits. Exits with 1
where there is one.

    python tests/fuzz/run.py --seconds 600 --output benchmarks/results/cpu/fuzz.json
    python tests/fuzz/run.py --target data_reader --input 00ff...
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "benchmarks")]

# Seconds of each of 100, and how many of them hypothesis and atheris have.
SHARES = {
    "verifiers_beside_lm_eval": (30, 4, 0),
    "verifiers_of_all_rules": (13, 3, 0),
    "arguments_of_verifiers": (8, 2, 0),
    "data_reader": (12, 2, 4),
    "configuration": (8, 2, 3),
    "templates": (4, 0, 0),
    "answers_of_vllm": (5, 1, 2),
    "kernels": (20, 0, 0),
}
LENGTH = 200  # bytes of an input, at most
LIBRARIES = "MDPGRPO_LIBRARIES"


class Faults:
    """What went wrong, each kind once."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, data: bytes, error: BaseException) -> None:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/fuzz/" not in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        said = " ".join(str(error).split())
        kind = f"{type(error).__name__} {said.split()[0] if frames == [] and said else place}"
        known = self.found.setdefault(kind, {"times": 0, "said": said[:400], "input": data.hex()})
        known["times"] += 1
        if known["times"] == 1:
            print(f"  {kind}: {said[:400]}", flush=True)


def at_random(target: Callable[[bytes], None], seed: str, seconds: float, faults: Faults) -> int:
    rng, end, count = random.Random(seed), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for _ in range(20):
            data, count = rng.randbytes(rng.randrange(LENGTH)), count + 1
            try:
                target(data)
            except Exception as e:
                faults.add(data, e)
    return count


def by_hypothesis(target: Callable[[bytes], None], seed: int, seconds: float, faults: Faults) -> int:
    import hypothesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    end, count = time.monotonic() + seconds, 0

    def one(data: bytes) -> None:
        nonlocal count
        if time.monotonic() > end:
            return
        count += 1
        try:
            target(data)
        except Exception as e:
            faults.add(data, e)

    while time.monotonic() < end:
        test = given(st.binary(max_size=LENGTH))(one)
        hypothesis.seed(seed)(
            settings(max_examples=1000, deadline=None, database=None, phases=[Phase.generate],
                     suppress_health_check=list(HealthCheck))(test)
        )()  # fmt: skip
        seed += 1
    return count


def by_atheris(name: str, seed: int, seconds: float, faults: Faults) -> int:
    """In a process of its own, which libFuzzer ends."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--atheris", name, "--seconds", str(seconds), "--seed", str(seed)]
        done = subprocess.run([*command, "--output", f"{folder}/faults"], capture_output=True, text=True)
        for line in Path(folder, "faults").read_text().splitlines() if Path(folder, "faults").exists() else ():
            fault = json.loads(line)
            faults.found.setdefault(fault.pop("kind"), fault)
    runs = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
    if not runs:
        faults.add(b"", RuntimeError(f"atheris ended with status {done.returncode}: {done.stderr[-300:]}"))
    return int(runs[-1]) if runs else 0


def _inside_atheris(name: str, seed: int, seconds: float, output: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["mdpgrpo_fast.data", "mdpgrpo_fast.cli", "mdpgrpo_fast.rollout.vllm"]):
        from fuzz import targets
    faults = Faults()
    with targets.ready(name) as ready:

        def one(data: bytes) -> None:
            known = len(faults.found)
            try:
                targets.timed(ready[name], data)
            except Exception as e:
                faults.add(data, e)
            if len(faults.found) > known:
                kind, fault = list(faults.found.items())[-1]
                with output.open("a") as file:
                    file.write(json.dumps({"kind": kind, **fault}) + "\n")

        options = [f"-max_total_time={max(1, int(seconds))}", f"-seed={seed + 1}", f"-max_len={LENGTH}", "-verbosity=0"]
        atheris.Setup([__file__, *options, "-print_final_stats=1"], one)
        atheris.Fuzz()


def of_kernels(seed: int, seconds: float, faults: Faults, libraries: Path | None) -> tuple[int, dict[str, Any]]:
    """In a process of its own, with the sanitised library in place of the other where there is one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    if libraries is not None:
        preload = [
            subprocess.run(["gcc", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
            for name in ("asan", "ubsan")
        ]
        environment |= {LIBRARIES: str(libraries), "LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, str(Path(__file__).with_name("kernels.py")), str(seed), str(seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    report = lines[-1] if lines else {"cases": {}, "faults": []}
    for fault in report.pop("faults"):
        faults.found.setdefault(fault.pop("kind"), fault)
    if done.returncode:
        faults.add(b"", RuntimeError(f"ended with status {done.returncode}: {done.stderr[-600:]}"))
    return sum(report["cases"].values()), report


def _run(args: argparse.Namespace) -> int:
    from fuzz import targets
    from harness import provenance

    command = f"python tests/fuzz/run.py --seconds {args.seconds:g} --seed {args.seed} --output {args.output}"
    document = provenance(command)  # of what is loaded now
    document["versions"] |= {name: _version(name) for name in ("hypothesis", "atheris", "nltk", "lm-eval")}
    rows: dict[str, Any] = {}
    begun = time.monotonic()
    with targets.ready() as ready:
        for name, (share, hypothesis, atheris) in SHARES.items():
            if args.only and name not in args.only:
                continue
            faults, start, counts = Faults(), time.monotonic(), {}
            part = args.seconds / 100
            if name == "kernels":
                number, more = of_kernels(args.seed, share * part, faults, args.libraries)
                counts = {"random": number}
                rows[name] = {**more, "sanitised": args.libraries is not None}
            else:
                target = lambda data, target=ready[name]: targets.timed(target, data)  # noqa: E731
                plain = share - hypothesis - atheris
                counts["random"] = at_random(target, f"{name} {args.seed}", plain * part, faults)
                if hypothesis:
                    counts["hypothesis"] = by_hypothesis(target, args.seed, hypothesis * part, faults)
                if atheris and not args.no_atheris:
                    counts["atheris"] = by_atheris(name, args.seed, atheris * part, faults)
                rows[name] = {}
            different = sum(f["times"] for k, f in faults.found.items() if k.startswith("Difference"))
            crashes = sum(f["times"] for k, f in faults.found.items() if not k.startswith("Difference"))
            rows[name] |= {"inputs": counts, "seconds": round(time.monotonic() - start, 1)}
            rows[name] |= {"crashes": crashes, "differences": different, "faults": faults.found}
            print(f"{name}: {sum(counts.values())} inputs, {crashes} crashes, {different} differences", flush=True)
            _write(args.output, document, rows, begun)
    return int(any(row["crashes"] or row["differences"] for row in rows.values()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write(output: Path, document: dict[str, Any], rows: dict[str, Any], begun: float) -> None:
    """The targets so far; a run that is cut short leaves those."""
    from harness import write_json

    totals = {key: sum(row[key] for row in rows.values()) for key in ("crashes", "differences")}
    inputs = sum(sum(row["inputs"].values()) for row in rows.values())
    more = {"seconds": round(time.monotonic() - begun), "inputs": inputs, **totals, "targets": rows}
    write_json(output, document | more)
    print(f"{inputs} inputs, {totals['crashes']} crashes, {totals['differences']} differences", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/fuzz.json"))
    parser.add_argument("--only", nargs="*", choices=SHARES, help="these targets alone")
    parser.add_argument("--libraries", type=Path, help="folder of the sanitised _cpu.abi3.so")
    parser.add_argument("--no-atheris", action="store_true", help="where there is no wheel of it")
    parser.add_argument("--target", choices=SHARES, help="of --input")
    parser.add_argument("--input", help="run this input alone, in hexadecimal digits")
    parser.add_argument("--atheris", choices=SHARES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.atheris:
        _inside_atheris(args.atheris, args.seed, args.seconds, args.output)
        return 0
    if args.target:
        from fuzz import targets

        with targets.ready(args.target) as ready:
            ready[args.target](bytes.fromhex(args.input))
        return 0
    return _run(args)


if __name__ == "__main__":
    sys.exit(main())
