"""Scores of a step's completions: rewards called, their values summed, and a reason for each sample that is lost."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..config import ConfigError, TrainConfig
from ..data import Example
from ..log import say_once
from ..verifiers import INSTRUCTIONS, Mode
from .calls import CallTimeout, call_async, call_limited
from .constraints import ConstraintReward
from .functions import (
    MOST,
    Arguments,
    RewardError,
    RewardFunction,
    TrainerState,
    check_values,
    is_async,
    is_usable,
    load_reward,
    name_of,
    spec_of,
)
from .lengths import CosineScaledReward, LengthReward, named_reward, unknown_reward
from .model import RewardModel
from .pool import Failure, Job, Verdict, Workers

CONSTRAINTS = "constraints"
CALL_TIMEOUT, COMPLETION_TIMEOUT = 600.0, 10.0  # seconds, where none are given
SAMPLES = ("Here is an answer.", "No")  # what rewards are tried with before the model is there
Value = float | Failure | None


@dataclass(frozen=True)
class Score:
    """One response's rewards. `total` is None where the sample is dropped, `problem` says why."""

    total: float | None
    parts: dict[str, float | None]  # by the names of Scorer.names; None: the reward did not apply, or failed
    satisfied: list[bool] | None
    problem: str | None = None
    cause: str = ""  # of a reward that failed, alike for all that it fails alike; "": none failed
    trace: str = ""
    extra: dict[str, Any] = field(default_factory=dict)  # of log_extra


@dataclass(frozen=True)
class Reward:
    """One reward of a run. function: None for `constraints`, for what workers call by its spec, and for what is made of
    their verdict on the constraints: scaled."""

    name: str
    spec: str
    function: RewardFunction | None
    isolated: bool = False
    scaled: CosineScaledReward | None = None

    @property
    def of_constraints(self) -> bool:
        return self.spec == CONSTRAINTS or self.scaled is not None


def named_spec(reward: str | RewardFunction) -> str:
    """What a run's settings call a reward: its spec, or of a function its module and name, whether or not it could be
    loaded by them."""
    if isinstance(reward, (str, LengthReward)):
        return reward if isinstance(reward, str) else reward.spec
    return f"{getattr(reward, '__module__', type(reward).__module__)}:{name_of(reward)}"


def _resolve(
    reward: str | RewardFunction, isolation: str, trust_remote_code: bool, max_completion_length: int | None
) -> Reward:
    length = named_reward(reward, max_completion_length) if isinstance(reward, str) else reward
    if isinstance(length, CosineScaledReward) and length.of_constraints:
        return Reward(name_of(length), length.spec, None, scaled=length)
    if isinstance(length, LengthReward):
        return Reward(name_of(length), length.spec, length)
    if not isinstance(reward, str):
        if isolation == "none" and not getattr(reward, "per_completion", False):
            return Reward(name_of(reward), named_spec(reward), reward)
        reward = spec_of(reward)
    if reward == CONSTRAINTS:
        return Reward(reward, reward, None)
    if ":" not in reward and ("/" in reward or Path(reward).is_dir()):
        model = RewardModel(reward, trust_remote_code)
        return Reward(name_of(model), reward, model)
    if ":" not in reward:
        raise unknown_reward(reward)
    function = load_reward(reward)
    isolated = isolation == "process" or getattr(function, "per_completion", False)
    if isolated and is_async(function):
        raise ConfigError(f"reward {reward!r} is async, and is called with all completions of a step, not one by one")
    return Reward(name_of(function), reward, None if isolated else function, isolated)


def _told_apart(rewards: list[Reward]) -> list[Reward]:
    """Names that two rewards share, or one with `constraints`, become specs; where those are equal, as of two lambdas,
    they get a number."""
    counts = Counter([CONSTRAINTS, *{(r.name, r.spec): r.name for r in rewards if r.spec != CONSTRAINTS}.values()])
    rewards = [replace(r, name=r.spec) if counts[r.name] > 1 else r for r in rewards]
    seen: Counter[str] = Counter()
    for i, reward in enumerate(rewards):
        seen[reward.name] += 1
        if seen[reward.name] > 1:
            rewards[i] = replace(reward, name=f"{reward.name} {seen[reward.name]}")
    return rewards


class Scorer:
    """Scores completions of a step: functions are called once with all of them, in this process; constraints and
    isolated functions one completion at a time in worker processes.

    rewards: specs as of TrainConfig.reward, or functions. weights: one each, default 1. max_completion_length: what
    rewards of lengths take where their spec gives none. A call that raises, takes longer than timeout or returns no
    numbers loses its completions: they come back with `total` None and the reason in `problem`. A reward, or weighted
    sum, that is NaN or beyond ±1e6 raises RewardError with the row, or drops the sample where on_bad_reward is "drop".
    None is "not mine": the other rewards are summed; where all are None the sample is dropped.
    Use as a context manager; workers end with it. Raises ConfigError for a reward that cannot be loaded.
    """

    def __init__(
        self,
        rewards: Sequence[str | RewardFunction],
        weights: Sequence[float] | None = None,
        *,
        rules: str = TrainConfig.rules,
        instructions: Sequence[str] = (),
        constraint_reward: str = TrainConfig.constraint_reward,
        isolation: str = TrainConfig.reward_isolation,
        timeout: float | None = TrainConfig.reward_timeout,
        workers: int = TrainConfig.reward_workers,
        memory: int = TrainConfig.reward_memory,
        on_bad_reward: str = TrainConfig.on_bad_reward,
        trust_remote_code: bool = False,
        max_completion_length: int | None = None,
    ) -> None:
        found = [_resolve(r, isolation, trust_remote_code, max_completion_length) for r in rewards]
        self.rewards = found = _told_apart(found)
        self.weights = [1.0] * len(found) if weights is None else list(map(float, weights))
        if len(self.weights) != len(found):
            raise ConfigError(f"reward_weights must have one weight per reward ({len(found)}); got {self.weights}")
        self.call_timeout = timeout or CALL_TIMEOUT
        self.drop_bad = on_bad_reward == "drop"
        self._causes: set[str] = set()  # for which constraints could not be checked, each said once
        self.unchecked, self.unchecked_reason = 0, ""  # of `verify`: how many, and why the first
        self.state = TrainerState()  # the trainer keeps it up to date
        self.specs = [r.spec for r in found if r.isolated]
        self.metrics: dict[str, list[float]] = {}
        constraints = ConstraintReward(rules, constraint_reward, instructions)
        constraints.load()
        self._workers = Workers(self.specs, constraints, workers, timeout or COMPLETION_TIMEOUT, memory)

    @classmethod
    def of(cls, run: Any, rewards: Sequence[str | RewardFunction] | None = None) -> Scorer:
        """That of a run's settings: a TrainConfig, or what has its knobs of rewards. rewards: in place of the run's."""
        return cls(
            run.reward if rewards is None else rewards,
            run.reward_weights,
            rules=run.rules,
            instructions=run.instructions,
            constraint_reward=run.constraint_reward,
            isolation=run.reward_isolation,
            timeout=run.reward_timeout,
            workers=run.reward_workers,
            memory=run.reward_memory,
            on_bad_reward=run.on_bad_reward,
            trust_remote_code=run.trust_remote_code,
            max_completion_length=run.max_completion_length,
        )

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the workers; a later call starts new ones."""
        self._workers.stop()

    @property
    def names(self) -> list[str]:
        """As each reward is logged: `constraints`, a function's name, the last part of a model's."""
        return [r.name for r in self.rewards]

    def to(self, device: Any) -> None:
        """Reward models run there."""
        for reward in self.rewards:
            if isinstance(reward.function, RewardModel):
                reward.function.to(device)

    def check(self, examples: Sequence[Example]) -> None:
        """Raises ConfigError for a prompt without constraints, where there is no reward of anything else."""
        if all(r.of_constraints for r in self.rewards):
            for index, example in enumerate(examples, 1):
                if not example.instruction_ids:
                    raise ConfigError(
                        f"prompt {index} has no instruction_id_list, which the reward {self.rewards[0].spec!r} needs: "
                        f"{example.text[:60]!r}"
                    )

    def try_out(self, examples: Sequence[Example]) -> None:
        """Calls every reward but `constraints` with two sample completions. Raises RewardError where a run would lose
        both."""
        if all(r.spec == CONSTRAINTS for r in self.rewards):
            return
        rows = [*examples[:2], *examples[:1]][:2]
        scores = self(rows, list(SAMPLES), completion_ids=[[1, 2, 3], [4]])
        self.take_metrics()
        if all(s.cause for s in scores):
            raise RewardError(
                f"{scores[0].problem}; it was tried on two sample rows (--no-reward-check)", scores[0].trace
            )

    def try_own_types(self, examples: Sequence[Example]) -> None:
        """Asks each instruction type of one's own about two sample completions, with the first arguments that the
        examples have. Raises RewardError where it answers neither."""
        first: dict[str, Example] = {}
        for example in examples:
            for instruction_id, kwargs in zip(example.instruction_ids, example.kwargs, strict=True):
                if INSTRUCTIONS[instruction_id].own:
                    first.setdefault(
                        instruction_id, replace(example, instruction_ids=[instruction_id], kwargs=[kwargs])
                    )
        for example in first.values():
            jobs = [Job(example, sample, sample) for sample in SAMPLES]
            found = self._workers.collect(self._workers.start_verifying(jobs, "strict"))
            if all(isinstance(f, Failure) for f in found):
                raise RewardError(
                    f"{found[0].reason}; it was tried on two sample texts (training: --no-reward-check)", found[0].trace
                )

    def __call__(
        self,
        examples: Sequence[Example],
        responses: Sequence[str],
        *,
        answers: Sequence[str] | None = None,
        completion_ids: Sequence[list[int]] | None = None,
    ) -> list[Score]:
        """One Score per (example, response) pair, in order. answers: what constraints look at; default: responses."""
        if completion_ids is None and any(r.scaled or isinstance(r.function, LengthReward) for r in self.rewards):
            raise ValueError("completion_ids must be given: rewards of lengths count the tokens; got None")
        ids = completion_ids if completion_ids is not None else [[]] * len(responses)
        state = replace(self.state, log_history=[])
        jobs = [
            Job(e, r, a, i, state)
            for e, r, a, i in zip(examples, responses, answers or responses, ids, strict=True)
        ]  # fmt: skip
        needed = [i for i, job in enumerate(jobs) if self.specs or job.example.instruction_ids]
        futures = self._workers.start([jobs[i] for i in needed])
        arguments = Arguments(examples, responses, ids, self.state)
        columns = self._call_functions(arguments)
        verdicts = dict(zip(needed, self._workers.collect(futures), strict=True))
        for name, values in arguments.metrics.items():
            self.metrics.setdefault(name, []).extend(values)
        extras = {k: v for k, v in arguments.extra.items() if len(v) == len(jobs)}
        for column in arguments.extra.keys() - extras.keys():
            say_once(logging.WARNING, f"log_extra({column!r}) is left out: it needs one value per completion")
        return [
            self._score(
                job, verdicts.get(i), [c[i] if c else None for c in columns], {k: v[i] for k, v in extras.items()}
            )
            for i, job in enumerate(jobs)
        ]

    def take_metrics(self) -> dict[str, float]:
        """Means of what functions gave to log_metric since the last call."""
        means = {name: sum(values) / len(values) for name, values in self.metrics.items() if values}
        self.metrics = {}
        return means

    def verify(self, examples: Sequence[Example], responses: Sequence[str], mode: Mode) -> list[list[bool]]:
        """Which constraints each response satisfies; all False, and counted in `unchecked`, where checking failed."""
        jobs = [Job(e, r, r) for e, r in zip(examples, responses, strict=True)]
        found = self._workers.collect(self._workers.start_verifying(jobs, mode))
        failures = [f for f in found if isinstance(f, Failure)]
        self.unchecked += len(failures)
        self.unchecked_reason = self.unchecked_reason or (failures[0].reason if failures else "")
        return [
            [False] * len(e.instruction_ids) if isinstance(f, Failure) else f
            for e, f in zip(examples, found, strict=True)
        ]

    # ---- functions in this process ----------------------------------------------------------------------------------

    def _call_functions(self, arguments: Arguments) -> list[list[Value] | None]:
        """For each reward its value for each completion; None for those that workers call. Async ones come last and all
        at once, as TRL has it."""
        columns: list[list[Value] | None] = [None] * len(self.rewards)
        if not len(arguments.examples):
            return columns
        waiting: dict[int, Callable[[], Any]] = {}
        for i, reward in enumerate(self.rewards):
            if reward.function is None:
                continue
            call = partial(reward.function, **arguments.keywords())
            if is_async(reward.function):
                waiting[i] = call
                continue
            seconds = math.inf if isinstance(reward.function, RewardModel) else self.call_timeout
            columns[i] = self._values(reward, len(arguments.examples), partial(_limited, call, seconds))
        outcomes = call_async(list(waiting.values()), self.call_timeout) if waiting else []
        for i, outcome in zip(waiting, outcomes, strict=True):
            columns[i] = self._values(self.rewards[i], len(arguments.examples), partial(_given, outcome))
        return columns

    def _values(self, reward: Reward, count: int, call: Callable[[], Any]) -> list[Value]:
        try:
            return list(check_values(call(), count))
        except CallTimeout:
            failure = Failure(f"reward {reward.spec!r} gave no answer within {self.call_timeout:g} s", "timeout")
        except (Exception, SystemExit, asyncio.CancelledError) as e:
            failure = Failure.of(reward.spec, e)
        return [failure] * count

    # ---- one completion ---------------------------------------------------------------------------------------------

    def _score(self, job: Job, verdict: Any, values: list[Value], extra: dict[str, Any]) -> Score:
        satisfied = None
        if isinstance(verdict, Failure):
            values = [verdict if r.function is None else v for r, v in zip(self.rewards, values, strict=True)]
        elif verdict is not None:
            satisfied, isolated = verdict.satisfied, iter(verdict.values)
            self._say_unchecked(verdict.constraint_reward)
            for name, logged in verdict.metrics.items():
                self.metrics.setdefault(name, []).extend(logged)
            extra = {**extra, **{k: v[0] for k, v in verdict.extra.items() if len(v) == 1}}
            for i, reward in enumerate(self.rewards):
                if reward.function is None:
                    values[i] = next(isolated) if reward.isolated else _of_constraints(reward, verdict, job)
        parts = {n: v if isinstance(v, (int, float)) else None for n, v in zip(self.names, values, strict=True)}
        pair = f"prompt {job.example.text[:80]!r}, response {job.text[:80]!r}"
        score = partial(Score, None, parts, satisfied, extra=extra)
        failure = next((v for v in values if isinstance(v, Failure)), None)
        if failure is not None:
            return score(f"{failure.reason}, for {pair}", cause=failure.cause, trace=failure.trace)
        for reward, value in zip(self.rewards, parts.values(), strict=True):
            if not is_usable(value):
                return self._unusable(score, f"reward {reward.spec!r} gave", value, pair, reward.spec)
        if all(v is None for v in parts.values()):
            return score(f"no reward applies: all gave None for {pair}")
        total = sum(w * v for w, v in zip(self.weights, parts.values(), strict=True) if v is not None)
        if not is_usable(total):
            what = f"rewards {list(parts.values())} with weights {self.weights} sum up to"
            return self._unusable(score, what, total, pair, "weighted sum")
        return replace(score(), total=total)

    def _unusable(self, score: Callable[..., Score], what: str, value: float | None, pair: str, cause: str) -> Score:
        assert value is not None
        beyond = f", beyond the ±{MOST:,.0f} that advantages are made of" if math.isfinite(value) else ""
        problem = f"{what} {value!r} for {pair}{beyond}"
        if not self.drop_bad:
            raise RewardError(f"{problem}; {'scale it, or ' * bool(beyond)}on_bad_reward = drop leaves it out")
        found = score(problem, cause=f"{cause} not usable")
        return replace(found, parts={n: v if is_usable(v) else None for n, v in found.parts.items()})

    def _say_unchecked(self, reward: float | Failure | None) -> None:
        """Where no reward loses its sample by it, that constraints cannot be checked would be lost in silence."""
        if not isinstance(reward, Failure) or reward.cause in self._causes:
            return
        if any(r.of_constraints for r in self.rewards):
            return
        self._causes.add(reward.cause)
        say_once(logging.WARNING, f"constraints that cannot be checked: {reward.reason}")


def _of_constraints(reward: Reward, verdict: Verdict, job: Job) -> Value:
    """What a worker's verdict on the constraints of a completion is worth."""
    share = verdict.constraint_reward
    if reward.scaled is None or share is None or isinstance(share, Failure):
        return share
    return reward.scaled.of(len(job.token_ids), all(verdict.satisfied or ()))


def _limited(call: Callable[[], Any], seconds: float) -> Any:
    """A function's values within the time limit, a generator's too."""

    def run() -> Any:
        returned = call()
        return list(returned) if hasattr(returned, "__next__") else returned

    return run() if seconds == math.inf else call_limited(run, seconds)


def _given(outcome: Any) -> Any:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
