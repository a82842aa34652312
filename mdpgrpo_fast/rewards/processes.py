"""A pool of spawned processes, each with its pipe and, while there is work, a thread here that keeps its time limit."""

from __future__ import annotations

import atexit
import contextlib
import math
import multiprocessing
import multiprocessing.context
import os
import selectors
import signal
import sys
import threading
import time
import types
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

from .functions import describe

Make = Callable[[], Callable[[Any], Any]]

STARTS = 4  # that fail, whatever the process, before what is asked is given up
POLL = 1.0  # seconds between two looks at a process whose pipes a child of its own may hold open
GRACE = 5.0  # seconds for a process that was killed to be gone
# multiprocessing reaps children and lists them without a lock, and __main__ is hidden for one start at a time.
_CHILDREN = threading.RLock()


class _Process(multiprocessing.context.SpawnProcess):
    """One that does not import the program's main script: a script without a main guard would start a second run."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            return multiprocessing.context.SpawnProcess._Popen(process_obj)  # type: ignore[attr-defined]
        finally:
            sys.modules["__main__"] = main


class Lost(NamedTuple):
    """Why a question has no answer, in one line, and what those that are lost alike share."""

    reason: str
    cause: str

    @classmethod
    def by(cls, error: BaseException) -> Lost:
        return cls(f"the scoring process raised {describe(error)}", f"worker {type(error).__name__}")


def _serve(connection: Connection, make: Make) -> None:
    """Runs in a process until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the program that is interrupted ends the others
    answer = make()
    connection.send(None)
    with contextlib.suppress(EOFError, OSError):
        while True:
            data = connection.recv_bytes()
            try:
                found = ForkingPickler.dumps(answer(ForkingPickler.loads(data)))
            except BaseException as e:  # an answer that cannot be pickled, for one
                found = ForkingPickler.dumps(Lost.by(e))
            connection.send_bytes(found)


class _Worker:
    """A process with the parent's end of its pipe."""

    def __init__(self, make: Make) -> None:
        self.connection, theirs = Pipe()
        try:
            with _CHILDREN:
                self.process = _Process(target=_serve, args=(theirs, make), daemon=True)
                self.process.start()
        finally:
            theirs.close()
        self._ready = selectors.PollSelector()  # one for all answers: to make it takes as long as a short answer
        self._ready.register(self.connection, selectors.EVENT_READ)
        self._ready.register(self.process.sentinel, selectors.EVENT_READ)

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


class Batch:
    """Questions that are asked together, and the answers so far."""

    def __init__(self, questions: Sequence[Any]) -> None:
        self.questions, self.answers, self.left = questions, [None] * len(questions), len(questions)
        self.done = threading.Event()
        if not questions:
            self.done.set()

    def give(self, index: int, answer: Any) -> None:
        self.answers[index] = answer
        self.left -= 1
        if not self.left:
            self.done.set()


class _Slot:
    """Room for one process. A thread that it has owns its worker."""

    def __init__(self) -> None:
        self.worker: _Worker | None = None
        self.thread: threading.Thread | None = None
        self.stopped = False


class Pool:
    """Up to count processes that answer questions, one each at a time, started as they are needed.

    make: called once in each process, before any limit begins; gives the function that answers, or raises what its
    process ends with. limit: seconds for one question from when a process takes it; one that is late is killed and
    replaced, one that ends costs the question that it had. None of it keeps the interpreter alive.
    """

    def __init__(self, make: Make, count: int, limit: float) -> None:
        self.make, self.limit = make, limit
        self._late = Lost(f"the scoring process gave no answer within {limit:g} s", "worker timeout")
        self._lock = threading.Lock()  # of all below
        self._queue: deque[tuple[Batch, int]] = deque()
        self._slots = [_Slot() for _ in range(count)]
        self._failures = 0  # of processes that ended without a question, since the last answer
        _POOLS.add(self)

    @property
    def processes(self) -> list[multiprocessing.context.SpawnProcess]:
        """Those that are there."""
        with self._lock:
            return [slot.worker.process for slot in self._slots if slot.worker is not None]

    def ask(self, questions: Sequence[Any]) -> Batch:
        """Hands them to the processes, and does not wait."""
        batch = Batch(questions)
        with self._lock:
            self._failures = 0
            self._queue.extend((batch, i) for i in range(len(questions)))
            idle = [slot for slot in self._slots if slot.thread is None]
            for slot in idle[: len(self._queue)]:
                slot.thread = threading.Thread(target=self._run, args=(slot,), daemon=True)
                slot.thread.start()
        return batch

    def answers(self, batch: Batch, limit: float) -> list[Any]:
        """An answer, or Lost, to each question, after limit seconds at the latest; the pool is stopped then, and by an
        exception in the wait (Ctrl-C) too."""
        missing = Lost("the scoring processes were stopped", "workers")
        try:
            if not batch.done.wait(limit):
                missing = self._late
                self.stop()
        except BaseException:
            self.stop()
            raise
        return [missing if answer is None else answer for answer in batch.answers]

    def stop(self) -> None:
        """Ends the processes, and leaves what has no answer without one. What is asked later starts new ones."""
        with self._lock:
            slots, self._slots = self._slots, [_Slot() for _ in self._slots]
            for batch, _ in self._queue:
                batch.done.set()
            self._queue.clear()
            threads = [slot.thread for slot in slots if slot.thread is not None]
            for slot in slots:
                slot.stopped = True
                if slot.worker is not None:
                    slot.worker.process.kill()
        for thread in threads:
            thread.join(GRACE)
        for slot in slots:
            if slot.thread is None:
                self._end(slot)

    # ---- the thread of a slot ---------------------------------------------------------------------------------------

    def _run(self, slot: _Slot) -> None:
        if slot.worker is not None and not slot.worker.is_alive():
            self._end(slot)  # it died with nothing to do
        while (job := self._next(slot)) is not None:
            batch, index = job
            answer = self._asked(slot, batch.questions[index])
            with self._lock:
                if slot.stopped:
                    batch.done.set()
                elif answer is None:
                    self._queue.appendleft(job)
                else:
                    batch.give(index, answer)

    def _next(self, slot: _Slot) -> tuple[Batch, int] | None:
        """What to ask next, with a worker to ask it; None where there is nothing: the thread is not the slot's then."""
        while True:
            with self._lock:
                if slot.stopped or not self._queue:
                    slot.thread = None
                    break
                if slot.worker is not None:
                    return self._queue.popleft()
            self._start(slot)
        if slot.stopped:
            self._end(slot)
        return None

    def _start(self, slot: _Slot) -> None:
        try:
            worker = _Worker(self.make)
        except Exception as e:  # of the system, or of what cannot be pickled
            self._fail(f"cannot be started: {describe(e)}")
            return
        with self._lock:
            slot.worker = worker
            if slot.stopped:
                worker.process.kill()
        try:
            worker.receive(math.inf)
        except (EOFError, OSError):
            self._fail(f"died {STARTS} times, the last with exit code {self._end(slot)}")

    def _asked(self, slot: _Slot, question: Any) -> Any:
        """The answer, or Lost; None where the process was gone before it took the question."""
        worker = slot.worker
        assert worker is not None
        try:
            data = ForkingPickler.dumps(question)
        except Exception as e:
            return Lost(
                f"a completion cannot be sent to a scoring process: {describe(e)}", f"worker {type(e).__name__}"
            )
        try:
            worker.connection.send_bytes(data)
        except OSError:
            self._fail(f"died {STARTS} times, the last with exit code {self._end(slot)}")
            return None
        try:
            found = worker.receive(self.limit)
        except TimeoutError:
            self._end(slot, late=True)
            return self._late
        except (EOFError, OSError):
            code = self._end(slot)
            return Lost(f"the scoring process died with exit code {code}", f"worker exit {code}")
        self._failures = 0
        try:
            return ForkingPickler.loads(found)
        except Exception as e:
            return Lost.by(e)

    def _fail(self, how: str) -> None:
        """Counts a process that ended before it was asked; after a few, everything that waits is lost."""
        with self._lock:
            self._failures += 1
            if self._failures >= STARTS:
                for batch, index in self._queue:
                    batch.give(index, Lost(f"the scoring processes {how}", "workers"))
                self._queue.clear()

    def _end(self, slot: _Slot, late: bool = False) -> int | None:
        with self._lock:
            worker, slot.worker = slot.worker, None
        return worker.end(late) if worker is not None else None


_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()
os.register_at_fork(after_in_child=_POOLS.clear)


@atexit.register
def _stop_all() -> None:
    """Before multiprocessing waits for its children."""
    for pool in list(_POOLS):
        pool.stop()
