"""Checks on single words and on the words of each sentence.

Each follows `ifbench/instructions.py` of allenai/IFBench, commit db69a6f05689.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

from ...arguments import Count, Phrase, Positive
from ...registry import MissingRequirementError, package
from ...text import sentences
from ...text.scan import nth, up_to
from ...text.words import first_tokens, tokens
from .kinds import MARKS, ifbench
from .tables import WITHOUT_PUNCTUATION

_CLUSTER = re.compile("[b-df-hj-np-tv-z]{2}")
_PRIMES = frozenset((2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97))
_PALINDROMES = 10
_REMEMBERED_LENGTH = 40
_TAGGER = "taggers/averaged_perceptron_tagger_eng/"


def _bare_words(text: str) -> list[str]:
    """The words of `text` without any ASCII punctuation; what was nothing else is no word."""
    return text.translate(WITHOUT_PUNCTUATION).split()


def _each_sentence(text: str) -> Iterator[str]:
    return (text[start:stop] for start, stop in sentences.spans(text))


def _nth_sentence(text: str, n: int) -> str | None:
    return nth(n, _each_sentence(text))


@ifbench("words:alphabet")
def alphabet(text: str) -> bool:
    """Each word starts with the next letter of the alphabet, and A follows Z."""
    words = _bare_words(text)
    at = string.ascii_lowercase.find(words[0][0].lower()) if words else -1
    if at < 0:
        return False
    for word in words:
        if word[0].lower()[0] != string.ascii_lowercase[at]:
            return False
        at = (at + 1) % 26
    return True


@ifbench("words:vowel")
def vowel(text: str) -> bool:
    """One paragraph, with at most three of the vowels a, e, i, o, u."""
    text = text.strip()
    return "\n" not in text and len(set("aeiou").intersection(text.lower())) <= 3


@ifbench("words:consonants")
def consonants(text: str) -> bool:
    """Each word has two consonants together."""
    return all(map(_CLUSTER.search, set(text.lower().split())))


@ifbench("words:palindrome")
def palindromes(text: str) -> bool:
    """At least 10 words of 5 characters or more that read the same backwards."""
    words = map(str.lower, _bare_words(text))
    return up_to(_PALINDROMES, (word for word in words if len(word) >= 5 and word == word[::-1])) == _PALINDROMES


@ifbench("words:prime_lengths")
def prime_lengths(text: str) -> bool:
    """The length of each word is a prime number (below 100)."""
    return all(len(word) in _PRIMES for word in _bare_words(text))


@functools.lru_cache(maxsize=1)
def tagger_data() -> str:
    """Where NLTK's English tagger lies. Raises MissingRequirementError where NLTK does not find it."""
    from nltk.data import find

    try:
        return str(find(_TAGGER))
    except LookupError:
        raise MissingRequirementError(
            "needs NLTK's averaged_perceptron_tagger_eng; `mdpgrpo verifiers --get-data` fetches it"
        ) from None


@functools.lru_cache(maxsize=1)
def _tagger(folder: str) -> Any:
    from nltk.tag import PerceptronTagger

    return PerceptronTagger(lang="eng")


@ifbench("words:start_verb", needs=tagger_data)
def start_verb(text: str) -> bool:
    """The first word is a verb, as NLTK tags it."""
    # The tagger goes from left to right and looks two words ahead.
    words = first_tokens(text, 3)
    return bool(words) and "VB" in _tagger(tagger_data()).tag(words)[0][1]


@ifbench("words:repeats")
def repeats(text: str, small_n: Count) -> bool:
    """No word more than `small_n` times."""
    return max(Counter(_bare_words(text.lower())).values(), default=0) <= small_n


@ifbench("words:odd_even_syllables", needs=package("syllapy"))
def odd_even_syllables(text: str) -> bool:
    """Words with odd and even numbers of syllables take turns."""
    words = map(str.lower, _bare_words(text))
    return all(one != following for one, following in pairwise(map(_is_odd, words)))


def _is_odd(word: str) -> bool:
    return _remembered(word) if len(word) <= _REMEMBERED_LENGTH else _count_is_odd(word)


def _count_is_odd(word: str) -> bool:
    import syllapy

    return bool(syllapy.count(word) % 2 == 1)


_remembered = functools.lru_cache(maxsize=1 << 14)(_count_is_odd)


@ifbench("words:last_first")
def last_first(text: str) -> bool:
    """The last word of each sentence is the first of the next."""
    return all(
        _last_word(one) == _first_word(following) is not None for one, following in pairwise(_each_sentence(text))
    )


def _last_word(text: str) -> str | None:
    words = text.rstrip(MARKS).rsplit(None, 1)
    return words[-1].lower() if words else None


def _first_word(text: str) -> str | None:
    words = text.lstrip(MARKS).split(None, 1)
    return words[0].lower() if words else None


@ifbench("words:paragraph_last_first")
def paragraph_last_first(text: str) -> bool:
    """Each paragraph, which is a line, ends with the word it starts with."""
    return all(map(_ends_as_it_starts, set(text.split("\n"))))


def _ends_as_it_starts(line: str) -> bool:
    line = line.strip().lower().strip(MARKS)
    return line.split(None, 1)[:1] == line.rsplit(None, 1)[-1:]


@ifbench("words:no_consecutive")
def no_consecutive(text: str) -> bool:
    """No two words in a row start with the same letter."""
    return all(one[0] != following[0] for one, following in pairwise(_bare_words(text.lower())))


@ifbench("words:keywords_specific_position", examples={"keyword": "river"})
def keyword_at(text: str, keyword: Phrase, n: Positive, m: Positive) -> bool:
    """`keyword` is the `m`-th word of the `n`-th sentence."""
    sentence = _nth_sentence(text, n)
    if sentence is None:
        return False
    words = (token for token in tokens(sentence) if any(map(str.isalnum, token)))
    word = nth(m, words)
    return word is not None and word.lower() == keyword.strip().lower()


@ifbench("words:words_position", examples={"keyword": "river"})
def words_position(text: str, keyword: Phrase) -> bool:
    """The second word and the last but one are `keyword`; a punctuation mark at the very end is no word."""
    words = tokens(text)
    # In IFBench a text within the row of all marks is a mark, ./ for one.
    last = 3 if words and words[-1] in string.punctuation else 2
    return len(words) >= last and words[1].lower() == words[-last].lower() == keyword.strip().lower()


@ifbench("sentence:alliteration_increment")
def alliteration_increment(text: str) -> bool:
    """In each sentence, more words than in the one before begin with the same character as a neighbour."""
    return all(before < after for before, after in pairwise(map(_alliterating, _each_sentence(text))))


def _alliterating(sentence: str) -> int:
    """The number of words that stand beside a word with the same first character."""
    words = (word.lstrip(MARKS) for word in sentence.lower().split())
    runs = (sum(1 for _ in run) for _, run in groupby(word[0] for word in words if word))
    return sum(length for length in runs if length > 1)


@ifbench("sentence:keyword", examples={"word": "river"})
def sentence_keyword(text: str, word: Phrase, N: Positive) -> bool:
    """The `N`-th sentence holds `word`."""
    sentence = _nth_sentence(text, N)
    return sentence is not None and re.search(rf"\b{re.escape(word)}\b", sentence, re.IGNORECASE) is not None


@ifbench("sentence:increment")
def increment(text: str, small_n: Count) -> bool:
    """Each sentence has exactly `small_n` more words than the one before."""
    lengths = (len(_bare_words(sentence)) for sentence in _each_sentence(text))
    return all(after - before == small_n for before, after in pairwise(lengths))
