"""The share of a prompt's constraints that hold, as verl's custom reward function."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from collections.abc import Sequence
from typing import Any

from ... import verifiers
from ...config import ConfigError, PromptConfig, TrainConfig
from ...data import Example
from ...data.examples import constraints_of
from ...rewards.constraints import ConstraintReward
from ...rewards.functions import RewardError
from ...rewards.pool import Failure, Job, Workers
from .estimator import COUNT

_one_at_a_time = threading.Lock()


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, *, rules: str = PromptConfig.rules,
    constraint_reward: str = TrainConfig.constraint_reward, timeout: float = 10.0,
    instructions: Sequence[str] = (), reward_router_address: Any = None, reward_model_tokenizer: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """The reward of one response, for verl's `reward.custom_reward_function` by the path
    pkg://mdpgrpo_fast.integrations.verl.reward; its `reward_kwargs` are the arguments after extra_info.

    solution_str: the response. ground_truth: instruction_id_list and kwargs of the prompt, an object or JSON text of
    one, as `write_parquet` makes it. rules, constraint_reward, instructions: the knobs of these names. timeout: seconds
    that the check may take, in a process of its own, which is killed then: a pattern that never ends does not stop the
    run. The last two are what verl gives beside a reward model, and are not used.

    Returns: score, the reward in [0, 1]; constraints, K; satisfied, how many hold strictly; all_satisfied, 1.0 or 0.0.
    Raises: ConfigError for a ground truth without constraints, an unknown instruction, argument or value; RewardError
    where the check was late or failed, for which verl gives the completion up.
    """
    text = ground_truth if isinstance(ground_truth, str) else json.dumps(ground_truth, default=list)
    with _one_at_a_time:  # verl calls from many threads, whose time in a queue is not the check's
        constraints, workers = _scoring(rules, constraint_reward, float(timeout), tuple(instructions))
        example = _example(text, constraints)
        (verdict,) = workers.collect(workers.start([Job(example, solution_str, solution_str)]))
    failure = next((x for x in (verdict, getattr(verdict, "constraint_reward", None)) if isinstance(x, Failure)), None)
    if failure is not None:
        raise RewardError(f"reward of a prompt of {data_source}: {failure.reason}", failure.trace)
    flags = verdict.satisfied
    return {
        "score": verdict.constraint_reward,
        COUNT: len(flags),
        "satisfied": sum(flags),
        "all_satisfied": float(all(flags)),
    }


async def compute_score_async(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """`compute_score` for verl's asynchronous form: other coroutines of the process go on meanwhile."""
    return await asyncio.to_thread(compute_score, *args, **kwargs)


@functools.cache
def _scoring(rules: str, kind: str, timeout: float, instructions: tuple[str, ...]) -> tuple[ConstraintReward, Workers]:
    """One process beside this one, which scores for as long as this one lives."""
    TrainConfig(rules=rules, constraint_reward=kind)  # type: ignore[arg-type]  # it refuses what it does not know
    constraints = ConstraintReward(rules, kind, instructions)
    constraints.load()
    return constraints, Workers([], constraints, 1, timeout)


@functools.lru_cache(maxsize=65536)  # a prompt comes once for each completion
def _example(ground_truth: str, constraints: ConstraintReward) -> Example:
    try:
        columns = json.loads(ground_truth)
        ids, kwargs = constraints_of(columns if isinstance(columns, dict) else {})
        if not ids:
            raise ValueError("it has no instruction_id_list")
        for name, arguments in zip(ids, kwargs, strict=True):
            verifiers.validate(name, arguments, constraints.rules)
    except ValueError as e:
        raise ConfigError(
            f"ground_truth must be JSON of instruction_id_list and kwargs; {e}; got {ground_truth[:200]!r}"
        ) from None
    return Example("", ids, kwargs)
