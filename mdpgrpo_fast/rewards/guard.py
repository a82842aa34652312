"""A guard of each scoring process: its parent, that ends it with the program, and with it all that it has started."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import NoReturn

POLL = 0.5  # seconds between two looks at a program whose pipes a fork of its own may hold open
ROUNDS = 10_000  # of ending children that go on to make others
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def guarded(program: int, sentinel: int, close: Callable[[], None]) -> None:
    """Forks; returns in the child. The parent, which the program knows, leads a process group of its own, and ends as
    the child does, or ends the child: at SIGTERM, and when the program is gone, whatever the child is busy with.

    What the child has started is killed first, that of other sessions too (Linux). program, sentinel: the program's
    process id, and a pipe that is readable when it is gone. close: of what the child alone is to hold.
    """
    os.setpgid(0, 0)  # a session would be a scheduling group too, which others' load keeps waiting at every answer
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # whose parent ends becomes a child of the guard
    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    guard, child = os.getpid(), os.fork()
    if child:
        try:
            close()
            _end_as(_watch(child, program, sentinel, signals))
        finally:
            os._exit(1)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.close(signals)
    os.close(wakeup)
    if not _prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        threading.Thread(target=_end_with, args=(guard,), daemon=True).start()
    if os.getppid() != guard:
        os._exit(1)


def _prctl(option: int, value: int) -> bool:
    """Whether the system has it: Linux alone does."""
    if sys.platform != "linux":
        return False
    import ctypes

    return bool(ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0)


def _end_with(guard: int) -> None:
    while os.getppid() == guard:
        time.sleep(POLL)
    os._exit(1)


def _watch(child: int, program: int, sentinel: int, signals: int) -> int:
    """The child's exit status, once it and all that it has started have ended."""
    status = None
    while status is None:
        ready = wait([signals, sentinel], POLL)
        came = os.read(signals, 4096) if signals in ready else b""
        gone = sentinel in ready or os.getppid() != program
        if gone or signal.SIGTERM in came:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        else:
            status = _reaped(child)
    for _ in range(ROUNDS):
        children = _children()
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)
        if not children:
            break
    else:
        gone = True
    if gone:
        os.killpg(0, signal.SIGKILL)  # the guard itself too: nobody asks how it ended
    return status


def _reaped(child: int) -> int | None:
    """The child's exit status if it has ended, as others may have, which it left."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            status = found[1] if found[0] == child else status
    return status


def _children() -> list[int]:
    """Of this process; none where the system does not tell."""
    try:
        return [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]
    except OSError:
        return []


def _end_as(status: int) -> NoReturn:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL has no other
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
