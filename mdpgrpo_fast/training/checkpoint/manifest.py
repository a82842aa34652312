"""The manifest of a checkpoint: what it is of, and the size and SHA-256 of each of its files. It is written last.

Whatever is loaded has been held against it before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ... import durable
from ...config import ConfigError

NAME = "manifest.json"
FORMAT = 1
THREADS = 8
CHUNK = 1 << 22
# Files beside those of the manifest that a loader might take for a part of it; others (.DS_Store) harm nothing.
_LOADABLE = (".safetensors", ".json", ".bin", ".pt", ".pth", ".pkl")


class DamagedError(ConfigError):
    """A checkpoint that is not as it was written; the message begins with the name of the file."""


def folders(path: Path) -> list[Path]:
    """The checkpoints of a run directory, whole or not, the newest first."""
    there = (path / "checkpoints").glob("checkpoint_*")
    found = [p for p in there if re.fullmatch(r"checkpoint_(0|[1-9][0-9]{0,17})", p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("_")[2])


def newest(path: Path) -> Path | None:
    """The checkpoint of the most steps in a run directory whose files are there in their sizes; None: there is none.

    Their contents are read by `hash_damage` alone.
    """
    return next((p for p in folders(path) if damage(p) is None), None)


def file_names(folder: Path) -> list[str]:
    """All files of a checkpoint but its manifest, by their paths in it."""
    found = (Path(at) / name for at, _, names in os.walk(folder) for name in names)
    return sorted(p.relative_to(folder).as_posix() for p in found if p != folder / NAME)


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files, in parallel threads (hashing lets the interpreter's lock go). Raises: OSError."""

    def digest(name: str) -> str:
        found = hashlib.sha256()
        with (folder / name).open("rb", buffering=0) as f:
            while chunk := f.read(CHUNK):
                found.update(chunk)
        return found.hexdigest()

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def write(folder: Path, values: dict[str, Any], hashes: dict[str, str]) -> None:
    """The manifest of a folder with these files. values: what the checkpoint is of. Raises: StorageError."""
    files = {name: {"size": (folder / name).stat().st_size, "sha256": x} for name, x in sorted(hashes.items())}
    content = {"format": FORMAT, **values, "files": files}
    durable.write_text(folder / NAME, _text(content))


def _text(content: dict[str, Any]) -> str:
    """The file, with its own SHA-256 in its last line."""
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1) + "\n"


def read(folder: Path) -> dict[str, Any]:
    """The manifest. Raises: DamagedError."""
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
        content = {k: v for k, v in json.loads(text).items() if k != "sha256"}
        whole = text == _text(content)
    except FileNotFoundError:
        raise DamagedError(f"{NAME} is missing") from None
    except (OSError, ValueError, AttributeError, KeyError, RecursionError):
        raise DamagedError(f"{NAME} cannot be read") from None
    if not whole:
        raise DamagedError(f"{NAME} is not as it was written")
    if content.get("format") != FORMAT:
        raise DamagedError(f"{NAME} is of another version of the library, {content.get('version')}")
    return content


def damage(folder: Path) -> str | None:
    """What is wrong with the manifest, and with the names and sizes of the files; None: nothing."""
    try:
        files = read(folder)["files"]
        for name, wanted in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            size = (folder / name).stat().st_size
            if size != wanted["size"]:
                return f"{name} has {size} bytes in place of {wanted['size']}"
        for name in file_names(folder):
            if name not in files and name.endswith(_LOADABLE):
                return f"{name} was not written with it"
    except DamagedError as e:
        return str(e)
    except OSError as e:
        return f"{e.filename or folder}: {e.strerror or e}"
    return None


def hash_damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """The first file whose content is not as it was written; None: all are. share: of the files, from 0."""
    try:
        files = read(folder)["files"]
        found = digests(folder, list(files)[share::shares])
    except DamagedError as e:
        return str(e)
    except OSError as e:
        return f"{e.filename or folder}: {e.strerror or e}"
    return next((f"{n} is not as it was written" for n, x in found.items() if x != files[n]["sha256"]), None)
