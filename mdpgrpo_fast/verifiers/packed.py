"""Files that are packed by gzip, unpacked within a limit."""

from __future__ import annotations

import gzip
import io

UNPACKED, TIMES = 2**26, 200  # bytes that a file may unpack to, and more for each of its own
PIECE = 2**20


def unpacked(data: bytes) -> bytes:
    """The bytes that `data`, a gzip file, holds.

    Raises: ValueError where they are far more than text that was packed can be; OSError, EOFError or zlib.error where
        it is damaged.
    """
    limit, found = UNPACKED + TIMES * len(data), io.BytesIO()
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        while piece := file.read(PIECE):  # one read of `limit` would ask for as much memory at once
            if found.tell() + len(piece) > limit:
                raise ValueError(f"its {len(data)} bytes unpack to more than {limit}")
            found.write(piece)
    return found.getvalue()
