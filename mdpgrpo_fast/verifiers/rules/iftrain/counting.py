"""IF-Train's checks on how many: letters, words, sentences in a paragraph.

Each follows allenai/open-instruct, `open_instruct/IFEvalG/instructions.py`.
"""

from __future__ import annotations

import re
import string
from collections import Counter

from ...arguments import RELATIONS, Count, Letter, Positive, Relation
from ...text import words
from ...text.scan import up_to
from ..wording import letter_frequency
from .kinds import iftrain
from .sentences import split

_LOWERCASE = re.compile(r"(?<!\w)[a-z]+(?!\w)")
_NO_LETTERS = bytes(range(128)).translate(None, string.ascii_letters.encode())
_DIVIDER = re.compile(r"\s?\*\*\*\s?")


@iftrain("count:lowercase_counting")
def lowercase_words(text: str, N: Positive) -> bool:
    """At most `N` words in lower-case letters from a to z."""
    return up_to(N + 1, _LOWERCASE.finditer(text)) <= N


@iftrain("letters:letter_counting")
def letters(text: str, N: Positive, relation: Relation) -> bool:
    """`relation` `N` letters from a to z, in either case."""
    return RELATIONS[relation](len(text.encode("ascii", "ignore").translate(None, _NO_LETTERS)), N)


@iftrain("letters:letter_counting2")
def one_letter(text: str, letter: Letter, let_frequency: Count, let_relation: Relation) -> bool:
    """`letter`, in either case, occurs `let_relation` `let_frequency` times."""
    return letter_frequency(text, letter, let_frequency, let_relation)


@iftrain("count:counting_composition")
def composition(text: str, n_sent: Positive, n_words: Positive) -> bool:
    """Three paragraphs, divided by ***, of `n_sent` sentences each, of `n_words` words each."""
    paragraphs = _DIVIDER.split(text, maxsplit=3)
    return len(paragraphs) == 3 and all(_composed(paragraph, n_sent, n_words) for paragraph in paragraphs)


def _composed(paragraph: str, n_sent: int, n_words: int) -> bool:
    sentences = split(paragraph)
    if len(sentences) != n_sent:
        return False
    # A run of non-blanks is a word at least: no need to look for the words of a sentence with too many.
    return all(
        len(sentence.split(None, min(n_words, len(sentence)))) <= n_words and len(words.tokens(sentence)) == n_words
        for sentence in sentences
    )


@iftrain("count:count_unique")
def unique_words(text: str) -> bool:
    """No word comes twice; punctuation counts as words."""
    # What is nothing but letters reads the same wherever it stands. Of any other run of non-blanks, the first word is
    # a start of it, or one of two quotes: there are fewer of these than runs.
    for run, number in Counter(text.split()).items():
        if number > 1 and (run.isalpha() or number > len(run) + 2):
            return False
    found = words.tokens(text)
    return len(set(found)) == len(found)
