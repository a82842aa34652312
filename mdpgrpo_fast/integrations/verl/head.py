"""A model whose forward pass gives verl the log-probs and entropy of the tokens in place of logits."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...config import ConfigError
from ...models.heads import UnsupportedHead, body_of, declared_head, effective_weight, find_head
from ...ops.linear.losses import linear_token_logprobs


def install(model: nn.Module) -> None:
    """Gives the model's forward pass verl's argument `temperature`: with it the pass returns verl's
    CausalLMOutputForPPO, log_probs and entropy (B, S) in float32, of the token after each position (`shift_labels`, or
    the next of `input_ids`). In place; other calls are as before. Logits are never built as a whole.

    Raises: ConfigError for a model whose logits are not those of a linear head.
    """
    lm: Any = model
    try:
        if lm.get_output_embeddings().weight.is_meta:  # on all ranks but the first, which does look
            softcap, scale = declared_head(lm.config.get_text_config())
        else:
            with _eager_attention(lm.config):
                found = find_head(lm)
            softcap, scale = found.softcap, found.logit_scale
    except UnsupportedHead as e:
        raise ConfigError(f"impl_backend = mdpgrpo_fast cannot be had for this model: {e}") from None
    before = lm.forward

    @functools.wraps(type(lm).forward)
    def forward(
        self: Any, *args: Any, temperature: float | Tensor | None = None, shift_labels: Tensor | None = None,
        return_dict: bool | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        from verl.models.transformers.dense_common import CausalLMOutputForPPO

        if temperature is None:
            more: dict[str, Any] = {} if shift_labels is None else {"shift_labels": shift_labels}
            more |= {} if return_dict is None else {"return_dict": return_dict}
            return before(*args, **more, **kwargs)
        # peft hands on what it was not given.
        kwargs = {name: value for name, value in kwargs.items() if value is not None} | {"use_cache": False}
        labels = shift_labels if shift_labels is not None else torch.roll(kwargs["input_ids"], -1, dims=-1)
        # Looked up at each call: FSDP and peft replace them.
        hidden = body_of(self)(*args, **kwargs).last_hidden_state  # type: ignore[misc]
        weight, bias = effective_weight(self.get_output_embeddings())
        log_probs, entropy = linear_token_logprobs(
            hidden, weight, labels, bias=bias, logit_scale=scale, softcap=softcap, temperature=temperature
        )
        return CausalLMOutputForPPO(log_probs=log_probs, entropy=entropy)

    lm.forward = types.MethodType(forward, lm)


@contextmanager
def _eager_attention(config: Any) -> Iterator[None]:
    """The model is on a CPU when its head is looked for, where flash-attn, its default, cannot run."""
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before
