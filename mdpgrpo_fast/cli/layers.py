"""Settings that lie under the flags of a command line: those of a YAML file, of a preset, of the demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import ConfigError


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
    return _flat({**values, **(values.get("run") or {}), **(values.get("method") or {})}, leave=("run", "method"))


def _flat(values: dict[Any, Any], prefix: str = "", leave: tuple[str, ...] = ()) -> dict[str, Any]:
    """Mappings inside mappings by dotted keys, as verl names its settings."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found.update({} if name in leave else _flat(value, f"{name}."))
        else:
            found[name] = value
    return found


def as_words(values: dict[str, Any]) -> list[str]:
    """Knobs as words of a command line, so that one parser converts and checks everything; nulls are left out."""
    words: list[str] = []
    for key, value in values.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        elif value is not None:
            words.append(f"{flag}={value}")
    return words
