"""What M-IFEval's languages share: relations, kinds of arguments, and the types that each has from IFEval."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Annotated, Any

from ...arguments import LANGUAGES, Kind, expected
from ...registry import INSTRUCTIONS, instruction
from ...text.language import detect
from .. import layout as _layout  # noqa: F401  enters types of IFEval
from .. import wording as _wording  # noqa: F401  enters the others

m_ifeval = functools.partial(instruction, rules=("m-ifeval",))

# Each language has two relations, and Spanish another two than the others.
RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "未満": operator.lt,
    "以上": operator.ge,
    "al menos": operator.ge,
    "como máximo": operator.le,
    "moins de": operator.lt,
    "au moins": operator.ge,
}
_SAME_AS_IFEVAL = {
    "ja": (
        "length_constraints:number_paragraphs detectable_content:number_placeholders detectable_format:json_format"
        " combination:two_responses"
    ),
    "es": (
        "keywords:existence keywords:forbidden_words length_constraints:number_paragraphs detectable_format:json_format"
        " detectable_format:title combination:two_responses combination:repeat_prompt punctuation:no_comma"
        " startend:quotation"
    ),
    "fr": (
        "keywords:existence keywords:forbidden_words length_constraints:number_paragraphs"
        " length_constraints:nth_paragraph_first_word detectable_content:number_placeholders"
        " detectable_content:postscript detectable_format:number_bullet_lists"
        " detectable_format:number_highlighted_sections detectable_format:multiple_sections"
        " detectable_format:json_format combination:two_responses combination:repeat_prompt startend:end_checker"
        " punctuation:no_comma"
    ),
}
KEYWORD_AGREES = INSTRUCTIONS["keywords:frequency"].agree
SECTIONS_AGREE = INSTRUCTIONS["detectable_format:multiple_sections"].agree
NTH_PARAGRAPH_AGREES = INSTRUCTIONS["length_constraints:nth_paragraph_first_word"].agree

for _language, _ids in _SAME_AS_IFEVAL.items():
    for _id in _ids.split():
        _type = INSTRUCTIONS[_id]
        m_ifeval(f"{_language}:{_id}", agree=_type.agree, needs=_type.needs, examples=_type.example)(_type.check)


def _language_code(value: Any, rules: str) -> str:
    # "zh" stands in M-IFEval's data, though langdetect says zh-cn or zh-tw.
    if value not in (*LANGUAGES, "zh"):
        raise expected("a language code that langdetect knows, such as 'de' or 'zh-cn'", value)
    return str(value)


Language = Annotated[str, Kind(_language_code, "a language code of langdetect", "de")]


def _latin_letter(value: Any, rules: str) -> str:
    # M-IFEval draws a letter where it is given none of these.
    if not isinstance(value, str) or len(value.lower()) != 1 or not "a" <= value.lower() <= "z":
        raise expected("a letter from a to z", value)
    return value.lower()


LatinLetter = Annotated[str, Kind(_latin_letter, "a letter from a to z", "e")]


@m_ifeval("ja:language:response_language")
@m_ifeval("es:language:response_language")
@m_ifeval("fr:language:response_language")
def response_language(text: str, language: Language) -> bool:
    """The response is in `language`, as langdetect sees it."""
    return detect(text) in (None, language)


def nth_paragraph_of(text: str, num_paragraphs: int, nth: int) -> str:
    """The `nth` of `num_paragraphs` paragraphs, stripped; "" where it is blank, or their number another."""
    pieces = text.split("\n\n")
    if sum(1 for piece in pieces if piece.strip()) != num_paragraphs:
        return ""
    # Blank pieces do not count above but do here, as in the original.
    return pieces[nth - 1].strip()


def has_title(text: str, opening: str, closing: str) -> bool:
    """Whether a line holds something that is not blank between `opening` and `closing`."""
    return any(_holds_title(line, opening, closing) for line in set(text.split("\n")) if opening in line)


def _holds_title(line: str, opening: str, closing: str) -> bool:
    start, end = line.find(opening), line.rfind(closing)
    title = line[start : end + len(closing)]
    return end > start + len(opening) and bool(title.lstrip(opening[0]).rstrip(closing[0]).strip())
