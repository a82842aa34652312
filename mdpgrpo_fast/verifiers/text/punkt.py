"""Sentence boundaries as Punkt decides them, in time linear in the text.

Kiss and Strunk, "Unsupervised Multilingual Sentence Boundary Detection", Computational Linguistics 32, 2006, in the
form of NLTK's `PunktSentenceTokenizer`, tables apart. NLTK's own code is not called: version 3.10 needs seconds for
200 kB and gives up with an error after five. The tests hold the two against each other.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType

from .scan import blanks

# How a word was met in the training text: the bits of the model's data files.
MID_UPPER = 1 << 2
UPPER = 1 << 1 | MID_UPPER | 1 << 3
BEGIN_LOWER = 1 << 4
LOWER = BEGIN_LOWER | 1 << 5 | 1 << 6

_BLANK = r" \t\n\r\x0b\x0c"
_NUMBER = re.compile(r"-?[.,]?\d[\d,.\-]*$")
_KNOWN = 8192


@dataclass(frozen=True)
class Tables:
    """What a Punkt model has learned; words in lower case and without their final period.

    `curly`: the closing quotes known beside the ASCII ones, none before NLTK 3.10.2. `engine`: the module whose idea
    of letters, digits and blanks counts, `re` or `regex`.
    """

    abbreviations: Set[str]
    collocations: Set[tuple[str, str]] = frozenset()
    starters: Set[str] = frozenset()
    met: Mapping[str, int] = field(default_factory=dict)
    curly: str = ""
    engine: ModuleType = re


class Splitter:
    """Splits text into sentences by the tables of one model."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self._number = tables.engine.compile(_NUMBER.pattern)
        self._initial = tables.engine.compile(r"[^\W\d]\.$")
        self._collocating = {word for word, _ in tables.collocations}
        self._special = self._collocating | tables.abbreviations
        self._closers = f"\"')]}}{tables.curly}"
        # The patterns themselves are `re`'s, which is twice as fast.
        s = blanks(tables.engine)
        apart = rf"[)\";}}\]*:@'({{\[!?{tables.curly}]"  # never inside a word
        many = rf"-{{2,}}|\.{{2,}}|(?:\.[{s}]){{2,}}\."
        # One match a run of non-blanks, at its last place where a sentence could end; the look-behind keeps a run
        # without any such place from being tried again at each of its characters.
        self._place = re.compile(rf"(?<![^{_BLANK}])[^{_BLANK}]*[.?!](?=({apart})|[{s}]+([^{s}]+))")
        self._place_at_once = re.compile(rf"[.?!](?=({apart})|[{s}]+([^{s}]+))")
        single, inside = r"(\"`{\[:;&#*@)}\],", rf"[^{s})\";}}\]*:@'({{\[!?{tables.curly}\-.,]*"
        period, comma = rf"\.(?!\.|[{s}]\.[{s}]\.)", rf",(?!$|[{s}]|{apart}|{many})"
        rest = rf"{inside}(?:(?:-(?!-)|{period}|{comma}){inside})*"
        self._word = re.compile(rf"[{single}]|[^{s}{single}\-.]{rest}|{many}|\.{rest}|-")
        self._closing = re.compile(rf"[\"')\]}}{tables.curly}]+?(?:[{s}]+|(?=--)|$)", re.MULTILINE)
        self._known: dict[str, bool] = {}  # context -> whether it breaks
        self._runs: dict[str, tuple[str, str, bool]] = {}  # what `_look` finds
        self._ends = functools.lru_cache(_KNOWN)(self._decide)

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """The (start, stop) of each sentence, found one by one."""
        start, last = 0, len(text.rstrip())
        for stop, following in self._breaks(text):
            # Quotes and brackets that close right after the end belong to the sentence that ends.
            closing = self._closing.match(text, following, last) if text[following] in self._closers else None
            if closing:
                yield start, following + len(closing[0].rstrip())
                start = closing.end()
            else:
                if start < stop:
                    yield start, stop
                start = following
        if start < last:
            yield start, last

    def _breaks(self, text: str) -> Iterator[tuple[int, int]]:
        """Where sentences end, and where the next one starts."""
        known = self._known
        for place in self._place.finditer(text):
            run, end = place.span()
            after = place.lastindex or 0
            # NLTK looks twice at a run that begins with an end mark, unless one blank is all that precedes it.
            if end > run + 1 and run != 1 and text[run] in ".?!":
                first = self._place_at_once.match(text, run)
                if first and self._is_break(text[run : first.end(first.lastindex or 0)], 1, first[1] or first[2]):
                    yield run + 1, run + 1 if first.lastindex == 1 else first.start(2)
            context = text[run : place.end(after)]
            is_break = known.get(context)
            if is_break is None:
                is_break = self._is_break(context, end - run, place[1] or place[2])
                if len(context) < 100:
                    if len(known) >= _KNOWN:
                        known.clear()
                    known[context] = is_break
            if is_break:
                yield end, end if after == 1 else place.start(2)

    def _is_break(self, context: str, length: int, follows: str) -> bool:
        """Whether a sentence ends in `context`: `length` characters up to an end mark, blanks, and what follows."""
        if follows[0] == "." or follows.isspace():  # may be one word with the marks before, or none
            return self._breaks_within(self._words(context))
        if context[length - 1] != ".":
            return True
        word = context[max(0, context.rfind("'", 0, length)) : length - 1]  # a quote is inside of no word
        letters = word.lstrip("'")
        if len(word) > 1 and letters[:1].isalpha() and letters.isalnum() and word.lower() not in self._special:
            return True
        _, last, broken = self._look(context[:length])
        after, _, breaks = self._look(follows)
        return broken or breaks or self._ends(last, after)

    def _look(self, run: str) -> tuple[str, str, bool]:
        """The first and the last word of a run without blanks, and whether a sentence ends inside."""
        found = self._runs.get(run)
        if found is None:
            words = self._word.findall(run)
            found = words[0], words[-1], self._breaks_within(words)
            if len(run) < 100:
                if len(self._runs) >= _KNOWN:
                    self._runs.clear()
                self._runs[run] = found
        return found

    def _breaks_within(self, words: list[str]) -> bool:
        for word, after in pairwise(words):  # noqa: SIM110  a generator takes a fifth longer
            if word[-1] in ".?!" and self._ends(word, after):
                return True
        return False

    def _words(self, context: str) -> list[str]:
        return [word for line in context.split("\n") if line.strip() for word in self._word.findall(line)]

    def _decide(self, word: str, after: str) -> bool:
        """Whether a sentence ends with `word`, which `after` follows."""
        if word[-1] != ".":
            return word in ("?", "!")
        dots = word[-2:] == ".."
        lower = word[:-1].lower() or word
        abbreviation = not dots and self._abbreviates(lower)
        ellipsis = dots and not word.strip(".")
        initial = len(word) == 2 and (word[0].isalpha() or self._initial.match(word) is not None)
        ends = not (dots or abbreviation)
        kind = self._kind(lower)
        if not (abbreviation or ellipsis or initial or kind == "##number##" or kind in self._collocating):
            return ends
        lower = after.lower()
        next_kind = self._kind(lower)
        if after[-1] == "." and (after == "." or not (after[-2:] == ".." or self._abbreviates(lower[:-1]))):
            next_kind = _without_period(next_kind)
        if (kind, next_kind) in self.tables.collocations:
            return False
        upper, starts = after[0].isupper(), self._starts(after, next_kind)
        if (abbreviation or ellipsis) and not initial and (starts or (upper and next_kind in self.tables.starters)):
            return True
        if initial or kind == "##number##":
            if starts is False:
                return False
            if starts is None and initial and upper and not self.tables.met.get(next_kind, 0) & LOWER:
                return False
        return ends

    def _abbreviates(self, word: str) -> bool:
        known = self.tables.abbreviations
        return word in known or ("-" in word and word.rpartition("-")[2] in known)

    def _kind(self, word: str) -> str:
        if word[0].isalpha():
            return word
        number = (_NUMBER if word.isascii() else self._number).match(word)
        return "##number##" if number else word

    def _starts(self, word: str, kind: str) -> bool | None:
        """Whether `word` starts a sentence, from its case here and in the training text; None where that is open."""
        if word in (";", ":", ",", ".", "!", "?"):
            return False
        met = self.tables.met.get(kind, 0)
        if word[0].isupper() and met & LOWER and not met & MID_UPPER:
            return True
        if word[0].islower() and (met & UPPER or not met & BEGIN_LOWER):
            return False
        return None


def _without_period(kind: str) -> str:
    return kind[:-1] if len(kind) > 1 and kind[-1] == "." else kind
