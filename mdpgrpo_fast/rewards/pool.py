"""Worker processes that check constraints and run isolated reward functions, one completion at a time."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import sys
import time
import types
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any

from pebble import ProcessExpired, ProcessPool

from ..data import Example
from .constraints import ConstraintReward
from .functions import Arguments, TrainerState, check_values, describe, load_reward, trace_of


class _Process(multiprocessing.context.SpawnProcess):
    """A worker that does not import the program's main script: one without a main guard would start a second run."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
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
    """Why a call gave nothing, in one line, and the traceback inside the user's code."""

    reason: str
    trace: str = ""


@dataclass(frozen=True)
class Verdict:
    """Of a worker: the values of its functions, failures among them, and the constraints that hold."""

    values: list[float | Failure | None]
    satisfied: list[bool] | None = None
    constraint_reward: float | None = None
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


def _load(specs: list[str]) -> None:
    """Runs once in each worker: a module's import takes its time before a completion's time limit starts."""
    for spec in specs:
        load_reward(spec)


def _work(specs: list[str], constraints: ConstraintReward, job: Job) -> Verdict:
    """Runs in a worker. Exceptions come back as text: many cannot be unpickled."""
    reward = flags = None
    if job.example.instruction_ids:
        reward, flags = constraints(job.example, job.answer)
    arguments = Arguments([job.example], [job.text], [job.token_ids], job.state)
    values: list[float | Failure | None] = []
    for spec in specs:
        try:
            values += check_values(load_reward(spec)(**arguments.keywords()), 1)
        except (Exception, SystemExit) as e:
            values.append(Failure(f"reward {spec!r} {said_of(e)}", trace_of(e)))
    return Verdict(values, flags, reward, arguments.metrics, arguments.extra)


def said_of(e: BaseException) -> str:
    """What a reward did, to follow its name: "returned ..." as `check_values` says it, or "raised ..."."""
    text = str(e) if isinstance(e, ValueError) else ""
    return text if text.startswith("returned ") else f"raised {describe(e)}"


def _verify(constraints: ConstraintReward, mode: str, example: Example, answer: str) -> list[bool]:
    return constraints.satisfied(example, answer, mode)


class Workers:
    """A pool of spawned processes, started with its first job. They import the verifiers and the functions: no torch,
    and no threads copied in the middle of a lock."""

    def __init__(self, specs: list[str], constraints: ConstraintReward, workers: int, timeout: float) -> None:
        self.specs, self.constraints, self.count, self.timeout = specs, constraints, workers, timeout
        self._pool = ProcessPool(max_workers=workers, context=_Context(), initializer=_load, initargs=(specs,))

    def start(self, jobs: list[Job]) -> list[Any]:
        """A future for each job."""
        return [
            self._pool.schedule(_work, args=[self.specs, self.constraints, job], timeout=self.timeout) for job in jobs
        ]

    def start_verifying(self, jobs: list[Job], mode: str) -> list[Any]:
        return [
            self._pool.schedule(_verify, args=[self.constraints, mode, job.example, job.answer], timeout=self.timeout)
            for job in jobs
        ]

    def collect(self, futures: list[Any]) -> list[Any]:
        """What each worker gave, or a Failure. No wait is without a limit, whatever becomes of the pool."""
        deadline = time.monotonic() + 60 + self.timeout * (len(futures) / self.count + 1)
        return [self._result(future, max(0.0, deadline - time.monotonic())) for future in futures]

    def _result(self, future: Any, limit: float) -> Any:
        try:
            return future.result(timeout=limit)
        except (FutureTimeout, TimeoutError):
            future.cancel()
            return Failure(f"no answer within {self.timeout:g} s")
        except ProcessExpired as e:
            return Failure(f"the scoring process died with exit code {e.exitcode}")
        except Exception as e:  # what a worker gave cannot be pickled, for one
            return Failure(f"the scoring process raised {describe(e)}")

    def stop(self) -> None:
        self._pool.stop()
        self._pool.join()
