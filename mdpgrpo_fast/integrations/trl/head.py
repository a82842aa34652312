"""A model whose forward pass hands its hidden states and head to a function, inside whatever wraps the model."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from ...models.heads import body_of, causal_lm, declared_head, effective_weight, find_head

# hidden states (B, S, D) and the head's arguments of `linear_token_loss` to per-token outputs.
Score = Callable[[Tensor, dict[str, Any]], FusedCausalLMOutput]


@dataclass(frozen=True)
class HeadShape:
    """What a model does to the output of its head. in_float32: the head runs in float32 outside of autocast."""

    softcap: float | None
    logit_scale: float
    in_float32: bool = False


def shape_of(model: Any, in_float32: bool = False) -> HeadShape:
    """Of a causal language model that can run. Raises: UnsupportedHead where its logits are not those of its head."""
    found = find_head(causal_lm(model))
    return HeadShape(found.softcap, found.logit_scale, in_float32)


def declared_shape(model: Any, in_float32: bool = False) -> HeadShape:
    """As `shape_of` of a model that cannot run yet: what its config says, untried."""
    config = causal_lm(model).config.get_text_config()
    softcap, scale = declared_head(config)
    return HeadShape(softcap, scale, in_float32)


def install(model: Any, shape: HeadShape) -> None:
    """Gives the forward pass of a model an argument `fused_lm_head` that may be a `Score`: it is then called in place
    of the head, and what it returns is what the pass returns. In place; all other calls are as before.

    A function is opaque to DDP, FSDP and DeepSpeed, which would round the tensors of other arguments.
    """
    lm = causal_lm(model)
    before, config = lm.forward, lm.config.get_text_config()

    @functools.wraps(type(lm).forward)  # whose signature `generate` looks at
    def forward(self: Any, *args: Any, fused_lm_head: bool | Score = False, labels: Any = None, **kwargs: Any) -> Any:
        if not callable(fused_lm_head):
            more = {"fused_lm_head": True} if fused_lm_head else {}
            more |= {} if labels is None else {"labels": labels}
            return before(*args, **more, **kwargs)
        kwargs["use_cache"] = False
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        # Looked up at each call: FSDP and peft replace them.
        out = body_of(self)(*args, **kwargs)  # type: ignore[misc]
        weight, bias = effective_weight(self.get_output_embeddings())
        hidden, context = out.last_hidden_state.to(weight.device), nullcontext()
        if shape.in_float32:
            hidden, context = hidden.float(), torch.autocast(hidden.device.type, enabled=False)  # type: ignore[assignment]
        head = {"weight": weight, "bias": bias, "logit_scale": shape.logit_scale, "softcap": shape.softcap}
        with context:
            scored = fused_lm_head(hidden, head)
        if kwargs.get("output_router_logits"):
            scored.aux_loss = _load_balancing_loss(config, out.router_logits, kwargs.get("attention_mask"))
        return scored

    lm.forward = types.MethodType(forward, lm)


class _Unrounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, returned: Tensor, found: Tensor) -> Tensor:
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def unrounded(returned: Tensor, found: Tensor) -> Tensor:
    """What a `Score` found, with the gradient of what the model's pass returned of it: FSDP2 rounds that to 16 bits in
    mixed precision, and its weights are whole in the backward pass only of what went through the model."""
    out: Tensor = _Unrounded.apply(returned, found.detach())
    return out


def _load_balancing_loss(config: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, attention_mask)  # type: ignore[return-value]
