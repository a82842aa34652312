"""The library's logger, and messages that are said once."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger("mdpgrpo_fast")


@functools.cache
def say_once(level: int, message: str) -> None:
    log.log(level, message)
