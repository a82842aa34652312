"""What TRL logs of a loss, from ours: the same names and numbers, in one call over the ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...reference import TokenLoss

_CLIPS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def log_loss(trainer: Any, mode: str, loss: Tensor, out: TokenLoss, mask: Tensor, inputs: dict[str, Any]) -> float:
    """Returns the sum of the ranks' losses. out: its rows as (B, L); mask: (B, L) of the rows that count."""
    t, keep = trainer, mask != 0
    advantages = inputs["advantages"]
    advantages = advantages if advantages.ndim == 2 else advantages[:, None]
    by_sequence = t.importance_sampling_level == "sequence" and advantages.shape[1] == 1
    known = keep & (advantages != 0) if t.skips_idle else keep  # whose entropy it is
    shares: dict[str, Tensor] = {"entropy": out.entropy.masked_fill(~known, 0)}
    if t.beta != 0:
        shares["kl"] = out.kl
    ratio = out.ratio if t.args.delta is None else out.ratio.clamp(max=t.args.delta)
    low, high = (ratio < 1 - t.epsilon_low) & (advantages < 0), (ratio > 1 + t.epsilon_high) & (advantages > 0)
    clips: dict[str, Tensor] = {}
    if t.loss_type in _CLIPS:
        clips = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
    elif t.loss_type == "cispo":
        clips = {"cispo_clip_ratio": (out.ratio > t.epsilon_high) & (advantages > 0)}
    per_completion: dict[str, Tensor] = {}
    for name, x in clips.items():
        if by_sequence:
            per_completion[name] = (x & keep).any(1).float()
        else:
            shares[name] = x.float()
    if t.loss_type == "vespo":
        old = inputs.get("old_per_token_logps")
        log_ratio = torch.zeros_like(out.logprobs) if old is None else out.logprobs - old
        a = t.args
        weights = (a.vespo_k_pos, a.vespo_lambda_pos, a.vespo_k_neg, a.vespo_lambda_neg)
        phi = t.get_gamma_weights(advantages, log_ratio, mask, inputs.get("importance_sampling_ratio"), *weights)
        (shares if phi.shape[1] > 1 else per_completion)["vespo/phi_seq_mean"] = phi
    # Sums over tokens and over completions, how many they are of, and the extremes: of all ranks in one call.
    values = [x.masked_fill(~keep, 0).sum() for x in shares.values()] + [x.sum() for x in per_completion.values()]
    values += [known.sum(), keep.sum(), torch.full((), len(mask), device=mask.device), loss.detach()]
    values += [_of_completions(low, keep, by_sequence, "min"), _of_completions(high, keep, by_sequence, "max")]
    *totals, least, most = zip(
        *t.accelerator.gather(torch.stack([x.float() for x in values])[None]).tolist(), strict=True
    )
    *found, with_entropy, tokens, completions, total_loss = map(sum, totals)
    counts = [with_entropy] + [tokens] * (len(shares) - 1) + [completions] * len(per_completion)
    for name, total, count in zip([*shares, *per_completion], found, counts, strict=True):
        t._metrics[mode][name].append(total / max(count, 1))
    if t.loss_type in _CLIPS:
        for name, ends, best in (("clip_ratio/low_min", least, min), ("clip_ratio/high_max", most, max)):
            t._metrics[mode][name].append(best((x for x in ends if not math.isnan(x)), default=math.nan))
    return float(total_loss)


def _of_completions(clipped: Tensor, keep: Tensor, by_sequence: bool, which: str) -> Tensor:
    """(): the least or largest share of a completion's tokens that are clipped; NaN where none has tokens."""
    clipped = (clipped & keep).float()
    each = clipped.amax(1) if by_sequence else clipped.sum(1) / keep.sum(1)
    end = math.inf if which == "min" else -math.inf
    found = each.nan_to_num(nan=end)
    found = found.amin() if which == "min" else found.amax()
    return torch.where(found.isinf(), torch.nan, found)
