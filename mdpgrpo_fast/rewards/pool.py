"""Worker processes that check constraints and run isolated reward functions, one completion at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..config import ConfigError
from ..data import Example
from ..verifiers import CheckError, Mode
from .constraints import ConstraintReward
from .functions import Arguments, TrainerState, check_values, describe, load_reward, place_of, text_of, trace_of
from .processes import Batch, Pool
from .worker import Lost, lacks_memory


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
        text = text_of(error) if isinstance(error, ValueError) else ""
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


def _load(specs: list[str], constraints: ConstraintReward) -> Callable[[tuple[str | None, Job]], Any]:
    """Runs once in each worker: what importing and making takes is before a completion's time limit starts."""
    with contextlib.suppress(ConfigError):
        constraints.load()
    for spec in specs:
        with contextlib.suppress(ConfigError):  # which the call will say
            _loaded(spec)
    return functools.partial(_answer, specs, constraints)


_loaded = functools.cache(load_reward)  # one object for all calls of a worker, with the state that it has


def _answer(
    specs: list[str], constraints: ConstraintReward, question: tuple[Mode | None, Job]
) -> Verdict | list[bool] | Failure:
    """Runs in a worker. With a mode: which constraints hold; without: all that is scored."""
    mode, job = question
    if mode is None:
        return _work(specs, constraints, job)
    try:
        return constraints.satisfied(job.example, job.answer, mode)
    except CheckError as e:
        return _failed_check(e)


def _failed_check(error: CheckError) -> Failure:
    if lacks_memory(error):
        raise error  # it says more of the process than of the constraint
    return Failure.of_check(error)


def _work(specs: list[str], constraints: ConstraintReward, job: Job) -> Verdict:
    """Exceptions come back as text: many cannot be unpickled. Raises one of memory, which costs the process."""
    reward: float | Failure | None = None
    flags = None
    if job.example.instruction_ids:
        try:
            reward, flags = constraints(job.example, job.answer)
        except CheckError as e:
            reward = _failed_check(e)
    arguments = Arguments([job.example], [job.text], [job.token_ids], job.state)
    values: list[float | Failure | None] = []
    for spec in specs:
        try:
            values += check_values(_loaded(spec)(**arguments.keywords()), 1)
        except (Exception, SystemExit) as e:
            if lacks_memory(e):
                raise
            values.append(Failure.of(spec, e))
    return Verdict(values, flags, reward, arguments.metrics, arguments.extra)


PAUSE, RESTART = 60.0, 10.0  # seconds that a process may take to start: the slowest, and each in a long row of them


def longest_wait(calls: int, workers: int, timeout: float) -> float:
    """Seconds after which calls are done that all take too long, so that each costs its process as well."""
    return PAUSE + (timeout + RESTART) * (calls / workers + 1)


class Workers:
    """Processes that score, started with their first job, and again with one after `stop`. They import the verifiers
    and the functions: no torch, and no threads copied in the middle of a lock."""

    def __init__(
        self, specs: list[str], constraints: ConstraintReward, workers: int, timeout: float, memory: int = 0
    ) -> None:
        self.specs, self.constraints, self.count, self.timeout = specs, constraints, workers, timeout
        self.pool = Pool(functools.partial(_load, specs, constraints), workers, timeout, memory)

    def start(self, jobs: list[Job]) -> Batch:
        return self.pool.ask([(None, job) for job in jobs])

    def start_verifying(self, jobs: list[Job], mode: Mode) -> Batch:
        return self.pool.ask([(mode, job) for job in jobs])

    def collect(self, batch: Batch) -> list[Any]:
        """What each worker gave, or a Failure. No wait is without a limit."""
        limit = longest_wait(len(batch.questions), self.count, self.timeout)
        answers = self.pool.answers(batch, self.timeout + PAUSE, limit)
        return [Failure(*answer) if isinstance(answer, Lost) else answer for answer in answers]

    def stop(self) -> None:
        self.pool.stop()
