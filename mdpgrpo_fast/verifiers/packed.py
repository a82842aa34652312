"""Files that are packed by gzip, unpacked within a limit."""

from __future__ import annotations

import gzip
import io

UNPACKED, TIMES = 2**26, 200  # bytes that a file may unpack to, and more for each of its own


def unpacked(data: bytes) -> bytes:
    """The bytes that `data`, a gzip file, holds.

    Raises: ValueError where they are far more than text that was packed can be; OSError, EOFError or zlib.error where
        it is damaged.
    """
    limit = UNPACKED + TIMES * len(data)
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        found = file.read(limit + 1)
    if len(found) > limit:
        raise ValueError(f"its {len(data)} bytes unpack to more than {limit}")
    return found
