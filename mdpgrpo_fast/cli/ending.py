"""How a command ends: errors in one line, and an exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

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
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `mdpgrpo train --help-all | head` ends in silence
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
