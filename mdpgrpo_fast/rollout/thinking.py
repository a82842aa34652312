"""Completions as they are scored: the answer behind a think block, by tokens where its tags are special ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..verifiers import THINK_TAGS, answer_of
from .generate import Rollout, decode

TAIL = 16  # tokens of a prompt's end in which its template may open a block


class Thinking:
    """Finds answers. mode: as TrainConfig.strip_thinking; "auto" looks for a tag in the tokenizer's chat template.

    `active`: think blocks are stripped for constraints; `for_all`: for every reward.
    """

    def __init__(self, tokenizer: Any, mode: str) -> None:
        self.tokenizer = tokenizer
        template = str(getattr(tokenizer, "chat_template", None) or "")
        self.active = mode == "on" or (mode == "auto" and any(close in template for _, close in THINK_TAGS))
        self.for_all = mode == "on"
        known = tokenizer.get_added_vocab() if self.active else {}
        self._openers, self._closers = (
            {known[t] for t in tags if t in known} for tags in zip(*THINK_TAGS, strict=True)
        )

    def answers(self, rollout: Rollout, responses: Sequence[str]) -> list[str]:
        """The part of each response that is scored. responses: as `decode` gives them."""
        if not self.active:
            return list(responses)
        tails = self.tokenizer.batch_decode(rollout.prompt_ids[:, -TAIL:].tolist(), skip_special_tokens=False)
        opened = [tail.rstrip().endswith(tuple(tag for tag, _ in THINK_TAGS)) for tail in tails]
        return [self._answer(*row) for row in zip(rollout.rows(), responses, opened, strict=True)]

    def _answer(self, tokens: list[int], response: str, opened: bool) -> str:
        last = max((i for i, t in enumerate(tokens) if t in self._closers), default=None)
        if last is None:
            return answer_of(response, opened or any(t in self._openers for t in tokens))
        # A special tag is not in the decoded text.
        return answer_of(self.tokenizer.decode(tokens[last + 1 :], skip_special_tokens=True)).lstrip()


def scored_texts(
    rollout: Rollout, tokenizer: Any, thinking: Thinking, keep_special_tokens: bool = False
) -> tuple[list[str], list[str], list[str]]:
    """Responses as they are shown, as reward functions see them, and as constraints do."""
    responses = decode(rollout, tokenizer)
    answers = thinking.answers(rollout, responses)
    seen = answers if thinking.for_all else responses
    return responses, decode(rollout, tokenizer, skip_special_tokens=False) if keep_special_tokens else seen, answers
