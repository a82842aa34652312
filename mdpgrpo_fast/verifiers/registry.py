"""The table of instruction types, and the errors a bad line of data gets."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import marshal
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from ..config import needs_package
from .arguments import Kind, kind_of, whole_mapping

_NOTHING: dict[str, Any] = {}
_NO_PARAMETER = inspect.Parameter("rules", inspect.Parameter.KEYWORD_ONLY)
_PACKAGE = str(Path(__file__).resolve().parent)
RULES = ("ifeval", "mdpgrpo", "iftrain", "ifbench", "m-ifeval")


class InstructionError(ValueError):
    """A line of data cannot be checked: base of the errors below."""


class UnknownInstructionError(InstructionError):
    """The instruction id is in no table of the chosen rules."""


class ArgumentError(InstructionError):
    """An argument (`kwargs`) of an instruction is missing, unexpected or of the wrong kind."""


class MissingRequirementError(InstructionError):
    """What a type needs, a package or data of NLTK, is not installed."""


class CheckError(RuntimeError):
    """A check of one's own raised an error, or returned something else than True or False."""


@dataclass(frozen=True)
class Instruction:
    """One instruction type.

    `check(text, **arguments)` answers for one text, and takes the rules too where `takes_rules`; `arguments` maps each
    argument to its kind, `optional` are those that may be absent; `rules` are the rule sets that know the type, `agree`
    looks at the arguments together (ValueError where they disagree), `needs` raises InstructionError where something
    is not installed; `own` marks a type that is none of the library's; `known` remembers cleaned arguments.
    """

    id: str
    check: Callable[..., bool]
    arguments: Mapping[str, Kind] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    rules: tuple[str, ...] = RULES
    agree: Callable[[Mapping[str, Any]], None] | None = None
    needs: Callable[[], object] | None = None
    takes_rules: bool = False
    own: bool = True
    known: dict[bytes, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def bare(self) -> bool:
        """Whether the check takes nothing but the text, and needs nothing."""
        return not (self.arguments or self.agree or self.needs or self.takes_rules)

    @property
    def description(self) -> str:
        """The first line of the check's docstring."""
        return (inspect.getdoc(self.check) or "").split("\n")[0]

    @property
    def example(self) -> dict[str, Any]:
        """Arguments that the type takes."""
        return {name: kind.example for name, kind in self.arguments.items() if name not in self.optional}


INSTRUCTIONS: dict[str, Instruction] = {}
LEFT_OUT: dict[str, str] = {}  # types of the official codes that are none here: why
_REMEMBERED = 1024  # arguments of each type


def instruction(
    id: str,
    *,
    rules: tuple[str, ...] = RULES,
    agree: Callable[[Mapping[str, Any]], None] | None = None,
    needs: Callable[[], object] | None = None,
    examples: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Enter the decorated check in `INSTRUCTIONS` under `id`, so that `verify` and training files know it.

    The check takes the response as its first parameter and answers True or False. Its other parameters are the
    instruction's arguments, each annotated with int, float, bool, str, dict, list[…] of these, Literal[…] or a kind of
    `mdpgrpo_fast.verifiers.arguments`; a parameter with a default may be absent. A parameter named `rules` gets the
    rule set instead. The first line of the docstring is what `--list` says.

    id: "group:name". rules: the rule sets that know it (default: all). agree, needs: see `Instruction`.
    examples: values for `--list` in place of those of the kinds.

    Raises: ValueError where `id` has another form or is taken; TypeError where a parameter has no annotation, or one
        that is none of these.
    """
    group, _, name = id.partition(":") if isinstance(id, str) else ("", "", "")
    if not group.strip() or not name.strip():
        raise ValueError(f"id: expected the form 'group:name', got {id!r}")
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown or not rules:
        raise ValueError(f"rules: expected some of {', '.join(RULES)}, got {unknown[0] if unknown else 'none'!r}")

    def enter(check: Callable[..., bool]) -> Callable[..., bool]:
        if not inspect.isfunction(check):
            raise TypeError(f"{id}: expected a function, got {type(check).__name__}")
        known = INSTRUCTIONS.get(id)
        if known is not None and _home(known.check) != _home(check):
            raise ValueError(f"id: {id!r} is taken by {known.check.__module__}.{known.check.__qualname__}")
        hints = get_type_hints(check, include_extras=True)
        text, *parameters = inspect.signature(check).parameters.values() or [_NO_PARAMETER]
        if text.name == "rules" or text.kind not in (text.POSITIONAL_ONLY, text.POSITIONAL_OR_KEYWORD):
            raise TypeError(f"{id}: the first parameter must take the response")
        arguments = {p.name: _kind(id, p, hints.get(p.name), rules[0]) for p in parameters if p.name != "rules"}
        for name, value in (examples or {}).items():
            arguments[name] = arguments[name]._replace(example=value)
        INSTRUCTIONS[id] = Instruction(
            id,
            check,
            arguments,
            frozenset(p.name for p in parameters if p.default is not p.empty),
            tuple(rules),
            agree,
            needs,
            takes_rules=any(p.name == "rules" for p in parameters),
            own=not check.__module__.startswith(__package__ + "."),
        )
        return check

    return enter


def _kind(id: str, parameter: inspect.Parameter, annotation: Any, rules: str) -> Kind:
    """The kind of a check's parameter. Raises TypeError where it has none, or its default is not of it."""
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        raise TypeError(f"{id}: parameter {parameter.name!r} cannot be passed by its name")
    try:
        kind = kind_of(annotation)
        if parameter.default is not parameter.empty and parameter.default is not None:
            kind.parse(parameter.default, rules)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{id}: parameter {parameter.name!r}: {error}") from None
    return kind


def _home(check: Callable[..., bool]) -> tuple[str, int]:
    """Where a function stands: a module may be loaded twice, under two names."""
    return check.__code__.co_filename, check.__code__.co_firstlineno


def said(error: BaseException) -> str:
    """An exception of a user's code in one line: type, message, and the line that raised it."""
    text = " ".join(str(error).split())
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_PACKAGE, "<frozen"))]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}" if text else f"{type(error).__name__}{place}"


def package(name: str) -> Callable[[], None]:
    """For `needs`: raises MissingRequirementError where the package `name`, of an extra of this library, is not
    installed."""

    @functools.lru_cache(maxsize=1)
    def needs() -> None:
        if importlib.util.find_spec(name) is None:
            raise MissingRequirementError(needs_package(name))

    return needs


def check_rules(rules: str) -> None:
    """Raises ValueError where `rules` is no rule set."""
    if rules not in RULES:
        raise ValueError(f"rules: expected one of {', '.join(RULES)}, got {rules!r}")


def lookup(instruction_id: str, rules: str) -> Instruction:
    """The entry of `instruction_id`.

    Raises UnknownInstructionError, which names the rule sets that know it, or the nearest id that `rules` know.
    """
    known = INSTRUCTIONS.get(instruction_id) if isinstance(instruction_id, str) else None
    if known is not None and rules in known.rules:
        return known
    check_rules(rules)
    if known is not None:
        hint = f"known under rules {', '.join(map(repr, known.rules))}"
    elif str(instruction_id) in LEFT_OUT:
        hint = f"left out: {LEFT_OUT[instruction_id]}"
    else:
        hint = _nearest(str(instruction_id), rules)
    raise UnknownInstructionError(f"unknown instruction id {instruction_id!r} under rules {rules!r}; {hint}")


def _nearest(instruction_id: str, rules: str) -> str:
    for name in difflib.get_close_matches(instruction_id, INSTRUCTIONS, n=1, cutoff=0.5):
        known = INSTRUCTIONS[name].rules
        return f"nearest: {name}" + ("" if rules in known else f", known under rules {', '.join(map(repr, known))}")
    return "--list of mdpgrpo_fast.verifiers names them, --instructions loads one's own"


def clean(entry: Instruction, kwargs: Mapping[str, Any] | None, rules: str) -> dict[str, Any]:
    """`kwargs` without None values, each checked and as the check wants it, with `rules` where the check takes them.

    Training asks for the same arguments hundreds of times, so those of the library's types are remembered; no check
    may change them. Raises ArgumentError, which names the instruction and the argument, and MissingRequirementError.
    """
    if entry.bare and (kwargs is None or kwargs == {}):
        return _NOTHING
    asked: Any = kwargs, rules
    try:
        key = marshal.dumps(asked, 2)  # which tells 1 from 1.0 and True
    except ValueError:  # not plain data
        key = None
    cleaned = entry.known.get(key) if key and not entry.own else None
    if cleaned is None:
        cleaned = _clean(entry, kwargs, rules)
        if key and not entry.own:
            if len(entry.known) >= _REMEMBERED:
                entry.known.clear()
            entry.known[key] = cleaned
    if entry.needs:
        try:
            entry.needs()
        except MissingRequirementError as error:
            raise MissingRequirementError(f"{entry.id}: {error}") from None
    return cleaned


def _clean(entry: Instruction, kwargs: Mapping[str, Any] | None, rules: str) -> dict[str, Any]:
    try:
        given = whole_mapping(kwargs)
    except ValueError as error:
        raise ArgumentError(f"{entry.id}: kwargs: {error}") from None
    for name in given:
        if name not in entry.arguments:
            names = ", ".join(entry.arguments) or "none"
            raise ArgumentError(f"{entry.id}: unexpected argument {name!r} (arguments: {names})")
    cleaned = {}
    for name, kind in entry.arguments.items():
        if name not in given and name in entry.optional:
            continue
        try:
            cleaned[name] = kind.parse(given.get(name), rules)
        except ValueError as error:
            raise ArgumentError(f"{entry.id}: {name}: {error}") from None
    try:
        if entry.agree:
            entry.agree(cleaned)
    except ValueError as error:
        raise ArgumentError(f"{entry.id}: {error}") from None
    return {**cleaned, "rules": rules} if entry.takes_rules else cleaned
