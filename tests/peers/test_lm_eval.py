"""Label by label against lm-eval's copy of Google's IFEval checkers."""

from __future__ import annotations

import random
from typing import Any

import pytest
from golden import scripts
from helpers.verifiers import ARGUMENTS, rows

from mdpgrpo_fast.verifiers import INSTRUCTIONS, verify

IFEVAL = [instruction_id for instruction_id, entry in INSTRUCTIONS.items() if "ifeval" in entry.rules]

# What the checkers look for, and what nearly is it.
PIECES = [
    *["\n"] * 6, *[" "] * 6,
    "\n\n", "\r\n", "\t", "\u00a0", "***", "******", "*", "**", "* a", "- b", "\n* x\n", "*\n", "<<", ">>", "<<a>>",
    "[", "]", "[a]", '"', "'", "```", "```json\n", "{}", "[1]", "1", "P.S.", "p. p. s", "P.P.S", "p.s", "Section 1",
    "Section", "SECTION 2", "My answer is yes.", "My answer is maybe", "zebra", "Zebra.", "island", "islands",
    "Name a zebra.", ",", ".", "!", "a", "q", "Q", "NASA", "I'M", "The end", "Der Hund ist da und",
    "the cat is here and",
]  # fmt: skip
THRESHOLDS = ("num_", "frequency", "nth_")


def disagreements(lm_eval: Any, instruction_id: str, kwargs: dict[str, Any], response: str) -> list[Any]:
    asked = lm_eval.InputExample(key=0, instruction_id_list=[instruction_id], prompt="", kwargs=[kwargs])
    theirs = {
        "strict": lm_eval.test_instruction_following_strict(asked, response),
        "loose": lm_eval.test_instruction_following_loose(asked, response),
    }
    return [
        (instruction_id, mode, kwargs, response)
        for mode, output in theirs.items()
        if output.follow_instruction_list != [verify(instruction_id, response, kwargs, mode=mode)]
    ]


def test_on_golden_rows(lm_eval: Any) -> None:
    sample = [row for row in rows("ifeval_golden.jsonl.gz")[::6] if len(row["response"]) < 20_000]
    assert len({row["instruction_id"] for row in sample}) == 25
    wrong = [bad for r in sample for bad in disagreements(lm_eval, r["instruction_id"], r["kwargs"], r["response"])]
    assert wrong == []


@pytest.mark.parametrize("instruction_id", IFEVAL)
def test_on_generated_texts(lm_eval: Any, instruction_id: str) -> None:
    rng = random.Random(instruction_id)
    wrong = []
    for _ in range(25 if "case:english" in instruction_id or "language" in instruction_id else 250):
        kwargs = dict(ARGUMENTS[instruction_id])
        for name in kwargs:
            if name.startswith(THRESHOLDS) or name.endswith("frequency"):
                kwargs[name] = rng.randint(1, 4)
        if "nth_paragraph" in kwargs:
            kwargs["num_paragraphs"] = rng.randint(kwargs["nth_paragraph"], 5)
        response = "".join(rng.choices(PIECES, k=rng.randint(1, 20)))
        wrong += disagreements(lm_eval, instruction_id, kwargs, response)
    assert wrong == []


def test_on_mixed_scripts(lm_eval: Any) -> None:
    assert list(scripts.differences(lm_eval, scripts.texts(2000))) == []


@pytest.mark.parametrize("instruction_id", [instruction_id for instruction_id, *_ in scripts.COUNTED])
def test_on_mixed_scripts_loosely(lm_eval: Any, instruction_id: str) -> None:
    kwargs = dict(ARGUMENTS[instruction_id])
    threshold = next(name for name, value in kwargs.items() if isinstance(value, int))
    wrong = []
    for n, text in enumerate(scripts.texts(300, seed=instruction_id)):
        kwargs[threshold] = n % 9 + 1
        wrong += disagreements(lm_eval, instruction_id, kwargs, text)
    assert wrong == []
