"""Prompts as training takes them: each row checked, bad ones named or left out."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import verifiers
from ..config import ConfigError, PromptConfig
from .files import Source, read_rows, read_template
from .forms import Found, literal, missing, recognise

DEEP = 100  # lists and objects within one another; what is written of a row later may not meet a limit of Python's


@dataclass(frozen=True)
class Example:
    """One prompt. `prompt` is text or chat messages; `columns` is the whole row, passed to rewards."""

    prompt: str | list[dict[str, Any]]
    instruction_ids: list[str] = field(default_factory=list)
    kwargs: list[dict[str, Any]] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = ""  # file:line

    @property
    def text(self) -> str:
        """The request as plain text: the prompt, or the last user message."""
        if isinstance(self.prompt, str):
            return self.prompt
        return next((m["content"] or "" for m in reversed(self.prompt) if m["role"] == "user"), "")

    @property
    def opening(self) -> str:
        """How the answer begins already: the last assistant message of a prompt that ends with one, which goes on."""
        return verifiers.opening_of(self.prompt)

    def num_constraints(self, default: int) -> int:
        """K: the instructions of the prompt, else its `num_constraints` column, else the default."""
        return len(self.instruction_ids) or self.columns.get("num_constraints") or default


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it stands, why, and how its prompt begins."""

    where: str
    reason: str
    prompt: str


@dataclass(frozen=True)
class Prompts:
    """Examples in the order of the file, what the reader should know of them, and the rows that were left out."""

    examples: list[Example]
    notes: list[str] = field(default_factory=list)
    dropped: list[BadRow] = field(default_factory=list)


def read_prompts(source: Source, config: PromptConfig | None = None, name: str = "prompts") -> Prompts:
    """The prompts of a file, a folder or a hub id, or of rows in memory, with their constraints where they have any
    (`files` and `forms` have what is read). A row in memory that is a text, or a list of chat messages, is a prompt.

    name: of what is in memory, for messages.

    Raises: ConfigError in one line where the source cannot be read or has no prompt, or the module of an instruction
        type of one's own cannot be loaded; and for the first row that cannot be used, with its file and line, unless
        on_bad_row is drop.
    """
    config = config or PromptConfig()
    verifiers.load_instructions(config.instructions)
    read_template(config.chat_template)  # not only once the model is loaded
    rows = read_rows(source, config.split, config.trust_remote_code, name)
    if isinstance(source, (str, Path)):
        name, quoted = str(source), repr(str(source))
        if not rows:
            raise ConfigError(f"prompt file {quoted} holds no prompts")
    else:
        quoted = name
        if not rows:
            raise ConfigError(f"{name} must have at least one row; got none")
        rows = [(where, {config.prompt_column: x} if isinstance(x, (str, list)) else x) for where, x in rows]
    for new, _, old in (item.partition("=") for item in config.columns):
        # A held-out file may have the new name already.
        if not any(isinstance(row, dict) and (old in row or new in row) for _, row in rows):
            raise ConfigError(f"columns {new}={old}: no row of {quoted} has a column {old!r}")
    examples, bad = [], []
    seen: dict[str, int] = {}
    for where, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"a row must be a JSON object; got {type(row).__name__}")
            if _deeper(row, DEEP):
                raise ValueError(f"is nested more than {DEEP} levels deep")
            found = recognise(row, config)
            examples.append(_example(found, where, config.rules))
        except ValueError as e:
            bad.append(BadRow(where, _one_line(e), _beginning(row, config.prompt_column)))
            if config.on_bad_row == "error":
                raise ConfigError(f"{where}: {_one_line(e)}") from None
        else:
            for form in found.forms:
                seen[form] = seen.get(form, 0) + 1
    notes = []
    if seen:
        parts = [
            form if count == len(examples) else f"{form} ({count} of {len(examples)})" for form, count in seen.items()
        ]
        notes.append(f"{name}: {'; '.join(parts)}")
    return sort_out(Prompts(examples, notes), bad)


def sort_out(prompts: Prompts, bad: list[BadRow]) -> Prompts:
    """The prompts with bad rows beside them, and a note on those. Raises ConfigError where nothing else is left."""
    if not bad:
        return prompts
    # Numbers apart, a reason is the same for all that are too long.
    groups: dict[str, list[BadRow]] = {}
    for row in bad:
        groups.setdefault(re.sub(r"\d+", "0", row.reason), []).append(row)
    largest = sorted(groups.values(), key=len, reverse=True)
    reasons = [f"{len(rows)} like {rows[0].where}: {rows[0].reason}" for rows in largest[:5]]
    if len(largest) > 5:
        reasons.append(f"{sum(map(len, largest[5:]))} for {len(largest) - 5} further reasons")
    note = f"left out {len(bad)} of {len(bad) + len(prompts.examples)} rows: {'; '.join(reasons)}"
    if not prompts.examples:
        raise ConfigError(f"no prompt can be used: {note}")
    return Prompts(prompts.examples, [*prompts.notes, note], [*prompts.dropped, *bad])


def batches(num_prompts: int, per_step: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Indices of each step's prompts: every prompt once per epoch, in an order that only the seed decides."""
    order = random.Random(seed)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < per_step:
            queue += order.sample(range(num_prompts), num_prompts)
        yield queue[:per_step]
        del queue[:per_step]


def _example(found: Found, where: str, rules: str) -> Example:
    prompt, columns = _prompt(found.prompt, found.column), found.columns
    ids, kwargs = constraints_of(columns)
    for instruction_id, arguments in zip(ids, kwargs, strict=True):
        verifiers.validate(instruction_id, arguments, rules=rules)
    ours = {
        "instruction_id_list": ids or None,
        "kwargs": kwargs if ids else None,
        "num_constraints": _num_constraints(columns.get("num_constraints")),
        "tools": _tools(columns.get("tools")),
    }
    columns = columns | {name: value for name, value in ours.items() if name in columns}
    try:
        json.dumps([prompt, columns], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"holds {e.object[e.start]!a}, half of a surrogate pair, which is no text") from None
    return Example(prompt, ids, kwargs, columns, where)


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects within one another are more than `levels`, those that are written as text apart."""
    if isinstance(value, dict):
        return levels == 0 or any(_deeper(item, levels - 1) for item in value.values())
    return isinstance(value, list) and (levels == 0 or any(_deeper(item, levels - 1) for item in value))


def _one_line(error: ValueError) -> str:
    """What an error says, cut where a value of the row that it names is long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 1000 else f"{text[:500]} … {text[-400:]}"


def _prompt(prompt: Any, column: str) -> str | list[dict[str, Any]]:
    if isinstance(prompt, list):
        messages = [_message(message, column) for message in prompt]
        if not messages:
            raise ValueError(f"{column!r} is empty")
        last = messages[-1]
        if last["role"] == "assistant" and not last["content"] and last.get("tool_calls"):
            raise ValueError(f"{column!r} ends with an assistant message without text, which cannot be continued")
        return messages
    if missing(prompt) or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError(f"{column!r} is empty")
    if not isinstance(prompt, str):
        raise ValueError(f"{column!r} must be text or chat messages; got {type(prompt).__name__}")
    return prompt


def _message(message: Any, column: str) -> dict[str, Any]:
    """A message with text as its content, "" beside tool calls; keys without a value, as tables have, are left out."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"each message of {column!r} must have a role and a content text")
    content = message.get("content")
    if isinstance(content, list):
        kinds = [part.get("type", "text") if isinstance(part, dict) else type(part).__name__ for part in content]
        if any(kind != "text" for kind in kinds):
            other = next(kind for kind in kinds if kind != "text")
            raise ValueError(f"a message of {column!r} has a part of type {other!r}; text alone is supported")
        texts = [part.get("text") for part in content]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise ValueError(f"a message of {column!r} has a part whose text is no text")
        content = "".join(text or "" for text in texts)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"each message of {column!r} must have a role and a content text")
    return {**_without_nulls(message), "content": content or ""}  # templates add it to text


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def constraints_of(columns: dict[str, Any]) -> tuple[list[Any], list[dict[str, Any]]]:
    """Instruction ids of a row and the arguments of each, which may be tables or JSON text. Raises: ValueError."""
    ids = literal(columns.get("instruction_id_list"))
    if missing(ids) or ids == []:
        return [], []
    if missing(columns.get("kwargs")):
        raise ValueError("column 'kwargs' is missing beside 'instruction_id_list'")
    kwargs = literal(columns["kwargs"])
    if not isinstance(ids, list) or not isinstance(kwargs, list) or len(kwargs) != len(ids):
        got = len(kwargs) if isinstance(kwargs, list) else type(kwargs).__name__
        expected = len(ids) if isinstance(ids, list) else "instruction_id_list is no list"
        raise ValueError(f"'kwargs' must be a list with one entry per instruction id ({expected}); got {got}")
    entries = [{} if missing(entry) else literal(entry) for entry in kwargs]
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("each entry of 'kwargs' must be an object with the instruction's arguments, or null")
    return ids, [{k: _whole(v) for k, v in entry.items() if not missing(v)} for entry in entries]


def _whole(value: Any) -> Any:
    """Tables with empty cells turn whole numbers into floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _num_constraints(value: Any) -> int | None:
    if missing(value):
        return None
    k = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 20 else _whole(value)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k < 2**31:
        raise ValueError(f"'num_constraints' must be a whole number of at least 1 and below 2^31; got {value!r}")
    return k


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if missing(value):
        return None
    tools = _without_nulls(literal(value))
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"'tools' must be a list of JSON schemas, or JSON text of one; got {type(tools).__name__}")
    return tools


def _beginning(row: Any, column: str) -> str:
    prompt = row.get(column, row.get("messages", "")) if isinstance(row, dict) else ""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, default=str)
    return text[:200].encode("utf-8", "replace").decode()
