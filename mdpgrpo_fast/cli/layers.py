"""Settings that lie under the flags of a command line: those of a YAML file, of a preset, of the demonstration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..log import reason_of

BYTES, ALIASES, KNOBS = 100_000, 20, 1000  # of a file of knobs; aliases of aliases double at each level


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Flat knobs of a YAML file; the `run` and `method` sections of a run's own config.yaml are merged.

    Raises: ConfigError for a missing file, text that is not YAML, that is not a mapping of knobs, or that is far too
        large or deep for one.
    """
    import yaml

    where = f"config file {str(path)!r}"
    try:
        with open(path, "rb") as file:
            data = file.read(BYTES + 1)
        if len(data) > BYTES:
            raise ConfigError(f"{where} must hold knobs in at most {BYTES} bytes")
        values = _parsed(data.decode("utf-8-sig"))
        if not isinstance(values, dict) or not values:
            got = "nothing" if not values and not isinstance(values, (bool, int)) else type(values).__name__
            raise ConfigError(f"{where} must hold a mapping of knobs; got {got}")
        for name in ("run", "method"):
            if not isinstance(values.get(name) or {}, dict):
                raise ConfigError(f"{where}: {name} must hold a mapping of knobs; got {type(values[name]).__name__}")
        values = _flat({**values, **(values.get("run") or {}), **(values.get("method") or {})}, leave=("run", "method"))
        json.dumps(values, ensure_ascii=False, default=str).encode()
    except FileNotFoundError:
        raise ConfigError(f"{where} does not exist") from None
    except UnicodeEncodeError as e:
        raise ConfigError(f"{where} holds {e.object[e.start]!a}, half of a surrogate pair, which is no text") from None
    except RecursionError:
        raise ConfigError(f"{where} cannot be read: it is nested too deep, or holds itself") from None
    except (OSError, MemoryError, ValueError, TypeError, AttributeError, LookupError, yaml.YAMLError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"{where} cannot be read: {reason_of(e)}") from None  # constructors raise all of these
    return values


def _parsed(text: str) -> Any:
    import yaml

    loader = yaml.SafeLoader(text)
    aliases = 0

    def compose_node(*args: Any) -> Any:
        nonlocal aliases
        aliases += loader.check_event(yaml.AliasEvent)
        if aliases > ALIASES:
            raise ValueError(f"more than {ALIASES} aliases")
        return yaml.SafeLoader.compose_node(loader, *args)

    loader.compose_node = compose_node  # type: ignore[method-assign,assignment]
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _flat(values: dict[Any, Any], prefix: str = "", leave: tuple[str, ...] = ()) -> dict[str, Any]:
    """Mappings inside mappings by dotted keys, as verl names its settings."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found.update({} if name in leave else _flat(value, f"{name}."))
        else:
            found[name] = value
        if len(found) > KNOBS:
            raise ValueError(f"more than {KNOBS} knobs")
    return found


def as_words(values: dict[str, Any]) -> list[list[str]]:
    """Knobs as words of command lines, one for each knob or item of a list, so that one parser converts and checks
    everything and an item that begins with -- is no flag; nulls are left out."""
    words: list[list[str]] = []
    for key, value in values.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, (list, tuple)):
            words += [[f"{flag}={item}"] for item in value] or [[flag]]
        elif value is not None:
            words.append([f"{flag}={value}"])
    return words
