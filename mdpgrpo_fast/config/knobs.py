"""What a knob is: one default, one check, one sentence of help; and the error of all settings."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import os
import types
from collections.abc import Collection
from dataclasses import field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.75)), None)


def knob_of(config: type, name: str) -> Any:
    """The knob of another dataclass, with its default and its help, for a field of the same name and meaning."""
    f = {f.name: f for f in dataclasses.fields(config)}[name]
    return field(default=f.default, default_factory=f.default_factory, metadata=f.metadata)


def unknown_name(kind: str, name: str, known: list[str]) -> ConfigError:
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else f"; known: {', '.join(sorted(known))}"
    return ConfigError(f"unknown {kind} {name!r}{hint}")


@functools.cache
def _hints(config: type) -> dict[str, Any]:
    return get_type_hints(config)  # which takes milliseconds


def check_values(config: Any, names: Collection[str] | None = None) -> None:
    """Every knob, or those named, as its type has it: a path as text, a single value of a list as a list, a whole
    number as a float.

    Raises: ConfigError for a value of another type, a choice that is none, and a number that is not finite.
    """
    hints = _hints(config.__class__)
    for name in [f.name for f in dataclasses.fields(config)] if names is None else names:
        value = _converted(name, getattr(config, name), hints[name])
        object.__setattr__(config, name, value)
        choices = get_args(hints[name])
        if choices and all(isinstance(c, str) for c in choices) and value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be finite; got {value!r}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{name} must be a whole number of 64 bits; got {value!r}")


_WANTED = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def _converted(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        choices = [x for arm in get_args(hint) if get_origin(arm) is Literal for x in get_args(arm)]
        if isinstance(value, str) and value in choices:
            return value
        (hint,) = (arm for arm in get_args(hint) if arm is not type(None) and get_origin(arm) is not Literal)
        if choices:
            require(isinstance(value, hint), name, value, f"{_WANTED[hint]}, or {', '.join(map(repr, choices))}")
    if get_origin(hint) is Literal:
        return value
    if get_origin(hint) is list:
        if isinstance(value, (str, os.PathLike, int, float)):
            value = [value]
        require(isinstance(value, (list, tuple)), name, value, "a list")
        return [_converted(name, item, get_args(hint)[0]) for item in value]
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    right = {
        bool: isinstance(value, bool),
        int: number and isinstance(value, numbers.Integral),
        float: number,
        str: isinstance(value, str),
    }[hint]
    require(right, name, value, _WANTED[hint])
    return hint(value)


def require(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        got = repr(value)
        raise ConfigError(f"{name} must be {expected}; got {got if len(got) <= 300 else got[:300] + '…'}")
