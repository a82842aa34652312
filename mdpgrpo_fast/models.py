"""Load a causal language model and its tokenizer, and run it over completions."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from .config import ConfigError
from .data import DEMO_DIR

SEED_POLICY = DEMO_DIR / "seed_policy"


def load(path: str | None, dtype: str = "auto") -> tuple[Any, Any]:
    """Model and tokenizer of a directory or hub id; None: the embedded seed policy.

    Raises: ConfigError in one line where the path is none or is no causal language model.
    """
    source = str(SEED_POLICY) if path is None else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ConfigError(f"model {source!r} cannot be loaded: {reason}") from None
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


def completion_logits(model: Any, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits that predict the completion tokens, the model's own soft-cap applied: (N, L, V).

    prompt_ids, prompt_mask (N, S) left-padded; tokens, mask (N, L) right-padded.
    """
    width = tokens.shape[1]
    attention = torch.cat([prompt_mask, mask], 1).long()
    # Left padding shifts positions unless they are told (trl#3722); a model without position ids derives its own.
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    accepted = inspect.signature(getattr(model, "module", model).forward).parameters
    options = {"logits_to_keep": width + 1, "position_ids": positions}
    out = model(
        input_ids=torch.cat([prompt_ids, tokens], 1),
        attention_mask=attention,
        use_cache=False,
        **{k: v for k, v in options.items() if k in accepted},
    )
    return out.logits[:, -(width + 1) : -1]
