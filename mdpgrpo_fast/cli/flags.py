"""Flags of a command line from the fields of dataclasses: how each is converted, and what it is called in the help."""

from __future__ import annotations

import types
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..config import nearest


@dataclass(frozen=True)
class Flag:
    """One knob as a command line has it."""

    name: str
    convert: Callable[[str], Any]
    metavar: str
    help: str
    default: Any = None
    many: bool = False

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def switch(self) -> bool:
        return self.convert is _bool or isinstance(self.convert, _BoolOr)


def flags_of(*kinds: type) -> list[Flag]:
    """The knobs of dataclasses, in their order."""
    found = []
    for kind in kinds:
        hints = get_type_hints(kind)
        for f in fields(kind):
            hint, many = _without_none(hints[f.name]), False
            if get_origin(hint) is list:
                hint, many = get_args(hint)[0], True
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            found.append(Flag(f.name, *_conversion(hint), f.metadata["help"], default, many))
    return found


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        hint = arms[0] if len(arms) == 1 else hint
    return hint


def _conversion(hint: Any) -> tuple[Callable[[str], Any], str]:
    if get_origin(hint) is Literal:
        return _one_of(get_args(hint)), "{" + ",".join(get_args(hint)) + "}"
    if get_origin(hint) in (Union, types.UnionType):
        _, choices = get_args(hint)  # bool | Literal
        return _BoolOr(get_args(choices)), f"[{','.join(get_args(choices))}]"
    plain: dict[Any, tuple[Callable[[str], Any], str]] = {
        bool: (_bool, ""), int: (_int, "N"), float: (_float, "X"), str: (str, "TEXT")
    }  # fmt: skip
    return plain[hint]


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text in choices:
            return text
        near = nearest(text[:80], list(choices))
        meant = f"; did you mean {near!r}?" if near else ""
        raise ArgumentTypeError(f"must be one of {', '.join(choices)}; got {_short(text)}{meant}")

    return convert


@dataclass(frozen=True)
class _BoolOr:
    """A switch that has further values."""

    choices: tuple[str, ...]

    def __call__(self, text: str) -> Any:
        if text in self.choices:
            return text
        try:
            return _bool(text)
        except ArgumentTypeError:
            raise ArgumentTypeError(f"must be true, false or {' or '.join(self.choices)}; got {_short(text)}") from None


def _bool(text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ArgumentTypeError(f"must be true or false; got {_short(text)}")
    return words[text.lower()]


def _int(text: str) -> int:
    try:
        number = int(text)
    except ValueError:  # thousands of digits among others
        raise ArgumentTypeError(f"must be a whole number; got {_short(text)}") from None
    if not -(2**63) <= number < 2**63:
        raise ArgumentTypeError(f"must be a whole number below 2^63; got {_short(text)}")
    return number


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"must be a number; got {_short(text)}") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "…")
