"""Sentence boundaries as Punkt decides them, in time linear in the text.

Kiss and Strunk, "Unsupervised Multilingual Sentence Boundary Detection", Computational Linguistics 32, 2006, in the
form of NLTK's `PunktSentenceTokenizer`, tables apart. NLTK's own code is not called: version 3.10 needs seconds for
200 kB and gives up with an error after five. The tests hold the two against each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from itertools import pairwise

# How a word was met in the training text: the bits of the model's data files.
MID_UPPER = 1 << 2
UPPER = 1 << 1 | MID_UPPER | 1 << 3
BEGIN_LOWER = 1 << 4
LOWER = BEGIN_LOWER | 1 << 5 | 1 << 6

_BLANK = r" \t\n\r\x0b\x0c"
_NUMBER = re.compile(r"-?[.,]?\d[\d,.\-]*$")
_KNOWN = 8192
_INITIAL = re.compile(r"[^\W\d]\.$")


@dataclass(frozen=True)
class Tables:
    """What a Punkt model has learned; words in lower case and without their final period.

    `curly`: the closing quotes known beside the ASCII ones, none before NLTK 3.10.
    """

    abbreviations: Set[str]
    collocations: Set[tuple[str, str]] = frozenset()
    starters: Set[str] = frozenset()
    met: Mapping[str, int] = field(default_factory=dict)
    curly: str = ""


class Splitter:
    """Splits text into sentences by the tables of one model."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        apart = rf"[)\";}}\]*:@'({{\[!?{tables.curly}]"  # never inside a word
        many = r"-{2,}|\.{2,}|(?:\.\s){2,}\."
        # One match a run of non-blanks, at its last place where a sentence could end; the look-behind keeps a run
        # without any such place from being tried again at each of its characters.
        self._place = re.compile(rf"(?<![^{_BLANK}])[^{_BLANK}]*[.?!](?=({apart})|\s+(\S+))")
        self._place_at_once = re.compile(rf"[.?!](?=({apart})|\s+(\S+))")
        inside = rf"[^\s)\";}}\]*:@'({{\[!?{tables.curly}\-.,]+"
        self._word = re.compile(
            rf"{many}|[^\s(\"`{{\[:;&#*@)}}\]\-,](?:{inside}|-(?!-)|\.(?!\.|\s\.\s\.)|,(?!$|\s|{apart}|{many}))*|\S"
        )
        self._closing = re.compile(rf"[\"')\]}}{tables.curly}]+?(?:\s+|(?=--)|$)", re.MULTILINE)
        self._known: dict[str, bool] = {}  # context -> whether it breaks

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """The (start, stop) of each sentence, found one by one."""
        before, skip = None, 0
        for start, stop in self._slices(text):
            if before is not None:
                # Quotes and brackets that close right after the end belong to the sentence that ends.
                closing = self._closing.match(text, start, stop)
                if closing:
                    yield before[0] + skip, start + len(closing[0].rstrip())
                elif before[0] + skip < before[1]:
                    yield before[0] + skip, before[1]
                skip = closing.end() - start if closing else 0
            before = start, stop
        if before is not None and before[0] + skip < before[1]:
            yield before[0] + skip, before[1]

    def _slices(self, text: str) -> Iterator[tuple[int, int]]:
        start, known = 0, self._known
        for place in self._place.finditer(text):
            run, end, after = place.start(), place.end(), place.lastindex or 0
            # NLTK looks twice at a run that begins with an end mark, unless one blank is all that precedes it.
            if end > run + 1 and text[run] in ".?!" and run != 1:
                first = self._place_at_once.match(text, run)
                if first and self._breaks(text[run : first.end(first.lastindex or 0)]):
                    yield start, run + 1
                    start = run + 1 if first.lastindex == 1 else first.start(2)
            context = text[run : place.end(after)]
            breaks = known.get(context)
            if breaks is None:
                breaks = self._breaks(context)
                if len(context) < 100:
                    if len(known) >= _KNOWN:
                        known.clear()
                    known[context] = breaks
            if breaks:
                yield start, end
                start = end if after == 1 else place.start(2)
        yield start, len(text.rstrip())

    def _breaks(self, context: str) -> bool:
        """Whether a sentence ends within `context`, which is a word with its end mark and what follows."""
        words = (found[0] for line in context.split("\n") for found in self._word.finditer(line))
        return any(self._ends(word, after) for word, after in pairwise(words) if word[-1] in ".?!")

    def _ends(self, word: str, after: str) -> bool:
        if word in ("?", "!"):
            return True
        if word[-1] != ".":
            return False
        dots = word.endswith("..")
        ellipsis = dots and not word.strip(".")
        abbreviation = not dots and self._abbreviates(word)
        ends = word == "." or not (dots or abbreviation)
        kind, next_kind = _without_period(_kind(word)), _kind(after)
        if after[-1] == "." and (after == "." or not (after.endswith("..") or self._abbreviates(after))):
            next_kind = _without_period(next_kind)
        if (kind, next_kind) in self.tables.collocations:
            return False
        initial = _INITIAL.match(word) is not None
        if not (abbreviation or ellipsis or initial or kind == "##number##"):
            return ends
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
        word = word[:-1].lower()
        return word in self.tables.abbreviations or word.rpartition("-")[2] in self.tables.abbreviations

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


def _kind(word: str) -> str:
    word = word.lower()
    return "##number##" if _NUMBER.match(word) else word


def _without_period(kind: str) -> str:
    return kind[:-1] if len(kind) > 1 and kind[-1] == "." else kind
