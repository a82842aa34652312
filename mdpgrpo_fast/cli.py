"""Command lines from dataclasses: layers of settings first, flags over them, unknown names with the nearest known."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import ConfigError, unknown_name


@contextmanager
def report_errors() -> Iterator[None]:
    """A ConfigError becomes one line on stderr and exit status 2."""
    try:
        yield
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Flat knobs of a YAML file; the `run` and `method` sections of a run's own config.yaml are merged.

    Raises: ConfigError for a missing file, text that is not YAML or not a mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config file {str(path)!r} must hold a mapping of knobs; got {type(values).__name__}")
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(value if key in ("run", "method") and isinstance(value, dict) else {key: value})
    return flat


def as_flags(layers: list[tuple[str, dict[str, Any]]], known: list[str]) -> list[str]:
    """The layers' knobs, later ones over earlier, as command-line words: one parser converts and checks everything.

    A null takes the knob back to its default.
    """
    merged: dict[str, Any] = {}
    for where, values in layers:
        for key, value in values.items():
            if key not in known:
                raise ConfigError(f"{where}: {unknown_name('key', str(key), known)}")
            merged[key] = value
    words: list[str] = []
    for key, value in merged.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:
            words += [f"--{key}={value}"]
    return words


def parse(
    argv: list[str] | None,
    *types: type,
    prog: str,
    description: str | None = None,
    layers: list[tuple[str, dict[str, Any]]] | None = None,
) -> tuple[Any, ...]:
    """One frozen dataclass per type from the layers in order, then argv. Raises ConfigError for anything unknown."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise ConfigError(message)

    parser = Parser(types, prog=prog, description=description, allow_abbrev=False)  # type: ignore[arg-type]
    for action in parser._actions:
        if action.nargs == "+":
            action.nargs = "*"  # an empty list is a list
    known = [f.name for t in types for f in fields(t)]
    words = as_flags(layers or [], known)
    argv = sys.argv[1:] if argv is None else argv
    *configs, rest = parser.parse_args_into_dataclasses([*words, *argv], return_remaining_strings=True)
    if rest:
        flag = rest[0].split("=")[0]
        if not flag.startswith("-"):
            raise ConfigError(f"unexpected argument {flag!r}")
        flags = [s for action in parser._actions for s in action.option_strings if "_" not in s]
        raise unknown_name("flag", flag, flags)
    return tuple(configs)
