"""TRL's own tests of GRPOTrainer, run on GRPOTrainer and on other classes, without a model hub.

`python benchmarks/studies/trl_suite.py --tests FOLDER [--trainer MODULE:CLASS --config MODULE:CLASS ...]`, FOLDER being
a checkout of TRL: what is needed of its tests goes to a temporary folder, beside stand-ins for the hub's models and
data sets (trl_suite_inputs.py), where trl_suite_plugin.py puts each class in GRPOTrainer's place. A config may be given
settings: `MODULE:CLASS{"num_constraints": 1}`. The tests of tools need jmespath. Writes
benchmarks/results/cpu/trl_suite.json after each class; exits 1 where one fails a test that GRPOTrainer passes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import ROOT, installed, provenance, write_json
from trl_suite_inputs import build, renumbered

BASELINE = ("trl:GRPOTrainer", "trl:GRPOConfig")
SUITE = "test_grpo_trainer.py"
COPIED = ("__init__.py", "conftest.py", "testing_utils.py")
SECONDS_PER_TEST = 600


@dataclass(frozen=True)
class Outcome:
    """What became of one test: `passed`, `failed`, `xfailed` or `skipped`; and why, in one line."""

    kind: str
    why: str = ""


def outcomes(report: Path) -> dict[str, Outcome]:
    """Of every test, by `class::name`, from pytest's junit file."""
    found: dict[str, Outcome] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.attrib['classname'].rpartition('.')[2]}::{case.attrib['name']}"
        outcome = Outcome("passed")
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                kind = {"pytest.xfail": "xfailed", "pytest.skip": "skipped"}.get(child.attrib.get("type", ""), "failed")
                lines = child.attrib.get("message", "").strip().splitlines() or [""]
                outcome = Outcome(kind, lines[0][:300])
        if name not in found or outcome.kind == "failed":  # a test and its teardown are reported one by one
            found[name] = outcome
    return found


def run(trainer: str, config: str, folder: Path, workers: int, seconds: int) -> tuple[dict[str, Outcome], int]:
    """The outcomes with one class, and the seconds that all took."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-n", str(workers), f"--timeout={SECONDS_PER_TEST}"]
    config, brace, settings = config.partition("{")
    command += ["-p", "trl_suite_plugin", "--trainer", trainer, "--config", config, f"--junitxml={report}"]
    command += ["--settings", brace + settings] if brace else []
    paths = [str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }
    start = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
    if not report.exists():
        raise RuntimeError(f"pytest wrote no report: {(done.stderr or done.stdout)[-2000:]}")
    return outcomes(report), round(time.monotonic() - start)


def copy(tests: Path, folder: Path) -> dict[str, str]:
    """The suite with what it imports and what it loads; and which version of the suite it is."""
    (folder / "tests").mkdir()
    for name in COPIED:
        (folder / "tests" / name).write_bytes((tests / "tests" / name).read_bytes())
    suite = (tests / "tests" / SUITE).read_bytes()
    (folder / "tests" / SUITE).write_text(renumbered(suite.decode()), encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\naddopts = -W ignore\n", encoding="utf-8")
    build(folder)
    version = (tests / "VERSION").read_text(encoding="utf-8").strip()
    blob = hashlib.sha1(b"blob %d\0" % len(suite) + suite).hexdigest()
    return {"file": f"tests/{SUITE}", "trl": version, "git_blob": blob}


def grouped(found: dict[str, Outcome]) -> dict[str, list[str]]:
    """The tests that were skipped, by reason."""
    groups = defaultdict(list)
    for name, outcome in found.items():
        if outcome.kind == "skipped":
            groups[outcome.why].append(name)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, required=True)
    parser.add_argument("--trainer", action="append", default=[])
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=3600, help="the most that one class may take")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "cpu" / "trl_suite.json")
    options = parser.parse_args()
    if len(options.trainer) != len(options.config):
        parser.error("each --trainer needs a --config")
    classes = list(zip(options.trainer, options.config, strict=True))
    asked = "".join(f" --trainer {trainer} --config {shlex.quote(config)}" for trainer, config in classes)
    document = provenance(f"python benchmarks/studies/trl_suite.py --tests FOLDER{asked}")
    document["versions"] |= installed(("peft", "accelerate", "datasets", "jmespath"))
    runs: list[dict[str, Any]] = []
    baseline: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        suite = copy(options.tests, Path(folder))
        for trainer, config in [BASELINE, *classes]:
            found, took = run(trainer, config, Path(folder), options.workers, options.seconds)
            baseline = baseline or found
            failed = {name: outcome.why for name, outcome in found.items() if outcome.kind == "failed"}
            lost = [n for n, o in baseline.items() if o.kind == "passed" and found.get(n) != o]
            counts = Counter(outcome.kind for outcome in found.values())
            runs.append({"trainer": trainer, "config": config, "seconds": took, "counts": counts})
            runs[-1] |= {"failed": failed, "passes_on_baseline_only": lost}
            print(trainer, config, took, dict(counts), *lost, sep="\n", flush=True)
            document |= {"suite": suite, "workers": options.workers, "runs": runs, "not_run": grouped(baseline)}
            write_json(options.output, document)
    return int(any(r["passes_on_baseline_only"] for r in runs))


if __name__ == "__main__":
    sys.exit(main())
