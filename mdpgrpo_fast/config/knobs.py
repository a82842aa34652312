"""What a knob is: one default, one check, one sentence of help; and the error of all settings."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import field
from typing import Any, Literal, get_args, get_type_hints

Backend = Literal["auto", "torch", "triton", "cpu", "cuda"]  # what the loss, log-probs and advantages run on


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the knob, what came and what is expected."""


def knob(default: Any, help: str) -> Any:
    """A dataclass field with the help text of its command-line flag."""
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def nearest(name: str, known: list[str]) -> str | None:
    """The known name that is spelt alike; None where none is near."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.6)), None)


def knob_of(config: type, name: str) -> Any:
    """The knob of another dataclass, with its default and its help, for a field of the same name and meaning."""
    f = {f.name: f for f in dataclasses.fields(config)}[name]
    return field(default=f.default, default_factory=f.default_factory, metadata=f.metadata)  # type: ignore[call-overload]


def unknown_name(kind: str, name: str, known: list[str]) -> ConfigError:
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else f"; known: {', '.join(sorted(known))}"
    return ConfigError(f"unknown {kind} {name!r}{hint}")


def check_choices(config: Any) -> None:
    """Raises ConfigError for a choice that is none and for a number that is not finite."""
    hints = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        choices = get_args(hints[f.name])
        value = getattr(config, f.name)
        if choices and all(isinstance(c, str) for c in choices) and value not in choices:
            raise ConfigError(f"{f.name} must be one of {', '.join(choices)}; got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{f.name} must be finite; got {value!r}")


def require(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {expected}; got {value!r}")
