"""Checks on how many, and in what proportion: words, sentences, numbers, names.

Each follows `ifbench/instructions.py` of allenai/IFBench, commit db69a6f05689.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from ...arguments import Count, Phrase, Positive
from ...text import sentences, words
from ...text.scan import up_to
from .kinds import MARKS, Percentage, ifbench
from .tables import CONJUNCTIONS, NAMES, PRONOUNS, STOP_WORDS

_WORD = re.compile(r"\w+")
# IFBench drops punctuation before it counts, so that 1,000 is one number.
_NUMBER = re.compile(rf"\d[\d{re.escape(string.punctuation)}]*")
_JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
_OVERLAP_MARGIN = 2


def _range(arguments: Mapping[str, Any]) -> None:
    least, most = arguments["min_words"], arguments["max_words"]
    if most < least:
        raise ValueError(f"max_words: expected at least min_words ({least}), got {most}")


@ifbench("count:word_count_range", agree=_range, examples={"min_words": 50, "max_words": 80})
def word_count_range(text: str, min_words: Count, max_words: Count) -> bool:
    """From `min_words` to `max_words` words."""
    return min_words <= up_to(max_words + 1, words.each_alphanumeric(text)) <= max_words


@ifbench("count:unique_word_count", examples={"N": 40})
def unique_words(text: str, N: Count) -> bool:
    """At least `N` different words."""
    # A word of punctuation alone counts too, once.
    return len({word.strip(MARKS) for word in set(text.lower().split())}) >= N


@ifbench("count:conjunctions")
def conjunctions(text: str, small_n: Count) -> bool:
    """At least `small_n` different coordinating conjunctions."""
    # Different as they are written: "and", "And" and "and," are three.
    found = (word for word in set(text.split()) if word.strip(MARKS).lower() in CONJUNCTIONS)
    return up_to(small_n, found) >= small_n


@ifbench("count:person_names")
def person_names(text: str, N: Count) -> bool:
    """At least `N` different names out of IFBench's list of 50, such as Emma, Liam, Sophia."""
    return len(NAMES.intersection(_WORD.findall(text))) >= N


@ifbench("count:numbers")
def numbers(text: str, N: Count) -> bool:
    """Exactly `N` numbers, in digits."""
    return up_to(N + 1, _NUMBER.finditer(text)) == N


@ifbench("count:punctuation")
def punctuation(text: str) -> bool:
    """Each of . , ! ? ; : and beside them an interrobang, which is ?! or !? or \u203d."""
    for interrobang in ("?!", "!?"):
        if interrobang in text:
            return _has_all_marks(text.replace(interrobang, "", 1))
    return "\u203d" in text and _has_all_marks(text)


def _has_all_marks(text: str) -> bool:
    return all(mark in text for mark in ".,!?;:")


@ifbench("count:pronouns")
def pronouns(text: str, N: Count) -> bool:
    """At least `N` pronouns."""
    return up_to(N, filter(PRONOUNS.__contains__, words.tokens(text.replace("/", " ").lower()))) >= N


@ifbench("count:words_japanese", examples={"N": 5})
def words_japanese(text: str, N: Positive) -> bool:
    """Every `N`-th word is in Japanese, or a number."""
    return all(map(_is_japanese, set(text.split()[N - 1 :: N])))


def _is_japanese(word: str) -> bool:
    word = word.strip(MARKS)
    return not word or word.isdigit() or _JAPANESE.search(word) is not None


_KEYWORDS = {f"keyword{n}": word for n, word in enumerate(("cloud", "rhythm", "fish", "puzzle", "dawn"), start=1)}


@ifbench("count:keywords_multiple", examples=_KEYWORDS)
def keywords_multiple(
    text: str, keyword1: Phrase, keyword2: Phrase, keyword3: Phrase, keyword4: Phrase, keyword5: Phrase
) -> bool:
    """`keyword1` once, `keyword2` twice, `keyword3` 3 times, `keyword4` 5 times, `keyword5` 7 times."""
    text = text.lower()
    keywords = (keyword1, keyword2, keyword3, keyword4, keyword5)
    return all(
        text.count(keyword.strip().lower()) == times for keyword, times in zip(keywords, (1, 2, 3, 5, 7), strict=True)
    )


@ifbench("ratio:stop_words")
def stop_words(text: str, percentage: Percentage) -> bool:
    """At most `percentage` percent of the words are stop words (the, of, is ...)."""
    found = words.alphanumeric(text)
    stops = sum(map(STOP_WORDS.__contains__, map(str.lower, found)))
    return bool(found) and stops / len(found) * 100 <= percentage


@ifbench("ratio:sentence_type")
def sentence_type(text: str) -> bool:
    """Twice as many sentences that end with . as with ?"""
    ends = list(_last_characters(text))
    return ends.count(".") == 2 * ends.count("?")


@ifbench("ratio:sentence_balance")
def sentence_balance(text: str) -> bool:
    """As many sentences that end with . as with ? and with !"""
    ends = list(_last_characters(text))
    return ends.count(".") == ends.count("?") == ends.count("!")


def _last_characters(text: str) -> Iterator[str]:
    return (text[stop - 1] for _, stop in sentences.spans(text))


@ifbench("ratio:overlap", examples={"reference_text": "The river rises in the hills."})
def overlap(text: str, reference_text: Phrase, percentage: Percentage) -> bool:
    """Of the different runs of 3 characters, `percentage` percent (2 more or less) occur in `reference_text`."""
    trigrams = _trigrams(text)
    if not trigrams:
        return False
    shared = len(trigrams & _trigrams_of_reference(reference_text)) / len(trigrams) * 100
    return percentage - _OVERLAP_MARGIN <= shared <= percentage + _OVERLAP_MARGIN


def _trigrams(text: str) -> set[str]:
    return {text[at : at + 3] for at in range(len(text) - 2)}


_trigrams_of_reference = functools.lru_cache(maxsize=64)(_trigrams)


@ifbench("ratio:sentence_words")
def sentence_words(text: str) -> bool:
    """Three sentences with as many characters each."""
    lengths = [len(text[start:stop].strip()) for start, stop in islice(sentences.spans(text), 4)]
    return len(lengths) == 3 and len(set(lengths)) == 1
