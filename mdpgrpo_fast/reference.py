"""The whole objective in plain PyTorch, one function per equation: the truth every fast path is proven against.

P prompts, G completions per prompt, B = P * G, L completion tokens, V vocabulary. Arithmetic is float32, or float64
for float64 input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import MDPGRPOConfig

# exp(20) = 4.9e8: far above any useful penalty, far below float32 overflow.
KL_EXPONENT_MAX = 20.0
# exp(80) = 5.5e34 is finite in float32: the zero gradient of a clipped ratio must not meet an infinite one.
RATIO_EXPONENT_MAX = 80.0


@dataclass(frozen=True)
class Advantages:
    """Group statistics and what follows from them. mean, std: (P,); the others (P, G)."""

    mean: Tensor
    std: Tensor
    z: Tensor
    delta: Tensor
    advantage: Tensor
    kl_beta: Tensor


TOTALS = ("tokens", "kl", "entropy", "clip_low", "clip_high", "ratio_mean", "ratio_max", "kl_clamped")


@dataclass(frozen=True)
class TokenLoss:
    """loss: scalar with gradient. All else is detached: one value per token, (B, L) or (T,), but for the last two.

    At masked tokens logprobs, entropy and kl are 0, the ratio is 1 and no clip holds.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    kl: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    completion_kl: Tensor  # (B,) mean KL estimate over each completion's tokens
    # (8,) in the order of TOTALS: token count, token means and shares, the largest ratio, clamped tokens
    totals: Tensor

    def total(self, name: str) -> Tensor:
        """A member of TOTALS as a scalar tensor, still on the device."""
        return self.totals[TOTALS.index(name)]


@dataclass(frozen=True)
class Layout:
    """Which completion a row belongs to: rows (B, L) of B completions, or rows (T,) with a map to them."""

    num_completions: int  # B
    completion: Tensor | None = None  # (T,) integers

    def sum(self, x: Tensor) -> Tensor:
        """Sum over each completion's rows: (B,)."""
        if self.completion is None:
            return x.sum(1)
        return x.new_zeros(self.num_completions).index_add(0, self.completion, x)

    def broadcast(self, x: Tensor) -> Tensor:
        """One value per completion (B,), as it broadcasts over the rows."""
        return x[:, None] if self.completion is None else x[self.completion]

    def knob(self, x: Tensor | float, dtype: torch.dtype) -> Tensor | float:
        """A number, one value per completion (B,) or one per row, as it broadcasts over the rows; detached."""
        if not isinstance(x, Tensor):
            return x
        x = x.detach().to(dtype)
        return self.broadcast(x) if tuple(x.shape) == (self.num_completions,) else x


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---- advantages -----------------------------------------------------------------------------------------------------


def group_statistics(rewards: Tensor, valid: Tensor, group_std: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation over the valid completions of each group, and whether they are all equal: (P,) each.

    Rewards a few units in the last place apart are equal. A constant group has its own reward as mean and a deviation
    of exactly 0, whatever rounding a sum would leave.
    """
    n = valid.sum(1)
    top = rewards.masked_fill(~valid, -torch.inf).amax(1)
    bottom = rewards.masked_fill(~valid, torch.inf).amin(1)
    noise = 4 * torch.finfo(rewards.dtype).eps * torch.maximum(top.abs(), bottom.abs())
    constant = (top - bottom <= noise) | (n == 0)
    kept = rewards.masked_fill(~valid, 0)
    mean = torch.where(constant & (n > 0), top, kept.sum(1) / n.clamp(min=1))
    divisor = n if group_std == "population" else n - 1
    square = ((kept - mean[:, None]) * valid).square().sum(1)
    std = torch.where(constant, 0, (square / divisor.clamp(min=1)).sqrt())
    return mean, std, constant


def relative_anchor(rewards: Tensor, mean: Tensor, std: Tensor, constant: Tensor, group_std: str) -> Tensor:
    """z = (r - μ) / max(σ, 1e-8), or TRL's (r - μ) / (s + 1e-4); exactly 0 in a constant group. (P, G)"""
    scale = std.clamp(min=1e-8) if group_std == "population" else std + 1e-4
    return torch.where(constant[:, None], 0, (rewards - mean[:, None]) / scale[:, None])


def goal_anchor(
    rewards: Tensor, mean: Tensor, num_constraints: Tensor, goal_mean: str, goal_std: str,
    running: tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """δ = (r - m) / s (paper Eq. 4; s = sqrt(G/(4K)) as released, or the binomial sqrt(1/(4K))); running: m and s for
    the choices of that name, the median and the standard deviation of rewards seen before. (P, G)"""
    half, median, deviation = (torch.full_like(mean, x) for x in (0.5, *(running or (torch.nan, torch.nan))))
    m = {"half": half, "max_half_mean": torch.maximum(half, mean), "mean": mean, "running": median}[goal_mean]
    size = rewards.shape[1] if goal_std == "released" else 1
    s = deviation if goal_std == "running" else (size / (4 * num_constraints.to(rewards.dtype))).sqrt()
    return (rewards - m[:, None]) / s[:, None].clamp(min=1e-8)


def prospect_shape(v: Tensor, beta: float, gain: float, loss: float) -> Tensor:
    """ψ(v) = λ₊ tanh(βv) for v >= 0, λ₋ tanh(βv) below (Kahneman and Tversky's loss aversion where λ₋ > λ₊)."""
    t = torch.tanh(beta * v)
    return torch.where(v >= 0, gain * t, loss * t)


def kl_coefficient(advantage: Tensor, beta_pos: float, beta_neg: float) -> Tensor:
    """β₊ where A >= 0, zero included; β₋ where A < 0."""
    return torch.full_like(advantage, beta_pos).masked_fill(advantage < 0, beta_neg)


def advantages(
    rewards: Tensor, num_constraints: Tensor, config: MDPGRPOConfig, valid: Tensor | None = None,
    running: tuple[float, float] | None = None,
) -> Advantages:  # fmt: skip
    """A = (1 - α) ψ(z) + α ψ(δ) and the KL coefficient of every completion.

    rewards (P, G) float; num_constraints (P,); valid (P, G) bool: completions whose reward counts (default all). The
    others get z = δ = A = 0 and take no part in the group's statistics. running: as of `goal_anchor`.
    """
    rewards = _float(rewards)
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    mean, std, constant = group_statistics(rewards, valid, config.group_std)
    # Else the rounding between equal rewards would decide the sign of A, and with it the KL coefficient.
    rewards = torch.where(constant[:, None], mean[:, None], rewards)
    z = relative_anchor(rewards, mean, std, constant, config.group_std).masked_fill(~valid, 0)
    delta = goal_anchor(rewards, mean, num_constraints, config.goal_mean, config.goal_std, running)
    delta = delta.masked_fill(~valid, 0)

    def shape(v: Tensor, on: bool) -> Tensor:
        return prospect_shape(v, config.prospect_beta, config.prospect_gain, config.prospect_loss) if on else v

    goal = shape(delta, config.prospect and config.prospect_on_goal)
    advantage = (1 - config.alpha) * shape(z, config.prospect) + config.alpha * goal
    return Advantages(mean, std, z, delta, advantage, kl_coefficient(advantage, *config.betas))


# ---- token objective ------------------------------------------------------------------------------------------------


def scaled_logits(logits: Tensor, temperature: Tensor | float, softcap: float | None) -> Tensor:
    """Soft-cap, then division by the temperature: a number, or a tensor that broadcasts over the rows (..., V)."""
    x = _float(logits)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if isinstance(temperature, Tensor):
        return x / temperature.to(x.dtype)[..., None]
    return x if temperature == 1 else x / temperature


def token_logprobs(
    logits: Tensor, tokens: Tensor, temperature: Tensor | float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """ℓ = log softmax(x/τ)[token] and the detached entropy of each row's distribution.

    logits (..., V), tokens (...); temperature: a number, or a tensor that broadcasts over the rows.
    """
    x = scaled_logits(logits, temperature, softcap)
    lse = x.logsumexp(-1)
    target = x.gather(-1, tokens[..., None].long()).squeeze(-1)
    with torch.no_grad():
        p = (x - lse[..., None]).exp()
        # p * x with x = -inf is 0 in the limit, NaN in arithmetic.
        entropy = lse - torch.where(p > 0, p * x, 0).sum(-1)
    return target - lse, entropy


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, layout: Layout, level: str) -> Tensor:
    """ρ = exp(ℓ - ℓ_old) per token, or exp of its completion mean at sequence level (GSPO); broadcasts over rows."""
    exponent = (logprobs - old_logprobs).masked_fill(mask == 0, 0)
    if level == "sequence":
        exponent = layout.broadcast(layout.sum(exponent) / layout.sum(mask).clamp(min=1))
    return exponent.clamp(max=RATIO_EXPONENT_MAX).exp()


def _cap(delta: Tensor | float | None, ratio: Tensor) -> Tensor:
    """delta as it broadcasts over the rows; infinity where it is 0, or None."""
    cap = torch.as_tensor(0 if delta is None else delta, dtype=ratio.dtype, device=ratio.device)
    return cap.masked_fill(cap <= 0, torch.inf)


def clipped_objective(
    ratio: Tensor, advantage: Tensor | float, epsilon_low: Tensor | float, epsilon_high: Tensor | float,
    delta: Tensor | float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """J = min(ρA, clip(ρ)A), ρ capped at delta first (0: not); and where the lower or the upper clip holds."""
    low_bound, high_bound = (
        torch.as_tensor(x, dtype=ratio.dtype, device=ratio.device) for x in (1 - epsilon_low, 1 + epsilon_high)
    )
    # Sequence level has one ratio per completion, but bounds may be per row.
    cap = _cap(delta, ratio)
    ratio = ratio.expand(torch.broadcast_shapes(ratio.shape, low_bound.shape, high_bound.shape, cap.shape))
    clipped = ratio.clamp(low_bound, high_bound) * advantage
    free = ratio.clamp(max=cap) * advantage
    advantage = torch.as_tensor(advantage)
    low = (ratio < low_bound) & (advantage < 0)
    high = (ratio > high_bound) & (advantage > 0)
    return torch.where(clipped < free, clipped, free), low, high


def clipped_objective_slope(
    ratio: Tensor, advantage: Tensor, epsilon_low: Tensor | float, epsilon_high: Tensor | float,
    delta: Tensor | float | None,
) -> Tensor:  # fmt: skip
    """dJ/dρ of `clipped_objective`: that of the unclipped branch where both are equal."""
    low, high = (
        torch.as_tensor(x, dtype=ratio.dtype, device=ratio.device) for x in (1 - epsilon_low, 1 + epsilon_high)
    )
    inside, cap = ratio.clamp(low, high), _cap(delta, ratio)
    take = inside * advantage < ratio.clamp(max=cap) * advantage
    return torch.where(take, torch.where(inside == ratio, advantage, 0), torch.where(ratio > cap, 0, advantage))


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """k1 = ℓ - ℓ_ref, k2 = (ℓ - ℓ_ref)²/2, k3 = exp(ℓ_ref - ℓ) - (ℓ_ref - ℓ) - 1 (Schulman, "Approximating KL").

    Second: where k3's ℓ_ref - ℓ was clamped at KL_EXPONENT_MAX; its gradient is 0 there.
    """
    d = ref_logprobs - logprobs
    if estimator == "k1":
        return -d, torch.zeros_like(d, dtype=torch.bool)
    if estimator == "k2":
        return d.square() / 2, torch.zeros_like(d, dtype=torch.bool)
    over = d > KL_EXPONENT_MAX
    # All of d: the exponential alone would leave the gradient of -d, which pushes ℓ further down.
    d = d.clamp(max=KL_EXPONENT_MAX)
    return d.exp() - d - 1, over


def kl_penalty_slope(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """∂KL/∂ℓ of `kl_penalty`."""
    d = ref_logprobs - logprobs
    if estimator == "k1":
        return torch.where(d.isnan(), d, 1)
    if estimator == "k2":
        return -d
    return torch.where(d > KL_EXPONENT_MAX, 0, 1 - d.clamp(max=KL_EXPONENT_MAX).exp())


def default_denominator(lengths: Tensor, aggregation: str, max_completion_length: int) -> Tensor:
    """What `aggregate` divides by when this batch is the whole batch: completions, tokens or B * max length.

    lengths: (B,) tokens that count of each completion. A completion without any counts in none of them.
    """
    completions = (lengths > 0).sum()
    if aggregation == "grpo":
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


@dataclass(frozen=True)
class Objective:
    """-w·J + β·KL of every row, and its parts; no share of an aggregation in it yet."""

    per_token: Tensor
    kl: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl_clamped: Tensor


def token_objective(
    logprobs: Tensor, kl_logprobs: Tensor, keep: Tensor, layout: Layout, *, advantage: Tensor | float,
    kl_beta: Tensor | float, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    importance_weight: Tensor | None, temperature: Tensor | float, epsilon_low: Tensor | float,
    epsilon_high: Tensor | float, delta: Tensor | float | None, importance_level: str, kl_estimator: str,
    rescale_per_row: bool,
) -> Objective:  # fmt: skip
    """The objective as a function of ℓ, differentiable with respect to logprobs and kl_logprobs (ℓ at the KL's τ).

    All of the rows' shape, or broadcasting to it; keep: bool. Rows that are not kept may hold anything but NaN in ℓ.
    """
    mask = keep.to(logprobs.dtype)
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach().to(mask.dtype)
    ratio = importance_ratio(logprobs, old, mask, layout, importance_level)
    objective, low, high = clipped_objective(ratio, advantage, epsilon_low, epsilon_high, delta)
    if rescale_per_row:
        objective = objective * temperature
    if importance_weight is not None:
        objective = importance_weight.detach().to(mask.dtype).masked_fill(~keep, 0) * objective
    per_token = -objective.expand_as(mask)
    kl, over = torch.zeros_like(mask), torch.zeros_like(keep)
    if ref_logprobs is not None:
        kl, over = kl_penalty(kl_logprobs, ref_logprobs.detach().to(mask.dtype).masked_fill(~keep, 0), kl_estimator)
        per_token = per_token + kl_beta * kl
    return Objective(
        per_token=per_token.masked_fill(~keep, 0),
        kl=kl.detach() * mask,
        ratio=ratio.detach().expand_as(mask).masked_fill(~keep, 1),
        clipped_low=low.expand_as(mask) & keep,
        clipped_high=high.expand_as(mask) & keep,
        kl_clamped=over & keep,
    )


def batch_totals(mask: Tensor, layout: Layout, entropy: Tensor, parts: Objective) -> tuple[Tensor, Tensor]:
    """(B,) mean KL of each completion, and the (8,) TOTALS. mask, entropy: rows, 0 where a row is not kept."""
    lengths = layout.sum(mask)
    n = lengths.sum()
    marks = (parts.clipped_low.sum(), parts.clipped_high.sum())
    sums = torch.stack([parts.kl.sum(), entropy.sum(), *marks, (parts.ratio * mask).sum()])
    top = (parts.ratio * mask).amax() if mask.numel() else n
    totals = torch.cat([n[None], sums / n.clamp(min=1), top[None], parts.kl_clamped.sum()[None]])
    return layout.sum(parts.kl) / lengths.clamp(min=1), totals


def token_loss(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, config: MDPGRPOConfig, *, advantage: Tensor | float,
    kl_beta: Tensor | float, max_completion_length: int, completion: Tensor | None = None,
    num_completions: int | None = None, old_logprobs: Tensor | None = None, ref_logprobs: Tensor | None = None,
    importance_weight: Tensor | None = None, temperature: Tensor | float = 1.0,
    epsilon_low: Tensor | float | None = None, epsilon_high: Tensor | float | None = None,
    delta: Tensor | float | None = None, softcap: float | None = None, denominator: Tensor | float | None = None,
) -> TokenLoss:  # fmt: skip
    """-w·J + β·KL of every token, aggregated. See `ops.token_loss`, the public door, for shapes and meaning."""
    keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
    mask = keep.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    layout = Layout(tokens.shape[0] if num_completions is None else num_completions, completion)
    two_temperatures = isinstance(temperature, Tensor) or temperature != config.kl_temperature
    epsilon_low = config.epsilon_low if epsilon_low is None else epsilon_low
    epsilon_high = config.epsilon_high if epsilon_high is None else epsilon_high
    delta = config.delta or 0.0 if delta is None else delta
    advantage, kl_beta, temperature, epsilon_low, epsilon_high, delta = (
        layout.knob(x, mask.dtype) for x in (advantage, kl_beta, temperature, epsilon_low, epsilon_high, delta)
    )
    # A masked position may hold any number, NaN included: it is taken out before it meets arithmetic.
    logits = logits.masked_fill(~keep[..., None], 0)
    logprobs, entropy = token_logprobs(logits, tokens, temperature, softcap)
    logprobs = kl_logprobs = logprobs.masked_fill(~keep, 0)
    if ref_logprobs is not None and two_temperatures:
        kl_logprobs = token_logprobs(logits, tokens, config.kl_temperature, softcap)[0].masked_fill(~keep, 0)
    parts = token_objective(
        logprobs, kl_logprobs, keep, layout, advantage=advantage, kl_beta=kl_beta, old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs, importance_weight=importance_weight, temperature=temperature,
        epsilon_low=epsilon_low, epsilon_high=epsilon_high, delta=delta,
        importance_level=config.importance_level, kl_estimator=config.kl_estimator,
        rescale_per_row=config.rescale_per_row,
    )  # fmt: skip
    if denominator is None:
        denominator = default_denominator(layout.sum(mask), config.aggregation, max_completion_length)
    loss = aggregate(parts.per_token, mask, layout, config.aggregation, denominator)
    with torch.no_grad():
        entropy = entropy.masked_fill(~keep, 0)
        completion_kl, totals = batch_totals(mask, layout, entropy, parts)
    return TokenLoss(
        loss, logprobs.detach(), entropy, parts.kl, parts.ratio, parts.clipped_low, parts.clipped_high, completion_kl,
        totals,
    )  # fmt: skip


# ---- the head -------------------------------------------------------------------------------------------------------


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, logit_scale: float = 1.0) -> Tensor:
    """(..., V) = logit_scale (hidden (..., D) weightᵀ (V, D) + bias (V,)): what `linear_token_loss` never builds."""
    return logit_scale * torch.nn.functional.linear(hidden, weight, bias)
