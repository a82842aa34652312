"""Arguments that only IFBench's types take."""

from __future__ import annotations

from typing import Annotated, Any

from ...arguments import Count, Kind, expected, kind_of

_COUNT = kind_of(Count)


def _ordinal(value: Any, rules: str) -> int:
    try:
        number = _COUNT.parse(value, rules)
    except ValueError:
        number = 0
    if number < 1:
        raise expected("a whole number from 1", value)
    return number


def _percentage(value: Any, rules: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 100:
        raise expected("a number from 0 to 100", value)
    return value


Ordinal = Annotated[int, Kind(_ordinal, "a whole number from 1", 2)]
Percentage = Annotated[float, Kind(_percentage, "a number from 0 to 100", 50)]
