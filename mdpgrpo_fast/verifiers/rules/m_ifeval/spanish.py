"""M-IFEval's Spanish types, each as lightblue-tech/M-IFEval checks it."""

from __future__ import annotations

import re
import string
import unicodedata
from typing import Literal

from ...arguments import Count, Pattern, Phrase
from ...text.language import detect
from ...text.patterns import Folded, compiled, compiles
from ...text.scan import up_to
from .. import layout
from .shared import (
    KEYWORD_AGREES,
    NTH_PARAGRAPH_AGREES,
    RELATIONS,
    SECTIONS_AGREE,
    LatinLetter,
    m_ifeval,
    nth_paragraph_of,
)
from .spanish_words import number_with, words

SpanishRelation = Literal["al menos", "como máximo"]

_OPTIONS = ("Sí.", "No.", "Quizás.")
_POSTSCRIPTS = {"P.D.": r"p\.\s?d\.", "Nota": "nota"}
_BULLET = re.compile(r"^[^\S\n]*\*[^*].*", re.MULTILINE)
_LINE_START = re.compile(r"^\s*(\d+\.\s*|[-*]\s*)?", re.MULTILINE)
_TILDES, _ENIE, _DIERESIS = map(frozenset, ("áéíóúÁÉÍÓÚ", "ñÑ", "üÜ"))
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

# M-IFEval's data give placeholders, highlights and sections a relation; its checks read "al menos" whatever it is.


@m_ifeval("es:detectable_content:number_placeholders")
def placeholders(text: str, num_placeholders: Count, relation: SpanishRelation = "al menos") -> bool:
    """At least `num_placeholders` placeholders in square brackets; `relation` changes nothing."""
    return layout.placeholders(text, num_placeholders)


@m_ifeval("es:detectable_format:number_highlighted_sections")
def highlights(text: str, num_highlights: Count, relation: SpanishRelation = "al menos") -> bool:
    """At least `num_highlights` passages *between stars*; `relation` changes nothing."""
    return layout.highlights(text, num_highlights)


@m_ifeval("es:detectable_format:multiple_sections", agree=SECTIONS_AGREE, examples={"section_spliter": "Sección"})
def sections(text: str, section_spliter: Pattern, num_sections: Count, relation: SpanishRelation = "al menos") -> bool:
    """At least `num_sections` sections, each begun by `section_spliter` and a number; `relation` changes nothing."""
    return layout.sections(text, section_spliter, num_sections)


@m_ifeval("es:detectable_format:number_bullet_lists")
def bullets(text: str, num_bullets: Count) -> bool:
    """Exactly `num_bullets` bullet points, each a line that starts with *."""
    return up_to(num_bullets + 1, _BULLET.finditer(text)) == num_bullets


@m_ifeval("es:detectable_format:constrained_response")
def constrained_response(text: str) -> bool:
    """Holds one of "Sí.", "No.", "Quizás."."""
    return any(option in text for option in _OPTIONS)


@m_ifeval(
    "es:detectable_content:postscript",
    agree=compiles("postscript_marker", lambda marker: marker.strip().lower()),
    examples={"postscript_marker": "P.D."},
)
def postscript(text: str, postscript_marker: Pattern) -> bool:
    """A postscript that starts with `postscript_marker`."""
    marker = postscript_marker.strip()
    return compiled(_POSTSCRIPTS.get(marker, marker.lower()), re.MULTILINE).search(text.lower()) is not None


@m_ifeval("es:keywords:frequency", agree=KEYWORD_AGREES, examples={"keyword": "empresa"})
def keyword_frequency(text: str, keyword: Pattern, frequency: Count, relation: SpanishRelation) -> bool:
    """`keyword` occurs `relation` `frequency` times."""
    return RELATIONS[relation](Folded(text).count(keyword.strip(), stop=frequency + 1), frequency)


@m_ifeval("es:keywords:letter_frequency")
def letter_frequency(text: str, letter: LatinLetter, let_frequency: Count, let_relation: SpanishRelation) -> bool:
    """`letter`, in either case, occurs `let_relation` `let_frequency` times."""
    return RELATIONS[let_relation](text.lower().count(letter), let_frequency)


@m_ifeval(
    "es:length_constraints:nth_paragraph_first_word", agree=NTH_PARAGRAPH_AGREES, examples={"first_word": "Creo que"}
)
def nth_first_word(text: str, num_paragraphs: Count, nth_paragraph: Count, first_word: Phrase) -> bool:
    """`num_paragraphs` paragraphs, divided by blank lines; the `nth_paragraph` begins with the words `first_word`."""
    wanted = first_word.lower().split()
    begin = nth_paragraph_of(text, num_paragraphs, nth_paragraph).split(None, len(wanted))[: len(wanted)]
    return [word.translate(_NO_PUNCTUATION).lower() for word in begin] == wanted


@m_ifeval("es:startend:end_checker", examples={"end_phrase": "Un saludo"})
def ends_with(text: str, end_phrase: Phrase) -> bool:
    """The response ends with `end_phrase`, and perhaps a full stop."""
    return text.strip().strip('"').lower().removesuffix(".").endswith(end_phrase.strip().lower())


@m_ifeval("es:punctuation:question_marks")
def question(text: str) -> bool:
    """Something that is not blank between ¿ and ?."""
    return _has_between(text, "¿", "?")


@m_ifeval("es:punctuation:exclamation_marks")
def exclamation(text: str) -> bool:
    """Something that is not blank between ¡ and !."""
    return _has_between(text, "¡", "!")


def _has_between(text: str, opening: str, closing: str) -> bool:
    start = text.find(opening)
    while start >= 0 and (end := text.find(closing, start)) >= 0:
        if text[start:end].lstrip(opening).strip():
            return True
        start = text.find(opening, end)
    return False


@m_ifeval("es:change_case:spanish_capital")
def spanish_capital(text: str) -> bool:
    """Spanish, in capital letters alone."""
    letters = filter(str.isalpha, set(unicodedata.normalize("NFKD", text)))
    upper = all(letter.isupper() or unicodedata.combining(letter) for letter in letters)
    return upper and detect(text.lower()) in (None, "es")


@m_ifeval("es:change_case:spanish_lowercase")
def spanish_lowercase(text: str) -> bool:
    """Spanish, in lower-case letters alone."""
    return text.islower() and detect(text) in (None, "es")


# The words of these are spaCy's tokens without punctuation.


@m_ifeval("es:length_constraints:number_words")
def number_words(text: str, num_words: Count, relation: SpanishRelation) -> bool:
    """`relation` `num_words` words, without the marks of lists, as spaCy divides them."""
    text = _LINE_START.sub(lambda start: "" if start[1] else start[0], text).replace("\n", " ")
    found = words(text)
    return found is not None and RELATIONS[relation](len(found), num_words)


@m_ifeval("es:change_case:capital_word_frequency")
def capital_words(text: str, capital_frequency: Count, capital_relation: SpanishRelation) -> bool:
    """`capital_relation` `capital_frequency` words in capital letters, as spaCy divides them."""
    found = words(text)
    return found is not None and RELATIONS[capital_relation](sum(map(str.isupper, found)), capital_frequency)


@m_ifeval("es:special_character:tildes")
def with_tilde(text: str, num_words: Count, relation: SpanishRelation) -> bool:
    """`relation` `num_words` words with one of á é í ó ú, as spaCy divides them."""
    number = number_with(text, _TILDES)
    return number is not None and RELATIONS[relation](number, num_words)


@m_ifeval("es:special_character:enie")
def with_enie(text: str, let_frequency: Count) -> bool:
    """Exactly `let_frequency` words with ñ, as spaCy divides them."""
    return number_with(text, _ENIE) == let_frequency


@m_ifeval("es:special_character:dieresis")
def with_dieresis(text: str, let_frequency: Count) -> bool:
    """Exactly `let_frequency` words with ü, as spaCy divides them."""
    return number_with(text, _DIERESIS) == let_frequency
