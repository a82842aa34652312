"""Arguments that only IF-Train's types take, and how its types are entered."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Annotated, Any

from ...arguments import Count, Kind, Pattern, Phrase, expected, kind_of
from ...registry import instruction
from ...text.patterns import compiled

iftrain = functools.partial(instruction, rules=("iftrain",))

_COUNT, _PHRASE, _PATTERN = kind_of(Count), kind_of(Phrase), kind_of(Pattern)
_ESCAPED = re.compile(r"\\[^\w\s]")


def _number(value: Any, rules: str) -> int:
    # 0 is refused: the original draws a number of its own in place of 0 and of none.
    try:
        number: int = _COUNT.parse(value, rules)
    except ValueError:
        number = 0
    if not number:
        raise expected("a whole number from 1", value)
    return number


def _word(value: Any, rules: str) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        value = value[0]  # the original reads a list so
    return _PHRASE.parse(value, rules)


def _repeated(value: Any, rules: str) -> str:
    """Its first and last word are read as regular expressions; these must be as simple as words are."""
    words = _PHRASE.parse(value, rules).split()
    for word in (words[0], words[-1]):
        compiled(word)
        bare = _ESCAPED.sub("", _PATTERN.parse(word, rules))
        if set(bare) & set("\\|^$()[]{}") or (word is words[0] and "?" in bare and "." in bare):
            raise ValueError(
                f"{word!r} is read as a regular expression, of which only . and ? are known; put a \\ before"
            )
    return value


Number = Annotated[int, Kind(_number, "a whole number from 1", 2)]
Word = Annotated[str, Kind(_word, "a word, or a list whose first item counts", "island")]
Repeated = Annotated[str, Kind(_repeated, "a phrase to repeat", "Every cloud has a silver lining")]
