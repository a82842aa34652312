"""Load a causal language model and its tokenizer, and run it over completions."""

from __future__ import annotations

import inspect
from typing import Any

import torch
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
    except (OSError, ValueError, KeyError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ConfigError(f"model {source!r} cannot be loaded: {reason}") from None
    return model, tokenizer


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0: it would make the ratio differ from 1 on-policy (trl#3234)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = getattr(model, "config", None)
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if getattr(config, name, 0):
            setattr(config, name, 0.0)
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def context_length(model: Any) -> int | None:
    """Positions the model was built for, where its configuration says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def completion_logits(model: Any, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits that predict the completion tokens, the model's own soft-cap applied: (N, L, V).

    prompt_ids, prompt_mask (N, S) left-padded; tokens, mask (N, L) right-padded.
    """
    width = tokens.shape[1]
    attention = torch.cat([prompt_mask, mask], 1).long()
    # Left padding shifts positions unless they are told (trl#3722).
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    inner = getattr(model, "module", model)
    keep = {"logits_to_keep": width + 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}
    out = model(
        input_ids=torch.cat([prompt_ids, tokens], 1),
        attention_mask=attention,
        position_ids=positions,
        use_cache=False,
        **keep,
    )
    return out.logits[:, -(width + 1) : -1]
