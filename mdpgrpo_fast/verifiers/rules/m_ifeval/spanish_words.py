"""The words of a Spanish text, as spaCy's Spanish models divide it: their tokens that are no punctuation.

The models are not needed for it, as their tokenizer goes by rules, and neither is spaCy, whose code is quadratic in a
run of marks. The golden cases of M-IFEval are labelled by spaCy's own code.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from .spanish_tables import SPECIALS, patterns

LONGEST = 1_000_000  # characters; spaCy's models refuse more
_SURROGATE = re.compile("[\ud800-\udfff]")
_PIECE = re.compile(r"\s+|\S+")
_SCHEME = re.compile(r"[\w+\-.]{2,}://")
_LONGEST_SPECIAL = max(map(len, SPECIALS))
_KNOWN = 8192
_known: dict[str, tuple[str, ...]] = {}


def words(text: str) -> list[str] | None:
    """The words; None where spaCy raises an error: at half a surrogate pair, or where the text is too long."""
    if len(text) > LONGEST or _SURROGATE.search(text):
        return None
    found = tokens(text)
    punctuation = set(filter(_is_punctuation, set(found)))
    return [token for token in found if token not in punctuation]


def number_with(text: str, letters: frozenset[str]) -> int | None:
    """The number of words with one of `letters`; None as `words`."""
    if len(text) > LONGEST or _SURROGATE.search(text):
        return None
    # The specials that `tokens` sees in the end join or divide no two such words.
    pieces = [piece for piece in text.split() if not letters.isdisjoint(piece)]
    return sum(not letters.isdisjoint(token) for piece in pieces for token in _split_once(piece))


def _is_punctuation(token: str) -> bool:
    return all(unicodedata.category(character)[0] == "P" for character in token)


def tokens(text: str) -> list[str]:
    """spaCy's tokens; a run of blanks is one too, but for one space behind a word."""
    found: list[str] = []
    spaced: set[int] = set()  # the tokens that a space follows
    for piece in _PIECE.findall(text):
        if not piece.isspace():
            found += _split_once(piece)
            continue
        if found and piece[0] == " ":
            spaced.add(len(found) - 1)
            piece = piece[1:]
        if piece:
            found.append(piece)
    return _with_specials(found, spaced)


def _split_once(piece: str) -> tuple[str, ...]:
    if piece.isalpha() and piece not in SPECIALS:
        return (piece,)
    parts = _known.get(piece)
    if parts is None:
        parts = tuple(_split(piece, SPECIALS))
        if len(piece) < 100:
            if len(_known) >= _KNOWN:
                _known.clear()
            _known[piece] = parts
    return parts


def _split(piece: str, specials: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The tokens of `piece`, which holds no blanks: what is cut off at its ends, and the rest cut inside."""
    prefixes, suffixes, ends = patterns().prefixes, patterns().suffixes, patterns().ends
    start, end, size, whole = 0, len(piece), 0, 0
    before: list[str] = []
    behind: list[str] = []
    while start < end and end - start != size:
        if end - start <= _LONGEST_SPECIAL and piece[start:end] in specials:
            break
        rest, stop, size = start, end, end - start
        if piece[start] in prefixes:
            rest += 1
        elif piece[start] in ".+UCA":
            rest = _prefix_end(piece, start, end)
        if start == rest or rest == end or end - rest > _LONGEST_SPECIAL or piece[rest:end] not in specials:
            if rest == end:
                pass
            elif piece[end - 1] in suffixes:
                stop -= 1
            elif end != whole and piece[end - 1] in ends:
                stop = _suffix_start(piece, rest, end)
                whole = end if stop == end else 0  # a later start makes none
            if start < stop < end and stop - start <= _LONGEST_SPECIAL and piece[start:stop] in specials:
                rest = start  # then the prefix stays
        if start < rest:
            before.append(piece[start:rest])
        if stop < end:
            behind.append(piece[stop:end])
        start, end = rest, stop
    if start < end:
        before += _inner(piece[start:end], specials)
    return before + behind[::-1]


def _prefix_end(piece: str, start: int, end: int) -> int:
    """Where a prefix of piece[start:end] that is no mark alone ends; `start` where there is none."""
    found = patterns().prefix.match(piece, start, end)
    return found.end() if found else start


def _suffix_start(piece: str, start: int, end: int) -> int:
    """Where a suffix of piece[start:end] that is no mark alone starts; `end` where there is none."""
    found = patterns().suffix.search(piece[max(start, end - 8) : end])
    if not found:
        return end
    if found[0].startswith(".."):
        stop = end
        while stop > start and piece[stop - 1] == ".":
            stop -= 1
        return stop
    return end - len(found[0])


def _inner(core: str, specials: Mapping[str, tuple[str, ...]]) -> list[str]:
    if core in specials:
        return list(specials[core])
    if core.isalnum() or _is_address(core):
        return [core]
    parts, start = [], 0
    for infix in patterns().infix.finditer(core):
        if infix.start() > 0:
            parts += [core[start : infix.start()], infix[0]]
            start = infix.end()
    return [part for part in (*parts, core[start:]) if part]


def _is_address(core: str) -> bool:
    """Whether it is an address of the web or of mail; after a / ? or # it may go on in any way."""
    if "." not in core[:-2]:  # two letters follow, or more dots
        return False
    scheme = _SCHEME.match(core)
    starts = {0, scheme.end() if scheme else 0}
    at = core.find("@", 1)
    while at >= 0:
        starts.add(at + 1)
        at = core.find("@", at + 1)
    return any(patterns().host.match(core, start) for start in starts)


@functools.lru_cache(maxsize=1)
def _special_phrases() -> dict[str, Any]:
    """The tokens of the specials that spaCy looks for once more, in the tokens of the whole text: a tree of them."""
    tree: dict[str, Any] = {}
    for special in SPECIALS:
        parts = [part for piece in special.split(" ") for part in _split(piece, {})]
        place = tree
        for part in parts:
            place = place.setdefault(part, {})
        place[""] = True
    return tree


def _with_specials(found: list[str], spaced: set[int]) -> list[str]:
    """`found` with the tokens of a special in place of its parts."""
    phrases = _special_phrases()
    spans = []
    for start, token in enumerate(found):
        place = phrases.get(token)
        stop = start + 1
        while place is not None and stop < len(found) and (place := place.get(found[stop])) is not None:
            stop += 1
            if "" in place:
                spans.append((start, stop))
    return _replaced(found, spaced, spans) if spans else found


def _replaced(found: list[str], spaced: set[int], spans: list[tuple[int, int]]) -> list[str]:
    """`found` with specials in place of the spans that read like one, the longest first."""
    specials: dict[int, tuple[int, tuple[str, ...]]] = {}
    seen = bytearray(len(found))
    for size, start in sorted((start - stop, start) for start, stop in spans):
        stop = start - size
        if not (seen[start] or seen[stop - 1]):
            text = "".join(found[at] + " " * (at in spaced and at < stop - 1) for at in range(start, stop))
            if text in SPECIALS:
                specials[start] = stop, SPECIALS[text]
        seen[start:stop] = b"\1" * (stop - start)
    parts, at = [], 0
    for start in sorted(specials):
        parts += found[at:start]
        at, special = specials[start]
        parts += special
    return parts + found[at:]
