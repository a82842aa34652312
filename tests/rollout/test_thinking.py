"""Responses that think first: what is scored of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mdpgrpo_fast.rollout.generate import Rollout
from mdpgrpo_fast.rollout.thinking import Thinking, scored_texts
from mdpgrpo_fast.verifiers import answer_of, verify, verify_all


@pytest.mark.parametrize(
    ("response", "opened", "answer"),
    [
        ("An answer.", False, "An answer."),
        ("<think>\na, b</think>\n\nAn answer.", False, "An answer."),
        ("a, b</think> An answer.", True, "An answer."),
        ("<think>a</think>b<think>c</think> d", False, "d"),
        ("<think>never closed", False, ""),
        ("never closed", True, ""),
        ("<think></think>", False, ""),
        ("[THINK]x[/THINK]y", False, "y"),
        ("<|channel|>analysis<|message|>x<|channel|>final<|message|>y", False, "y"),
    ],
)
def test_an_answer_is_what_follows_the_last_closing_tag(response: str, opened: bool, answer: str) -> None:
    assert answer_of(response, opened) == answer


def test_verifiers_strip_thinking_where_they_are_told_to() -> None:
    response = "<think>one, two</think>\nNo comma."
    assert verify_all(["punctuation:no_comma"], response, [{}]) == [False]
    assert verify_all(["punctuation:no_comma"], response, [{}], strip_thinking=True) == [True]
    assert verify("punctuation:no_comma", response, {}, strip_thinking=True)
    assert not verify("punctuation:no_comma", "<think>no comma", {}, strip_thinking=True), "no answer follows nothing"


class Words:
    """A tokenizer of whole words; those in `special` are special tokens."""

    def __init__(self, template: str, special: tuple[str, ...] = ()) -> None:
        self.chat_template, self.special = template, special
        self.words = ["<pad>", "<think>", "</think>", "so,", "yes.", "user", "<end>"]

    def get_added_vocab(self) -> dict[str, int]:
        return {w: i for i, w in enumerate(self.words) if w.startswith("<")}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        words = [self.words[i] for i in ids]
        return " ".join(w for w in words if not (skip_special_tokens and w in self.special))

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [self.decode(r, skip_special_tokens) for r in rows]


def rollout(prompts: list[list[int]], rows: list[list[int]]) -> Rollout:
    width = max(map(len, rows))
    tokens = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    lengths, ids, empty = torch.tensor([len(r) for r in rows]), torch.tensor(prompts), torch.zeros(len(rows), width)
    return Rollout(ids, ids >= 0, tokens, lengths, lengths > 0, lengths.float(), empty, empty)


ROWS = [[1, 3, 2, 4, 6], [3, 2, 4, 6], [3, 4, 6], [1, 3]]
TEMPLATE = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"


@pytest.mark.parametrize("special", [("<end>",), ("<end>", "<think>", "</think>")], ids=["text", "special tokens"])
def test_answers_of_a_rollout(special: tuple[str, ...]) -> None:
    tokenizer: Any = Words(TEMPLATE, special)
    thinking = Thinking(tokenizer, "auto")
    assert thinking.active and not thinking.for_all
    plain = rollout([[0, 5]] * 4, ROWS)
    responses, seen, answers = scored_texts(plain, tokenizer, thinking)
    assert answers == ["yes.", "yes.", "so, yes.", ""] and seen == responses
    opened = rollout([[5, 1]] * 4, ROWS)
    assert scored_texts(opened, tokenizer, thinking)[2] == ["yes.", "yes.", "", ""]
    _, seen, answers = scored_texts(plain, tokenizer, Thinking(tokenizer, "on"))
    assert seen == answers, "for every reward"
    _, seen, answers = scored_texts(plain, tokenizer, Thinking(tokenizer, "off"), keep_special_tokens=True)
    assert seen[0] == "<think> so, </think> yes. <end>" and answers == responses


def test_auto_is_off_where_the_template_knows_no_tag() -> None:
    assert not Thinking(Words("{{ messages }}"), "auto").active and not Thinking(Words(TEMPLATE), "off").active
    assert Thinking(Words(""), "on").active
