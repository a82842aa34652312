"""Checks on words: keywords, lengths, case, language, punctuation.

Each follows google-research `instruction_following_eval` (rules "ifeval") and m-salmani78/MDP-GRPO (rules "mdpgrpo").
"""

from __future__ import annotations

import re
from itertools import islice

from . import capitals, sentences
from .language import detect
from .registry import RELATIONS, count, instruction, language, letter, pattern, patterns, phrase, relation
from .scan import up_to

_WORD = re.compile(r"\w+")
_HYPHENATED = re.compile(r"\b\w[\w\-]*\b")

# Counts stop at the threshold plus one: there every relation has made up its mind.


@instruction("keywords:existence", keywords=patterns)
def keywords_exist(text: str, rules: str, keywords: list[str]) -> bool:
    return all(re.search(keyword, text, re.IGNORECASE) for keyword in keywords)


@instruction("keywords:frequency", keyword=pattern, frequency=count, relation=relation)
def keyword_frequency(text: str, rules: str, keyword: str, frequency: int, relation: str) -> bool:
    found = re.finditer(keyword.strip(), text, re.IGNORECASE)
    return RELATIONS[relation](up_to(frequency + 1, found), frequency)


@instruction("keywords:forbidden_words", forbidden_words=patterns)
def forbidden_words(text: str, rules: str, forbidden_words: list[str]) -> bool:
    # Without \b the engine skims the text ten times faster, and rules most words out.
    within = [word for word in forbidden_words if re.search(word, text, re.IGNORECASE)]
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in within)


@instruction("keywords:letter_frequency", letter=letter, let_frequency=count, let_relation=relation)
def letter_frequency(text: str, rules: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return RELATIONS[let_relation](text.lower().count(letter), let_frequency)


@instruction("language:response_language", language=language)
def response_language(text: str, rules: str, language: str) -> bool:
    return _few_letters(text, rules) or detect(text) in (None, language)


@instruction("length_constraints:number_sentences", num_sentences=count, relation=relation)
def number_sentences(text: str, rules: str, num_sentences: int, relation: str) -> bool:
    return RELATIONS[relation](sentences.count(text, stop=num_sentences + 1), num_sentences)


@instruction("length_constraints:number_words", num_words=count, relation=relation)
def number_words(text: str, rules: str, num_words: int, relation: str) -> bool:
    return RELATIONS[relation](up_to(num_words + 1, _WORD.finditer(text)), num_words)


@instruction("change_case:capital_word_frequency", capital_frequency=count, capital_relation=relation)
def capital_words(text: str, rules: str, capital_frequency: int, capital_relation: str) -> bool:
    number = capitals.count(text) if rules == "ifeval" else sum(map(str.isupper, _HYPHENATED.findall(text)))
    return RELATIONS[capital_relation](number, capital_frequency)


@instruction("change_case:english_capital")
def english_capital(text: str, rules: str) -> bool:
    return _few_letters(text, rules) or (text.isupper() and detect(text) in (None, "en"))


@instruction("change_case:english_lowercase")
def english_lowercase(text: str, rules: str) -> bool:
    return _few_letters(text, rules) or (text.islower() and detect(text) in (None, "en"))


@instruction("punctuation:no_comma")
def no_comma(text: str, rules: str) -> bool:
    return "," not in text and not (rules == "mdpgrpo" and "\u060c" in text)


@instruction("startend:end_checker", end_phrase=phrase)
def ends_with(text: str, rules: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _few_letters(text: str, rules: str) -> bool:
    """MDP-GRPO's rules leave a text with fewer than 3 letters alone."""
    return rules == "mdpgrpo" and len(list(islice(filter(str.isalpha, text), 3))) < 3
