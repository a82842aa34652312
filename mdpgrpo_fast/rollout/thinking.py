"""Completions as they are scored: the answer behind a think block, without the special tokens around it."""

from __future__ import annotations

from typing import Any

from ..verifiers import THINK_TAGS, answer_of
from .generate import Rollout, decode

TAIL = 16  # tokens of a prompt's end in which its template may open a block


class Thinking:
    """Finds answers. mode: as TrainConfig.strip_thinking; "auto" looks for a tag in the tokenizer's chat template.
    `active`: think blocks are stripped."""

    def __init__(self, tokenizer: Any, mode: str) -> None:
        self.tokenizer = tokenizer
        template = str(getattr(tokenizer, "chat_template", None) or "")
        self.active = mode == "on" or (mode == "auto" and any(close in template for _, close in THINK_TAGS))

    def scored_texts(
        self, rollout: Rollout, keep_special_tokens: bool = False
    ) -> tuple[list[str], list[str], list[str]]:
        """Responses as they are shown, as reward functions see them, and as constraints do: the last two without think
        blocks, and constraints never with special tokens."""
        responses = decode(rollout, self.tokenizer)
        if not (self.active or keep_special_tokens):
            return responses, responses, responses
        # Tags may be special tokens, or made of some.
        whole = decode(rollout, self.tokenizer, skip_special_tokens=False)
        if not self.active:
            return responses, whole, responses
        tails = self.tokenizer.batch_decode(rollout.prompt_ids[:, -TAIL:].tolist(), skip_special_tokens=False)
        openers = tuple(tag for tag, _ in THINK_TAGS)
        kept = [answer_of(text, tail.rstrip().endswith(openers)) for text, tail in zip(whole, tails, strict=True)]
        # Where nothing was cut, decoding itself leaves special tokens out, with the spaces that it puts around them.
        answers = [
            response if cut == text else self._without_special_tokens(cut)
            for response, text, cut in zip(responses, whole, kept, strict=True)
        ]
        return responses, kept if keep_special_tokens else answers, answers

    def _without_special_tokens(self, text: str) -> str:
        special = [str(t.content) for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        for token in sorted(special, key=len, reverse=True):
            text = text.replace(token, "")
        return text
