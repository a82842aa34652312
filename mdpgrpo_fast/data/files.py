"""Rows of a file or a data set, each with the place where it stands."""

from __future__ import annotations

import csv
import inspect
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..config import ConfigError, needs_package
from ..verifiers.packed import unpacked

# Where a row stands ("file:line", "file row 3"), and the row, or the ValueError that says why there is none.
Row = tuple[str, Any]
# A path, a hub id, or rows in memory: texts, objects, a data set of the package datasets, a table of pandas.
Source = str | Path | Iterable[Any]

SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".parquet", ".gz", ".txt")
FIELD = 2**27  # characters of a CSV field: a prompt may be longer than the default of 131,072
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


def read_rows(
    source: Source, split: str | None = None, trust_remote_code: bool = False, name: str = "prompts"
) -> list[Row]:
    """The rows of a file (by its suffix: .parquet, .csv, else JSON lines or an array, each also as .gz), of a folder or
    of a hub id, the last two through the package datasets; or those given, as "`name` row 1" and so on. A hub id takes
    a configuration behind a colon.

    split: of a data set; None: the one named train, or the only one.

    Raises: ConfigError in one line where that is none of these, or a package is missing.
    """
    if not isinstance(source, (str, Path)):
        return list(_numbered(name, _given(source, split, name)))
    path, place = str(source), Path(source)
    if place.is_file():
        return list(_file(place))
    if place.is_dir() or (_HUB_ID.fullmatch(path) and not path.endswith(SUFFIXES)):
        return _data_set(path, place.is_dir(), split, trust_remote_code)
    raise ConfigError(f"prompt file {path!r} does not exist")


def read_template(chat_template: str) -> str | None:
    """The text of the file that the knob chat_template names; None where it is auto, on or off."""
    if chat_template in ("auto", "on", "off"):
        return None
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as e:
        reason = "does not exist" if isinstance(e, FileNotFoundError) else f"cannot be read: {_reason(e)}"
        if any(mark in chat_template for mark in ("{{", "{%")):
            reason = "is jinja text, which is not accepted inline"
        start = chat_template if len(chat_template) <= 80 else chat_template[:80] + "…"
        raise ConfigError(f"chat_template must be auto, on, off or a file that holds one; {start!r} {reason}") from None


def _reason(error: BaseException) -> str:
    """What an exception says, and what it came from, in one line."""
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    return (text[:400] + "…" if len(text) > 400 else text) or type(error).__name__


def _file(path: Path) -> Iterator[Row]:
    try:
        data = path.read_bytes()
        name = path.name.lower()
        if name.endswith(".gz"):
            data, name = unpacked(data), name.removesuffix(".gz")
        if name.endswith(".parquet"):
            return _parquet(path, data)
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, MemoryError, zlib.error, ValueError) as e:
        raise ConfigError(f"prompt file {str(path)!r} cannot be read: {_reason(e)}") from None
    if name.endswith(".csv"):
        return _csv(path, text)
    return _json_array(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            row = ValueError(f"not JSON: {e.msg} at column {e.colno}")
        except ValueError as e:  # a number of thousands of digits
            row = ValueError(f"not JSON that can be read: {_reason(e)}")
        except RecursionError:
            row = ValueError("is nested more levels deep than can be read")
        yield f"{path}:{number}", row


def _json_array(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as e:
        raise ConfigError(f"{path}:{e.lineno}: not a JSON array: {e.msg} at column {e.colno}") from None
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"prompt file {str(path)!r} cannot be read: {_reason(e)}") from None
    return _numbered(path, rows)


def _numbered(path: object, rows: list[Any]) -> Iterator[Row]:
    return ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))


def _csv(path: Path, text: str) -> Iterator[Row]:
    """All values are text: what looks like a number may be an answer's spelling."""
    limit = csv.field_size_limit(FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header, line = next(reader, []), reader.line_num
        twice = next((name for name, count in Counter(header).items() if name and count > 1), None)
        if twice is not None:
            raise ConfigError(f"{path}:1: the header has two columns {twice!r}")
        for fields in reader:
            where, line = f"{path}:{line + 1}", reader.line_num
            if len(fields) == len(header):
                yield where, dict(zip(header, fields, strict=True))
            elif fields:
                yield where, ValueError(f"{len(fields)} fields; the header has {len(header)}")
    except csv.Error as e:
        raise ConfigError(f"{path}:{reader.line_num}: not CSV: {e}") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, data: bytes) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"prompt file {str(path)!r} {needs_package('pyarrow')}") from None
    try:
        return _numbered(path, pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist())
    except (pyarrow.ArrowException, OSError) as e:
        raise ConfigError(f"prompt file {str(path)!r} cannot be read: {_reason(e)}") from None


def _data_set(path: str, is_folder: bool, split: str | None, trust_remote_code: bool) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"data set {path!r} {needs_package('datasets')}") from None
    what = f"data set {path!r}" if is_folder else f"{path!r} is no file or folder here, and as a data set of the hub it"
    saved = any(Path(path, name).is_file() for name in ("dataset_info.json", "state.json", "dataset_dict.json"))
    load: Callable[..., Any] = datasets.load_dataset
    keywords: dict[str, Any] = {}
    if "trust_remote_code" in inspect.signature(load).parameters:  # gone since datasets 4
        keywords["trust_remote_code"] = trust_remote_code  # not given, stdin would be asked
    identifier, _, configuration = (path, "", "") if is_folder else path.partition(":")
    keywords |= {name: value for name, value in (("name", configuration), ("split", split)) if value}
    try:
        found = datasets.load_from_disk(path) if saved else load(identifier, **keywords)
        if isinstance(found, datasets.DatasetDict):
            found = found[_split(path, list(found), split)]
        return list(_numbered(path, list(found.with_format(None))))
    except ConfigError:
        raise
    except Exception as e:  # the hub, the disk, a script of the data set: whatever they raise
        raise ConfigError(f"{what} cannot be loaded: {_reason(e)}") from None


def _given(source: Any, split: str | None, name: str) -> list[Any]:
    if isinstance(source, dict) and source and all(hasattr(rows, "features") for rows in source.values()):
        source = source[_split(name, list(source), split)]  # a DatasetDict
    if hasattr(source, "itertuples"):
        return source.to_dict("records")  # type: ignore[no-any-return]  # its own iterator gives names of columns
    if isinstance(source, (bytes, dict)) or not isinstance(source, Iterable):
        raise ConfigError(
            f"{name} must be a path, a hub id, a list of texts or rows, or a data set; got {type(source).__name__}"
        )
    return list(source.with_format(None) if hasattr(source, "with_format") else source)


def _split(path: str, names: list[str], wanted: str | None) -> str:
    name = wanted or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    if name not in names:
        got = f"has no split {name!r}" if name else "has several splits and none is named train: choose one by split"
        raise ConfigError(f"data set {path!r} {got}; it has {', '.join(names)}")
    return name
