"""IFEval's accuracies: of verdicts, and of a file of responses in IFEval's own form."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .packed import unpacked
from .registry import CheckError, check_rules
from .verify import THINK_TAGS, answer_of, last_answer, opening_of, validate, verify_all

Verdicts = Sequence[Sequence[bool]]


def accuracy(instruction_ids: Sequence[Sequence[str]], verdicts: Verdicts) -> dict[str, Any]:
    """Shares of satisfied constraints: by prompt (hsr), averaged over prompts (ssr), by instruction, by type.

    instruction_ids, verdicts: of each prompt, by position. Prompts without constraints are left out; all values are
    None where none has any.
    """
    counted = [(ids, row) for ids, row in zip(instruction_ids, verdicts, strict=True) if row]
    if not counted:
        return {"hsr": None, "ssr": None, "instruction": None, "count": 0, "types": {}}
    tally: dict[str, list[bool]] = {}
    for ids, row in counted:
        for instruction_id, ok in zip(ids, row, strict=True):
            tally.setdefault(instruction_id, []).append(ok)
    everything = [ok for row in tally.values() for ok in row]
    return {
        "hsr": sum(all(row) for _, row in counted) / len(counted),
        "ssr": sum(sum(row) / len(row) for _, row in counted) / len(counted),
        "instruction": sum(everything) / len(everything),
        "count": len(counted),
        "types": {t: {"rate": sum(row) / len(row), "count": len(row)} for t, row in sorted(tally.items())},
    }


def strict_and_loose(instruction_ids: Sequence[Sequence[str]], strict: Verdicts, loose: Verdicts) -> dict[str, Any]:
    """The four accuracies of IFEval (prompt and instruction level, strict and loose), SSR, HSR and per-type rates."""
    one, other = accuracy(instruction_ids, strict), accuracy(instruction_ids, loose)
    return {
        "prompt_strict": one["hsr"],
        "instruction_strict": one["instruction"],
        "prompt_loose": other["hsr"],
        "instruction_loose": other["instruction"],
        "hsr": one["hsr"],
        "ssr": one["ssr"],
        "count": one["count"],
        "types": {
            t: {"strict": row["rate"], "loose": other["types"][t]["rate"], "count": row["count"]}
            for t, row in one["types"].items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result of `strict_and_loose` as plain text."""
    rows = [
        ("prompt level (all constraints, HSR)", result["prompt_strict"], result["prompt_loose"]),
        ("instruction level", result["instruction_strict"], result["instruction_loose"]),
    ]
    lines = [f"{result['count']} prompts", f"{'':42}{'strict':>8}{'loose':>8}"]
    lines += [f"{name:42}{strict:8.3f}{loose:8.3f}" for name, strict, loose in rows]
    lines.append(f"{'share per prompt (SSR)':42}{result['ssr']:8.3f}")
    lines += [f"  {t:34}{row['count']:5} {row['strict']:8.3f}{row['loose']:8.3f}" for t, row in result["types"].items()]
    return "\n".join(lines)


# ---- files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """One prompt of a file with its response and verdicts, by position."""

    key: Any
    prompt: Any
    response: str
    instruction_ids: list[str]
    strict: list[bool]
    loose: list[bool]


def score_files(
    prompts: str | Path, responses: str | Path, rules: str = "ifeval", strip_thinking: bool = False
) -> tuple[list[Scored], list[str]]:
    """Verdicts on a file of responses, in the order of the prompts, and notes on what was left out of account.

    prompts: rows of `prompt`, `instruction_id_list`, `kwargs`, as IFEval's input_data.jsonl. responses: rows of
    `prompt` and `response`, as IFEval's; or of `key` and `response`. A response is text, or a chat, whose last
    assistant message is scored; null is a blank text. Of several responses to one prompt the last one counts, as in
    IFEval. JSON lines or an array, plain or .gz. strip_thinking: see `verify_all`.

    Raises: ConfigError in one line, with file and line, where a file cannot be read, a row is none of these, an
        instruction is unknown or wrong, or a prompt has no response; CheckError where a check of one's own raises.
    """
    check_rules(rules)
    given: dict[str, Any] = {}
    answers = list(_rows(Path(responses)))
    for where, row in answers:
        if "response" not in row or not ("prompt" in row or "key" in row):
            raise ConfigError(f"{where}: expected prompt (or key) and response; got {_names(row)}")
        try:
            last_answer("" if row["response"] is None else row["response"])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from None
        given[_name(row)] = "" if row["response"] is None else row["response"]
    by_key = bool(given) and all(name.startswith("key ") for name in given)
    scored, used = [], set()
    for where, row in _rows(Path(prompts)):
        ids, kwargs = _constraints(row, where)
        if "prompt" not in row and "key" not in row:
            raise ConfigError(f"{where}: expected prompt (or key); got {_names(row)}")
        name = _name(row, by_key)
        if name not in given:
            raise ConfigError(f"{responses}: no response to {where}, {name[:80]}")
        used.add(name)
        try:
            text = _scored_text(row.get("prompt"), given[name], strip_thinking)
            for instruction_id, arguments in zip(ids, kwargs, strict=True):
                validate(instruction_id, arguments, rules)
            strict, loose = (verify_all(ids, text, kwargs, mode=mode, rules=rules) for mode in ("strict", "loose"))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from None
        except CheckError as error:
            raise CheckError(f"{where}: {error}") from error.__cause__
        scored.append(Scored(row.get("key"), row.get("prompt"), text, ids, strict, loose))
    if not any(row.instruction_ids for row in scored):
        raise ConfigError(f"{prompts} holds no prompts with constraints: there is nothing to check")
    left = {"no prompt": len(given) - len(used), "the prompt of a later one": len(answers) - len(given)}
    return scored, [f"responses left out, to {why}: {number}" for why, number in left.items() if number]


def _scored_text(prompt: Any, response: Any, strip_thinking: bool) -> str:
    """The answer that a prompt began and a response went on with; of a chat, the last one."""
    text = last_answer(response)
    if strip_thinking:
        opened = isinstance(prompt, list) and _opens_block(prompt)
        text = answer_of(text, opened)
    return opening_of(prompt) + text if isinstance(response, str) else text


def _opens_block(prompt: list[Any]) -> bool:
    """Whether the last message ends inside a think block."""
    last = str(prompt[-1].get("content") or "") if prompt and isinstance(prompt[-1], dict) else ""
    return last.rstrip().endswith(tuple(tag for tag, _ in THINK_TAGS))


def _constraints(row: dict[str, Any], where: str) -> tuple[list[Any], list[Any]]:
    """The ids and arguments of a row: lists, or JSON text of such; NaN, as tables have it, is an empty cell."""
    ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
    try:
        ids, kwargs = (json.loads(value) if isinstance(value, str) else value for value in (ids, kwargs))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: instruction_id_list and kwargs must be lists, or JSON text: {error}") from None
    if not isinstance(ids, list) or not isinstance(kwargs, list) or len(ids) != len(kwargs):
        got = " and ".join(str(len(v)) if isinstance(v, list) else type(v).__name__ for v in (ids, kwargs))
        raise ConfigError(f"{where}: instruction_id_list and kwargs must be lists of one length; got {got}")
    return ids, [{k: v for k, v in x.items() if v == v} if isinstance(x, dict) else x for x in kwargs]


def _name(row: dict[str, Any], by_key: bool = False) -> str:
    if by_key or "prompt" not in row:
        return f"key {row.get('key')!r}"
    return f"prompt {json.dumps(row['prompt'], sort_keys=True)}"


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no columns"


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        data = path.read_bytes()
        text = (unpacked(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"file {str(path)!r} does not exist") from None
    except (OSError, EOFError, MemoryError, zlib.error, ValueError) as error:
        raise ConfigError(f"file {str(path)!r} cannot be read: {error}") from None
    if text.lstrip().startswith("["):
        texts, where = [text], str(path)
    else:
        texts, where = text.split("\n"), ""
    for number, line in enumerate(texts, 1):
        if not line.strip():
            continue
        place = where or f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{place}: no JSON: {error}") from None
        for i, row in enumerate(value if where and isinstance(value, list) else [value], 1):
            if not isinstance(row, dict):
                raise ConfigError(f"{place}: a row must be a JSON object; got {type(row).__name__}")
            yield (f"{path} row {i}" if where else place), row
