"""Counting the words in capital letters among the tokens of `nltk.word_tokenize`.

NLTK rewrites the text some thirty times, up to 1.5 s for 200 kB. Only splits between letters change this count, so one
pass cuts the text where NLTK surely does, and the few pieces with an apostrophe or a contraction are looked at one by
one. The tests hold the count against NLTK's tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from . import sentences

# The end of a sentence matters inside a run of non-blanks, and where its period hides a clitic: I CAN'T.
_NEEDS_SENTENCES = re.compile(r"\.'|\.:\d|'\w{0,2}\.|wanna\.", re.IGNORECASE)
_OPENING_QUOTE = re.compile(r"(?<=[ (\[{<])(?:\"|'')")
_FINAL_PERIOD = re.compile(r"(?<=[^.])\.[\])}>\"'»”’ ]*\s*$")
_SHORT_CLITIC = re.compile(r"(?<=[^'])(?:'[sSmMdD]|')$")
_LONG_CLITIC = re.compile(r"(?<=[^'])(?:'ll|'LL|'re|'RE|'ve|'VE|n't|N'T)$")
# A closing apostrophe before one of these is set apart before clitics are looked for.
_PARTED_EARLY = re.compile(r"[ «“‘„`:,;@#$%&?!\u2012-\u2015]|\.\.")
_CONTRACTION = re.compile(
    r"\b(can)(not)\b|\b(d)('ye)\b|\b(gim)(me)\b|\b(gon)(na)\b|\b(got)(ta)\b|\b(lem)(me)\b|\b(more)('n)\b"
    r"|\b(wan)(na)(?=\s)",
    re.IGNORECASE,
)
_TIS = re.compile(r" ('t)(is|was)\b", re.IGNORECASE)
_MAY_CONTRACT = re.compile(r"cannot|d'ye|gimme|gonna|gotta|lemme|more'n|wanna|'tis|'twas", re.IGNORECASE)


def count(text: str) -> int:
    """The number of NLTK's word tokens in `text` that are in capitals (`str.isupper`)."""
    nltk = _nltk_rules()
    if _NEEDS_SENTENCES.search(text):
        parts = (_OPENING_QUOTE.sub("``", text[start:stop]) for start, stop in sentences.spans(text))
        text = " ".join(_FINAL_PERIOD.sub(" ", part) for part in parts)
    if "'" in text:
        text = nltk.part_apostrophes(text)
    elif not _MAY_CONTRACT.search(text):
        return sum(map(str.isupper, nltk.piece.findall(text)))
    number = 0
    for match in nltk.piece.finditer(text):
        piece = match[0]
        if piece[-1] == "'" and _PARTED_EARLY.match(text, match.end()):
            piece = piece[:-1]
        number += sum(map(str.isupper, _words(piece)))
    return number


def _words(piece: str) -> list[str]:
    words = [piece]
    for clitic in (_SHORT_CLITIC, _LONG_CLITIC) if "'" in piece else ():
        found = clitic.search(words[0])
        if found and found.start():
            words[:1] = [words[0][: found.start()], found[0]]
    if _MAY_CONTRACT.search(piece):
        spaced = _CONTRACTION.sub(_spaced, f" {' '.join(words)} ")
        words = _TIS.sub(_spaced, spaced).split()
    return words


def _spaced(contraction: re.Match[str]) -> str:
    return f" {' '.join(part for part in contraction.groups() if part)} "


class _Rules(NamedTuple):
    piece: re.Pattern[str]
    part_apostrophes: Callable[[str], str]


@functools.lru_cache(maxsize=1)
def _nltk_rules() -> _Rules:
    """Two rules changed with NLTK 3.10, so the NLTK at hand is asked: long dashes, and an apostrophe before a word."""
    from nltk.tokenize import NLTKWordTokenizer

    dashes = "\u2012-\u2015" if any(rule.search("\u2014") for rule, _ in NLTKWordTokenizer.PUNCTUATION) else ""
    # The excluded characters stand apart in NLTK; , and : stay inside before a digit, . - and ' when they come singly.
    inside = rf"[^\s«“‘„`»”’;@#$%&?!*\[\](){{}}<>\"{dashes}:,.'\-]+"
    rule, replacement = NLTKWordTokenizer.STARTING_QUOTES[-1]
    return _Rules(
        re.compile(rf"(?:{inside}|[:,](?=\d)|(?<!\.)\.(?!\.)|(?<!-)-(?!-)|(?<!')'(?!'))+"),
        functools.partial(re.compile(rule.pattern).sub, replacement),
    )
