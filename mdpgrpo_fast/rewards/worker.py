"""One spawned process that answers questions, and its pipe."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.popen_spawn_posix
import multiprocessing.process
import multiprocessing.spawn
import os
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
from typing import Any, NamedTuple

from ..log import log
from .functions import describe

Make = Callable[[], Callable[[Any], Any]]

POLL = 1.0  # seconds between two looks at a process whose pipes a child of its own may hold open
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
    def by(cls, error: BaseException) -> Lost:
        return cls(f"the scoring process raised {describe(error)}", f"worker {type(error).__name__}")


class _Notes(logging.Handler):
    """The library's warnings in a process, which go with its next answer: each would say them all."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelno, record.getMessage()))

    def pack(self, answer: Any) -> Any:
        said, self.said = self.said, []
        try:
            return ForkingPickler.dumps((answer, said))
        except Exception as e:
            return ForkingPickler.dumps((Lost.by(e), said))


def _end_with(parent: Any) -> None:
    """Ends the process when the one that asks is gone, whatever it is busy with. A fork of that one keeps its pipes
    open, so that their end alone does not tell."""
    while os.getppid() == parent.pid and not multiprocessing.connection.wait([parent.sentinel], POLL):
        pass
    os._exit(1)


def _serve(connection: Connection, make: Make) -> None:
    """Runs in a process until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the program that is interrupted ends the others
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    notes = _Notes()
    log.addHandler(notes)
    log.propagate = False
    answer = make()
    connection.send_bytes(notes.pack(None))
    with contextlib.suppress(EOFError, OSError):
        while True:
            data = connection.recv_bytes()
            try:
                found = answer(ForkingPickler.loads(data))
            except BaseException as e:
                found = Lost.by(e)
            connection.send_bytes(notes.pack(found))


class Worker:
    """A process with the parent's end of its pipe."""

    def __init__(self, make: Make, limit: float) -> None:
        self.connection, theirs = Pipe()
        try:
            self._bound(limit)
            self.process = _Process(target=_serve, args=(theirs, make))
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

    def end(self, late: bool = False) -> int | None:
        """Its exit code. It is killed, at once where it is late, else unless it ends by itself."""
        self.connection.close()
        with _CHILDREN:
            self.process.join(0 if late else POLL)
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
