"""Label by label against lm-eval's copy of Google's IFEval checkers."""

from __future__ import annotations

import importlib
import random
import sys
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from helpers.inputs import unavailable
from helpers.verifiers import ARGUMENTS, nltk_data, punkt_folder, rows

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


@pytest.fixture(scope="module")
def lm_eval() -> Iterator[Any]:
    """lm_eval.tasks.ifeval.utils alone: its package imports far more than the tests install."""
    try:
        files = metadata.files("lm-eval") or []
    except metadata.PackageNotFoundError:
        unavailable("lm-eval is missing: pip install --no-deps lm-eval==0.4.13")
    root = next(Path(str(f.locate())).parent for f in files if str(f) == "lm_eval/__init__.py")
    with nltk_data(punkt_folder()) as patch:
        for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
            package = types.ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            patch.setitem(sys.modules, name, package)
        try:
            import langdetect

            module = importlib.import_module("lm_eval.tasks.ifeval.utils")
        except ImportError as error:
            unavailable(f"lm-eval's IFEval cannot be imported: {error}")
        patch.setattr(langdetect.DetectorFactory, "seed", 0)
        yield module
        for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval.")]:
            del sys.modules[name]


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
