"""The policy: a causal language model over padded or packed completions, and its objective, in one forward pass."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import Backend, ConfigError, MDPGRPOConfig, TrainConfig
from ..log import say_once
from ..ops.linear.losses import linear_token_logprobs, linear_token_loss
from ..ops.logprobs import token_logprobs
from ..ops.token_loss import token_loss
from ..reference import TokenLoss
from .heads import LinearHead, UnsupportedHead, causal_lm, find_head
from .packing import PackedRow, Packing, Unpackable

T = TypeVar("T")


def _inputs(
    module: Any, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor, **more: Any
) -> dict[str, Any]:
    """Arguments of a forward pass over prompts and completions, of those that the module takes."""
    attention = torch.cat([prompt_mask, mask], 1).long()
    # Left padding shifts positions unless they are told (trl#3722); a model without position ids derives its own.
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    accepted = inspect.signature(causal_lm(getattr(module, "module", module)).forward).parameters
    options = {"position_ids": positions, **more}
    return {
        "input_ids": torch.cat([prompt_ids, tokens], 1),
        "attention_mask": attention,
        "use_cache": False,
        **{k: v for k, v in options.items() if k in accepted},
    }


def completion_logits(model: Any, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits that predict the completion tokens, the model's own soft-cap applied: (B, L, V).

    prompt_ids, prompt_mask (B, S) left-padded; tokens, mask (B, L) right-padded.
    """
    width = tokens.shape[1]
    out = model(**_inputs(model, prompt_ids, prompt_mask, tokens, mask, logits_to_keep=width + 1))
    logits: Tensor = out.logits
    return logits[:, -(width + 1) : -1]


def completion_states(body: Any, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Hidden states that predict the completion tokens: (B, L, D), a view. Arguments as of `completion_logits`."""
    states: Tensor = body(**_inputs(body, prompt_ids, prompt_mask, tokens, mask)).last_hidden_state
    return states[:, -(tokens.shape[1] + 1) : -1]


class Policy(nn.Module):
    """A causal language model and its objective in one forward pass, so that wrappers (DDP, FSDP, autocast) see both.

    The objective comes from the hidden states and the head, which is never called; from logits where the head is no
    linear layer, which is said once.

    model: of transformers. lm_head: "auto", "fused" (raises ConfigError where "auto" would take logits) or "logits".
    workspace_bytes, fp32_logits: as of `linear_token_loss`. skip_idle: as there, but off by default, as the trainer's
    knob is, so that statistics are of all completions. packing: "auto" runs over packed groups too
    where that is exact, and says once where it is not; "on" raises ConfigError there; "off" does not try.
    device, dtype: where and in what passes will run, if not as the model is.
    """

    def __init__(
        self, model: Any, lm_head: str = "auto", workspace_bytes: int | None = None, fp32_logits: bool = False,
        skip_idle: bool = TrainConfig.skip_idle, packing: str = "off", device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        # What FSDP wraps.
        self._no_split_modules = getattr(causal_lm(model), "_no_split_modules", None)
        self.options = {"workspace_bytes": workspace_bytes, "fp32_logits": fp32_logits}
        self.skip_idle = skip_idle
        self.head: LinearHead | None = None
        if lm_head != "logits":
            try:
                self.head = find_head(model)
            except UnsupportedHead as e:
                if lm_head == "fused":
                    raise ConfigError(f"lm_head = fused cannot be had for this model: {e}") from None
                say_once(logging.WARNING, f"the logits are built as a whole: {e}")
        self.packing: Packing | None = None
        if packing != "off":
            try:
                self.packing = Packing(model, device or model.device, dtype or model.dtype)
            except Unpackable as e:
                if packing == "on":
                    raise ConfigError(f"packing = on cannot be had for this model: {e}") from None
                say_once(logging.WARNING, f"prompts are not shared inside a group: {e}")

    def forward(
        self, inputs: PackedRow | tuple[Tensor, Tensor, Tensor, Tensor], mask: Tensor | None, config: MDPGRPOConfig,
        lengths: list[int] | None, **objective: Any,
    ) -> TokenLoss:  # fmt: skip
        """inputs: packed groups, or those of `completion_logits`; mask: rows that count; the rest as of
        `linear_token_loss`."""
        if isinstance(inputs, PackedRow):
            objective |= {"completion": inputs.completion, "num_completions": len(inputs.rows)}
        rows, tokens = self._rows(inputs)
        if self.head is None:
            return token_loss(rows, tokens, mask, config, **objective)
        return linear_token_loss(
            rows, tokens=tokens, mask=mask, config=config, lengths=lengths, skip_idle=self._skips_idle(config),
            **self._head(), **objective,
        )  # fmt: skip

    def _skips_idle(self, config: MDPGRPOConfig) -> bool:
        """With an entropy bonus, also one that does not act at present, and a quantile of entropies all rows count."""
        return self.skip_idle and not config.has_entropy_bonus and config.top_entropy_quantile == 1

    @torch.no_grad()
    def logprobs(
        self, inputs: PackedRow | tuple[Tensor, Tensor, Tensor, Tensor], mask: Tensor | None, lengths: list[int] | None,
        temperature: Tensor | float, backend: Backend, logit_floor: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Log-probs of the completion tokens, (B, L) or packed (R,); 0 where mask is."""
        rows, tokens = self._rows(inputs)
        more: dict[str, Any] = {"temperature": temperature, "backend": backend, "logit_floor": logit_floor}
        if isinstance(inputs, PackedRow):
            more |= {"completion": inputs.completion, "num_completions": len(inputs.rows)}
        if self.head is None:
            return token_logprobs(rows, tokens, mask, **more)[0]
        return linear_token_logprobs(rows, tokens=tokens, mask=mask, lengths=lengths, **more, **self._head())[0]

    def call(self, function: Callable[[], T]) -> T:
        """function(), which runs the model: for wrappers that have to know (FSDP)."""
        return function()

    def _rows(self, inputs: PackedRow | tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states, or logits where there is no head to take them; and the tokens that they predict."""
        if isinstance(inputs, PackedRow):
            assert self.packing is not None, "packed inputs need packing"
            arguments = self.packing.arguments(inputs)
            if self.head is None:
                return self.model(**arguments, logits_to_keep=inputs.predictors).logits[0], inputs.tokens
            return self.head.body(**arguments).last_hidden_state[0, inputs.predictors], inputs.tokens
        if self.head is None:
            return completion_logits(self.model, *inputs), inputs[2]
        return completion_states(self.head.body, *inputs), inputs[2]

    def _head(self) -> dict[str, Any]:
        assert self.head is not None
        weight, bias = self.head.parameters()
        scale, softcap = self.head.logit_scale, self.head.softcap
        return {"weight": weight, "bias": bias, "logit_scale": scale, "softcap": softcap, **self.options}
