"""A parser made of dataclasses of knobs: their types, their help, and one line for whatever is wrong."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from ..config import ConfigError, nearest
from .flags import Flag, flags_of
from .foreign import hint
from .help import page
from .layers import as_words

Layer = tuple[str, dict[str, Any]]  # where the settings stand, and the settings by the names of their knobs


class Parser(argparse.ArgumentParser):
    """Raises ConfigError, one line without the usage, where argparse ends the process."""

    def error(self, message: str) -> NoReturn:
        # "argument --steps: must be …"; argparse names a switch by both of its spellings.
        raise ConfigError(re.sub(r"^argument (--[\w-]+)(/--[\w-]+)*: (must )?", r"\1 \3", message))


def _parser(flags: list[Flag]) -> Parser:
    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-3 and -.5 are numbers too
    for flag in flags:
        if flag.switch:
            parser.add_argument(flag.flag, dest=flag.name, nargs="?", const=True, type=flag.convert)
            parser.add_argument(f"--no-{flag.flag[2:]}", dest=flag.name, action="store_false")
        else:
            nargs = "*" if flag.many else None
            parser.add_argument(flag.flag, dest=flag.name, nargs=nargs, type=flag.convert)
    return parser


def peek(argv: Sequence[str], *names: str) -> dict[str, str]:
    """The values of these flags in a command line that is not parsed yet; the last one counts, as it will there."""
    found = {}
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in names:
            found[name] = value if equals else following
    return found


def read(
    argv: Sequence[str] | None,
    *kinds: type,
    prog: str,
    description: str = "",
    layers: Sequence[Layer] = (),
    extra: Sequence[Flag] = (),
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One dataclass of each kind from the layers in their order, then argv, and what argv gave.

    A null in a layer takes the knob back to its default. extra: flags that are no knobs. `--help` and `--help-all`
    print the help, with the layers' values as the defaults, and end the process.
    Raises: ConfigError in one line for anything unknown or wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:
        if not word.isprintable() and any(0xD800 <= ord(c) < 0xE000 for c in word):
            raise ConfigError(f"argument {word!a} holds bytes that are no UTF-8 text")
    flags = [*extra, *flags_of(*kinds)]
    parser, known = _parser(flags), [f.name for f in flags]
    values: dict[str, Any] = {}
    knobs = known[len(extra) :]
    for where, layer in layers:
        for key in layer:
            if key not in knobs:
                raise ConfigError(f"{where}: {_unknown('key', key[:100], knobs)}")
        try:
            found = _converted(parser, layer, {f.name for f in flags if f.many})
        except ConfigError as e:
            raise ConfigError(f"{where}: {e}") from None
        values = {k: v for k, v in {**values, **found}.items() if layer.get(k, v) is not None}
    for word, everything in (("--help", False), ("-h", False), ("--help-all", True)):
        if word in argv:
            print(page(flags, values, prog, description, everything))
            sys.exit(0)
    namespace, rest = parser.parse_known_args([_dashed(word) for word in argv])
    if rest:
        name = rest[0].split("=")[0]
        name = name if len(name) <= 100 else f"{name[:100]}…"
        if not name.startswith("-"):
            raise ConfigError(f"unexpected argument {name!r}{_hint(name, known)}")
        raise ConfigError(_unknown("flag", name, [*(f.flag for f in flags), *_negated(flags)]))
    given = vars(namespace)
    values |= given
    configs = [kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values}) for kind in kinds]
    return tuple(configs), given


def _converted(parser: Parser, layer: dict[str, Any], lists: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for words in as_words(layer):
        for name, value in vars(parser.parse_args(words)).items():
            if name in found and name not in lists:
                raise ConfigError(f"--{name.replace('_', '-')} takes one value; got a list")
            found[name] = found.get(name, []) + value if name in lists else value
    return found


def parse(argv: Sequence[str] | None, *kinds: type, **options: Any) -> tuple[Any, ...]:
    """`read` without what argv gave."""
    return read(argv, *kinds, **options)[0]


def _negated(flags: list[Flag]) -> list[str]:
    return [f"--no-{flag.flag[2:]}" for flag in flags if flag.switch]


def _dashed(word: str) -> str:
    """--learning_rate is --learning-rate; verl's dotted keys stay."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") and "." not in name else word


def _unknown(kind: str, name: str, known: list[str]) -> str:
    said = _hint(name, known)
    if not said:
        near = nearest(name, known)
        said = f"; did you mean {near!r}?" if near else "; --help-all lists the flags"
    return f"unknown {kind} {name!r}{said}"


def _hint(name: str, known: list[str]) -> str:
    """What a name of another trainer is here, where this command has it."""
    text = hint(name)
    here = {k.removeprefix("--").replace("_", "-") for k in known}
    return f"; {text}" if text and set(re.findall(r"--([a-z][\w-]*)", text)) <= here else ""
