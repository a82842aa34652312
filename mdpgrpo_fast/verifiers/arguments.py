"""What the arguments (`kwargs`) of an instruction may be: a check is annotated with these, or with plain types."""

from __future__ import annotations

import operator
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "less than": operator.lt,
    "at least": operator.ge,
    "more than": operator.gt,
    "up to": operator.le,
    "exactly": operator.eq,
}
TWO_RELATIONS = ("less than", "at least")
# What langdetect 1.0.9 can answer; any other code could never be followed.
LANGUAGES = tuple(
    "af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa pl pt ro"
    " ru sk sl so sq sv sw ta te th tl tr uk ur vi zh-cn zh-tw".split()
)


class Kind(NamedTuple):
    """One kind of argument.

    `parse(value, rules)` returns the value as the check takes it, of None too where the argument is absent, and raises
    ValueError; `wants` says in words what it takes; `example` is such a value.
    """

    parse: Callable[[Any, str], Any]
    wants: str
    example: Any


def expected(what: str, value: Any) -> ValueError:
    """The error of an argument that should have been `what`."""
    return ValueError(f"expected {what}, " + ("missing" if value is None else f"got {value!r}"))


def _count(value: Any, rules: str) -> int:
    # A float without fraction too: tables with empty cells turn numbers into floats.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise expected("a whole number from 0", value)
    return value


def _positive(value: Any, rules: str) -> int:
    try:
        number = _count(value, rules)
    except ValueError:
        number = 0
    if number < 1:
        raise expected("a whole number from 1", value)
    return number


def _relation(value: Any, rules: str) -> str:
    known = tuple(RELATIONS) if rules == "mdpgrpo" else TWO_RELATIONS
    if value not in known:
        raise expected("one of " + ", ".join(map(repr, known)), value)
    return str(value)


def _phrase(value: Any, rules: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise expected("a text that is not blank", value)
    return value


def _request(value: Any, rules: str) -> str:
    if rules == "mdpgrpo" and value in (None, ""):
        return "x" * 21
    return _phrase(value, rules)


def _letter(value: Any, rules: str) -> str:
    if not isinstance(value, str) or len(value) != 1 or not value.strip():
        raise expected("one character", value)
    return value.lower()


def _language(value: Any, rules: str) -> str:
    if value not in LANGUAGES:
        raise expected("a language code that langdetect knows, such as 'de' or 'zh-cn'", value)
    return str(value)


_ESCAPE_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_REPEAT = re.compile(r"[*+]|\{\d*,?\d*\}")


def _pattern(value: Any, rules: str) -> str:
    value = _phrase(value, rules)
    # Over a long response a repeat can take minutes, and in a keyword (C++) it is a slip.
    if _REPEAT.search(_ESCAPE_OR_CLASS.sub("", value)):
        raise ValueError(f"{value!r} is read as a regular expression and may not repeat (* + {{}}); put a \\ before")
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{value!r} is read as a regular expression and is none: {error}") from None
    return str(value)


def list_of(kind: Kind) -> Kind:
    """The kind of a list, not empty, of `kind`."""

    def parse(value: Any, rules: str) -> list[Any]:
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise expected(f"a list that is not empty, each {kind.wants}", value)
        return [kind.parse(item, rules) for item in value]

    return Kind(parse, f"a list that is not empty, each {kind.wants}", [kind.example])


Count = Annotated[int, Kind(_count, "a whole number from 0", 3)]
Positive = Annotated[int, Kind(_positive, "a whole number from 1", 2)]
Relation = Annotated[str, Kind(_relation, "a relation, such as 'at least' or 'less than'", "at least")]
Phrase = Annotated[str, Kind(_phrase, "a text that is not blank", "the end")]
Request = Annotated[str, Kind(_request, "the request to repeat", "Write a haiku.")]
Letter = Annotated[str, Kind(_letter, "one character", "e")]
Language = Annotated[str, Kind(_language, "a language code of langdetect", "de")]
Pattern = Annotated[str, Kind(_pattern, "a keyword, read as a regular expression without repeats", "island")]
Patterns = Annotated[list[str], list_of(Kind(_pattern, "a keyword, read as a regular expression", "island"))]


def _plain(type_: type, wants: str, example: Any) -> Kind:
    def parse(value: Any, rules: str) -> Any:
        if type_ is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if type_ is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, type_) or (isinstance(value, bool) and type_ is not bool):
            raise expected(wants, value)
        return value

    return Kind(parse, wants, example)


_PLAIN: dict[Any, Kind] = {
    int: _plain(int, "a whole number", 3),
    float: _plain(float, "a number", 0.5),
    bool: _plain(bool, "true or false", True),
    str: _plain(str, "a text", "the end"),
    dict: _plain(dict, "an object", {}),
}


def kind_of(annotation: Any) -> Kind:
    """The kind that an annotation asks for: one of this module's, int, float, bool, str, dict, list[…] of these,
    Literal, or any of these with `| None`.

    Raises: TypeError for any other annotation, or none.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated and isinstance(inner[1], Kind):
        return inner[1]
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if origin is list:
        return list_of(kind_of(inner[0]))
    if origin is Literal:
        return one_of(*inner)
    if origin in (Union, types.UnionType):
        rest = [kind for kind in inner if kind is not type(None)]
        if len(rest) == 1:
            return kind_of(rest[0])
    raise TypeError("expected int, float, bool, str, dict, list[...] of one, Literal[...] or a kind of this library")


def one_of(*values: Any) -> Kind:
    """The kind that takes these values alone."""
    wants = "one of " + ", ".join(map(repr, values))

    def parse(value: Any, rules: str) -> Any:
        if value not in values:
            raise expected(wants, value)
        return value

    return Kind(parse, wants, values[0])


def whole_mapping(value: Any) -> Mapping[str, Any]:
    """`kwargs` without its None values. Raises ValueError where it is no mapping."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping, got {type(value).__name__}")
    return {name: item for name, item in (value or {}).items() if item is not None}
