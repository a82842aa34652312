"""One spawned process that answers questions, and its pipe."""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.popen_spawn_posix
import multiprocessing.process
import multiprocessing.spawn
import os
import re
import resource
import selectors
import signal
import socket
import struct
import threading
import time
import types
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

from ..log import log
from .functions import describe
from .guard import guarded

Make = Callable[[], Callable[[Any], Any]]

POLL = 1.0  # seconds between two looks at a process whose pipes a child of its own may hold open
NO_ROOM = 75  # exit code of a process whose memory limit leaves no room for a question
GRACE = 5.0  # seconds for a process that was killed to be gone
_CHILDREN = threading.RLock()  # multiprocessing starts and reaps children without a lock


class _Spawn(types.ModuleType):
    """multiprocessing.spawn, but that the process does not import the program's main script: one without a main guard
    would start a second run."""

    def __getattr__(self, name: str) -> Any:
        return getattr(multiprocessing.spawn, name)

    def get_preparation_data(self, name: str) -> dict[str, Any]:
        data: dict[str, Any] = multiprocessing.spawn.get_preparation_data(name)
        return {key: value for key, value in data.items() if not key.startswith("init_main")}


class _Popen(multiprocessing.popen_spawn_posix.Popen):
    # A copy that sees other globals: what is changed in multiprocessing itself, or in sys.modules, all threads see.
    _launch = types.FunctionType(
        multiprocessing.popen_spawn_posix.Popen._launch.__code__,  # type: ignore[attr-defined]
        {**vars(multiprocessing.popen_spawn_posix), "spawn": _Spawn("spawn")},
    )


class _Process(multiprocessing.context.SpawnProcess):
    """Not a daemon, which may have no children, but nothing waits for it when the interpreter ends."""

    _Popen = staticmethod(_Popen)

    def start(self) -> None:
        with _CHILDREN:
            super().start()
            multiprocessing.process._children.discard(self)  # type: ignore[attr-defined]


class Lost(NamedTuple):
    """Why a question has no answer, in one line, and what those that are lost alike share."""

    reason: str
    kind: str

    @classmethod
    def by(cls, error: BaseException, memory: int = 0) -> Lost:
        """memory: the limit in MB, 0: none."""
        if memory and lacks_memory(error):
            return cls(f"the scoring process took more than reward_memory = {memory} MB: {describe(error)}", "memory")
        return cls(f"the scoring process raised {describe(error)}", f"worker {type(error).__name__}")


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception, or what it came from, is of memory that was refused: by Python, the system, or torch."""
    return any(
        isinstance(e, MemoryError)
        or (isinstance(e, OSError) and e.errno == errno.ENOMEM)
        or (isinstance(e, RuntimeError) and "can't allocate memory" in describe(e))
        for e in (error, error.__cause__)
    )


class _Notes(logging.Handler):
    """The library's warnings in a process, which go with its next answer: each would say them all."""

    def __init__(self, memory: int) -> None:
        super().__init__(logging.WARNING)
        self.memory = memory
        self.said: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelno, record.getMessage()))

    def pack(self, answer: Any, last: bool = False) -> Any:
        """last: the process ends after this answer."""
        said, self.said = self.said, []
        try:
            return ForkingPickler.dumps((answer, said, last))
        except Exception as e:
            return ForkingPickler.dumps((Lost.by(e, self.memory), said, last or lacks_memory(e)))


def _limit_memory(megabytes: int) -> None:
    """No more than that on top of what this process holds: of its own, written or to be written (RLIMIT_DATA), which
    does not count what libraries only reserve. Processes that it starts have the same limit each."""
    if not megabytes:
        return
    try:
        (held,) = re.findall(r"^VmData:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        most = int(held) * 1024 + megabytes * 2**20
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    except (OSError, ValueError) as e:
        log.warning("reward_memory has no effect on this system: %s", describe(e))


def _serve(connection: Connection, make: Make, memory: int) -> None:
    """Runs in a process until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the program that is interrupted ends the others
    program: Any = multiprocessing.parent_process()
    guarded(program.pid, program.sentinel, connection.close)
    notes = _Notes(memory)
    log.addHandler(notes)
    log.propagate = False
    answer = make()
    _limit_memory(memory)
    connection.send_bytes(notes.pack(None))
    with contextlib.suppress(EOFError, OSError):
        last = False
        while not last:
            try:
                data = connection.recv_bytes()
            except MemoryError:
                os._exit(NO_ROOM)
            try:
                found = answer(ForkingPickler.loads(data))
            except BaseException as e:
                found, last = Lost.by(e, memory), lacks_memory(e)
            connection.send_bytes(notes.pack(found, last))


class Worker:
    """A process with the parent's end of its pipe."""

    def __init__(self, make: Make, limit: float, memory: int) -> None:
        self.connection, theirs = Pipe()
        try:
            self._bound(limit)
            self.process = _Process(target=_serve, args=(theirs, make, memory))
            self.process.start()
        finally:
            theirs.close()
        self._ready = selectors.PollSelector()  # one for all answers: to make it takes as long as a short answer
        self._ready.register(self.connection, selectors.EVENT_READ)
        self._ready.register(self.process.sentinel, selectors.EVENT_READ)

    def _bound(self, limit: float) -> None:
        """No write, and no read of a message that has begun, takes longer: they raise BlockingIOError then. Without
        that, one to a process that is suspended takes for ever."""
        seconds = min(max(limit, 0.001), 1e6)
        value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        with socket.socket(fileno=os.dup(self.connection.fileno())) as same:
            same.setblocking(True)  # whatever socket.setdefaulttimeout says
            same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)

    def is_alive(self) -> bool:
        with _CHILDREN:
            return self.process.is_alive()

    def receive(self, limit: float) -> bytes:
        """Raises TimeoutError after that many seconds; EOFError or OSError where the process has ended."""
        end = time.monotonic() + limit
        while True:
            came = [key.fileobj for key, _ in self._ready.select(min(POLL, max(0.0, end - time.monotonic())))]
            if self.connection in came:
                return self.connection.recv_bytes()
            if came or not self.is_alive():
                raise EOFError
            if time.monotonic() >= end:
                raise TimeoutError

    def stop(self) -> None:
        """It is killed, with all that it has started: `end` waits for that."""
        self.process.terminate()

    def end(self, late: bool = False) -> int | None:
        """Its exit code. It is killed, at once where it is late, else unless it ends by itself."""
        self.connection.close()
        assert self.process.pid is not None
        with _CHILDREN:
            self.process.join(0 if late else POLL)
            self.process.terminate()
            self.process.join(GRACE)
            with contextlib.suppress(OSError):  # of a guard that hangs or was killed
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join(GRACE)
            code = self.process.exitcode
            if code is not None:
                self.process.close()
        return code


def _forked() -> None:
    global _CHILDREN
    _CHILDREN = threading.RLock()


os.register_at_fork(after_in_child=_forked)
