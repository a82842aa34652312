"""Keywords and phrases of data files, looked for in time that a long response cannot draw out."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from .scan import up_to

# Nanoseconds, more or less, that a keyword may take at one place of a text; each of its first MOST | adds EACH.
STEPS, EACH, MOST = 450, 55, 32

_SPECIAL = re.compile(r"[.^$*+?{}\[\]\\|()]|[^\x00-\x7f]")
_LETTERS_AT_BOTH_ENDS = re.compile(r"\w(?:.*\w)?", re.DOTALL)
_UNLIKE = "\u0130\u0131\u017f\u212a"  # İ ı ſ K: to `re` these are i, s and k in another case
_SIGMA = "\u03a3"  # the one letter whose small letter hangs on its neighbours
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x[a-zA-Z-]*[:)]")
_PART = re.compile(
    r"(?P<open>\((?!\?)|\(\?(?:P<\w+>|[:=!>]|<[=!]|[a-zA-Z-]+:|\(\w+\)))|(?P<close>\))|(?P<bar>\|)|(?P<maybe>\?[?+]?)"
    r"|(?P<back>\\[1-9]|\(\?P=\w+\))|(?P<note>\(\?#[^)]*\)|\(\?[a-zA-Z-]+\))|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.",
    re.DOTALL,
)


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str, flags: int = 0) -> re.Pattern[str]:
    """`pattern` compiled. Raises ValueError, which says why, where it cannot be or may take more than `STEPS`."""
    try:
        found = re.compile(pattern, flags)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is none: {error}") from None
    if _VERBOSE.search(pattern):
        raise ValueError("may not be verbose (?x)")
    if _steps(pattern) > STEPS + EACH * min(pattern.count("|"), MOST):
        raise ValueError("may not be so long, or have choice after choice: a response could take seconds to search")
    return found


def compiles(argument: str, written: Callable[[str], str], flags: int = 0) -> Callable[[Mapping[str, Any]], None]:
    """For `agree` of an instruction: raises ValueError unless each pattern of `argument`, `written` as the check writes
    it, compiles."""

    def agree(arguments: Mapping[str, Any]) -> None:
        patterns = arguments[argument]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            try:
                compiled(written(pattern), flags)
            except ValueError as error:
                raise ValueError(f"{argument}: {pattern!r} is read as a regular expression and {error}") from None

    return agree


@functools.lru_cache(maxsize=4096)
def plain(pattern: str) -> bool:
    """Whether `pattern` stands for itself alone, in ASCII."""
    return _SPECIAL.search(pattern) is None


def _steps(pattern: str) -> int:
    """What it may take to try `pattern`, which repeats nothing, at one place; no less, in nanoseconds more or less."""
    steps, groups = 0, [_Group(1)]
    for part in _PART.finditer(pattern):
        kind, group = part.lastgroup, groups[-1]
        if kind == "open":
            steps += 5 * group.ways
            groups.append(_Group(group.ways))
        elif kind == "bar":
            steps += 10 * group.entry
            group.done, group.ways = group.done + group.ways, group.entry
        elif kind == "maybe":
            steps += 10 * group.before
            group.ways += group.before
        elif kind == "close" and len(groups) > 1:
            groups.pop()
            groups[-1].before, groups[-1].ways = groups[-1].ways, group.done + group.ways
        elif kind != "note":
            group.before = group.ways
            steps += (3 if len(part[0]) == 1 else 5 + 2 * _compared(part[0])) * group.ways
            group.ways *= 2 if kind == "back" else 1  # groups that repeat one another grow as fast as choices do
    return steps


def _compared(part: str) -> int:
    """How many characters of [...] are compared one by one: those beyond 16 bits, which `re` has no table for."""
    return sum(c > "\uffff" for c in part) + part.count("\\U") + part.count("\\N") if part[0] == "[" else 0


class _Group:
    """Part of a pattern that is read: in how many ways one comes to its start, its end so far, and before its last
    item, and through its alternatives before this one."""

    def __init__(self, entry: int) -> None:
        self.entry = self.ways = self.before = entry
        self.done = 0


def begins(text: str, phrase: str) -> bool:
    """Whether `text`, in small letters, begins with `phrase`."""
    head = text[: len(phrase)]  # no letter becomes less than one
    return (text if _SIGMA in head else head).lower().startswith(phrase)


def ends(text: str, phrase: str) -> bool:
    """Whether `text`, in small letters, ends with `phrase`."""
    tail = text[-len(phrase) :]
    return (text if _SIGMA in tail else tail).lower().endswith(phrase)


def same(text: str, wanted: str) -> bool:
    """Whether `text` is `wanted`, in any case and between any blanks."""
    return text.strip().lower() == wanted.strip().lower()


def as_word(word: str) -> str:
    """The pattern of `word` between two ends of words."""
    return rf"\b{word}\b"


@functools.lru_cache(maxsize=4096)
def _alone(word: str) -> re.Pattern[bytes]:
    """A plain word with no letter of ASCII, and nothing beyond ASCII, next to it."""
    letters = r"[a-z0-9_\x80-\xff]"
    return re.compile(rf"{word}(?<!{letters}{word})(?!{letters})".encode())


class Folded:
    """A text to look for keywords in, whatever their case, as `re.IGNORECASE` finds them.

    Plain words are looked for in the bytes of the text in small letters, some thirty times as fast.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        alike = text.isascii() or not any(c in text for c in _UNLIKE)
        self._small = text.encode("utf-8", "surrogatepass").lower() if alike else None

    def has(self, keyword: str) -> bool:
        """Whether `keyword` occurs."""
        if self._small is not None and plain(keyword):
            return keyword.lower().encode() in self._small
        return compiled(keyword, re.IGNORECASE).search(self.text) is not None

    def has_word(self, word: str) -> bool:
        """Whether `word` occurs between two ends of words."""
        if not self.has(word):
            return False
        if self._small is not None and plain(word) and _LETTERS_AT_BOTH_ENDS.fullmatch(word):
            alone = _alone(word.lower()).search(self._small) is not None
            if alone or self.text.isascii():
                return alone
        return compiled(as_word(word), re.IGNORECASE).search(self.text) is not None

    def count(self, keyword: str, stop: int) -> int:
        """How often `keyword` occurs, without overlaps; from `stop` on any number that is not less."""
        if self._small is not None and plain(keyword):
            return self._small.count(keyword.lower().encode())
        return up_to(stop, compiled(keyword, re.IGNORECASE).finditer(self.text))
