"""Load a causal language model and its tokenizer, and run it over completions."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .backends import say_once
from .config import ConfigError, MDPGRPOConfig
from .data import DEMO_DIR
from .heads import LinearHead, UnsupportedHead, find_head
from .linear import WORKSPACE_BYTES, linear_token_logprobs, linear_token_loss
from .ops import token_logprobs, token_loss
from .reference import TokenLoss

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


def _inputs(
    module: Any, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor, **more: Any
) -> dict[str, Any]:
    """Arguments of a forward pass over prompts and completions, of those that the module takes."""
    attention = torch.cat([prompt_mask, mask], 1).long()
    # Left padding shifts positions unless they are told (trl#3722); a model without position ids derives its own.
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    accepted = inspect.signature(getattr(module, "module", module).forward).parameters
    options = {"position_ids": positions, **more}
    return {
        "input_ids": torch.cat([prompt_ids, tokens], 1),
        "attention_mask": attention,
        "use_cache": False,
        **{k: v for k, v in options.items() if k in accepted},
    }


def completion_logits(model: Any, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits that predict the completion tokens, the model's own soft-cap applied: (N, L, V).

    prompt_ids, prompt_mask (N, S) left-padded; tokens, mask (N, L) right-padded.
    """
    width = tokens.shape[1]
    out = model(**_inputs(model, prompt_ids, prompt_mask, tokens, mask, logits_to_keep=width + 1))
    return out.logits[:, -(width + 1) : -1]


def completion_states(body: Any, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Hidden states that predict the completion tokens: (N, L, D), a view. Arguments as of `completion_logits`."""
    states = body(**_inputs(body, prompt_ids, prompt_mask, tokens, mask)).last_hidden_state
    return states[:, -(tokens.shape[1] + 1) : -1]


class Policy(nn.Module):
    """A causal language model and its objective in one forward pass, so that wrappers (DDP, FSDP, autocast) see both.

    The objective comes from the hidden states and the head, which is never called; from logits where the head is no
    linear layer, which is said once.

    model: of transformers. lm_head: "auto", "fused" (raises ConfigError where "auto" would take logits) or "logits".
    workspace_bytes, fp32_logits, skip_idle: as of `linear_token_loss`.
    """

    def __init__(
        self, model: Any, lm_head: str = "auto", workspace_bytes: int = WORKSPACE_BYTES, fp32_logits: bool = False,
        skip_idle: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.options = {"workspace_bytes": workspace_bytes, "fp32_logits": fp32_logits}
        self.skip_idle = skip_idle
        self.head: LinearHead | None = None
        if lm_head == "logits":
            return
        try:
            self.head = find_head(model)
        except UnsupportedHead as e:
            if lm_head == "fused":
                raise ConfigError(f"lm_head = fused cannot be had for this model: {e}") from None
            say_once(logging.WARNING, f"the logits are built as a whole: {e}")

    def forward(
        self, inputs: tuple[Tensor, Tensor, Tensor, Tensor], mask: Tensor, config: MDPGRPOConfig,
        lengths: list[int] | None, **objective: Any,
    ) -> TokenLoss:  # fmt: skip
        """inputs: of `completion_logits`; mask (N, L): tokens that count; the rest as of `linear_token_loss`."""
        if self.head is None:
            return token_loss(completion_logits(self.model, *inputs), inputs[2], mask, config, **objective)
        states, head = completion_states(self.head.body, *inputs), self._head()
        return linear_token_loss(
            states, tokens=inputs[2], mask=mask, config=config, lengths=lengths, skip_idle=self.skip_idle, **head,
            **objective,
        )  # fmt: skip

    @torch.no_grad()
    def logprobs(
        self, inputs: tuple[Tensor, Tensor, Tensor, Tensor], mask: Tensor, lengths: list[int] | None,
        temperature: Tensor | float, backend: str,
    ) -> Tensor:  # fmt: skip
        """Log-probs (N, L) of the completion tokens, 0 where mask is."""
        if self.head is None:
            logits = completion_logits(self.model, *inputs)
            return token_logprobs(logits, inputs[2], mask, temperature=temperature, backend=backend)[0]
        states, head = completion_states(self.head.body, *inputs), self._head()
        return linear_token_logprobs(
            states, tokens=inputs[2], mask=mask, lengths=lengths, temperature=temperature, backend=backend, **head
        )[0]

    def _head(self) -> dict[str, Any]:
        assert self.head is not None
        weight, bias = self.head.parameters()
        scale, softcap = self.head.logit_scale, self.head.softcap
        return {"weight": weight, "bias": bias, "logit_scale": scale, "softcap": softcap, **self.options}
