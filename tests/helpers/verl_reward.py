"""A reward function as verl takes it from a file: the share of the constraints that an answer satisfies."""

from __future__ import annotations

import json
from typing import Any

from mdpgrpo_fast.data.examples import Example
from mdpgrpo_fast.rewards.constraints import ConstraintReward

_REWARD = ConstraintReward()


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any, **_: Any) -> dict[str, Any]:
    """The reward of an answer, and the counts behind it. ground_truth: the row's constraints, as JSON."""
    row = json.loads(ground_truth)
    example = Example("", row["instruction_id_list"], row["kwargs"])
    share, flags = _REWARD(example, solution_str)
    return {"score": share, "constraints": len(flags), "satisfied": sum(flags)}
