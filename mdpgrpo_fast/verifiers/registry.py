"""The table of instruction types, their arguments, and the errors a bad line of data gets."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RULES = ("ifeval", "mdpgrpo")
RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "less than": operator.lt,
    "at least": operator.ge,
    "more than": operator.gt,
    "up to": operator.le,
    "exactly": operator.eq,
}
IFEVAL_RELATIONS = ("less than", "at least")
# What langdetect 1.0.9 can answer; any other code could never be followed.
LANGUAGES = tuple(
    "af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa pl pt ro"
    " ru sk sl so sq sv sw ta te th tl tr uk ur vi zh-cn zh-tw".split()
)


class InstructionError(ValueError):
    """A line of data cannot be checked: base of the two errors below."""


class UnknownInstructionError(InstructionError):
    """The instruction id is in no table of the chosen rules."""


class ArgumentError(InstructionError):
    """An argument (`kwargs`) of an instruction is missing, unexpected or of the wrong kind."""


Kind = Callable[[Any, str], Any]  # (value or None, rules) -> value as the check takes it; raises ValueError


@dataclass(frozen=True)
class Instruction:
    """One instruction type.

    `check(text, rules, **arguments)` answers for one text, `arguments` maps each argument to its kind, `rules` are
    the rule sets that know the type, `agree` looks at the arguments together (ValueError where they disagree).
    """

    id: str
    check: Callable[..., bool]
    arguments: Mapping[str, Kind]
    rules: tuple[str, ...] = RULES
    agree: Callable[[Mapping[str, Any]], None] | None = None


INSTRUCTIONS: dict[str, Instruction] = {}


def instruction(
    id: str,
    *,
    rules: tuple[str, ...] = RULES,
    agree: Callable[[Mapping[str, Any]], None] | None = None,
    **arguments: Kind,
) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Enter the decorated check in `INSTRUCTIONS` under `id`, with the kind of each argument."""

    def enter(check: Callable[..., bool]) -> Callable[..., bool]:
        INSTRUCTIONS[id] = Instruction(id, check, arguments, rules, agree)
        return check

    return enter


def lookup(instruction_id: str, rules: str) -> Instruction:
    """The entry of `instruction_id`; UnknownInstructionError names the nearest id that `rules` know."""
    if rules not in RULES:
        raise ValueError(f"rules: expected one of {', '.join(RULES)}, got {rules!r}")
    known = INSTRUCTIONS.get(instruction_id) if isinstance(instruction_id, str) else None
    if known is not None and rules in known.rules:
        return known
    names = [name for name, entry in INSTRUCTIONS.items() if rules in entry.rules]
    near = difflib.get_close_matches(str(instruction_id), names, n=1, cutoff=0.0)[0]
    raise UnknownInstructionError(f"unknown instruction id {instruction_id!r} under rules {rules!r}; nearest: {near}")


def clean(entry: Instruction, kwargs: Mapping[str, Any] | None, rules: str) -> dict[str, Any]:
    """`kwargs` without None values, each checked and as the check wants it.

    Raises ArgumentError, which names the instruction and the argument.
    """
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ArgumentError(f"{entry.id}: kwargs: expected a mapping, got {type(kwargs).__name__}")
    given = {name: value for name, value in (kwargs or {}).items() if value is not None}
    for name in given:
        if name not in entry.arguments:
            expected = ", ".join(entry.arguments) or "none"
            raise ArgumentError(f"{entry.id}: unexpected argument {name!r} (arguments: {expected})")
    cleaned = {}
    for name, kind in entry.arguments.items():
        try:
            cleaned[name] = kind(given.get(name), rules)
        except ValueError as error:
            raise ArgumentError(f"{entry.id}: {name}: {error}") from None
    if entry.agree:
        try:
            entry.agree(cleaned)
        except ValueError as error:
            raise ArgumentError(f"{entry.id}: {error}") from None
    return cleaned


def _expected(what: str, value: Any) -> ValueError:
    return ValueError(f"expected {what}, " + ("missing" if value is None else f"got {value!r}"))


def count(value: Any, rules: str) -> int:
    """A whole number from 0; a float without fraction too, as tables with empty cells turn numbers into floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _expected("a whole number from 0", value)
    return value


def relation(value: Any, rules: str) -> str:
    """One of the relations of `rules`."""
    known = IFEVAL_RELATIONS if rules == "ifeval" else tuple(RELATIONS)
    if value not in known:
        raise _expected("one of " + ", ".join(map(repr, known)), value)
    return value


def phrase(value: Any, rules: str) -> str:
    """A text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise _expected("a text that is not blank", value)
    return value


def request(value: Any, rules: str) -> str:
    """The request to repeat; MDP-GRPO's rules put x's where it is empty."""
    if rules == "mdpgrpo" and value in (None, ""):
        return "x" * 21
    return phrase(value, rules)


def letter(value: Any, rules: str) -> str:
    """One character, in lower case; IFEval draws a random letter for what is none, here it is counted as it is."""
    if not isinstance(value, str) or len(value) != 1 or not value.strip():
        raise _expected("one character", value)
    return value.lower()


def language(value: Any, rules: str) -> str:
    """A language code that langdetect knows."""
    if value not in LANGUAGES:
        raise _expected("a language code that langdetect knows, such as 'de' or 'zh-cn'", value)
    return value


_ESCAPE_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_REPEAT = re.compile(r"[*+]|\{\d*,?\d*\}")


def pattern(value: Any, rules: str) -> str:
    """A keyword, which both rule sets read as a regular expression.

    Repeats are refused: over a long response they can take minutes, and in a keyword (C++) they are a slip.
    """
    value = phrase(value, rules)
    if _REPEAT.search(_ESCAPE_OR_CLASS.sub("", value)):
        raise ValueError(f"{value!r} is read as a regular expression and may not repeat (* + {{}}); put a \\ before")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is read as a regular expression and is none: {error}") from None
    return value


def patterns(value: Any, rules: str) -> list[str]:
    """A list of keywords, not empty."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise _expected("a list of keywords that is not empty", value)
    return [pattern(item, rules) for item in value]
