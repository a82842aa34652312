"""IF-Train's checks on words: keywords, first and last words, what words begin with.

Each follows allenai/open-instruct, `open_instruct/IFEvalG/instructions.py`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ...arguments import Count, Pattern, Phrase, Positive, Relation
from ...text import words as nltk_words
from ...text.patterns import Folded, compiles
from ..wording import keyword_frequency
from .kinds import Word, iftrain
from .sentences import split

_NO_WORD = re.compile(r"[^\w\s]")
_QUOTES = "\"'`"  # NLTK writes double quotes in other characters
_compiles = functools.partial(compiles, written=str.strip, flags=re.IGNORECASE)


@iftrain("keywords:word_once", agree=_compiles("keyword"))
def word_once(text: str, keyword: Pattern) -> bool:
    """`keyword` occurs once."""
    return Folded(text).count(keyword.strip(), stop=2) == 1


@iftrain("keywords:word_count_different_numbers", agree=_compiles("keyword"))
def word_count_different_numbers(text: str, keyword: Pattern, frequency: Count, relation: Relation) -> bool:
    """`keyword` occurs `relation` `frequency` times."""
    return keyword_frequency(text, keyword, frequency, relation)


def _both_compile(arguments: Mapping[str, Any]) -> None:
    for name in ("keyword1", "keyword2"):
        _compiles(name)(arguments)


@iftrain("count:count_increment_word", agree=_both_compile, examples={"keyword2": "harbour"})
def count_increment_word(text: str, keyword1: Pattern, keyword2: Pattern) -> bool:
    """`keyword1` occurs once, `keyword2` twice."""
    folded = Folded(text)
    return folded.count(keyword1.strip(), stop=2) == 1 and folded.count(keyword2.strip(), stop=3) == 2


@iftrain("keywords:exclude_word_harder", examples={"keyword": "island"})
def exclude_word(text: str, keyword: Phrase, instruction: str = "") -> bool:
    """`keyword` does not stand between two spaces (`instruction` is not read)."""
    return f" {keyword.strip()} " not in text


@iftrain("keywords:keyword_specific_position")
def keyword_position(text: str, keyword: Word, n: Positive, m: Positive) -> bool:
    """The `m`-th word of the `n`-th sentence is `keyword`."""
    sentences, keyword = split(text), keyword.strip()
    if len(sentences) < n or (keyword not in sentences[n - 1] and not any(quote in keyword for quote in _QUOTES)):
        return False
    words = nltk_words.tokens(sentences[n - 1])
    return len(words) >= m and words[m - 1] == keyword


@iftrain("keywords:palindrome")
def palindrome(text: str) -> bool:
    """A word reads the same backwards, such as level; one character is such a word."""
    return any(word[0] == word[-1] and word == word[::-1] for word in text.split())


@iftrain("keywords:start_end")
def start_end(text: str) -> bool:
    """The first and the last word are the same, and nothing follows."""
    last = text.rstrip()[-1]
    if last.isascii() and last not in _QUOTES and last.lower() not in text.split(None, 1)[0].lower():
        return False  # the last word ends with a character that the first does not hold
    words = nltk_words.tokens(text)
    return len(words) > 1 and words[0].lower() == words[-1].lower()


@iftrain("keywords:no_adjacent_consecutive")
def no_adjacent_consecutive(text: str) -> bool:
    """No word begins with the letter that follows, in the alphabet, the first letter of the word before."""
    letters = [word[0].lower() for word in text.split()]
    # A dotted capital I has two characters in lower case, which the original cannot compare.
    return all(len(one + other) == 2 and ord(other) - ord(one) != 1 for one, other in pairwise(letters))


@iftrain("first_word:first_word_sent")
def first_word_of_sentences(text: str, first_word: Word) -> bool:
    """Every sentence begins with `first_word`."""
    wanted = first_word.strip().lower()
    return all(sentence and sentence.split(None, 1)[0].lower() == wanted for sentence in split(text))


@iftrain("first_word:first_word_answer", examples={"first_word": "island"})
def first_word_of_answer(text: str, first_word: Phrase) -> bool:
    """The response begins with `first_word`."""
    return text.split(None, 1)[0].lower() == first_word.strip().lower()


@iftrain("last_word:last_word_sent")
def last_word_of_sentences(text: str, last_word: Word) -> bool:
    """Every sentence ends with `last_word`, punctuation aside."""
    wanted = last_word.strip().lower()
    return all(sentence and _last_word(sentence) == wanted for sentence in split(text))


@iftrain("last_word:last_word_answer", examples={"last_word": "island"})
def last_word_of_answer(text: str, last_word: Phrase) -> bool:
    """The response ends with `last_word`, punctuation aside."""
    return _last_word(text) == last_word.strip().lower()


def _last_word(text: str) -> str:
    return _NO_WORD.sub("", text.rsplit(None, 1)[-1]).lower()
