"""Stress of the scoring pool: `python tests/helpers/stress.py 3000` makes so many bad events, and counts them by kind.

Every event has to cost its own question alone, with its reason; questions between them have to be answered. Ctrl-C ends
it earlier.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import re
import signal
import sys
import time
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from helpers import questions

from mdpgrpo_fast.rewards.processes import Pool
from mdpgrpo_fast.rewards.worker import Lost

# What is asked, and the kind of what is lost by it.
EVENTS: list[tuple[tuple[str, Any], str]] = [
    (("exit", 0), "worker exit 0"),
    (("exit", 7), "worker exit 7"),
    (("raise", SystemExit("out")), "worker SystemExit"),
    (("raise", KeyboardInterrupt("stop")), "worker KeyboardInterrupt"),
    (("killed", 0), "worker exit -9"),
    (("aborts", 0), "worker exit -6"),
    (("raise unpicklable", 0), "worker Unpicklable"),
    (("unpickles with an error", 0), "worker ZeroDivisionError"),
    (("lambda", 0), "worker (PicklingError|AttributeError)"),
    (("family, and then", ("/dev/null", ("exit", 3))), "worker (exit 3|timeout)"),
    (("take", 4000), "memory"),
    (("compiled", 0), "worker timeout"),
    (("deaf", 60), "worker timeout"),
]


def stress(
    events: int, workers: int, limit: float, batch: int, seed: int = 0, counts: collections.Counter[str] | None = None
) -> collections.Counter[str]:
    """Counts by what was lost. Raises AssertionError where an event cost more than its question, or was not said."""
    draw, counts = random.Random(seed), collections.Counter() if counts is None else counts
    resource_tracker.ensure_running()  # which keeps a pipe
    before = len(os.listdir("/proc/self/fd"))
    pool = Pool(questions.make, workers, limit, memory=1000)
    try:
        while sum(counts.values()) < events:
            asked = [draw.choice(EVENTS) if draw.random() < 0.5 else None for _ in range(batch)]
            made = pool.ask([event[0] if event else ("echo", i) for i, event in enumerate(asked)])
            for i, (event, answer) in enumerate(zip(asked, pool.answers(made, 120.0), strict=True)):
                if event is None:
                    assert answer == i, f"a question between was lost: {answer}"
                else:
                    assert isinstance(answer, Lost) and answer.reason, f"{event} gave {answer}"
                    assert re.fullmatch(event[1], answer.kind), f"{event} gave {answer}"
                    counts[answer.kind] += 1
            for process in pool.processes:  # all are idle
                if draw.random() < 0.8 and process.pid is not None:
                    of = draw.choice(["guard", "worker"])
                    for pid in [process.pid] if of == "guard" else children(process.pid):
                        os.kill(pid, signal.SIGKILL)
                    process.join(10)
                    counts[f"idle {of} killed"] += 1
    finally:
        pool.stop()
    assert len(os.listdir("/proc/self/fd")) <= before, "files are left open"
    return counts


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


if __name__ == "__main__":
    began, found = time.monotonic(), collections.Counter[str]()
    with contextlib.suppress(KeyboardInterrupt):
        stress(int(sys.argv[1]), 4, 1.0, 80, counts=found)
    for kind, count in sorted(found.items()):
        print(f"{count:6}  {kind}")
    print(f"{found.total():6}  events in {time.monotonic() - began:.0f} s; each cost its own question alone")
