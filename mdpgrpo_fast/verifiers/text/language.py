"""The language of a text, by langdetect with a fixed seed."""

from __future__ import annotations

import functools
import re
import threading
from typing import Any

_READ = 10_000  # characters langdetect reads, once it has dropped addresses and composed Vietnamese letters
_EDGE = re.compile(r"[\s\u3001-\ud7ff]")  # can be part of none of these
_LOADING = threading.Lock()


def detect(text: str) -> str | None:
    """langdetect's answer for `text`, the same on every call; None where it finds nothing to go by."""
    return _detect(_head(text))


def _head(text: str) -> str:
    """As much of `text` as langdetect can come to read: composing halves a text at most."""
    size = 3 * _READ
    while size < len(text):
        edge = _EDGE.search(text, size)
        if edge is None:
            break
        head = text[: edge.start()]
        detector = _detector()
        if len(detector.MAIL_RE.sub(" ", detector.URL_RE.sub(" ", head))) >= 2 * _READ:
            return head
        size *= 2
    return text


@functools.lru_cache(maxsize=128)
def _detect(text: str) -> str | None:
    from langdetect import LangDetectException

    detector = _detector()
    detector.append(text)
    try:
        return detector.detect()
    except LangDetectException:
        return None


def _detector() -> Any:
    """A new detector of langdetect's shared factory, whose 55 profiles are read once a process."""
    from langdetect import detector_factory

    with _LOADING:  # the library publishes the factory before it has read the profiles
        detector_factory.init_factory()
    detector = detector_factory._factory.create()
    detector.seed = 0  # this detector's alone: the library's global seed stays as the caller has it
    return detector
