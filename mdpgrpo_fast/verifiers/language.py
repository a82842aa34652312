"""The language of a text, by langdetect with a fixed seed."""

from __future__ import annotations

import functools
from typing import Any


def detect(text: str) -> str | None:
    """langdetect's answer for `text`, the same on every call; None where it finds nothing to go by."""
    return _detect(text)


@functools.lru_cache(maxsize=256)
def _detect(text: str) -> str | None:
    langdetect, factory = _factory()
    detector = factory.create()
    detector.seed = 0  # this detector's alone: the library's global seed stays as the caller has it
    detector.append(text)
    try:
        return detector.detect()
    except langdetect.LangDetectException:
        return None


def _factory() -> tuple[Any, Any]:
    """langdetect and its shared factory; its 55 profiles are read once a process, with the first text."""
    import langdetect
    from langdetect import detector_factory

    detector_factory.init_factory()
    return langdetect, detector_factory._factory
