"""The language of a text, as langdetect names it with a fixed seed.

langdetect draws letter groups of the text, multiplies what each says for every language, and takes the mean of seven
such trials. Here are the same draws and the same sums in the same order, from the library's tables: only each word is
cut up once, and the trials end when the rest cannot change the answer. The tests hold the two against each other.
"""

from __future__ import annotations

import functools
import random
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

_READ = 10_000  # characters langdetect reads, once it has dropped addresses and composed Vietnamese letters
_EDGE = re.compile(r"[\s\u3001-\ud7ff]")  # can be part of none of these
_BLANKS = re.compile(" {2,}")
_LATIN = re.compile("[A-z]")
_NOT_LATIN = re.compile("[\u0300-\U0010ffff]")  # langdetect means to leave out Vietnamese letters, and does not
_TRIALS, _DRAWS, _SURE, _LIKELY = 7, 1000, 0.99999, 0.1
_ALPHA, _ALPHA_WIDTH, _FREQUENCY = 0.5, 0.05, 10_000
_SEED = 0  # of our own generator: the library's global seed stays as the caller has it
_LONG_WORD = 40
_LOADING = threading.Lock()

Row = list[float]  # how often each language has a letter group


def detect(text: str) -> str | None:
    """langdetect's answer for `text`, the same on every call; None where it finds nothing to go by."""
    return _detect(_head(text))


def _head(text: str) -> str:
    """As much of `text` as langdetect can come to read: composing halves a text at most."""
    size = 3 * _READ
    while size < len(text):
        edge = _EDGE.search(text, size)
        if edge is None:
            break
        head = text[: edge.start()]
        if len(_without_addresses(head)) >= 2 * _READ:
            return head
        size *= 2
    return text


def _without_addresses(text: str) -> str:
    detector = _library().detector
    text = detector.URL_RE.sub(" ", text) if "http" in text else text
    return detector.MAIL_RE.sub(" ", text) if "@" in text else text


@functools.lru_cache(maxsize=128)
def _detect(text: str) -> str | None:
    rows = _rows(_read(text))
    if not rows:
        return None
    languages = _library().languages
    generator, means = random.Random(_SEED), [0.0] * len(languages)
    for left in reversed(range(_TRIALS)):
        trial = _trial(rows, len(languages), generator)
        means = [mean + p / _TRIALS for mean, p in zip(means, trial, strict=True)]
        second, first = sorted(means)[-2:]
        if first - second > (left + 1e-6) / _TRIALS:
            break
    return languages[means.index(first)] if first > _LIKELY else "unknown"


def _read(text: str) -> str:
    """What langdetect reads of `text`, as it folds it."""
    library, text = _library(), _without_addresses(text)
    if not text.isascii():
        text = library.compose(text[: 2 * _READ])
    text = _BLANKS.sub(" ", text[:_READ])
    if 2 * len(_LATIN.findall(text)) < len(_NOT_LATIN.findall(text)):
        text = _LATIN.sub("", text)
    return text.translate(library.folded)


def _rows(text: str) -> list[Row]:
    """The row of each letter group, in the order of the text: for each letter one, two and three that end there."""
    *words, last = text.split(" ")
    rows: list[Row] = []
    for word in words:
        if word:
            rows += _rows_of_word(f" {word} ") if len(word) < _LONG_WORD else _rows_of(f" {word} ")
    return rows + _rows_of(f" {last}")


def _rows_of(word: str) -> list[Row]:
    rows, known = [], _library().rows
    for end in range(2, len(word) + 1):
        if word[end - 2].isupper() and word[end - 1].isupper():  # within a word in capital letters
            continue
        for start in range(end - 1, max(end - 4, -1), -1):
            row = known.get(word[start:end])
            if row is not None and word[start:end] != " ":
                rows.append(row)
    return rows


_rows_of_word = functools.lru_cache(maxsize=8192)(_rows_of)


def _trial(rows: list[Row], languages: int, generator: random.Random) -> Row:
    """How probable each language is, by groups drawn until one is sure."""
    probable = [1.0 / languages] * languages
    weight = (_ALPHA + generator.gauss(0.0, 1.0) * _ALPHA_WIDTH) / _FREQUENCY
    for draw in range(_DRAWS + 1):
        row = generator.choice(rows)
        probable = [p * (weight + frequency) for p, frequency in zip(probable, row, strict=False)]  # the faster zip
        if draw % 5 == 0:
            total = sum(probable)
            probable = [p / total for p in probable]
            if max(probable) > _SURE:
                break
    return probable


class _Library(NamedTuple):
    detector: Any  # the class
    languages: list[str]
    rows: dict[str, Row]
    compose: Callable[[str], str]
    folded: _Folded


class _Folded(dict[int, str]):
    """How langdetect folds each character, for `str.translate`; asked once for each."""

    def __init__(self, fold: Callable[[str], str]) -> None:
        self._fold = fold

    def __missing__(self, code: int) -> str:
        self[code] = folded = self._fold(chr(code))
        return folded


@functools.lru_cache(maxsize=1)
def _library() -> _Library:
    """langdetect's shared factory, whose 55 profiles are read once a process."""
    from langdetect import detector_factory
    from langdetect.detector import Detector
    from langdetect.utils.ngram import NGram

    with _LOADING:  # the library publishes the factory before it has read the profiles
        detector_factory.init_factory()
    factory = detector_factory._factory
    return _Library(
        Detector, factory.langlist, factory.word_lang_prob_map, NGram.normalize_vi, _Folded(NGram.normalize)
    )
