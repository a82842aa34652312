"""Whose a run directory is: the marker that tells it from other folders, and the lock that one run has on it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import weakref
from datetime import datetime
from pathlib import Path

import yaml

from ...config import ConfigError
from ...version import __version__

MARKER = ".mdpgrpo_run"  # JSON: version, pid, host, time of the last run in the directory; locked while it lasts
_UNLOCKABLE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def check_output_dir(path: Path) -> bool:
    """Whether there is an earlier run, to be moved aside.

    Raises: ConfigError where the path holds something else, another run is in it, or nothing can be made there.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output_dir {str(path)!r} is a file")
    try:
        found = [p for p in path.iterdir() if p.name != MARKER] if path.exists() else []
    except OSError as e:
        raise ConfigError(f"output_dir {str(path)!r} cannot be read: {e.strerror or e}") from None
    if found and not (path / MARKER).is_file():
        if _is_unmarked_run(path):
            raise ConfigError(
                f"output_dir {str(path)!r} holds a run of an earlier version of this library (there is no {MARKER}): "
                "take another name, or move it"
            )
        raise ConfigError(f"output_dir {str(path)!r} exists and is no earlier run")
    if found and Path.cwd().is_relative_to(path.resolve()):
        raise ConfigError(
            f"output_dir {str(path)!r} holds an earlier run and the current directory, which cannot be moved aside: "
            "take another name"
        )
    # An earlier run is renamed in its parent.
    parent = next(p for p in path.absolute().parents if p.exists()) if found or not path.exists() else path
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "cannot be written to" if parent.is_dir() else "is a file"
        raise ConfigError(f"output_dir {str(path)!r} cannot be made: {str(parent)!r} {why}")
    return bool(found)


def check_unused(path: Path) -> None:
    """Raises ConfigError where another run is in the directory. The first of several ranks alone asks: its own lock
    would refuse the others."""
    if os.environ.get("RANK", "0") != "0" or not (path / MARKER).is_file():
        return
    try:
        fd = os.open(path / MARKER, os.O_RDONLY)
    except OSError as e:
        raise ConfigError(f"output_dir {str(path)!r} cannot be read: {e.strerror or e}") from None
    try:
        _lock(fd, path, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def _is_unmarked_run(path: Path) -> bool:
    """By what versions without a marker wrote as config.yaml."""
    try:
        found = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return False
    return isinstance(found, dict) and {"run", "method"} <= found.keys()


class Claim:
    """The lock on a directory that is there, until `release` or the death of this process; no child inherits it.

    problem: why the file system gives no lock; None where it does. Raises: ConfigError where another run has it;
    OSError where the marker cannot be written.
    """

    def __init__(self, path: Path) -> None:
        file = path / MARKER
        while True:
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                self.problem = _lock(fd, path)
                # Another run may have moved the directory aside in between.
                if os.path.lexists(file) and os.path.samestat(os.fstat(fd), os.lstat(file)):
                    _write_marker(fd)
                    break
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        self._fd = fd
        self._end = weakref.finalize(self, _unlock, fd)
        _CLAIMS.add(self)

    def release(self) -> None:
        self._end()

    def forget(self) -> None:
        """In a forked child, which else would keep the lock as long as it lives."""
        if self._end.detach():
            os.close(self._fd)


def claim_new(path: Path) -> tuple[Claim, Path | None]:
    """Makes the directory for a new run; an earlier run in it is moved aside, to the second of what is returned.

    Raises: ConfigError where the directory cannot be used, or another run is in it; OSError where it cannot be made.
    """
    moved = None
    while True:
        if not check_output_dir(path):
            path.mkdir(parents=True, exist_ok=True)
        try:
            claim = Claim(path)
        except FileNotFoundError:  # moved aside by another run
            continue
        if not check_output_dir(path):
            return claim, moved
        moved = _move_aside(path)
        claim.release()


def _move_aside(path: Path) -> Path:
    """Renames a run to the first free `name.1`, `name.2` …; returns where it went."""
    path, number = Path(os.path.abspath(path)), 1
    while os.path.lexists(old := path.with_name(f"{path.name}.{number}")):
        number += 1
    path.rename(old)
    return old


def _lock(fd: int, path: Path, kind: int = fcntl.LOCK_EX) -> str | None:
    """Why there are no locks on this file system; None: the lock is had."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"output_dir {str(path)!r} is in use by another run{_holder(fd)}") from None
    except OSError as e:
        if e.errno not in _UNLOCKABLE:
            raise
        return e.strerror or str(e)
    return None


def _unlock(fd: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _holder(fd: int) -> str:
    try:
        found = json.loads(os.pread(fd, 10_000, 0))
        return f" (process {int(found['pid'])} on {ascii(found['host'])[1:-1]})"
    except (ValueError, KeyError, TypeError, OSError, RecursionError):  # it has not written the marker yet
        return ""


def _write_marker(fd: int) -> None:
    time = datetime.now().astimezone().isoformat(timespec="seconds")
    row = {"version": __version__, "pid": os.getpid(), "host": socket.gethostname(), "time": time}
    data = json.dumps(row).encode() + b"\n"
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)


_CLAIMS: weakref.WeakSet[Claim] = weakref.WeakSet()


def _forked() -> None:
    for claim in list(_CLAIMS):
        claim.forget()


os.register_at_fork(after_in_child=_forked)
