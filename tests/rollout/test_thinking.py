"""Responses that think first: what is scored of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.inputs import make_tokenizer
from tokenizers import AddedToken

from mdpgrpo_fast.rollout.generate import Rollout
from mdpgrpo_fast.rollout.thinking import Thinking
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

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        words = enumerate(self.words)
        return {i: AddedToken(w, special=w in self.special) for i, w in words if w.startswith("<")}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        words = [self.words[i] for i in ids]
        return " ".join(w for w in words if not (skip_special_tokens and w in self.special))

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [self.decode(r, skip_special_tokens) for r in rows]


def rollout(prompts: list[list[int]], rows: list[list[int]]) -> Rollout:
    width = max(map(len, rows))
    tokens = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    lengths, ids, empty = torch.tensor([len(r) for r in rows]), torch.tensor(prompts), torch.zeros(len(rows), width)
    return Rollout(ids, ids >= 0, tokens, lengths, lengths > 0, lengths.float(), empty, empty, empty, empty)


ROWS = [[1, 3, 2, 4, 6], [3, 2, 4, 6], [3, 4, 6], [1, 3]]
TEMPLATE = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"


@pytest.mark.parametrize("special", [("<end>",), ("<end>", "<think>", "</think>")], ids=["text", "special tokens"])
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_answers_of_a_rollout(special: tuple[str, ...], mode: str) -> None:
    tokenizer: Any = Words(TEMPLATE, special)
    thinking = Thinking(tokenizer, mode)
    assert thinking.active
    plain, opened = (rollout([[0, last]] * 4, ROWS) for last in (5, 1))
    responses, seen, answers = thinking.scored_texts(plain)
    assert [a.strip() for a in answers] == ["yes.", "yes.", "so, yes.", ""] and seen == answers
    assert responses == tokenizer.batch_decode(ROWS, skip_special_tokens=True)
    assert [a.strip() for a in thinking.scored_texts(opened)[2]] == ["yes.", "yes.", "", ""]
    _, seen, kept = thinking.scored_texts(plain, keep_special_tokens=True)
    assert seen == ["yes. <end>", "yes. <end>", "so, yes. <end>", ""] and kept == answers


def test_no_special_token_is_scored_beside_an_answer() -> None:
    """A tokenizer of the tests with end tokens that have no name, as Llama 3 has some."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom_id|>", "<|eom_id|>>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    texts = ["<think>the sea</think>the wind<|eom_id|>", "the wind<|eom_id|>", "<think>the</think>the wind<|eom_id|>>"]
    rows = [tokenizer(t, add_special_tokens=False).input_ids for t in texts]
    _, _, answers = Thinking(tokenizer, "on").scored_texts(rollout([[2, 3]] * 3, rows))
    assert [a.strip() for a in answers] == ["the wind"] * 3


def test_tags_of_several_special_tokens() -> None:
    """gpt-oss: none of them is left in decoded text."""
    tokenizer: Any = Words("<|channel|>final<|message|>", ("<|channel|>", "<|message|>", "<|return|>"))
    tokenizer.words = ["<|channel|>", "analysis", "<|message|>", "so,", "final", "yes.", "<|return|>"]
    tokenizer.decode = lambda ids, skip_special_tokens: "".join(
        w for w in (tokenizer.words[i] for i in ids) if not (skip_special_tokens and w in tokenizer.special)
    )
    rows = rollout([[1, 3]], [[0, 1, 2, 3, 0, 4, 2, 5, 6]])
    responses, _, answers = Thinking(tokenizer, "auto").scored_texts(rows)
    assert responses == ["analysisso,finalyes."] and answers == ["yes."]


def test_nothing_is_stripped_where_it_is_off() -> None:
    tokenizer: Any = Words(TEMPLATE, ("<end>",))
    off, plain = Thinking(tokenizer, "off"), rollout([[0, 5]] * 4, ROWS)
    responses, seen, answers = off.scored_texts(plain)
    assert responses == seen == answers == tokenizer.batch_decode(ROWS, skip_special_tokens=True)
    responses, seen, answers = off.scored_texts(plain, keep_special_tokens=True)
    assert seen[0] == "<think> so, </think> yes. <end>" and answers == responses


def test_auto_is_off_where_the_template_knows_no_tag() -> None:
    assert not Thinking(Words("{{ messages }}"), "auto").active and not Thinking(Words(TEMPLATE), "off").active
    assert Thinking(Words(""), "on").active
