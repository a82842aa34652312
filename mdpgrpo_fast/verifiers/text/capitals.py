"""Counting the words in capital letters among the tokens of `nltk.word_tokenize`.

NLTK rewrites the text some thirty times, up to 1.5 s for 200 kB. Only splits between letters change this count, so one
pass cuts the text where NLTK surely does, and the few pieces with an apostrophe or a contraction are looked at one by
one. The tests hold the count against NLTK's tokens.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from . import sentences

_MAY_HOLD_CAPITALS = re.compile(r"(?<!\S)[^\sA-Z\x80-\U0010ffff]*[A-Z\x80-\U0010ffff]\S*\s?")
# The end of a sentence matters inside a run of non-blanks, and where its period hides a clitic: I CAN'T.
_APOSTROPHE_AND_PERIOD = re.compile(r"'(?:\w{0,2}\.|(?<=\.'))")
_APOSTROPHE_AND_WORD = re.compile(r"'\w")
_PERIOD_AND_COLON = re.compile(r"\.:\d")
_OPENING_QUOTE = re.compile(r"(?<=[ (\[{<])(?:\"|'')")
_SHORT_CLITIC = re.compile(r"(?<=[^'])(?:'[sSmMdD]|')$")
_LONG_CLITIC = re.compile(r"(?<=[^'])(?:'ll|'LL|'re|'RE|'ve|'VE|n't|N'T)$")
_CONTRACTION = re.compile(
    r"\b(can)(not)\b|\b(d)('ye)\b|\b(gim)(me)\b|\b(gon)(na)\b|\b(got)(ta)\b|\b(lem)(me)\b|\b(more)('n)\b"
    r"|\b(wan)(na)(?=\s)",
    re.IGNORECASE,
)
_TIS = re.compile(r" ('t)(is|was)\b", re.IGNORECASE)
_CONTRACTED = ("cannot", "d'ye", "gimme", "gonna", "gotta", "lemme", "more'n", "wanna", "'tis", "'twas")


def count(text: str) -> int:
    """The number of NLTK's word tokens in `text` that are in capitals (`str.isupper`)."""
    nltk = _nltk_rules()
    if _needs_sentences(text):
        text = " ".join(_without_final_period(text[start:stop]) for start, stop in sentences.spans(text))
    if not text.isupper():
        text = "".join(_MAY_HOLD_CAPITALS.findall(text))
    if _APOSTROPHE_AND_WORD.search(text):
        text = nltk.part_apostrophes(text)
    pieces = nltk.piece.findall(text)
    lower = text.lower()
    contracted = any(word in lower for word in _CONTRACTED)
    if not contracted and "'" not in text:
        return sum(map(str.isupper, pieces))
    return sum(
        times * sum(map(str.isupper, _words(piece, contracted)))
        for piece, times in Counter(pieces).items()
        if not piece.islower()
    )


def _needs_sentences(text: str) -> bool:
    if "wanna." in text.lower() or _PERIOD_AND_COLON.search(text):
        return True
    for found in _APOSTROPHE_AND_PERIOD.finditer(text):
        before, clitic = text[max(found.start() - 2, 0) : found.start()], found[0][1:-1]
        # Parting don't leaves words with small letters, which do not count however it is parted.
        if not (len(before) == 2 and before.isalpha() and before.islower() and (clitic.islower() or not clitic)):
            return True
    return False


def _without_final_period(sentence: str) -> str:
    words = _OPENING_QUOTE.sub("``", sentence).rstrip().rstrip("])}>\"'»”’ ")
    return words[:-1] + " " if words.endswith(".") and not words.endswith("..") else sentence


def _words(piece: str, contracted: bool) -> list[str]:
    words = [piece]
    for clitic in (_SHORT_CLITIC, _LONG_CLITIC) if "'" in piece else ():
        found = clitic.search(words[0])
        if found and found.start():
            words[:1] = [words[0][: found.start()], found[0]]
    if contracted:
        words = _TIS.sub(_spaced, _CONTRACTION.sub(_spaced, f" {' '.join(words)} ")).split()
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
    # The excluded characters stand apart in NLTK; , and : stay inside before a digit, . - and ' when they come singly,
    # but for a closing ' that NLTK sets apart before it looks for clitics.
    inside = rf"[^\s«“‘„`»”’;@#$%&?!*\[\](){{}}<>\"{dashes}:,.'\-]+"
    parted = rf"[ «“‘„`;@#$%&?!{dashes}]|[:,](?!\d)|\.\."
    rule, replacement = NLTKWordTokenizer.STARTING_QUOTES[-1]
    return _Rules(
        re.compile(rf"(?:{inside}|[:,](?=\d)|(?<!\.)\.(?!\.)|(?<!-)-(?!-)|(?<!')'(?!'|{parted}))+"),
        functools.partial(re.compile(rule.pattern).sub, replacement),
    )
