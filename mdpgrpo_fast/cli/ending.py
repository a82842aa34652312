"""How a command ends: errors in one line, and an exit status."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from ..config import ConfigError
from ..log import printable


@contextmanager
def report_errors() -> Iterator[None]:
    """A ConfigError becomes one line on stderr and exit status 2."""
    try:
        yield
    except ConfigError as e:
        print(printable(f"error: {e}"), file=sys.stderr)
        sys.exit(2)


def end(command: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process with its status.

    gloo's threads take the GIL to free tensors of finished work: at the interpreter's shutdown they abort, and while a
    process group is destroyed they may wait for ever. So a process of several under gloo ends without either.
    """
    # `mdpgrpo train | head`, a terminal that is closed: what is written after that is lost, and the run is not.
    sys.stdout, sys.stderr = _unread(sys.stdout), _unread(sys.stderr)
    try:
        code = command()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    dist = sys.modules.get("torch.distributed")  # not loaded by what only answers a flag
    if dist is not None and dist.is_available() and dist.is_initialized():
        if dist.get_backend() == "gloo":
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        dist.destroy_process_group()
    sys.exit(code)


class _Unread(io.FileIO):
    """A standard stream; once its reader has closed it, or its terminal has gone, what is written goes nowhere, from
    child processes too."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self._gone = {errno.EPIPE, errno.EIO} if self.isatty() else {errno.EPIPE}

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as e:
            if e.errno not in self._gone:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def _unread(stream: TextIO) -> TextIO:
    try:
        number = stream.fileno()
    except (AttributeError, OSError, ValueError):  # of a test, or closed
        return stream
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    raw = io.BufferedWriter(_Unread(number))
    return io.TextIOWrapper(
        raw, stream.encoding, stream.errors, line_buffering=stream.line_buffering, write_through=stream.write_through
    )
