"""The morphemes of a Japanese text, as janome finds them, by the dictionary that the package janome carries.

Its own code needs 6 s for 200 kB of prose and a minute for 200 kB of full stops. This one finds the same path of least
cost, ties included: it keeps what it has read of the dictionary, asks once for each left context, and drops the ways to
a place that cannot win any more. The golden cases of M-IFEval are labelled by janome's own code.
"""

from __future__ import annotations

import functools
import re
import threading
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

_CHUNK, _LONGEST_CHUNK = 500, 1024  # characters that janome reads before it may, and must, begin anew
_WINDOW = 50  # no word of the dictionary is longer, or janome would not find it
_SURROGATE = re.compile("[\ud800-\udfff]")
_FINAL_ARC, _LAST_ARC = 1, 2  # flags of the dictionary's automaton
_KNOWN = 1 << 16

# A word that may stand at a place: its length, left and right context, cost, number (-1: in no entry), part of speech.
_Word = tuple[int, int, int, int, int, str]
# The best way to the end of a word: its cost; the word's right context, number, start, part of speech; the way before.
_Way = tuple[int, int, int, int, str, Any]


# What stands in the text, its number in the dictionary and, where it has none, its part of speech.
Morpheme = tuple[str, int, str]


def is_noun(morpheme: Morpheme) -> bool:
    """Whether it is a noun, by the dictionary or, if unknown, by its letters."""
    _, number, part = morpheme
    part = part if number < 0 else _dictionary().tables.lookup_extra(number)[0]
    return part.startswith("名詞")


class _Place:
    """A place in the dictionary: the words that end here, and where each further letter leads."""

    __slots__ = ("next", "states", "words")

    def __init__(self, states: list[tuple[bytes, int]], words: list[_Word]) -> None:
        self.states, self.words = states, words
        self.next: dict[str, _Place | None] = {}


class _Dictionary:
    """janome's dictionary, read as far as texts have asked."""

    def __init__(self) -> None:
        from janome.tokenizer import Tokenizer

        tokenizer = Tokenizer()
        self.tables, self._matcher = tokenizer.sys_dic, tokenizer.matcher
        self.root = _Place([(data, 0) for data in self._matcher.dict_data], [])
        self._read, self._reading = 0, threading.Lock()  # janome's matcher is not for two threads
        edges = {edge for letters in self.tables.char_ranges for edge in (ord(letters["from"]), ord(letters["to"]) + 1)}
        self._edges = sorted({0, *edges})
        self._kinds = [self.tables.get_char_categories(chr(edge)) for edge in self._edges]
        self.costs = functools.lru_cache(maxsize=None)(self._costs)
        self.unknown = functools.lru_cache(maxsize=4096)(self._unknown)

    def categories(self, letter: str) -> dict[str, list[str]]:
        """The categories of a letter, each with those it is compatible with."""
        kinds: dict[str, list[str]] = self._kinds[bisect_right(self._edges, ord(letter)) - 1]
        return kinds

    def _costs(self, left: int) -> list[int]:
        """What a word of this left context costs, by the right context of the word before."""
        return [row[left] for row in self.tables.connections]

    def _unknown(self, category: str, length: int) -> list[_Word]:
        return [(length, *word[:3], -1, word[3]) for word in self.tables.unknowns[category]]

    def follow(self, place: _Place, word: str) -> _Place | None:
        """Where the last letter of `word` leads from `place`, which the letters before it led to; None: nowhere."""
        with self._reading:
            if self._read >= _KNOWN:
                self.root, self._read = _Place(self.root.states, []), 0
            self._read += 1
            states = [moved for state in place.states if (moved := self._move(*state, word[-1].encode()))]
            found = _Place(states, self._words(word, states)) if states else None
        place.next[word[-1]] = found
        return found

    def _words(self, word: str, states: list[tuple[bytes, int]]) -> list[_Word]:
        if not any(self._matcher.next_arc(*state)[0] & _FINAL_ARC for state in states):
            return []
        entries = self.tables.lookup(word.encode(), self._matcher)
        return [(len(word), *entry[2:], entry[0], "") for entry in entries if entry[1] == word]

    def _move(self, data: bytes, at: int, letter: bytes) -> tuple[bytes, int] | None:
        for byte in letter:
            while True:
                flags, label, _, _, target, size = self._matcher.next_arc(data, at)
                if label == byte and not flags & _FINAL_ARC:
                    at += target
                    break
                if flags & _LAST_ARC or at + size >= len(data):
                    return None
                at += size
        return data, at


@functools.lru_cache(maxsize=1)
def _dictionary() -> _Dictionary:
    return _Dictionary()


def morphemes(text: str) -> Iterator[Morpheme]:
    """The morphemes of `text`, found chunk by chunk.

    Raises UnicodeEncodeError, before the first, where janome does at some place: at half a surrogate pair.
    """
    found = _morphemes(text.strip())
    return iter(list(found)) if _SURROGATE.search(text) else found


def _morphemes(text: str) -> Iterator[Morpheme]:
    start = 0
    while start < len(text):
        path, size = _read_chunk(text[start : start + _LONGEST_CHUNK])
        yield from path
        start += size


@functools.lru_cache(maxsize=32)
def _read_chunk(text: str) -> tuple[list[Morpheme], int]:
    """The morphemes from the start of `text` to where janome begins anew."""
    dictionary = _dictionary()
    costs = dictionary.costs
    ends: list[list[_Way]] = [[] for _ in range(len(text) + 1)]
    ends[0] = [(0, 0, -1, 0, "", None)]
    runs: dict[str, int] = {}
    bad = _SURROGATE.search(text) is not None
    at = 0
    while not _begins_anew(text, at):
        if bad:
            text[at : at + _WINDOW].encode()
        ways = _thin(ends[at])
        best: dict[int, tuple[int, _Way]] = {}
        for length, left, right, cost, number, part in _words(dictionary, text, at, runs):
            known = best.get(left)
            if known is None:
                known = best[left] = _best(ways, costs(left))
            ends[at + length].append((known[0] + cost, right, number, at, part, known[1]))
        at += 1
        while not ends[at]:
            at += 1
    path: list[Morpheme] = []
    way, stop = _best(_thin(ends[at]), costs(0))[1], at
    while way[5] is not None:
        _, _, number, start, part, before = way
        path.append((text[start:stop], number, part))
        way, stop = before, start
    return path[::-1], at


def _begins_anew(text: str, at: int) -> bool:
    if at < _CHUNK:
        return at == len(text)
    return at == len(text) or text[at - 1] in "、。,.？?！!" or text.endswith(("\n\n", "\r\n\r\n"), 0, at)


def _thin(ways: list[_Way]) -> list[_Way]:
    """`ways` without those that another one of the same right context undercuts."""
    if len(ways) < 6:
        return ways
    least: dict[int, int] = {}
    for way in ways:
        if way[0] < least.get(way[1], way[0] + 1):
            least[way[1]] = way[0]
    return [way for way in ways if way[0] == least[way[1]]]


def _best(ways: list[_Way], costs: list[int]) -> tuple[int, _Way]:
    """The way of least cost, with the cost of what follows; of two entries at the same cost the earlier one."""
    best = ways[0]
    least = best[0] + costs[best[1]]
    if len(ways) == 1:
        return least, best
    for way in ways:
        cost = way[0] + costs[way[1]]
        if cost < least or (cost == least and 0 <= way[2] < best[2]):
            best, least = way, cost
    return least, best


def _words(dictionary: _Dictionary, text: str, at: int, runs: dict[str, int]) -> list[_Word]:
    """The words that begin at `at`: of the dictionary, and unknown ones, which are runs of letters of one category.

    `runs` remembers where the last run of each category ends.
    """
    place, words = dictionary.root, []
    for stop in range(at, min(at + _WINDOW, len(text))):
        letter = text[stop]
        step = place.next[letter] if letter in place.next else dictionary.follow(place, text[at : stop + 1])
        if step is None:
            break
        place = step
        words += place.words
    known, tables = bool(words), dictionary.tables
    for category in dictionary.categories(text[at]):
        if known and not tables.unknown_invoked_always(category):
            continue
        if not tables.unknown_grouping(category):
            stop = _run(dictionary, text, at, category, min(len(text), at + tables.unknown_length(category) + 1))
        elif (stop := runs.get(category, 0)) <= at:
            stop = runs[category] = _run(dictionary, text, at, category, len(text))
        words += dictionary.unknown(category, stop - at)
    return words


def _run(dictionary: _Dictionary, text: str, at: int, category: str, limit: int) -> int:
    for stop in range(at + 1, limit):
        kinds = dictionary.categories(text[stop])
        if category not in kinds and not any(category in compatible for compatible in kinds.values()):
            return stop
    return limit
