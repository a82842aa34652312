"""TRL's reward contract: the same functions through GRPOTrainer 1.16 as it is, and through ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers.rewards as functions
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mdpgrpo_fast.data import Example
from mdpgrpo_fast.rewards import Scorer

# TRL takes the names of the columns from the first row, and each other row has to have them.
ROWS: list[dict[str, Any]] = [
    {"prompt": "Say hi.", "bonus": 3, "answer": "hi"},
    {"prompt": "A number?", "bonus": 5, "answer": None},
]
CHAT = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
TEXTS = ["hi", "hello there", "four", "4"]
IDS = [[5, 6], [7], [8, 9, 10], [11]]


def answers(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """A column that some rows lack, and a reward that is not for them."""
    return [None if a is None else float(a == c) for a, c in zip(answer, completions, strict=True)]


def seen(
    prompts: Any, completions: Any, completion_ids: Any, bonus: Any, trainer_state: Any, **rest: Any
) -> list[float]:
    """Depends on each argument that TRL passes."""
    assert set(rest) == {"answer", "log_metric", "log_extra"}
    rest["log_metric"]("calls", 2.0)
    rest["log_extra"]("upper", [str(c).upper() for c in completions])
    assert trainer_state.global_step == 0 and trainer_state.max_steps >= 0
    return [
        len(str(p)) + len(str(c)) / 100 + sum(ids) + b
        for p, c, ids, b in zip(prompts, completions, completion_ids, bonus, strict=True)
    ]


FUNCTIONS: list[Any] = [
    functions.length, functions.slow_length, functions.Counter(), functions.scaled, functions.only_short, answers, seen,
]  # fmt: skip
WEIGHTS = [1.0, 0.5, 2.0, -1.0, 3.0, 0.0, 0.25]


def trl_rewards(
    peer: Callable[[str], Any], model: str, tmp: Path, rewards: list[Any], rows: list[dict[str, Any]]
) -> tuple[Any, torch.Tensor]:
    """The trainer, and what its `_calculate_rewards` gives: (B, rewards), NaN where one gave None."""
    trl, datasets = peer("trl"), peer("datasets")
    config = trl.GRPOConfig(
        output_dir=str(tmp), use_cpu=True, bf16=False, report_to=[], num_generations=2, per_device_train_batch_size=4,
        reward_weights=WEIGHTS[: len(rewards)],
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=list(rewards), args=config, train_dataset=datasets.Dataset.from_list(rows)
    )
    inputs = [row for row in rows for _ in range(2)]
    prompts, chat = [row["prompt"] for row in inputs], not isinstance(rows[0]["prompt"], str)
    completions = [[{"role": "assistant", "content": t}] for t in TEXTS] if chat else TEXTS
    found = trainer._calculate_rewards(inputs, prompts, completions, IDS)
    peer("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)
    return trainer, found


def our_rewards(rewards: list[Any], rows: list[dict[str, Any]]) -> tuple[Scorer, list[Any]]:
    examples = [Example(row["prompt"], columns=row) for row in rows for _ in range(2)]
    scorer = Scorer(rewards, WEIGHTS[: len(rewards)])
    return scorer, scorer(examples, TEXTS, completion_ids=IDS)


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["text", "chat"])
def test_the_same_functions_give_the_same_rewards(
    peer: Callable[[str], Any], model_dirs: dict[str, str], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    rewards = [functions.chat, functions.Counter(), seen] if rows is CHAT else FUNCTIONS
    trainer, theirs = trl_rewards(peer, model_dirs["llama"], tmp_path, rewards, rows)
    rewards = [functions.Counter() if isinstance(r, functions.Counter) else r for r in rewards]
    scorer, ours = our_rewards(rewards, rows)
    assert scorer.names == trainer.reward_func_names
    table = torch.tensor([[torch.nan if v is None else v for v in s.parts.values()] for s in ours])
    torch.testing.assert_close(table, theirs, equal_nan=True)
    weights = torch.tensor(WEIGHTS[: len(rewards)])
    torch.testing.assert_close(torch.tensor([s.total for s in ours]), (theirs * weights).nansum(1))
    assert scorer.take_metrics() == {k: sum(v) / len(v) for k, v in trainer._pending_metrics.items()} == {"calls": 2.0}
    assert [s.extra["upper"] for s in ours] == trainer._pending_extra_logs["upper"]


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["text", "chat"])
def test_the_same_reward_model_gives_the_same_rewards(
    peer: Callable[[str], Any], model_dirs: dict[str, str], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    path = str(tmp_path / "judge")
    AutoModelForSequenceClassification.from_pretrained(model_dirs["llama"], num_labels=1).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(model_dirs["llama"])
    asked = "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}" + asked
    tokenizer.save_pretrained(path)
    trainer, theirs = trl_rewards(peer, model_dirs["llama"], tmp_path, [path, functions.length], rows)
    scorer, ours = our_rewards([path, functions.length], rows)
    assert scorer.names == trainer.reward_func_names == ["judge", "length"]
    torch.testing.assert_close(torch.tensor([list(s.parts.values()) for s in ours]), theirs)
