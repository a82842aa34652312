"""The objective of every token, and its aggregation to one loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import MDPGRPOConfig
from . import losses
from .rows import Layout, entropy_quantile, token_logprobs

TOTALS = ("tokens", "kl", "entropy", "clip_low", "clip_high", "ratio_mean", "ratio_max", "kl_clamped")


@dataclass(frozen=True)
class TokenLoss:
    """loss: scalar with gradient. All else is detached: one value per token, (B, L) or (T,), but for the last two.

    At masked tokens logprobs, entropy and kl are 0, the ratio is 1 and no clip holds.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    kl: Tensor  # the estimate; with kl_gradient = unbiased times ρ
    ratio: Tensor  # ρ of the token; of its completion at sequence level and for gmpo
    clipped_low: Tensor
    clipped_high: Tensor
    completion_kl: Tensor  # (B,) mean KL estimate over each completion's tokens
    # (8,) in the order of TOTALS: token count, token means and shares, the largest ratio, clamped tokens
    totals: Tensor

    def total(self, name: str) -> Tensor:
        """A member of TOTALS as a scalar tensor, still on the device."""
        return self.totals[TOTALS.index(name)]


# ---- aggregation ----------------------------------------------------------------------------------------------------


def default_denominator(lengths: Tensor, aggregation: str, max_completion_length: int) -> Tensor:
    """What `aggregate` divides by when this batch is the whole batch: completions, tokens or B * max length.

    lengths: (B,) tokens that count of each completion. A completion without any counts in none of them.
    """
    completions = (lengths > 0).sum()
    if aggregation in ("grpo", "seq_mean_token_sum"):
        return completions
    if aggregation == "dr_grpo":
        return completions * max_completion_length
    return lengths.sum()


def token_shares(lengths: Tensor, layout: Layout, aggregation: str, denominator: Tensor | float) -> Tensor:
    """What each row's loss is multiplied by before the sum over all: one value per completion, as it broadcasts."""
    each = lengths if aggregation == "grpo" else torch.ones_like(lengths)
    return layout.broadcast(1 / (each.clamp(min=1) * torch.as_tensor(denominator, device=lengths.device).clamp(min=1)))


def aggregate(per_token: Tensor, mask: Tensor, layout: Layout, aggregation: str, denominator: Tensor | float) -> Tensor:
    """Sum of the tokens (`grpo`: of the completions' token means) over the denominator of the whole batch."""
    share = token_shares(layout.sum(mask), layout, aggregation, denominator)
    return layout.sum(per_token * mask * share).sum()


# ---- the objective of a token ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """-w·J - entropy_coef·H + β·KL of every row, and its parts; no share of an aggregation in it yet."""

    per_token: Tensor
    kl: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl_clamped: Tensor
    weight: Tensor  # w, what J is multiplied by, 0 where a gate is shut
    gate: Tensor  # bool: the entropy is not under its floor
    kl_ratio: Tensor  # ρ of the KL term


def kept_off_policy(
    logprobs: Tensor, sampling_logprobs: Tensor, keep: Tensor, layout: Layout, advantage: Tensor | float,
    threshold: float,
) -> Tensor:  # fmt: skip
    """Whether a row stays in the policy term: not where A < 0 and the completion's mean of ℓ_sampling - ℓ is above the
    threshold (off-policy sequence masking, DeepSeek-V3.2, Eq. 9)."""
    gap = (sampling_logprobs - logprobs.detach()).masked_fill(~keep, 0)
    drift = layout.mean(gap, keep.to(gap.dtype))
    return ~((torch.as_tensor(advantage, device=gap.device) < 0) & (drift > threshold))


def token_objective(
    logprobs: Tensor, kl_logprobs: Tensor, entropy: Tensor, keep: Tensor, layout: Layout, config: MDPGRPOConfig, *,
    advantage: Tensor | float, kl_beta: Tensor | float, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    sampling_logprobs: Tensor | None, importance_weight: Tensor | None, temperature: Tensor | float,
    epsilon_low: Tensor | float, epsilon_high: Tensor | float, delta: Tensor | float | None,
    entropy_coef: Tensor | float, entropy_floor: Tensor | float,
) -> Objective:  # fmt: skip
    """The objective as a function of ℓ, ℓ at the KL's τ, and the entropy; differentiable with respect to these.

    All of the rows' shape, or broadcasting to it; keep: bool. Rows that are not kept may hold anything but NaN in ℓ.
    """
    mask = keep.to(logprobs.dtype)

    def rows(x: Tensor) -> Tensor:
        return x.detach().to(mask.dtype).masked_fill(~keep, 0)

    # On-policy ρ is 1, also of an ℓ that is infinite or NaN.
    policy = logprobs.masked_fill(~logprobs.isfinite(), 0) if old_logprobs is None else logprobs
    old = policy.detach() if old_logprobs is None else rows(old_logprobs)
    weight = None if importance_weight is None else rows(importance_weight)
    bounds = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high}
    log_ratio = (policy - old).masked_fill(~keep, 0)
    kl_ratio = ratio = losses.importance_ratio(policy, old, mask, layout, config.importance_level)
    low = high = torch.zeros_like(keep)
    if config.loss in ("ppo_clip", "luspo"):
        objective, low, high = losses.clipped_objective(ratio, advantage, delta=delta, **bounds)
    elif config.loss == "cispo":
        _, low, high = losses.clipped_objective(ratio, advantage, delta=None, **bounds)
        objective = losses.cispo_weight(ratio, **bounds) * advantage * logprobs
    elif config.loss == "sapo":
        objective = losses.sapo_gate(ratio, advantage, config) * advantage
    elif config.loss == "gmpo":
        bounded, low, high = losses.gmpo_log_ratios(log_ratio, advantage, **bounds)
        ratio = losses.bounded_exp(layout.mean(bounded.masked_fill(~keep, 0), mask))
        objective = ratio * advantage
    else:
        log_weight = losses.vespo_log_weight(log_ratio, weight, mask, layout)
        objective, weight = losses.vespo_weight(log_weight, advantage, config) * advantage * logprobs, None

    # What the policy term takes part with: the rows' own weights, and the gates.
    factor = torch.ones_like(mask)
    if weight is not None:
        factor = factor * weight
    if config.rescale_per_row:
        factor = factor * temperature
    # An entropy that rounds below 0 is not under a floor of 0.
    gate = ~(entropy.detach().clamp(min=0) < entropy_floor)
    if config.off_policy_threshold is not None and (sampling_logprobs is not None or old_logprobs is not None):
        base = old if sampling_logprobs is None else rows(sampling_logprobs)
        factor = factor * kept_off_policy(logprobs, base, keep, layout, advantage, config.off_policy_threshold)
    factor = factor * gate
    # In this order: a number times a bool would be float32.
    per_token = -(factor * objective) - entropy_coef * (gate * entropy)
    kl, over = torch.zeros_like(mask), torch.zeros_like(keep)
    if ref_logprobs is not None:
        kl, over = losses.kl_penalty(kl_logprobs, rows(ref_logprobs), config.kl_estimator)
        if config.kl_gradient == "unbiased":
            kl = kl * kl_ratio
        per_token = per_token + kl_beta * kl
    # A token that the policy cannot have drawn, or that a NaN is about: no term of it, however bounded, hides that.
    drawn = logprobs > -torch.inf
    per_token = torch.where(drawn, per_token, logprobs * torch.where(drawn, 0.0, torch.nan))
    return Objective(
        per_token=per_token.masked_fill(~keep, 0),
        kl=kl.detach() * mask,
        ratio=ratio.detach().expand_as(mask).masked_fill(~keep, 1),
        clipped_low=low.expand_as(mask) & keep,
        clipped_high=high.expand_as(mask) & keep,
        kl_clamped=over & keep,
        weight=factor,
        gate=gate & keep,
        kl_ratio=kl_ratio.detach().expand_as(mask),
    )


def batch_totals(
    mask: Tensor, layout: Layout, entropy: Tensor, kl: Tensor, ratio: Tensor, clipped_low: Tensor, clipped_high: Tensor,
    kl_clamped: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B,) mean KL of each completion, and the (8,) TOTALS. mask, entropy: rows, 0 where a row is not kept."""
    lengths = layout.sum(mask)
    n = lengths.sum()
    sums = torch.stack([kl.sum(), entropy.sum(), clipped_low.sum(), clipped_high.sum(), (ratio * mask).sum()])
    top = (ratio * mask).amax() if mask.numel() else n
    totals = torch.cat([n[None], sums / n.clamp(min=1), top[None], kl_clamped.sum()[None]])
    return layout.sum(kl) / lengths.clamp(min=1), totals


# ---- the loss -------------------------------------------------------------------------------------------------------


def token_loss(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, config: MDPGRPOConfig, *, advantage: Tensor | float,
    kl_beta: Tensor | float, max_completion_length: int, completion: Tensor | None = None,
    num_completions: int | None = None, old_logprobs: Tensor | None = None, ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None, importance_weight: Tensor | None = None,
    temperature: Tensor | float = 1.0, epsilon_low: Tensor | float | None = None,
    epsilon_high: Tensor | float | None = None, delta: Tensor | float | None = None,
    entropy_coef: Tensor | float | None = None, entropy_floor: Tensor | float | None = None,
    logit_floor: Tensor | None = None, softcap: float | None = None, denominator: Tensor | float | None = None,
) -> TokenLoss:  # fmt: skip
    """-w·J - entropy_coef·H + β·KL of every token, aggregated. See `ops.token_loss`, the public door, for shapes."""
    keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
    mask = keep.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    layout = Layout(tokens.shape[0] if num_completions is None else num_completions, completion)
    # The reference's log-probs are of all tokens.
    own_kl = isinstance(temperature, Tensor) or temperature != config.kl_temperature or logit_floor is not None
    knobs = {
        "advantage": advantage,
        "kl_beta": kl_beta,
        "temperature": temperature,
        "epsilon_low": config.epsilon_low if epsilon_low is None else epsilon_low,
        "epsilon_high": config.epsilon_high if epsilon_high is None else epsilon_high,
        "delta": config.delta or 0.0 if delta is None else delta,
        "entropy_coef": config.entropy_coef if entropy_coef is None else entropy_coef,
        "entropy_floor": 0.0 if entropy_floor is None else entropy_floor,
    }
    given = {name: layout.knob(x, mask.dtype) for name, x in knobs.items()}
    # A masked position may hold any number, NaN included: it is taken out before it meets arithmetic.
    logits = logits.masked_fill(~keep[..., None], 0)
    has_bonus = isinstance(entropy_coef, Tensor) or bool(knobs["entropy_coef"])
    logprobs, entropy = token_logprobs(logits, tokens, given["temperature"], softcap, has_bonus, logit_floor)
    logprobs = kl_logprobs = logprobs.masked_fill(~keep, 0)
    if ref_logprobs is not None and own_kl:
        kl_logprobs = token_logprobs(logits, tokens, config.kl_temperature, softcap)[0].masked_fill(~keep, 0)
    if config.top_entropy_quantile < 1:
        given["entropy_floor"] = entropy_quantile(entropy, keep, config.top_entropy_quantile)
    parts = token_objective(
        logprobs, kl_logprobs, entropy, keep, layout, config, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs, importance_weight=importance_weight, **given,
    )  # fmt: skip
    if denominator is None:
        denominator = default_denominator(layout.sum(mask), config.aggregation, max_completion_length)
    loss = aggregate(parts.per_token, mask, layout, config.aggregation, denominator)
    with torch.no_grad():
        entropy = entropy.detach().masked_fill(~keep, 0)
        completion_kl, totals = batch_totals(
            mask, layout, entropy, parts.kl, parts.ratio, parts.clipped_low, parts.clipped_high, parts.kl_clamped
        )
    return TokenLoss(
        loss, logprobs.detach(), entropy, parts.kl, parts.ratio, parts.clipped_low, parts.clipped_high, completion_kl,
        totals,
    )  # fmt: skip
