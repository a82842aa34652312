"""Weights on their way to a server, as files that this user alone can read: in shared memory, or on a shared disk."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...log import reason_of
from .completion import RolloutError

PREFIX = "mdpgrpo-weights-"


@contextmanager
def weight_file(weights: list[tuple[str, Tensor]], directory: str | None) -> Iterator[str]:
    """Path of a safetensors file of the weights; it is gone after the block, however that ends.

    The file has mode 0600 and lies in a directory of its own of mode 0700, whatever the umask. directory: where that
    one is made; None: the system's for temporary files.

    Raises: RolloutError where it cannot be written.
    """
    with private_directory(directory) as made:
        path = os.path.join(made, "weights.safetensors")
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))  # what is written keeps its mode
            save_file({name: tensor.cpu().contiguous() for name, tensor in weights}, path)
        except (OSError, SafetensorError) as e:
            raise RolloutError(f"weights for the vLLM server cannot be written to {made}: {reason_of(e)}") from None
        yield path


@contextmanager
def adapter_files(write: Callable[[str], None], directory: str | None) -> Iterator[str]:
    """Path of a directory with what write(path) puts there, files of mode 0600; it is gone after the block.

    Raises: RolloutError where it cannot be written.
    """
    with private_directory(directory) as made:
        try:
            write(made)
            for path in Path(made).rglob("*"):
                path.chmod(0o700 if path.is_dir() else 0o600)
        except (OSError, SafetensorError) as e:
            raise RolloutError(f"the adapter for vLLM cannot be written to {made}: {reason_of(e)}") from None
        yield made


@contextmanager
def private_directory(directory: str | None) -> Iterator[str]:
    """Path of a directory of mode 0700, made in this one, which is gone after the block, however that ends.

    Raises: RolloutError where it cannot be made.
    """
    try:
        made = tempfile.mkdtemp(prefix=f"{PREFIX}{_host()}-{os.getpid()}-", dir=directory)
    except OSError as e:
        raise RolloutError(f"weights for the vLLM server cannot be written: {reason_of(e)}") from None
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def remove_leftovers(directory: str | None) -> list[str]:
    """Remove what killed processes of this user on this host left in the directory of `weight_file`; its names."""
    removed = []
    for entry in os.scandir(directory or tempfile.gettempdir()):
        host, _, pid = entry.name.removeprefix(PREFIX).rpartition("-")[0].rpartition("-")
        if not entry.name.startswith(PREFIX) or host != _host() or not pid.isdecimal():
            continue
        with suppress(OSError):  # another process may be removing it too
            own = entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.getuid()
            if own and not _runs(int(pid)):
                shutil.rmtree(entry.path)
                removed.append(entry.name)
    return removed


def _host() -> str:
    """This host and, where there are such, its space of process ids: containers may share both name and memory."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}-{os.stat(space).st_ino if space.exists() else 0}"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True
