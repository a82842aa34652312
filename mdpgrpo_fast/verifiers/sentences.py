"""Sentences and words, by NLTK's English Punkt model where its data are installed."""

from __future__ import annotations

import functools
from typing import Any


def count(text: str, stop: int) -> int:
    """The number of sentences in `text`, at most `stop`."""
    number = 0
    for _ in _punkt().span_tokenize(text):
        number += 1
        if number >= stop:
            break
    return number


def words(text: str) -> list[str]:
    """The word tokens of `text`, as `nltk.word_tokenize` splits them."""
    import nltk

    return nltk.word_tokenize(text)


@functools.lru_cache(maxsize=1)
def _punkt() -> Any:
    from nltk.tokenize.punkt import PunktTokenizer

    return PunktTokenizer("english")
