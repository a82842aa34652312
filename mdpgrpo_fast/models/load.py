"""Loading of a causal language model with its tokenizer, and the longest prompt that it takes."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..config import ConfigError
from ..demo import SEED_POLICY


def load(path: str | None, dtype: str = "auto", attention: str = "auto") -> tuple[Any, Any]:
    """Model and tokenizer of a directory or hub id; None: the embedded seed policy.

    attention: an attn_implementation of transformers, or "auto".

    Raises: ConfigError in one line where the path is none or is no causal language model, or the attention cannot run.
    """
    source = str(SEED_POLICY) if path is None else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=None if attention == "auto" else attention
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        how = "" if attention == "auto" else f" with attention = {attention}"
        raise ConfigError(f"model {source!r} cannot be loaded{how}: {reason}") from None
    return model, tokenizer


def context_length(model: Any) -> int | None:
    """Positions the model was built for, where its configuration says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def prompt_limit(model: Any, max_prompt_length: int, max_completion_length: int) -> int:
    """Longest prompt in tokens that leaves room for a completion. Raises ConfigError where there is none."""
    room = context_length(model)
    if room is None:
        return max_prompt_length
    if max_completion_length >= room:
        raise ConfigError(
            f"max_completion_length must be below the model's {room} positions; got {max_completion_length}"
        )
    return min(max_prompt_length, room - max_completion_length)
