"""Checks on words: keywords, lengths, case, language, punctuation.

Each follows google-research `instruction_following_eval` (rules "ifeval") and m-salmani78/MDP-GRPO (rules "mdpgrpo").
"""

from __future__ import annotations

import re
from itertools import islice

from ..arguments import RELATIONS, Count, Language, Letter, Pattern, Patterns, Phrase, Relation
from ..text import sentences, words
from ..text.language import detect
from ..text.patterns import Folded, as_word, compiles, ends
from ..text.scan import up_to
from .layout import ifeval

_HYPHENATED = re.compile(r"\b\w[\w\-]*\b")
_ONLY_WORDS = bytes(code if chr(code).isalnum() or chr(code) == "_" else ord(" ") for code in range(256))

# Counts stop at the threshold plus one: there every relation has made up its mind.


@ifeval("keywords:existence", agree=compiles("keywords", str, re.IGNORECASE))
def keywords_exist(text: str, keywords: Patterns) -> bool:
    """Every one of `keywords` occurs."""
    return all(map(Folded(text).has, keywords))


@ifeval("keywords:frequency", agree=compiles("keyword", str.strip, re.IGNORECASE))
def keyword_frequency(text: str, keyword: Pattern, frequency: Count, relation: Relation) -> bool:
    """`keyword` occurs `relation` `frequency` times."""
    return RELATIONS[relation](Folded(text).count(keyword.strip(), stop=frequency + 1), frequency)


@ifeval("keywords:forbidden_words", agree=compiles("forbidden_words", as_word, re.IGNORECASE))
def forbidden_words(text: str, forbidden_words: Patterns) -> bool:
    """None of `forbidden_words` occurs as a word."""
    return not any(map(Folded(text).has_word, forbidden_words))


@ifeval("keywords:letter_frequency")
def letter_frequency(text: str, letter: Letter, let_frequency: Count, let_relation: Relation) -> bool:
    """`letter`, in either case, occurs `let_relation` `let_frequency` times."""
    return RELATIONS[let_relation](text.lower().count(letter), let_frequency)


@ifeval("language:response_language")
def response_language(text: str, rules: str, language: Language) -> bool:
    """The response is in `language`, as langdetect sees it."""
    return _few_letters(text, rules) or detect(text) in (None, language)


@ifeval("length_constraints:number_sentences")
def number_sentences(text: str, num_sentences: Count, relation: Relation) -> bool:
    """`relation` `num_sentences` sentences, as NLTK's English Punkt model splits them."""
    return RELATIONS[relation](sentences.count(text, stop=num_sentences + 1), num_sentences)


@ifeval("length_constraints:number_words")
def number_words(text: str, num_words: Count, relation: Relation) -> bool:
    """`relation` `num_words` words."""
    return RELATIONS[relation](_words(text, stop=num_words + 1), num_words)


def _words(text: str, stop: int) -> int:
    """The number of words; from `stop` on any number that is not less."""
    if text.isascii():
        return len(text.encode().translate(_ONLY_WORDS).split())
    return up_to(stop, words.each_alphanumeric(text))


@ifeval("change_case:capital_word_frequency")
def capital_words(text: str, rules: str, capital_frequency: Count, capital_relation: Relation) -> bool:
    """`capital_relation` `capital_frequency` words in capital letters."""
    number = words.capitals(text) if rules != "mdpgrpo" else sum(map(str.isupper, _HYPHENATED.findall(text)))
    return RELATIONS[capital_relation](number, capital_frequency)


@ifeval("change_case:english_capital")
def english_capital(text: str, rules: str) -> bool:
    """English, in capital letters alone."""
    return _few_letters(text, rules) or (text.isupper() and detect(text) in (None, "en"))


@ifeval("change_case:english_lowercase")
def english_lowercase(text: str, rules: str) -> bool:
    """English, in lower-case letters alone."""
    return _few_letters(text, rules) or (text.islower() and detect(text) in (None, "en"))


@ifeval("punctuation:no_comma")
def no_comma(text: str, rules: str) -> bool:
    """No comma."""
    return "," not in text and not (rules == "mdpgrpo" and "\u060c" in text)


@ifeval("startend:end_checker")
def ends_with(text: str, end_phrase: Phrase) -> bool:
    """The response ends with `end_phrase`."""
    return ends(text.strip().strip('"'), end_phrase.strip().lower())


def _few_letters(text: str, rules: str) -> bool:
    """MDP-GRPO's rules leave a text with fewer than 3 letters alone."""
    return rules == "mdpgrpo" and len(list(islice(filter(str.isalpha, text), 3))) < 3
