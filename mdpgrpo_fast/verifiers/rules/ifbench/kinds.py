"""How IFBench's types are entered, and what they share."""

from __future__ import annotations

import functools
import string
from typing import Annotated, Any

from ...arguments import Kind, expected
from ...registry import instruction

ifbench = functools.partial(instruction, rules=("ifbench",))

# What the official code strips from words and texts.
MARKS = string.punctuation + " "


def _percentage(value: Any, rules: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 100:
        raise expected("a number from 0 to 100", value)
    return value


Percentage = Annotated[float, Kind(_percentage, "a number from 0 to 100", 50)]
