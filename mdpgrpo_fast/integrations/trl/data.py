"""Prompts with constraints as a data set of TRL, and their reward as a function of TRL's signature."""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset

from ...config import PromptConfig
from ...data import Example, read_prompts
from ...data.examples import constraints_of
from ...rewards.constraints import ConstraintReward


def constraint_dataset(source: Any, config: PromptConfig | None = None, *, conversational: bool = True) -> Dataset:
    """The prompts that `read_prompts` finds (a file, a folder, a hub id, or rows in memory) as a data set.

    Columns: prompt, instruction_id_list, kwargs (JSON text, as Arrow would give every entry the arguments of all) and
    num_constraints, for `constraint_reward` and the goal anchor; and any others of the rows that all of them have.
    conversational: a prompt that is text becomes a user's message, which TRL renders by the chat template; False for a
    model without one.

    Raises: ConfigError as `read_prompts`.
    """
    examples = read_prompts(source, config).examples
    common = set.intersection(*(set(e.columns) for e in examples)) - {"messages", "tools", "ground_truth"}
    wrap = conversational or not all(isinstance(e.prompt, str) for e in examples)  # a column has one type
    rows = [
        {
            **{name: e.columns[name] for name in sorted(common)},
            "prompt": [{"role": "user", "content": e.prompt}] if wrap and isinstance(e.prompt, str) else e.prompt,
            "instruction_id_list": e.instruction_ids,
            "kwargs": json.dumps(e.kwargs),
            "num_constraints": e.num_constraints(1),
        }
        for e in examples
    ]
    return Dataset.from_list(rows)


def constraint_reward(
    prompts: list[Any], completions: list[Any], instruction_id_list: list[Any] | None = None,
    kwargs: list[Any] | None = None, **_: Any,
) -> list[float]:  # fmt: skip
    """For `reward_funcs` of TRL: the share of its prompt's constraints that each completion satisfies, in [0, 1].

    instruction_id_list, kwargs: columns of the data, in any form that our files have. A completion of messages counts
    by the text of its last one. Raises: ValueError for data without these columns, a prompt without constraints, or an
    unknown instruction.
    """
    if instruction_id_list is None or kwargs is None:
        raise ValueError("train_dataset must have the columns instruction_id_list and kwargs for constraint_reward")
    reward, found = ConstraintReward(), []
    for prompt, completion, ids, arguments in zip(prompts, completions, instruction_id_list, kwargs, strict=True):
        known = constraints_of({"instruction_id_list": ids, "kwargs": arguments})
        if not known[0]:
            raise ValueError(f"instruction_id_list has no entry for the prompt {str(prompt)[:200]}")
        text = completion if isinstance(completion, str) else (completion[-1].get("content") or "")
        found.append(reward(Example(prompt, *known), text)[0])
    return found
