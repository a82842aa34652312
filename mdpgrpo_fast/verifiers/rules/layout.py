"""Checks on layout: sections, paragraphs, bullets, JSON, XML, what comes first and last.

Each follows google-research `instruction_following_eval` (rules "ifeval") and m-salmani78/MDP-GRPO (rules "mdpgrpo").
Where their patterns are quadratic, ours are rewritten to read every character a bounded number of times.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from ..arguments import Count, Pattern, Phrase, Request
from ..registry import instruction
from ..text import markup
from ..text.patterns import begins, compiled, compiles, plain
from ..text.scan import up_to

# IFEval's 25 types, which the rule sets built on it know too.
ifeval = functools.partial(instruction, rules=("ifeval", "mdpgrpo", "iftrain", "ifbench"))

_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
_PERSIAN_POSTSCRIPT = {"\u067e.\u0646.": "\u067e\\.\\s?\u0646\\."}
# Lines are found by the \n before them, which is five times as fast as ^.
_STAR_BULLET = re.compile(r"\n[^\S\n]*\*[^*].*")
_DASH_BULLET = re.compile(r"\n[^\S\n]*-")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]*\]")  # the innermost bracket of each: as many, found in one pass
_HIGHLIGHT = re.compile(r"\*([^\n*]*)\*")
_DOUBLE_HIGHLIGHT = re.compile(r"\*\*([^\n*]*)\*\*")
_XML_FENCE = re.compile(r"```(?:[xX][mM][lL])?\s*\n")
_XML_DECLARATION = re.compile(r"<\?xml\s[^?]*\?>\s*")
_XML_NAME = re.compile(r"[A-Za-z_][\w\-.:]*")
_WORD_EDGE = re.compile(r"\b")


@ifeval("detectable_content:number_placeholders")
def placeholders(text: str, num_placeholders: Count) -> bool:
    """At least `num_placeholders` placeholders in square brackets, such as [address]."""
    return up_to(num_placeholders, _PLACEHOLDER.finditer(text)) >= num_placeholders


@ifeval("detectable_content:postscript", agree=compiles("postscript_marker", lambda marker: marker.strip().lower()))
def postscript(text: str, rules: str, postscript_marker: Pattern) -> bool:
    """A postscript that starts with `postscript_marker`."""
    marker = postscript_marker.strip()
    known = _POSTSCRIPTS if rules != "mdpgrpo" else _POSTSCRIPTS | _PERSIAN_POSTSCRIPT
    return compiled(known.get(marker, marker.lower()), re.MULTILINE).search(text.lower()) is not None


@ifeval("detectable_format:number_bullet_lists")
def bullets(text: str, num_bullets: Count) -> bool:
    """Exactly `num_bullets` bullet points, each a line that starts with * or -."""
    text = "\n" + text
    stars = up_to(num_bullets + 1, _STAR_BULLET.finditer(text))
    return stars + up_to(num_bullets + 1, _DASH_BULLET.finditer(text)) == num_bullets


@ifeval("detectable_format:constrained_response")
def constrained_response(text: str) -> bool:
    """Holds one of "My answer is yes.", "My answer is no.", "My answer is maybe."."""
    return any(option in text for option in _OPTIONS)


@ifeval("detectable_format:number_highlighted_sections")
def highlights(text: str, num_highlights: Count) -> bool:
    """At least `num_highlights` passages *between stars*."""
    found = _HIGHLIGHT.findall(text) + _DOUBLE_HIGHLIGHT.findall(text)
    return sum(map(bool, map(str.strip, found))) >= num_highlights


def _section(spliter: str) -> str:
    # In front of a plain word, a blank that may be there decides nothing, and slows the search for the word.
    spliter = spliter.strip()
    return rf"{spliter}\s?\d+\s?" if plain(spliter) else rf"\s?{spliter}\s?\d+\s?"


@ifeval("detectable_format:multiple_sections", agree=compiles("section_spliter", _section))
def sections(text: str, section_spliter: Pattern, num_sections: Count) -> bool:
    """At least `num_sections` sections, each begun by `section_spliter` and a number."""
    section = compiled(_section(section_spliter))
    # The original counts what re.split returns, groups of the pattern included.
    return up_to(num_sections, section.finditer(text)) * (1 + section.groups) >= num_sections


@ifeval("length_constraints:number_paragraphs")
def paragraphs(text: str, num_paragraphs: Count) -> bool:
    """Exactly `num_paragraphs` paragraphs, divided by ***."""
    pieces = [piece.strip() for piece in text.split("***")]
    return all(pieces[1:-1]) and sum(map(bool, pieces)) == num_paragraphs


def _nth_within(arguments: Mapping[str, Any]) -> None:
    nth, total = arguments["nth_paragraph"], arguments["num_paragraphs"]
    if not 1 <= nth <= total:
        raise ValueError(f"nth_paragraph: expected 1 to num_paragraphs ({total}), got {nth}")


@ifeval("length_constraints:nth_paragraph_first_word", agree=_nth_within)
def nth_first_word(text: str, num_paragraphs: Count, nth_paragraph: Count, first_word: Phrase) -> bool:
    """`num_paragraphs` paragraphs, divided by blank lines; the `nth_paragraph` begins with `first_word`."""
    pieces = text.split("\n\n")
    if sum(1 for piece in pieces if piece.strip()) != num_paragraphs:
        return False
    # Blank pieces do not count above but do here, as in the original.
    piece = pieces[nth_paragraph - 1].strip()
    if not piece:
        return False
    word = re.split(r"[.,?!'\"]", piece.split(None, 1)[0].lstrip("'").lstrip('"'), maxsplit=1)[0]
    return "".join(map(str.lower, word)) == first_word.lower()  # letter by letter: a final sigma stays plain


@ifeval("detectable_format:json_format")
def json_format(text: str) -> bool:
    """The whole response is JSON, in a fence or not."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


@ifeval("detectable_format:title")
def title(text: str) -> bool:
    """A title in double angle brackets: <<title>>."""
    if "<<" not in text or ">>" not in text:
        return False
    return any(_is_title(line) for line in set(text.split("\n")) if "<<" in line and ">>" in line)


def _is_title(line: str) -> bool:
    start, end = line.find("<<"), line.rfind(">>")
    return end >= start + 3 and bool(line[start : end + 2].lstrip("<").rstrip(">").strip())


@ifeval("combination:two_responses")
def two_responses(text: str) -> bool:
    """Two different responses, divided by ******."""
    pieces = [piece.strip() for piece in text.split("******")]
    if not all(pieces[1:-1]):
        return False
    answers = [piece for piece in pieces if piece]
    return len(answers) == 2 and answers[0] != answers[1]


@ifeval("combination:repeat_prompt")
def repeat_prompt(text: str, rules: str, prompt_to_repeat: Request) -> bool:
    """The response begins with `prompt_to_repeat`, word for word."""
    wanted = prompt_to_repeat.strip().lower()
    quotes = ("",) if rules != "mdpgrpo" else ("", "'", '"')
    return any(begins(text.strip(), quote + wanted) for quote in quotes)


@ifeval("startend:quotation")
def quotation(text: str) -> bool:
    """The whole response stands in double quotes."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@instruction("detectable_format:xml_format", rules=("mdpgrpo",))
def xml_format(text: str) -> bool:
    """The whole response is XML, in a fence or not."""
    text = _without_xml_fence(text.strip())
    return markup.well_formed(text) or _looks_like_xml(text)


def _without_xml_fence(text: str) -> str:
    opening = _XML_FENCE.match(text)
    if opening:
        text = text[opening.end() :]
    else:
        for fence in ("```xml", "```Xml", "```XML", "```"):
            text = text.removeprefix(fence)
    return text.removesuffix("```").strip()


def _looks_like_xml(text: str) -> bool:
    """Whether an optional declaration and one outer element are all there is, whatever lies between its tags."""
    declaration = _XML_DECLARATION.match(text)
    start = declaration.end() if declaration else 0
    close = text.rfind("</")
    name = text[close + 2 : -1]
    after_name = start + 1 + len(name)
    return (
        text.startswith("<", start)
        and close >= after_name
        and text.endswith(">")
        and _XML_NAME.fullmatch(name) is not None
        and text.startswith(name, start + 1)
        and _WORD_EDGE.match(text, after_name) is not None
    )


def span_holds_text(text: str, start: int, stop: int) -> None:
    """Raises ValueError where nothing could be copied from text[start:stop]."""
    if not text[start:stop].strip():
        raise ValueError(f"n_start, n_end: prompt_to_repeat holds no text from character {start} to {stop - 1}")
