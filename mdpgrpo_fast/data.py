"""Prompts from JSON lines: read, checked line by line, rendered and tokenised once."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import verifiers
from .config import ConfigError, TrainConfig


@dataclass(frozen=True)
class Example:
    """One prompt. `prompt` is text or chat messages; `columns` is the whole line, passed to rewards."""

    prompt: str | list[dict[str, str]]
    instruction_ids: list[str] = field(default_factory=list)
    kwargs: list[dict[str, Any]] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The request as plain text: the prompt, or the last user message."""
        if isinstance(self.prompt, str):
            return self.prompt
        return next((m["content"] for m in reversed(self.prompt) if m["role"] == "user"), "")

    def num_constraints(self, default: int) -> int:
        """K: the instructions of the prompt, else its `num_constraints` column, else the default."""
        return len(self.instruction_ids) or self.columns.get("num_constraints") or default


def _parse(row: Any, rules: str) -> Example:
    if not isinstance(row, dict):
        raise ValueError(f"a line must be a JSON object; got {type(row).__name__}")
    if "prompt" not in row:
        raise ValueError(f"column 'prompt' is missing; the line has {', '.join(map(repr, row)) or 'no columns'}")
    prompt = row["prompt"]
    if isinstance(prompt, list):
        for message in prompt:
            if not (isinstance(message, dict) and isinstance(message.get("content"), str) and "role" in message):
                raise ValueError("each message of 'prompt' must have a role and a content text")
    elif not isinstance(prompt, str):
        raise ValueError(f"'prompt' must be text or chat messages; got {type(prompt).__name__}")
    if not prompt:
        raise ValueError("'prompt' is empty")
    ids = [] if row.get("instruction_id_list") is None else row["instruction_id_list"]
    if ids and "kwargs" not in row:
        raise ValueError("column 'kwargs' is missing beside 'instruction_id_list'")
    kwargs = row.get("kwargs", []) if ids else []
    if not isinstance(ids, list) or not isinstance(kwargs, list) or len(kwargs) != len(ids):
        got = len(kwargs) if isinstance(kwargs, list) else type(kwargs).__name__
        expected = len(ids) if isinstance(ids, list) else "instruction_id_list is no list"
        raise ValueError(f"'kwargs' must be a list with one entry per instruction id ({expected}); got {got}")
    if not all(kw is None or isinstance(kw, dict) for kw in kwargs):
        raise ValueError("each entry of 'kwargs' must be an object with the instruction's arguments, or null")
    k = row.get("num_constraints")
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        raise ValueError(f"'num_constraints' must be a whole number of at least 1; got {k!r}")
    kwargs = [{k: v for k, v in (kw or {}).items() if v is not None} for kw in kwargs]
    for instruction_id, kw in zip(ids, kwargs, strict=True):
        verifiers.validate(instruction_id, kw, rules=rules)
    return Example(prompt, ids, kwargs, row)


def read_prompts(path: str | Path, rules: str = TrainConfig.rules) -> list[Example]:
    """The examples of a JSON lines file (`prompt`, and for constraints `instruction_id_list` and `kwargs`).

    Raises: ConfigError that names the file and the line for a missing file, a line that is not JSON, a missing column,
    kwargs of the wrong length, an unknown instruction id or an argument it lacks; and for a file without prompts.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise ConfigError(f"prompt file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"prompt file {str(path)!r} cannot be read: {e}") from None
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            examples.append(_parse(json.loads(line), rules))
        except json.JSONDecodeError as e:
            raise ConfigError(f"{path}:{number}: not JSON: {e.msg} at column {e.colno}") from None
        except ValueError as e:
            raise ConfigError(f"{path}:{number}: {e}") from None
    if not examples:
        raise ConfigError(f"prompt file {str(path)!r} holds no prompts")
    return examples


def tokenize(examples: list[Example], tokenizer: Any, max_prompt_length: int) -> list[list[int]]:
    """Token ids of every prompt, chat template applied where the tokenizer has one.

    Raises: ConfigError for the first prompt longer than max_prompt_length tokens.
    """
    template = getattr(tokenizer, "chat_template", None)
    ids = []
    for index, example in enumerate(examples):
        prompt = example.prompt
        if template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as e:  # templates raise what they like, for a system message for one
                raise ConfigError(f"prompt {index + 1}: the tokenizer's chat template refuses it: {e}") from None
            row = tokenizer(text, add_special_tokens=False).input_ids
        elif isinstance(prompt, str):
            row = tokenizer(prompt).input_ids
        else:
            raise ConfigError(f"prompt {index + 1} is chat messages, but the tokenizer has no chat template")
        if len(row) > max_prompt_length:
            start = repr(example.text[:60])
            raise ConfigError(
                f"prompt {index + 1} has {len(row)} tokens, over the limit of {max_prompt_length}: {start}"
            )
        ids.append(row)
    return ids


def batches(num_prompts: int, per_step: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Indices of each step's prompts: every prompt once per epoch, in an order that only the seed decides."""
    order = random.Random(seed)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < per_step:
            queue += order.sample(range(num_prompts), num_prompts)
        yield queue[:per_step]
        del queue[:per_step]
