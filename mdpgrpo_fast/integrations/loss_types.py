"""TRL's `loss_type`, which is Liger's too, as a policy term and an aggregation of `linear_token_loss`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import MDPGRPOConfig

# loss_type: (loss, aggregation).
LOSS_TYPES = {
    "grpo": ("ppo_clip", "grpo"),
    "bnpo": ("ppo_clip", "bnpo"),
    "dr_grpo": ("ppo_clip", "dr_grpo"),
    "dapo": ("ppo_clip", "dapo"),
    "cispo": ("cispo", "dapo"),
    "sapo": ("sapo", "grpo"),
    "luspo": ("ppo_clip", "seq_mean_token_sum"),
    "vespo": ("vespo", "dapo"),
}


class LossType(NamedTuple):
    """What `linear_token_loss` and `token_loss` take: a config, and the knobs that go beside it."""

    config: MDPGRPOConfig
    knobs: dict[str, Any]


@functools.lru_cache  # its checks take a millisecond
def objective_of(
    loss_type: str,
    *,
    importance_sampling_level: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = False,
    temperature: float = 1.0,
    off_policy_mask_threshold: float | None = None,
    **options: Any,
) -> LossType:
    """The objective of TRL's arguments of these names; the denominator is that of `denominator`.

    beta: whether there is a KL term is all that counts here. temperature: of the log-probs, those of the KL too.
    options: more members of MDPGRPOConfig, as sapo_temperature_pos and vespo_k_neg, whose names TRL shares.

    Raises: ValueError for a loss_type or level that TRL does not have, or one that is not TRL's meaning of the other.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}; got {loss_type!r}")
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be token or sequence; got {importance_sampling_level!r}")
    loss, aggregation = LOSS_TYPES[loss_type]
    level = importance_sampling_level
    if loss == "vespo" and level == "sequence":
        if beta and use_bias_correction_kl:
            raise ValueError(
                "importance_sampling_level must be token for loss_type = vespo with use_bias_correction_kl: its weight "
                "is of the sequence by itself; got 'sequence'"
            )
        level = "token"  # which vespo itself does not ask for
    knobs: dict[str, Any] = {}
    if loss == "ppo_clip":
        knobs = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "delta": delta or 0.0}
    elif loss == "cispo":
        # Its one bound is that of the weight itself.
        knobs = {"epsilon_low": 1.0, "epsilon_high": epsilon_high - 1}
    members: dict[str, Any] = {
        "loss": loss,
        "aggregation": aggregation,
        "importance_level": level,
        "kl_temperature": temperature,
        "kl_gradient": "unbiased" if use_bias_correction_kl else "plain",
        "off_policy_threshold": off_policy_mask_threshold,
    }
    config = MDPGRPOConfig(**members, **options)
    return LossType(config, knobs)


def denominator(
    loss_type: str, mask: Tensor, max_completion_length: int | None, num_items_in_batch: Tensor | float | None = None
) -> Tensor:
    """(): what TRL divides the sum of a batch by; completions without tokens count.

    mask: (B, L) of the tokens that count. num_items_in_batch: tokens of the whole batch that dapo, cispo and vespo are
    normalised by; default: those of the mask.
    """
    aggregation, size = LOSS_TYPES[loss_type][1], len(mask)
    if aggregation == "bnpo" or (aggregation == "dapo" and num_items_in_batch is None):
        return (mask != 0).sum().clamp(min=1)
    if aggregation == "dapo":
        return torch.as_tensor(num_items_in_batch, device=mask.device).clamp(min=1)
    if aggregation == "dr_grpo":
        size *= max_completion_length or mask.shape[1]
    return torch.full((), size, device=mask.device)
