"""Sentences against NLTK's own Punkt, and the command line around its data."""

from __future__ import annotations

import random
import runpy
import sys
from collections.abc import Iterator

import pytest
from golden import scripts
from helpers.verifiers import nltk_data, punkt_folder, rows

from mdpgrpo_fast.verifiers import punkt_source, verify
from mdpgrpo_fast.verifiers.text import sentences

# Whatever Punkt and the word tokenizer treat in a way of its own, put together at random.
PIECES = [
    *["."] * 8, *["?", "!"] * 2, *[" "] * 8, *["'"] * 4, *"\n\t\u00a0\x85\"()[]{}*:;,-`&#@$%<>_",
    "--", "...", ". . .", "''", "``", "Mr", "Dr", "e.g", "U.S", "a", "b", "A", "J", "The", "THE", "he", "He", "3",
    "4.5", "1,000", ":5", ",5", "-5", "\u2019", "\u2018",
    "\u201c", "\xab", "\u2014", "\xe9", "\xc9", "\u0130", "\u01c5",
    "\U0001d400", "Bach", "vs", "p.m", "\r\n", "\u3002", "x-y", "X-", "'S", "'LL", "n't", "N'T", "'s", "'M", "DON'T",
    "\x1c", "\x1f", "½", "\u0301", "\u0967.", "\u0301.",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def genuine() -> Iterator[None]:
    with nltk_data(punkt_folder()):
        yield


def texts(number: int) -> list[str]:
    rng = random.Random(11)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 25))) for _ in range(number)]
    golden = [row["response"] for row in rows("ifeval_golden.jsonl.gz") if len(row["response"]) < 3000]
    some = rng.sample(golden, 150)
    return texts + some + [text.upper() for text in some[:50]] + list(scripts.texts(number // 4))


def test_sentences_are_those_of_nltk() -> None:
    from nltk.tokenize.punkt import PunktTokenizer

    nltks = PunktTokenizer("english")
    assert [t for t in texts(8000) if list(sentences.spans(t)) != list(nltks.span_tokenize(t))] == []


def test_counting_stops_where_it_is_told() -> None:
    assert sentences.count("We go. " * 10, stop=4) == 4
    assert sentences.count("We go. " * 3, stop=4) == 3


def test_without_data_one_notice_and_the_built_in_model(caplog: pytest.LogCaptureFixture) -> None:
    with nltk_data():
        asked = {"num_sentences": 2, "relation": "less than"}
        for _ in range(3):
            assert verify("length_constraints:number_sentences", "Mr. Fox met Dr. Ape in the U.S. today.", asked)
        assert punkt_source().startswith("built-in")
        assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0] and "--get-punkt" in caplog.messages[0]
    assert punkt_source().startswith("NLTK punkt_tab")


def run_module(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["verifiers", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("mdpgrpo_fast.verifiers", run_name="__main__")
    return end.value.code


def test_get_punkt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import nltk

    fetched = []
    with nltk_data() as patch:

        def download(name: str, quiet: bool, raise_on_error: bool, **kwargs: object) -> bool:
            assert quiet and raise_on_error
            fetched.append(name)
            patch.setattr(nltk.data, "path", [str(punkt_folder())])
            return True

        patch.setattr(nltk, "download", download)
        assert run_module(monkeypatch, "--get-punkt") == 0
    assert fetched == ["punkt_tab"]
    assert capsys.readouterr().out.startswith("NLTK punkt_tab, ")


def test_get_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    fetched = []
    with nltk_data(punkt_folder()) as patch:
        patch.setattr(nltk, "download", lambda name, **kwargs: fetched.append(name))
        assert run_module(monkeypatch, "--get-data") == 0
    assert fetched == ["punkt_tab", "averaged_perceptron_tagger_eng"]


def test_get_punkt_without_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import nltk

    def no_network(name: str, **kwargs: object) -> bool:
        raise ValueError("Error loading punkt_tab:\n  no route to host")

    with nltk_data() as patch:
        patch.setattr(nltk, "download", no_network)
        assert run_module(monkeypatch, "--get-punkt") == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "error: punkt_tab could not be fetched: Error loading punkt_tab: no route to host\n"


def test_module_says_which_model_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_module(monkeypatch) == 0
    assert "NLTK punkt_tab" in capsys.readouterr().out
