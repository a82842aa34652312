"""Word tokens against NLTK's own tokenizers, on whatever they treat in a way of their own."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from golden import scripts
from helpers.verifiers import HOSTILE, long_prose, nltk_data, punkt_folder

from mdpgrpo_fast.verifiers.text import words

FEW = "'\".,: `-a1s)\n"  # runs of these are where the rules meet
MANY = (
    "'\".,:;-!?()[]{}<>*@#$%&a bsSmMdDtnT\n\t\r\x0b`«»”’“‘„—–"
    "\u00a0\x1c\x1f\x85\u2028_\u0301\u093e½²٣१İıſβ日\ud800é\x00\u200b"
)
WHOLE = [
    *"'' `` -- ... .. ,, 's 'll n't N'T 'tis 'twas 'T\u0130S wanna gimme G\u0130MME GOT\u0300TA got\u0301ta".split(),
    *"cannot d'ye more'n etc. Mr. .\" .'' ?\" .' a b".split(), "'S ", "e.g. ", ". ) ", " ", " ", " ", " ",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def genuine() -> Iterator[None]:
    with nltk_data(punkt_folder()):
        yield


def texts(number: int) -> Iterator[str]:
    rng = random.Random(15)
    for _ in range(number):
        pieces = rng.choice((list(FEW), list(MANY), [*WHOLE, *MANY], [*WHOLE, *scripts.WORDS, *scripts.MARKS]))
        yield "".join(rng.choices(pieces, k=rng.randint(0, 30)))


def test_tokens_are_those_of_nltk() -> None:
    from nltk import word_tokenize

    assert [text for text in texts(6000) if words.tokens(text) != word_tokenize(text)] == []


def test_tokens_of_long_texts_are_those_of_nltk() -> None:
    from nltk import word_tokenize

    long = {name: text[:2000] for name, text in HOSTILE.items()} | {"prose": long_prose()[:20_000]}
    assert [name for name, text in long.items() if words.tokens(text) != word_tokenize(text)] == []


def test_alphanumeric_tokens_are_those_of_nltk() -> None:
    from nltk import RegexpTokenizer

    nltks = RegexpTokenizer(r"\w+").tokenize
    assert [text for text in texts(6000) if words.alphanumeric(text) != nltks(text)] == []
    assert [found[0] for found in words.each_alphanumeric("a _b 3½")] == nltks("a _b 3½")


@pytest.mark.parametrize(
    "text", ["g\u0131mme", "G\u0131MME 't\u0131\u017f", "'t\u0131s", "i\u0307sn't g\u0130mme", "'twa\u017f"]
)
def test_contractions_with_letters_that_re_takes_for_i_and_s(text: str) -> None:
    from nltk import word_tokenize

    assert words.tokens(text) == word_tokenize(text)


def test_capital_words_are_counted() -> None:
    assert words.capitals("NASA's I'M DON'T X-RAY, É é ½") == 7  # NASA I 'M DO N'T X-RAY É
