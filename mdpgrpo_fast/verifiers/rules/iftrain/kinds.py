"""Arguments that only IF-Train's types take, and how its types are entered."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Annotated, Any

from ...arguments import Kind, Pattern, Phrase, kind_of
from ...registry import instruction
from ...text.patterns import compiled

iftrain = functools.partial(instruction, rules=("iftrain",))

_PHRASE, _PATTERN = kind_of(Phrase), kind_of(Pattern)
_ESCAPED = re.compile(r"\\[^\w\s]")


def _word(value: Any, rules: str) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        value = value[0]  # the original reads a list so
    return str(_PHRASE.parse(value, rules))


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
    return str(value)


Word = Annotated[str, Kind(_word, "a word, or a list whose first item counts", "island")]
Repeated = Annotated[str, Kind(_repeated, "a phrase to repeat", "Every cloud has a silver lining")]
