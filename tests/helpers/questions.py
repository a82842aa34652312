"""What the processes of a pool are asked in its tests: they import this module."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def make() -> Callable[[tuple[str, Any]], Any]:
    return answer


def dies() -> Any:
    os._exit(9)


def hangs() -> Any:
    time.sleep(60)


def slow() -> Any:
    time.sleep(1.0)
    return answer


class Unpicklable(Exception):
    def __init__(self, text: str, response: Any) -> None:
        super().__init__(text)
        self.response = response


class Unpickles:
    def __reduce__(self) -> Any:
        return divmod, (1, 0)


FAMILY = """import os, subprocess, sys, time
me = [sys.executable, "-c", "import time; time.sleep(60)"]
others = [subprocess.Popen(me), subprocess.Popen(me, start_new_session=True)]
print(*[other.pid for other in others], flush=True)
"""


def family() -> list[int]:
    """Processes that this one leaves behind: a fork, one whose parent is gone, and a daemon of its own session."""
    fork = os.fork()
    if fork == 0:
        time.sleep(60)
        os._exit(0)
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True) as made:
        assert made.stdout is not None
        others = made.stdout.readline()
    return [os.getpid(), fork, *map(int, others.split())]


def answer(question: tuple[str, Any]) -> Any:
    kind, value = question
    if kind == "sleep":
        time.sleep(value)
    elif kind == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(value)
    elif kind == "family":
        return family()
    elif kind == "take":
        return len(bytearray(value * 2**20))
    elif kind == "family, and then":
        path, then = value
        with open(path, "w") as file:
            file.write(" ".join(map(str, family())))
        return answer(then)
    elif kind == "exit":
        os._exit(value)
    elif kind == "exit, and a child keeps the pipes":
        if os.fork() == 0:
            time.sleep(10)
        os._exit(value)
    elif kind == "raise unpicklable":
        raise Unpicklable("an answer", lambda: value)
    elif kind == "unpickles with an error":
        return Unpickles()
    elif kind == "aborts":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.abort()
    elif kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "spin":
        while True:
            pass
    elif kind == "compiled":
        sum(range(10**12))  # one call that holds the interpreter's lock
    elif kind == "children":
        with multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(abs, value)
    elif kind == "note":
        logging.getLogger("mdpgrpo_fast.some").warning(value)
    elif kind == "lambda":
        return lambda: value
    elif kind == "raise":
        raise value
    return value if kind in ("echo", "note") else os.getpid()
