"""A pool of spawned processes, each with, while there is work, a thread here that keeps its time limit."""

from __future__ import annotations

import atexit
import contextlib
import math
import multiprocessing.context
import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

from ..log import say_once
from .functions import describe
from .worker import GRACE, NO_ROOM, Lost, Make, Worker

STARTS = 4  # that fail, whatever the process, before what is asked is given up
_UNANSWERED = object()


class Batch:
    """Questions that are asked together, and the answers so far."""

    def __init__(self, questions: Sequence[Any]) -> None:
        self.questions, self.answers = questions, [_UNANSWERED] * len(questions)
        self.unanswered = len(questions)
        self.done = threading.Event()
        if not questions:
            self.done.set()

    def give(self, index: int, answer: Any) -> None:
        self.answers[index] = answer
        self.unanswered -= 1
        if not self.unanswered:
            self.done.set()


class _Slot:
    """Room for one process. A thread that it has owns its worker and its job."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.thread: threading.Thread | None = None
        self.job: tuple[Batch, int] | None = None
        self.stopped = False


class Pool:
    """Up to count processes that answer questions, one each at a time, started as they are needed.

    make: called once in each process, before any limit begins; gives the function that answers, or raises what its
    process ends with. limit: seconds for one question from when a process takes it; one that is late is killed and
    replaced, one that ends costs the question that it had. memory: MB that a process may take beyond what it holds once
    made, 0 for any; the question that asks for more is lost, and its process replaced. What processes have started ends
    with them. None of it keeps the interpreter alive.
    """

    def __init__(self, make: Make, count: int, limit: float, memory: int = 0) -> None:
        self.make, self.limit, self.memory = make, limit, memory
        self._late = Lost(f"the scoring process gave no answer within {limit:g} s", "worker timeout")
        self._lock = threading.Lock()  # of all below
        self._queue: deque[tuple[Batch, int]] = deque()
        self._slots = [_Slot() for _ in range(count)]
        self._failures = 0  # of processes that ended without a question, since the last answer
        self._progress = time.monotonic()  # when a question was last answered, or a process ready
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
                thread = threading.Thread(target=self._run, args=(slot,), daemon=True)
                try:
                    thread.start()
                except RuntimeError as e:  # of the system, or because the interpreter ends
                    if all(slot.thread is None for slot in self._slots):
                        self._lose(f"cannot be started: {describe(e)}")
                    break
                slot.thread = thread
        return batch

    def answers(self, batch: Batch, pause: float, limit: float = math.inf) -> list[Any]:
        """An answer, or Lost, to each question, after limit seconds at the latest, and sooner where for pause seconds
        no process was ready or gave an answer. The pool is stopped then, and by an exception in the wait (Ctrl-C)."""
        missing = Lost("the scoring processes were stopped", "workers")
        began = time.monotonic()
        try:
            while not batch.done.wait(
                left := min(max(began, self._progress) + pause, began + limit) - time.monotonic()
            ):
                if left <= 0:
                    waited = time.monotonic() - began
                    missing = Lost(f"no scoring process was done with it after {waited:.0f} s", "workers")
                    self.stop()
                    break
        except BaseException:
            self.stop()
            raise
        return [missing if answer is _UNANSWERED else answer for answer in batch.answers]

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
                    slot.worker.stop()
        for thread in threads:
            thread.join(GRACE)
        for slot in slots:
            if slot.thread is None:
                self._end(slot)

    def forked(self) -> None:
        """In a process that was forked: the threads are not there, the processes are those of the other."""
        jobs = [*self._queue, *(slot.job for slot in self._slots if slot.job is not None)]
        for batch, _ in jobs:
            batch.done = threading.Event()  # the lock of the old one may be held
            batch.done.set()
        self._lock, self._failures = threading.Lock(), 0
        self._queue, self._slots = deque(), [_Slot() for _ in self._slots]

    # ---- the thread of a slot ---------------------------------------------------------------------------------------

    def _run(self, slot: _Slot) -> None:
        while True:
            try:
                self._work(slot)
                return
            except Exception as e:  # unforeseen; without its thread, the slot would never be used again
                self._recover(slot, e)

    def _work(self, slot: _Slot) -> None:
        if slot.worker is not None and not slot.worker.is_alive():
            self._end(slot)  # it died with nothing to do
        while (job := self._next(slot)) is not None:
            batch, index = job
            answer = self._asked(slot, batch.questions[index])
            with self._lock:
                slot.job = None
                if slot.stopped:
                    batch.done.set()
                elif answer is _UNANSWERED:
                    self._queue.appendleft(job)
                else:
                    self._give(job, answer)

    def _recover(self, slot: _Slot, error: Exception) -> None:
        with self._lock:
            worker, slot.worker = slot.worker, None
            job, slot.job = slot.job, None
            if job is not None:
                self._give(job, Lost(f"asking a scoring process raised {describe(error)}", "workers"))
        if job is None:
            self._fail(slot, f"cannot be used: {describe(error)}")
        if worker is not None:
            with contextlib.suppress(Exception):
                worker.end(late=True)

    def _give(self, job: tuple[Batch, int], answer: Any) -> None:
        self._progress = time.monotonic()
        job[0].give(job[1], answer)

    def _next(self, slot: _Slot) -> tuple[Batch, int] | None:
        """What to ask next, with a worker to ask it; None where there is nothing: the thread is not the slot's then."""
        while True:
            with self._lock:
                if slot.stopped or not self._queue:
                    slot.thread = None
                    break
                if slot.worker is not None:
                    slot.job = self._queue.popleft()
                    return slot.job
            self._start(slot)
        if slot.stopped:
            self._end(slot)
        return None

    def _start(self, slot: _Slot) -> None:
        try:
            worker = Worker(self.make, self.limit, self.memory)
        except Exception as e:  # of the system, or of what cannot be pickled
            self._fail(slot, f"cannot be started: {describe(e)}")
            return
        with self._lock:
            slot.worker = worker
            if slot.stopped:
                worker.stop()
        try:
            self._unpack(worker.receive(math.inf))
            self._progress = time.monotonic()
        except (EOFError, OSError):
            self._died(slot, self._end(slot))

    def _asked(self, slot: _Slot, question: Any) -> Any:
        """The answer, or Lost; _UNANSWERED where the process was gone before it took the question."""
        worker = slot.worker
        assert worker is not None
        try:
            data = ForkingPickler.dumps(question)
        except Exception as e:
            return Lost(
                f"a completion cannot be sent to a scoring process: {describe(e)}", f"worker {type(e).__name__}"
            )
        end = time.monotonic() + self.limit
        try:
            worker.connection.send_bytes(data)
        except BlockingIOError:
            self._end(slot, late=True)
            return self._late
        except OSError:
            code = self._end(slot)
            if code == NO_ROOM:
                return Lost(f"a completion and its row take more than reward_memory = {self.memory} MB", "memory")
            self._died(slot, code)
            return _UNANSWERED
        try:
            found = worker.receive(max(0.0, end - time.monotonic()))
        except (TimeoutError, BlockingIOError):
            self._end(slot, late=True)
            return self._late
        except (EOFError, OSError):
            code = self._end(slot)
            maybe = f"; it may take reward_memory = {self.memory} MB" if self.memory and code == -signal.SIGABRT else ""
            return Lost(f"the scoring process died with exit code {code}{maybe}", f"worker exit {code}")
        self._failures = 0
        try:
            answer, last = self._unpack(found)
        except Exception as e:
            return Lost.by(e)
        if last:
            self._end(slot)
        return answer

    def _unpack(self, found: bytes) -> tuple[Any, bool]:
        """The answer, and whether its process ends now."""
        answer, said, last = ForkingPickler.loads(found)
        with self._lock:  # or two threads say the same
            for level, text in said:
                say_once(level, text)
        return answer, last

    def _died(self, slot: _Slot, code: int | None) -> None:
        self._fail(slot, f"died {STARTS} times, the last with exit code {code}")

    def _fail(self, slot: _Slot, how: str) -> None:
        """Counts a process that ended before it was asked; after a few, everything that waits is lost."""
        with self._lock:
            if slot.stopped:
                return  # it was killed, and what waits now waits for others
            self._failures += 1
            if self._failures >= STARTS:
                self._lose(how)

    def _lose(self, how: str) -> None:
        for job in self._queue:
            self._give(job, Lost(f"the scoring processes {how}", "workers"))
        self._queue.clear()

    def _end(self, slot: _Slot, late: bool = False) -> int | None:
        with self._lock:
            worker, slot.worker = slot.worker, None
        return worker.end(late) if worker is not None else None


_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()


def _forked() -> None:
    for pool in list(_POOLS):
        pool.forked()


os.register_at_fork(after_in_child=_forked)


@atexit.register
def _stop_all() -> None:
    """Else those that are busy would outlive the program for a moment."""
    for pool in list(_POOLS):
        pool.stop()
