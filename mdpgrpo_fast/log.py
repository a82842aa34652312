"""The library's logger, messages that are said once, errors of other libraries in one line, counts in words, JSON."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from typing import Any

log = logging.getLogger("mdpgrpo_fast")


@functools.cache
def say_once(level: int, message: str) -> None:
    log.log(level, message)


def counted(count: int, what: str) -> str:
    """ "1 prompt", "2 prompts"."""
    return f"{count} {what}{'s' * (count != 1)}"


def reason_of(error: BaseException, limit: int = 300) -> str:
    """What an error says, in one line of at most `limit` characters that keeps why."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # transformers lists all models that it knows.
    text = re.sub(r"(\w+, ){8,}\w+", "(a long list)", " ".join(lines))
    if len(text) > limit and not lines[0].endswith(":"):
        text = lines[0]
    if len(text) > limit:
        # How it begins and how it ends, from the start of a word to the end of one.
        begin, end = text[: limit * 2 // 3].rsplit(" ", 1)[0], text[-(limit // 3 - 3) :].partition(" ")[2]
        text = f"{begin} … {end}" if end else f"{text[: limit - 2]} …"
    return f"{type(error).__name__}: {text}" if isinstance(error, (KeyError, AttributeError, TypeError)) else text


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON, which has no NaN and no infinity: null in their place. What JSON has no form for is its text."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    return [_finite(x) for x in value] if isinstance(value, (list, tuple)) else value
