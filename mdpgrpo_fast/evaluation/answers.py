"""Greedy responses of a model to tokenised prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..rollout.thinking import Thinking

MUCH_TRUNCATED = 0.2  # share of completions cut at the length limit that is worth a line


@dataclass(frozen=True)
class Answer:
    """A greedy response, as it is shown, as reward functions see it (`seen`) and as constraints do (`scored`)."""

    response: str
    seen: str
    scored: str
    token_ids: list[int]
    finished: bool  # it ended by itself


def answer(
    model: Any, thinking: Thinking, prompts: list[list[int]], eos: list[int], max_new_tokens: int, batch_size: int,
    keep_special_tokens: bool = False,
) -> list[Answer]:  # fmt: skip
    """Greedy responses to tokenised prompts, in the order of the prompts; thinking: of the model's tokenizer."""
    from ..rollout.generate import generate

    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        out = generate(model, [prompts[i] for i in rows], temperature=None, eos=eos, max_new_tokens=max_new_tokens)
        texts = thinking.scored_texts(out, keep_special_tokens)
        for i, *row in zip(rows, *texts, out.rows, out.finished.tolist(), strict=True):
            answers[i] = Answer(*row)
    return [answers[i] for i in range(len(prompts))]


def truncation_note(share: float, max_completion_length: int) -> str:
    return (
        f"{share:.0%} of the completions were cut at {max_completion_length} tokens and score as they stand: "
        "--max-completion-length gives them room"
    )
