"""`python benchmarks/bench_start.py --output FILE`: CPU seconds from a command line to its answer.

Each command in a fresh interpreter, all in turn, five rounds after one that warms the disk's cache; medians of user and
system time.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from harness import ROOT, provenance, short, write_json

ROUNDS = 5
PYTHON = (sys.executable, "-c")
OURS = (sys.executable, "-m", "mdpgrpo_fast")
# What is shown, and the command.
COMMANDS: dict[str, tuple[str, ...]] = {
    "Python alone": (*PYTHON, "pass"),
    "`import mdpgrpo_fast`": (*PYTHON, "import mdpgrpo_fast"),
    "`from mdpgrpo_fast import verify`": (*PYTHON, "from mdpgrpo_fast import verify"),
    "`import torch`": (*PYTHON, "import torch"),
    "`from mdpgrpo_fast import token_loss`": (*PYTHON, "from mdpgrpo_fast import token_loss"),
    "`from mdpgrpo_fast import Trainer`": (*PYTHON, "from mdpgrpo_fast import Trainer"),
    "`mdpgrpo --help`": (*OURS, "--help"),
    "`mdpgrpo train --help`": (*OURS, "train", "--help"),
    "`mdpgrpo train --lr 1` (refused)": (*OURS, "train", "--lr", "1"),
    "`mdpgrpo evaluate --help`": (*OURS, "evaluate", "--help"),
    "`mdpgrpo report --help`": (*OURS, "report", "--help"),
    "`trl --help`": (str(Path(sys.executable).parent / "trl"), "--help"),
    "`trl grpo --help`": (str(Path(sys.executable).parent / "trl"), "grpo", "--help"),
}


def cpu_seconds(command: tuple[str, ...]) -> float:
    """User and system time of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env={**os.environ, "COLUMNS": "100"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 2):
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.decode()[-500:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(ROUNDS + 1):
        for name, command in COMMANDS.items():
            taken = cpu_seconds(command)
            if number:
                seconds[name].append(taken)
    rows = [{"command": name, "cpu_seconds": short(statistics.median(s))} for name, s in seconds.items()]
    for row in rows:
        print(f"{row['cpu_seconds']:8.3f} s  {row['command']}")
    command = "python benchmarks/bench_start.py --output benchmarks/results/cpu/start.json"
    write_json(output, {**provenance(command), "rounds": ROUNDS, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
