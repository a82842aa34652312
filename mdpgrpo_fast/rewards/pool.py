"""Worker processes that check constraints and run isolated reward functions, one completion at a time."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.context
import sys
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessPool

from ..config import ConfigError
from ..data import Example
from ..verifiers import CheckError
from .constraints import ConstraintReward
from .functions import Arguments, TrainerState, check_values, describe, load_reward, place_of, trace_of

POLL = 1.0  # seconds between two looks at whether the pool is still alive
RESTARTS = 3  # of a pool that ends by itself, for one call of the scorer
_STARTING = threading.Lock()  # pools start and restart workers from threads of their own


class _Process(multiprocessing.context.SpawnProcess):
    """A worker that does not import the program's main script: one without a main guard would start a second run."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _STARTING:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            try:
                return multiprocessing.context.SpawnProcess._Popen(process_obj)  # type: ignore[attr-defined]
            finally:
                sys.modules["__main__"] = main


class _Context(multiprocessing.context.SpawnContext):
    Process = _Process  # type: ignore[assignment]


@dataclass(frozen=True)
class Job:
    """One completion for a worker. text: as functions see it; answer: as constraints do."""

    example: Example
    text: str
    answer: str
    token_ids: list[int] = field(default_factory=list)
    state: TrainerState = field(default_factory=TrainerState)


@dataclass(frozen=True)
class Failure:
    """Why a call gave nothing, in one line, and the traceback inside the user's code. Failures of one cause are alike
    whatever they say of the completion."""

    reason: str
    cause: str
    trace: str = ""

    @classmethod
    def of(cls, name: str, error: BaseException) -> Failure:
        """A reward that raised, or returned what `check_values` refuses."""
        text = str(error) if isinstance(error, ValueError) else ""
        said = text if text.startswith("returned ") else f"raised {describe(error)}"
        return cls(f"reward {name!r} {said}", f"{name} {type(error).__name__} {place_of(error)}", trace_of(error))

    @classmethod
    def of_check(cls, error: CheckError) -> Failure:
        """A constraint of the user's own that raised."""
        cause = error.__cause__ or error
        return cls(str(error), f"{type(cause).__name__} {place_of(cause)}", trace_of(cause))


@dataclass(frozen=True)
class Verdict:
    """Of a worker: the values of its functions, failures among them, and the constraints that hold."""

    values: list[float | Failure | None]
    satisfied: list[bool] | None = None
    constraint_reward: float | Failure | None = None
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


def _load(specs: list[str], constraints: ConstraintReward) -> None:
    """Runs once in each worker: what importing and making takes is before a completion's time limit starts."""
    with contextlib.suppress(ConfigError):
        constraints.load()
    for spec in specs:
        with contextlib.suppress(ConfigError):  # which the call will say
            _loaded(spec)


_loaded = functools.cache(load_reward)  # one object for all calls of a worker, with the state that it has


def _work(specs: list[str], constraints: ConstraintReward, job: Job) -> Verdict:
    """Runs in a worker. Exceptions come back as text: many cannot be unpickled."""
    reward: float | Failure | None = None
    flags = None
    if job.example.instruction_ids:
        try:
            reward, flags = constraints(job.example, job.answer)
        except CheckError as e:
            reward = Failure.of_check(e)
    arguments = Arguments([job.example], [job.text], [job.token_ids], job.state)
    values: list[float | Failure | None] = []
    for spec in specs:
        try:
            values += check_values(_loaded(spec)(**arguments.keywords()), 1)
        except (Exception, SystemExit) as e:
            values.append(Failure.of(spec, e))
    return Verdict(values, flags, reward, arguments.metrics, arguments.extra)


def _verify(constraints: ConstraintReward, mode: str, example: Example, answer: str) -> list[bool] | Failure:
    try:
        return constraints.satisfied(example, answer, mode)
    except CheckError as e:
        return Failure.of_check(e)


def longest_wait(calls: int, workers: int, timeout: float) -> float:
    """Seconds after which calls that all took their whole time are done, and a minute."""
    return 60 + timeout * (calls / workers + 1)


class Pending(NamedTuple):
    """A call that a worker has to make, and its future."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    future: Any


class Workers:
    """A pool of spawned processes, started with its first job. They import the verifiers and the functions: no torch,
    and no threads copied in the middle of a lock."""

    def __init__(self, specs: list[str], constraints: ConstraintReward, workers: int, timeout: float) -> None:
        self.specs, self.constraints, self.count, self.timeout = specs, constraints, workers, timeout
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self.count, context=_Context(), initializer=_load, initargs=(self.specs, self.constraints)
        )

    def start(self, jobs: list[Job]) -> list[Pending]:
        return [self._submit(_work, self.specs, self.constraints, job) for job in jobs]

    def start_verifying(self, jobs: list[Job], mode: str) -> list[Pending]:
        return [self._submit(_verify, self.constraints, mode, job.example, job.answer) for job in jobs]

    def _submit(self, function: Callable[..., Any], *args: Any) -> Pending:
        try:
            future = self._pool.schedule(function, args=args, timeout=self.timeout)
        except RuntimeError:
            # To pebble a worker that dies with nothing to do, or before it says what it does, is the end of all.
            self.stop()
            self._pool = self._new_pool()
            future = self._pool.schedule(function, args=args, timeout=self.timeout)
        return Pending(function, args, future)

    def collect(self, pending: list[Pending]) -> list[Any]:
        """What each worker gave, or a Failure. No wait is without a limit, whatever becomes of the pool."""
        results = self._wait(pending)
        for _ in range(RESTARTS):
            lost = [i for i, result in enumerate(results) if result is None]
            again = self._wait([self._submit(pending[i].function, *pending[i].args) for i in lost])
            for i, result in zip(lost, again, strict=True):
                results[i] = result
        died = Failure(f"the scoring processes died {RESTARTS + 1} times", "workers")
        return [died if result is None else result for result in results]

    def _wait(self, pending: list[Pending]) -> list[Any]:
        """The results; None where the pool ended before one was known."""
        deadline = time.monotonic() + longest_wait(len(pending), self.count, self.timeout)
        return [self._result(p.future, max(0.0, deadline - time.monotonic())) for p in pending]

    def _result(self, future: Any, limit: float) -> Any:
        end = time.monotonic() + limit
        # In slices: pebble forgets what stood in its queue when its pool ended.
        while not wait([future], min(POLL, max(0.0, end - time.monotonic())) if self._pool.active else 0).done:
            if not self._pool.active:
                return None
            if time.monotonic() >= end:
                future.cancel()
                return Failure(f"the scoring process gave no answer within {self.timeout:g} s", "worker timeout")
        try:
            return future.result(timeout=0)
        except (BrokenProcessPool, CancelledError):
            return None
        except (FutureTimeout, TimeoutError):
            return Failure(f"the scoring process gave no answer within {self.timeout:g} s", "worker timeout")
        except ProcessExpired as e:
            return Failure(f"the scoring process died with exit code {e.exitcode}", f"worker exit {e.exitcode}")
        except (Exception, SystemExit) as e:  # what a worker gave cannot be pickled, for one
            return Failure(f"the scoring process raised {describe(e)}", f"worker {type(e).__name__}")

    def stop(self) -> None:
        self._pool.stop()
        self._pool.join()
