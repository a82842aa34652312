"""Importance weights of the trainer's policy over the sampler's, and what of them is out of bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import MDPGRPOConfig
from ...models.packing import PackedRow
from ...reference import Layout, kept_off_policy
from ...rollout.generate import Rollout
from ..batch import MicroBatch


def log_ratio(rollout: Rollout, own: Tensor | None, truncated: bool = False) -> Tensor:
    """(B, L) log π_old - log μ of every token.

    own: (B, L) log-probs of the trainer's policy at each row's temperature, which what truncation kept is taken off
    where it is known; None: those at temperature 1, untruncated, as `corrected` has them. truncated: whether own is
    over what truncation kept already.
    """
    if own is None:
        return rollout.policy_logprobs - rollout.sampling_logprobs
    if truncated:
        return own - rollout.sampling_logprobs
    # NaN of vLLM, which does not tell, and cuts nothing where this is asked.
    return own - rollout.log_kept.nan_to_num(0.0) - rollout.sampling_logprobs


def importance_weights(log_ratio: Tensor, mask: Tensor, method: MDPGRPOConfig) -> tuple[Tensor, Tensor]:
    """w = exp(log π_old - log μ) of each token, bounded, and whether it was out of bounds: (B, L) each.

    At sequence level it is the product over the completion's tokens, the same for all of them. mask: (B, L) bool, a
    completion's own tokens; what lies behind them has no say.
    """
    gap = log_ratio.masked_fill(~mask, 0)
    if method.importance_weight_level == "sequence":
        gap = gap.sum(1, keepdim=True).expand_as(gap)
    weight = gap.exp()
    floor, cap = method.importance_weight_floor, method.importance_weight_cap
    outside = ((weight < floor) | (weight > cap)) & mask
    if method.importance_weight_kind == "mask":
        return weight.masked_fill(outside, 0), outside
    return weight.clamp(min=floor, max=cap), outside


def share_outside(outside: Tensor, mask: Tensor, method: MDPGRPOConfig) -> float | None:
    """Share of the weights that were out of bounds: of tokens, or of completions at sequence level; None: of none.

    outside: of `importance_weights`; mask: (B, L) bool, tokens that count.
    """
    per_completion = method.importance_weight_level == "sequence"
    found = (outside & mask).any(1)[mask.any(1)] if per_completion else outside[mask]
    return found.float().mean().item() if found.numel() else None


def left_out(micro_batch: MicroBatch, logprobs: Tensor, old: Tensor | None, threshold: float) -> Tensor:
    """(): completions of a micro-batch that the off-policy threshold took out of the policy term, as the loss does.

    logprobs: of the loss, one per row; old: those it was given, None: the same.
    """
    base = micro_batch.objective.get("sampling_logprobs", old)
    if base is None:
        return torch.zeros((), dtype=torch.int64, device=logprobs.device)
    inputs, advantage = micro_batch.inputs, micro_batch.objective["advantage"]
    completion = inputs.completion if isinstance(inputs, PackedRow) else None
    layout = Layout(len(advantage), completion)
    keep = torch.ones_like(logprobs, dtype=torch.bool) if micro_batch.mask is None else micro_batch.mask
    kept = kept_off_policy(logprobs, base, keep, layout, layout.broadcast(advantage), threshold)
    return (layout.sum((keep & ~kept).long()) > 0).sum()
