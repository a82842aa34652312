"""Rewards: the share of constraints satisfied, or any function of TRL's signature, scored in a guarded process pool."""

from __future__ import annotations

import importlib
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

from pebble import ProcessExpired, ProcessPool

from . import verifiers
from .config import ConfigError, TrainConfig
from .data import Example

RewardFunction = Callable[..., "Sequence[float | None]"]


class RewardError(RuntimeError):
    """A reward that cannot be used; the message shows the row."""


class ConstraintReward:
    """Share of a prompt's constraints that a response satisfies, r = satisfied / K, by `verifiers`."""

    def __init__(self, rules: str = TrainConfig.rules, mode: str = "strict") -> None:
        self.rules, self.mode = rules, mode

    def satisfied(self, example: Example, response: str) -> list[bool]:
        """Which of the example's constraints hold, by position."""
        return verifiers.verify_all(
            example.instruction_ids, response, example.kwargs, prompt=example.text, mode=self.mode, rules=self.rules
        )

    def __call__(self, example: Example, response: str) -> tuple[float, list[bool]]:
        flags = self.satisfied(example, response)
        return sum(flags) / len(flags), flags


def load_reward(spec: str) -> RewardFunction:
    """The function named by `module:function`. Raises ConfigError where it cannot be imported or called."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise ConfigError(f"reward must be 'constraints' or module:function; got {spec!r}")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as e:  # whatever a user's module does when it is imported
        raise ConfigError(f"reward {spec!r} cannot be loaded: {' '.join(str(e).split())}") from None
    if not callable(function):
        raise ConfigError(f"reward {spec!r} is not a function")
    return function


@dataclass(frozen=True)
class Score:
    """One response's rewards. `total` is None where the sample is dropped, `problem` says why."""

    total: float | None
    parts: list[float | None]
    satisfied: list[bool] | None
    problem: str | None = None


def _load_rewards(specs: list[str]) -> None:
    """Runs once in each worker: a module's import takes its time before a response's time limit starts."""
    for spec in specs:
        if spec != "constraints":
            load_reward(spec)


def _verify_one(rules: str, mode: str, example: Example, response: str) -> list[bool]:
    return ConstraintReward(rules, mode).satisfied(example, response)


def _score_one(specs: list[str], rules: str, example: Example, response: str) -> tuple[list[Any], list[bool] | None]:
    """Runs in a worker: every reward of one response, and its satisfied constraints where it has any."""
    parts: list[Any] = []
    flags = None
    if example.instruction_ids:
        share, flags = ConstraintReward(rules)(example, response)
    for spec in specs:
        if spec == "constraints":
            parts.append(share)
        else:
            taken = ("prompt", "completion", "prompts", "completions")
            columns = {k: [v] for k, v in example.columns.items() if k not in taken}
            chat = not isinstance(example.prompt, str)
            completion: Any = [{"role": "assistant", "content": response}] if chat else response
            values = load_reward(spec)(prompts=[example.prompt], completions=[completion], **columns)
            value = next(iter(values))
            parts.append(None if value is None else float(value))
    return parts, flags


class Scorer:
    """Scores responses in worker processes, one call per response, each with a time limit.

    A scorer that hangs past the limit or dies costs its own sample: it comes back with `total` None and is counted in
    `dropped`. A None or NaN reward raises RewardError with the row, or drops the sample where on_bad_reward is `drop`.
    Use as a context manager; workers end with it.
    """

    def __init__(
        self,
        specs: list[str],
        weights: list[float] | None = None,
        *,
        rules: str = TrainConfig.rules,
        timeout: float | None = TrainConfig.reward_timeout,
        workers: int = TrainConfig.reward_workers,
        on_bad_reward: str = TrainConfig.on_bad_reward,
    ) -> None:
        _load_rewards(specs)
        self.specs, self.rules = list(specs), rules
        self.weights = list(weights) if weights is not None else [1.0] * len(specs)
        self.timeout, self.drop_bad = timeout or 10.0, on_bad_reward == "drop"
        self.dropped = 0
        # Spawned workers import the verifiers alone: no torch, no threads copied in the middle of a lock.
        self._pool = ProcessPool(
            max_workers=workers,
            context=multiprocessing.get_context("spawn"),
            initializer=_load_rewards,
            initargs=(self.specs,),
        )

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.stop()
        self._pool.join()

    def check(self, examples: list[Example]) -> None:
        """Raises ConfigError for a prompt that the reward `constraints` cannot score."""
        if "constraints" in self.specs:
            for index, example in enumerate(examples):
                if not example.instruction_ids:
                    raise ConfigError(
                        f"prompt {index + 1} has no instruction_id_list, which the reward 'constraints' needs: "
                        f"{example.text[:60]!r}"
                    )

    def __call__(self, examples: list[Example], responses: list[str]) -> list[Score]:
        """One Score per (example, response) pair, in order."""
        jobs = [
            self._pool.schedule(_score_one, args=[self.specs, self.rules, e, r], timeout=self.timeout)
            for e, r in zip(examples, responses, strict=True)
        ]
        return [self._collect(*row) for row in zip(jobs, examples, responses, strict=True)]

    def verify(self, examples: list[Example], responses: list[str], mode: str) -> list[list[bool]]:
        """Which constraints each response satisfies; all False, and counted in `dropped`, where checking failed."""
        jobs = [
            self._pool.schedule(_verify_one, args=[self.rules, mode, e, r], timeout=self.timeout)
            for e, r in zip(examples, responses, strict=True)
        ]
        flags = []
        for job, example in zip(jobs, examples, strict=True):
            try:
                flags.append(job.result())
            except (FutureTimeout, ProcessExpired):
                self.dropped += 1
                flags.append([False] * len(example.instruction_ids))
        return flags

    def _collect(self, job: Any, example: Example, response: str) -> Score:
        try:
            parts, flags = job.result()
        except FutureTimeout:
            return self._drop(f"no answer within {self.timeout:g} s")
        except ProcessExpired as e:
            return self._drop(f"the scoring process died with exit code {e.exitcode}")
        except Exception as e:
            reason = " ".join(str(e).split())[:200]
            return self._drop(f"the scorer raised {type(e).__name__}: {reason}")
        values = [None if p is None or not math.isfinite(p) else p for p in parts]
        if None in values:
            spec = self.specs[values.index(None)]
            got, pair = parts[values.index(None)], f"prompt {example.text[:80]!r}, response {response[:80]!r}"
            if not self.drop_bad:
                raise RewardError(f"reward {spec!r} gave {got!r} for {pair}; on_bad_reward = drop leaves it out")
            return self._drop(f"reward {spec!r} gave {got!r} for {pair}", flags)
        total = sum(w * v for w, v in zip(self.weights, values, strict=True) if v is not None)
        return Score(total, values, flags)

    def _drop(self, problem: str, satisfied: list[bool] | None = None) -> Score:
        self.dropped += 1
        return Score(None, [None] * len(self.specs), satisfied, problem)
