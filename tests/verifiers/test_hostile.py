"""Responses are untrusted: every type answers to every text, in bounded time.

How long is measured by benchmarks/bench_verifiers.py; here an alarm only keeps a hang from passing for patience.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from helpers.verifiers import ARGUMENTS, HOSTILE, nltk_data, punkt_folder

from mdpgrpo_fast.verifiers import INSTRUCTIONS, verify

SMALL = [
    "", " ", "\n", "\n\n", "\r\n", "\x00", "\ud800", "\udfff\ud800", "\u200f", "\u202e abc", "\ufeff", "*", "**",
    "******", '"', '""', "<<", "<<>>", "[", "[]", "```", "```json", "```xml\n", "<", "<a>", "</a>", "p.s", "P.S.", ".",
    "...", "'", "a\x00b", "a\u2028b", "\ud83d", "-", "{", "1" * 5000, "\x1c", "\x85",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def genuine() -> Iterator[None]:
    with nltk_data(punkt_folder()):
        yield


@contextmanager
def no_hang(seconds: int = 120) -> Iterator[None]:
    """Far more than any machine needs: a pattern that backtracks over 200,000 characters needs hours."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def hung(*_: object) -> None:
        pytest.fail(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_every_type_has_arguments_to_be_tried_with() -> None:
    assert set(ARGUMENTS) == set(INSTRUCTIONS)


@pytest.mark.parametrize("instruction_id", INSTRUCTIONS)
def test_odd_texts(instruction_id: str) -> None:
    for rules in INSTRUCTIONS[instruction_id].rules:
        for text in SMALL:
            strict, loose = (
                verify(instruction_id, text, ARGUMENTS[instruction_id], mode=mode, rules=rules)
                for mode in ("strict", "loose")
            )
            assert isinstance(strict, bool) and isinstance(loose, bool)
            assert loose or not strict
            assert text.strip() or not loose


@pytest.mark.parametrize("instruction_id", INSTRUCTIONS)
def test_long_texts(instruction_id: str) -> None:
    with no_hang():
        for rules in INSTRUCTIONS[instruction_id].rules:
            for text in HOSTILE.values():  # the loose variants include the text as it is
                answer = verify(instruction_id, text, ARGUMENTS[instruction_id], mode="loose", rules=rules)
                assert isinstance(answer, bool)
