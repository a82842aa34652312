"""Files that are whole or not there: written aside, flushed to the disk, renamed; and one error for a disk that fails.

A rename within a folder is atomic and takes the place of a file; what a file holds is on the disk after fsync alone,
and its name after fsync of its folder (fsync(2), rename(2)).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NEW, OLD = ".new", ".old"  # ends of the names of what is not whole yet, and of what is about to be removed


class StorageError(RuntimeError):
    """The disk did not take what had to be written, or has no room for it."""


@contextmanager
def storing(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Inside, an error of the file system, or one of `more` classes, is raised as a StorageError with the path."""
    try:
        yield
    except Exception as e:
        # Libraries in Rust, as tokenizers, raise the plain Exception with the text of std::io::Error.
        if not isinstance(e, (OSError, *more)) and "(os error " not in str(e):
            raise
        reason = (e.strerror if isinstance(e, OSError) else None) or str(e) or type(e).__name__
        raise StorageError(f"{str(path)!r} cannot be written: {reason}") from e


def sync_folder(path: Path) -> None:
    """Names in a folder are on the disk."""
    if os.name == "nt":  # which opens no folders
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as e:  # a file system that has it not
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


def sync_file(path: Path) -> None:
    """What a file holds is on the disk."""
    with path.open("rb+" if os.name == "nt" else "rb") as f:  # a file may be there for reading alone
        os.fsync(f.fileno())


def sync_tree(path: Path) -> None:
    """All files and folders in a folder, and its own names, are on the disk."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            sync_file(Path(folder) / name)
        sync_folder(Path(folder))


def write_text(path: Path, text: str) -> None:
    """The text as the whole of a file, in UTF-8, in place of what was there. Raises: StorageError; that stays then."""
    new = path.with_name(path.name + NEW)
    with storing(path):
        try:
            with new.open("w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.replace(new, path)
        except BaseException:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def append_text(path: Path, text: str) -> None:
    """The text at the end of a file, in UTF-8. Raises: StorageError; what of it came to the file is taken back."""
    with storing(path), path.open("ab", buffering=0) as f:  # with a buffer, close() would write what was taken back
        size, left = f.tell(), memoryview(text.encode("utf-8"))
        try:
            while left:
                left = left[f.write(left) :]
        except OSError:
            with suppress(OSError):
                os.truncate(path, size)
            raise


def replace_folder(new: Path, path: Path) -> None:
    """Renames a folder that is whole, in place of the one at `path`. Raises: StorageError.

    Folders do not take each other's place: at a kill in between, the one before is at `path` + ".old", and the new one
    still has its own name.
    """
    old = path.with_name(path.name + OLD)
    with storing(path):
        sync_tree(new)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
        sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back_folder(path: Path) -> None:
    """The folder of before under its name again, where `replace_folder` was killed or failed while none had it. Raises:
    StorageError."""
    old = path.with_name(path.name + OLD)
    if not path.exists() and old.is_dir():
        with storing(path):
            os.rename(old, path)
            sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder, first its name, so that none is found there in parts. Raises: StorageError."""
    old = path.with_name(path.name + OLD)
    with storing(path):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    shutil.rmtree(old, ignore_errors=True)


def free_bytes(path: Path) -> int:
    """Bytes that may be written where a path is, or will be made."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def need_space(path: Path, size: float, what: str) -> None:
    """Raises: StorageError where fewer bytes than `size` are free at a path."""
    free = free_bytes(path)
    if free < size:
        raise StorageError(f"{what} needs {size / 1e6:,.1f} MB, and {str(path)!r} has {free / 1e6:,.1f} MB free")
