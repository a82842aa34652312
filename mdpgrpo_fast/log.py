"""The library's logger, messages said once, what terminals may be told, others' errors in one line, counts, JSON."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from typing import Any

log = logging.getLogger("mdpgrpo_fast")
# What a terminal obeys or cannot be sent: control characters but tab and line feed, line ends and marks of direction of
# Unicode, halves of characters.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text of others, a model's or a server's, for a terminal: what it would obey is spelled as Python spells it."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _show(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


log.addFilter(_show)


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
