"""The table of instruction types, and the errors a bad line of data gets."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import marshal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from .arguments import Kind, kind_of, whole_mapping

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

    @property
    def description(self) -> str:
        """The first line of the check's docstring."""
        return (inspect.getdoc(self.check) or "").split("\n")[0]

    @property
    def example(self) -> dict[str, Any]:
        """Arguments that the type takes."""
        return {name: kind.example for name, kind in self.arguments.items() if name not in self.optional}


INSTRUCTIONS: dict[str, Instruction] = {}
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
    if unknown:
        raise ValueError(f"rules: expected some of {', '.join(RULES)}, got {unknown[0]!r}")

    def enter(check: Callable[..., bool]) -> Callable[..., bool]:
        known = INSTRUCTIONS.get(id)
        if known is not None and _home(known.check) != _home(check):
            raise ValueError(f"id: {id!r} is taken by {'.'.join(_home(known.check))}")
        hints = get_type_hints(check, include_extras=True)
        parameters = list(inspect.signature(check).parameters.values())[1:]
        arguments = {}
        for parameter in parameters:
            if parameter.name == "rules":
                continue
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise TypeError(f"{id}: parameter {parameter.name!r} cannot be passed by its name")
            try:
                kind = kind_of(hints.get(parameter.name))
            except TypeError as error:
                raise TypeError(f"{id}: parameter {parameter.name!r}: {error}") from None
            arguments[parameter.name] = kind._replace(example=(examples or {}).get(parameter.name, kind.example))
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


def _home(check: Callable[..., bool]) -> tuple[str, str]:
    return check.__module__, check.__qualname__


def package(name: str, extra: str) -> Callable[[], None]:
    """For `needs`: raises MissingRequirementError where the package `name`, which `extra` of this library brings, is
    not installed."""

    @functools.lru_cache(maxsize=1)
    def needs() -> None:
        if importlib.util.find_spec(name) is None:
            raise MissingRequirementError(f"needs the package {name}: pip install 'mdpgrpo-fast[{extra}]'")

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
    else:
        names = [name for name, entry in INSTRUCTIONS.items() if rules in entry.rules]
        hint = f"nearest: {difflib.get_close_matches(str(instruction_id), names, n=1, cutoff=0.0)[0]}"
        if not any(name.startswith(str(instruction_id).partition(":")[0] + ":") for name in names):
            hint += " (types of one's own are loaded by --instructions)"
    raise UnknownInstructionError(f"unknown instruction id {instruction_id!r} under rules {rules!r}; {hint}")


def clean(entry: Instruction, kwargs: Mapping[str, Any] | None, rules: str) -> dict[str, Any]:
    """`kwargs` without None values, each checked and as the check wants it, with `rules` where the check takes them.

    Training asks for the same arguments hundreds of times, so those of the library's types are remembered; no check
    may change them. Raises ArgumentError, which names the instruction and the argument, and MissingRequirementError.
    """
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
