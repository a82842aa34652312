"""M-IFEval's French types, each as lightblue-tech/M-IFEval checks it."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from ...arguments import Count, Kind, Pattern, Phrase, expected
from ...registry import MissingRequirementError
from ...text import sentences, words
from ...text.language import detect
from ...text.patterns import Folded
from ...text.punkt import Splitter
from ...text.scan import up_to
from .shared import KEYWORD_AGREES, RELATIONS, LatinLetter, has_title, m_ifeval

FrenchRelation = Literal["au moins", "moins de"]

_OPTIONS = ("Oui.", "Non.", "Peut-être.")
_QUOTES = ('""', "''", "«»")
_FAMILIAR = re.compile(r"\bt(?:u|e|oi|on|a|es|')\b", re.IGNORECASE)
_ACCENTED = re.compile("[À-ÅÇ-ÏÑ-ÖÙ-Ýà-åç-ïñ-öù-ýÿ]")
_DIGIT = re.compile(r"\d")
_WORD = re.compile(r"\w+")
# Beside what the Punkt model knows.
_ABBREVIATIONS = """
m mr mme mlle dr dre drs dres prof pr cap lt etc cf vs rép i.e c.-à-d ex e.g apr av j.c j.-c a.d env janv fév mar avr
juil sept oct nov déc svp p.v tél adj q.v p resp tel v vol nb n.b p.s ps p.p.s p.-s p-s
"""


@functools.lru_cache(maxsize=4)
def _splitter(data: tuple[str, ...]) -> Splitter:
    """The French Punkt model of NLTK's `data` folders. Raises LookupError where none has it."""
    from nltk.data import find

    learned = sentences.tables(find("tokenizers/punkt_tab/french/", list(data)))
    return Splitter(replace(learned, abbreviations=learned.abbreviations | set(_ABBREVIATIONS.split())))


def _french() -> Splitter:
    from nltk import data

    return _splitter(tuple(map(str, data.path)))


def _with_punkt() -> None:
    try:
        _french()
    except (LookupError, OSError):
        fetch = "mdpgrpo verifiers --get-punkt"
        raise MissingRequirementError(f"needs the French model of NLTK's punkt_tab: {fetch}") from None


def _accents(value: Any, rules: str) -> dict[str, str]:
    if not isinstance(value, Mapping) or not value:
        raise expected("an object of words without and with accents, such as {'ecole': 'école'}", value)
    pairs = {plain: accented for plain, accented in value.items() if accented is not None}
    if not pairs or not all(isinstance(word, str) for pair in pairs.items() for word in pair):
        raise expected("an object of words without and with accents, such as {'ecole': 'école'}", value)
    return pairs


Accents = Annotated[dict[str, str], Kind(_accents, "an object of words, plain to accented", {"ecole": "école"})]


@m_ifeval("fr:keywords:frequency", agree=KEYWORD_AGREES, examples={"keyword": "étoile"})
def keyword_frequency(text: str, keyword: Pattern, frequency: Count, relation: FrenchRelation) -> bool:
    """`keyword` occurs `relation` `frequency` times."""
    return RELATIONS[relation](Folded(text).count(keyword.strip(), stop=frequency), frequency)


@m_ifeval("fr:keywords:letter_frequency")
def letter_frequency(text: str, letter: LatinLetter, let_frequency: Count, let_relation: FrenchRelation) -> bool:
    """`letter`, in either case, occurs `let_relation` `let_frequency` times."""
    return RELATIONS[let_relation](text.lower().count(letter), let_frequency)


@m_ifeval("fr:length_constraints:number_sentences", needs=_with_punkt)
def number_sentences(text: str, num_sentences: Count, relation: FrenchRelation) -> bool:
    """`relation` `num_sentences` sentences, as NLTK's French Punkt model splits them."""
    return RELATIONS[relation](up_to(num_sentences, _french().spans(text)), num_sentences)


@m_ifeval("fr:length_constraints:number_words")
def number_words(text: str, num_words: Count, relation: FrenchRelation) -> bool:
    """`relation` `num_words` words."""
    return RELATIONS[relation](up_to(num_words, words.each_alphanumeric(text)), num_words)


@m_ifeval("fr:detectable_format:constrained_response")
def constrained_response(text: str) -> bool:
    """Holds one of "Oui.", "Non.", "Peut-être."."""
    return any(option in text for option in _OPTIONS)


@m_ifeval("fr:detectable_format:title")
def title(text: str) -> bool:
    """A title between double hash signs: ##titre##."""
    return has_title(text, "##", "##")


@m_ifeval("fr:startend:quotation")
def quotation(text: str) -> bool:
    """The whole response stands in quotes: "…", '…' or «…»."""
    text = text.strip()
    return len(text) > 1 and text[0] + text[-1] in _QUOTES


@m_ifeval("fr:change_case:capital_word_frequency")
def capital_words(text: str, capital_frequency: Count, capital_relation: FrenchRelation) -> bool:
    """`capital_relation` `capital_frequency` words in capital letters."""
    return RELATIONS[capital_relation](words.capitals(text), capital_frequency)


@m_ifeval("fr:change_case:french_capital")
def french_capital(text: str) -> bool:
    """French, in capital letters alone."""
    return text.isupper() and detect(text.lower()) in (None, "fr")


@m_ifeval("fr:change_case:french_lowercase")
def french_lowercase(text: str) -> bool:
    """French, in lower-case letters alone."""
    return text.islower() and detect(text) in (None, "fr")


@m_ifeval("fr:special_character:ethel_or_cedilla", examples={"forbidden_char": "ç"})
def without_character(text: str, forbidden_char: Phrase) -> bool:
    """No `forbidden_char`, such as ç or œ, in either case."""
    return re.search(re.escape(forbidden_char), text, re.IGNORECASE) is None


@m_ifeval("fr:special_character:no_accents")
def no_accents(text: str) -> bool:
    """No accented letter from À to ÿ."""
    return _ACCENTED.search(text) is None


@m_ifeval("fr:special_character:accents")
def accents(text: str, word_to_accentuate: Accents) -> bool:
    """Each word of `word_to_accentuate` that occurs is written with its accents."""
    spelled = set(_WORD.findall(text.lower()))
    return all(word_to_accentuate.get(_plain(word), word) == word for word in spelled)


def _plain(word: str) -> str:
    if word.isascii():
        return word
    return "".join(letter for letter in unicodedata.normalize("NFKD", word) if not unicodedata.combining(letter))


@m_ifeval("fr:detectable_content:informal_address")
def informal_address(text: str) -> bool:
    """The reader is addressed by tu: one of tu, te, t', toi, ton, ta, tes."""
    return _FAMILIAR.search(text) is not None


@m_ifeval("fr:detectable_content:no_digits")
def no_digits(text: str) -> bool:
    """No digits."""
    return _DIGIT.search(text) is None
