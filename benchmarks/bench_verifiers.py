"""Every instruction type on a response of 200,000 characters: prose, and the hostile text it is slowest on.

`pytest benchmarks/bench_verifiers.py`, or with the options of pytest-benchmark. langdetect remembers its answers, so
the three types that ask it are measured on a text that is new each time.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.verifiers import ARGUMENTS, HOSTILE, long_prose, nltk_data, punkt_folder

from mdpgrpo_fast.verifiers import INSTRUCTIONS, verify

TYPES = [(name, rules) for name, entry in INSTRUCTIONS.items() for rules in entry.rules]
FRESH = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def genuine() -> Iterator[None]:
    with nltk_data(punkt_folder()):
        verify("length_constraints:number_sentences", "Load the model.", {"num_sentences": 1, "relation": "at least"})
        verify("language:response_language", "Load the profiles.", {"language": "en"})
        yield


def _slowest(instruction_id: str, rules: str, mode: str) -> str:
    def seconds(text: str) -> float:
        start = time.perf_counter()
        verify(instruction_id, text, ARGUMENTS[instruction_id], mode=mode, rules=rules)
        return time.perf_counter() - start

    return max(HOSTILE, key=lambda name: seconds(HOSTILE[name]))


@pytest.mark.parametrize("mode", ["strict", "loose"])
@pytest.mark.parametrize("text", ["prose", "hostile"])
@pytest.mark.parametrize(("instruction_id", "rules"), TYPES)
def test_verify(benchmark, instruction_id: str, rules: str, text: str, mode: str) -> None:
    name = "prose" if text == "prose" else _slowest(instruction_id, rules, mode)
    response = long_prose() if text == "prose" else HOSTILE[name]
    if instruction_id == "change_case:english_capital":
        response = response.upper()
    elif instruction_id == "change_case:english_lowercase":
        response = response.lower()

    def setup() -> tuple[tuple[str, str, dict], dict]:
        return (instruction_id, f"{next(FRESH)} {response}", ARGUMENTS[instruction_id]), {"mode": mode, "rules": rules}

    benchmark.group = f"{text}, {mode}"
    benchmark.extra_info.update(characters=len(response), text=repr(name))
    benchmark.pedantic(verify, setup=setup, rounds=5, warmup_rounds=1)
