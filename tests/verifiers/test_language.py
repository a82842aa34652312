"""The language of a text, against langdetect's own answer with the same seed."""

from __future__ import annotations

import random

import langdetect
import pytest
from helpers.verifiers import hostile

from mdpgrpo_fast.verifiers.text import language

SPEECH = """
Das ist ein guter Tag.|This is a good day.|C'est une bonne journée.|Привет, как дела?|Добрий день усім.|Добро утро!
你好世界|这是中文。這是中文。|これは日本語の文章です。|カタカナ|안녕하세요|مرحبا بالعالم|سلام، حال شما چطور است؟
שלום עולם|Γειά σου κόσμε|สวัสดีชาวโลก|नमस्ते दुनिया|हे मराठी आहे|வணக்கம்|Xin chào thế giới|Xin cha\u0300o the\u0301 gio\u0301i
Dobrý den, světe|Dobrý deň, svet|Bună ziua, ș și ț|Hej världen, hur mår du?|Hei verden, hvordan går det?|Hej verden
Olá mundo|Hola mundo|Ciao mondo|Merhaba dünya|Halo dunia|Jambo dunia|Tere maailm|Hei maailma|Labas pasauli
ABC DEF|A b C|USA NASA|iPhone|McDonald|http://example.org/a?b=c|https://|me@example.org|@|12,5|!!!|😀|\ud800
İı ß ſ ǅ|_[]^`|\u200b|’|ﬁ|e\u0301|\u3000|\t|x
"""


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(langdetect.DetectorFactory, "seed", 0)


def own_answer(text: str) -> str | None:
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return None


@pytest.mark.parametrize("case", [str, str.upper, str.title])
def test_mixed_texts(case) -> None:
    pieces = [piece for line in SPEECH.split("\n") for piece in line.split("|") if piece]
    rng, answers = random.Random(case.__name__), set()
    for piece in pieces:
        assert language.detect(case(piece)) == own_answer(case(piece)), piece
    for _ in range(80):
        text = case(rng.choice(("", " ", "  ", "\n")).join(rng.choices(pieces, k=rng.randint(1, 8))))
        answers.add(language.detect(text))
        assert language.detect(text) == own_answer(text), text
    assert len(answers) > 12


def test_one_language_for_long() -> None:
    for piece in SPEECH.split("|")[:30:2]:
        text = piece * (12_000 // len(piece))
        assert language.detect(text) == own_answer(text), piece


def test_hostile_texts() -> None:
    for name, text in hostile(1000).items():
        assert language.detect(text) == own_answer(text), name
