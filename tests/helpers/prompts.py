"""Prompt files, and tokenizers with the chat templates of well-known models."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from helpers.inputs import make_tokenizer, unavailable

GOOD = {"prompt": "Say hi.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
# The turn tokens of a template, as its tokenizer has them.
TOKENS = {
    "qwen2_5": ("<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama3_1": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
}


def write(path: Path, *rows: object) -> Path:
    """JSON lines; a text is written as it is."""
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def template(name: str) -> str:
    """A chat template among those that TRL ships."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        unavailable("peer trl cannot be found")
    return Path(spec.submodule_search_locations[0], "chat_templates", f"{name}.jinja").read_text(encoding="utf-8")


def chat_tokenizer(name: str = "qwen2_5") -> Any:
    """The tests' tokenizer with the template of a family and its tokens; eos is <eos>, which no template writes."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS[name])})
    bos = next((t for t in TOKENS[name] if t in ("<bos>", "<|begin_of_text|>")), None)
    if bos:
        tokenizer.bos_token = bos
    tokenizer.chat_template = template(name)
    return tokenizer


def stops(tokenizer: Any, token: str) -> list[int]:
    """The end-of-sequence ids of a chat model that stops at token."""
    return [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(token)]
