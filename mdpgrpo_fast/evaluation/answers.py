"""Responses of a model to tokenised prompts: one greedy answer, or several drawn at temperatures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..rollout.thinking import Thinking

MUCH_TRUNCATED = 0.2  # share of completions cut at the length limit that is worth a line


@dataclass(frozen=True)
class Answer:
    """A response, as it is shown, as reward functions see it (`seen`) and as constraints do (`scored`)."""

    response: str
    seen: str
    scored: str
    token_ids: list[int]
    finished: bool  # it ended by itself


@dataclass(frozen=True)
class Draw:
    """How the G responses to a prompt are drawn. temperatures: of each of the G slots; a single 0: greedily."""

    temperatures: tuple[float, ...] = (0.0,)
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


def answer(
    model: Any, thinking: Thinking, prompts: list[list[int]], eos: list[int], max_new_tokens: int, batch_size: int,
    keep_special_tokens: bool = False,
) -> list[Answer]:  # fmt: skip
    """Greedy responses to tokenised prompts, in the order of the prompts; thinking: of the model's tokenizer."""
    found = answers(model, thinking, prompts, eos, max_new_tokens, batch_size, keep_special_tokens)
    return [one for (one,) in found]


def answers(
    model: Any, thinking: Thinking, prompts: list[list[int]], eos: list[int], max_new_tokens: int, batch_size: int,
    keep_special_tokens: bool = False, draw: Draw | None = None,
) -> list[list[Answer]]:  # fmt: skip
    """G responses to each tokenised prompt, in the order of the prompts and of draw's slots (default: one, greedily).

    batch_size: responses of one call of the sampler, which has all G of a prompt.
    """
    from ..rollout.generate import generate, pad_id

    draw, pad = draw or Draw(), pad_id(model, thinking.tokenizer)
    g, greedy = len(draw.temperatures), draw.temperatures == (0.0,)
    done: dict[int, list[Answer]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
    per_call = max(1, batch_size // g)
    for start in range(0, len(order), per_call):
        rows = order[start : start + per_call]
        out = generate(
            model,
            [prompts[i] for i in rows],
            temperature=None if greedy else list(draw.temperatures) * len(rows),
            eos=eos,
            max_new_tokens=max_new_tokens,
            top_k=draw.top_k,
            top_p=draw.top_p,
            min_p=draw.min_p,
            num_generations=g,
            pad=pad,
        )
        texts = thinking.scored_texts(out, keep_special_tokens)
        found = [Answer(*row) for row in zip(*texts, out.rows, out.finished.tolist(), strict=True)]
        for j, i in enumerate(rows):
            done[i] = found[j * g : (j + 1) * g]
    return [done[i] for i in range(len(prompts))]


def truncation_note(share: float, max_completion_length: int) -> str:
    return (
        f"{share:.0%} of the completions were cut at {max_completion_length} tokens and score as they stand: "
        "--max-completion-length gives them room"
    )
