"""Reading a text: without reading on once the answer is settled, and as the NLTK at hand reads it."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable
from itertools import islice
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def up_to(stop: int, found: Iterable[object]) -> int:
    """The number of items in `found`, at most `stop`."""
    return sum(1 for _ in islice(found, min(stop, sys.maxsize)))


def nth(number: int, found: Iterable[T]) -> T | None:
    """The item `number`, from 1, of `found`; None where there are fewer."""
    return next(islice(found, min(number - 1, sys.maxsize), None), None)


def engine_of(pattern: object) -> ModuleType:
    """The module, `re` or `regex`, that NLTK compiled `pattern` with: each version of NLTK has its own mixture.

    To `regex` a combining mark is part of a word, ½ is not, and \\x1c to \\x1f are no blanks.
    """
    if isinstance(pattern, re.Pattern):
        return re
    import regex

    engine: ModuleType = regex
    return engine


@functools.lru_cache(maxsize=2)
def blanks(engine: ModuleType) -> str:
    """The characters that \\s stands for."""
    return "".join(engine.findall(r"\s", "".join(map(chr, range(0x3001)))))
