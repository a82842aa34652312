"""Held-out evaluation of a run: greedy answers of all ranks, scored as training scores."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..config import TrainConfig
from ..evaluation import answers as greedy
from ..evaluation.answers import Answer
from ..evaluation.scores import from_scores, intervals
from ..rewards import RewardError, Score, Scorer
from ..rewards.lost import raise_where_all_failed, why_all_failed
from ..rollout.engine import raise_on_all_ranks
from ..rollout.thinking import Thinking
from . import distributed
from .metrics import over_ranks
from .task import Task


def answer_and_score(
    task: Task, run: TrainConfig, accelerator: Accelerator, scorer: Scorer, thinking: Thinking, model: Any, lm: Any
) -> tuple[dict[str, Any], list[tuple[int, Answer, Score]]]:
    """What metrics.jsonl says of the held-out prompts, and (prompt, answer, score) of each; the same on all ranks.

    model: as it is wrapped for training; lm: the language model in it. Raises, on all ranks: RewardError for a reward
    that cannot be used, and where all of them failed; FloatingPointError where the model's logits are not finite.
    """
    mine = list(range(accelerator.process_index, len(task.held_out), accelerator.num_processes))
    answer = partial(
        greedy.answer, lm, thinking, [task.held_out_ids[i] for i in mine], task.eos, run.max_completion_length,
        run.eval_batch_size, run.keep_special_tokens,
    )  # fmt: skip
    problem: Exception | None = None
    answers, scores = [], []
    try:
        answers = distributed.call_whole(accelerator, model, answer)
        scores = scorer(
            [task.held_out[i] for i in mine],
            [a.seen for a in answers],
            answers=[a.scored for a in answers],
            completion_ids=[a.token_ids for a in answers],
        )
    except (RewardError, FloatingPointError) as e:
        problem = e
    raise_on_all_ranks(accelerator, problem)
    found = sorted(gather_object(list(zip(mine, answers, scores, strict=True))), key=lambda x: x[0])
    scores = [s for *_, s in found]
    raise_where_all_failed([why_all_failed(scores)], "the held-out evaluation", len(scores))
    examples = [task.held_out[i] for i, *_ in found]
    result = from_scores(examples, scores)
    result["intervals"] = intervals(examples, scores)
    result["truncated"] = statistics.fmean(not a.finished for _, a, _ in found)
    result["dropped"] = sum(s.total is None for s in scores)
    result["logged"] = over_ranks(gather_object([scorer.take_metrics()]))
    return result, found
