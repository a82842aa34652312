"""Losses of a token as functions of its log-probs: ratios, the policy term of each loss, KL penalties; their slopes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import MDPGRPOConfig
from .rows import Layout

# exp(20) = 4.9e8: far above any useful penalty, far below float32 overflow.
KL_EXPONENT_MAX = 20.0
# exp(80) = 5.5e34 is finite in float32: the zero gradient of a clipped ratio must not meet an infinite one.
RATIO_EXPONENT_MAX = 80.0
# Of VESPO's log weight of a completion, and of the log-ratio of each of its tokens (authors' code, as TRL has it).
VESPO_LOG_MIN, VESPO_LOG_MAX = math.log(1e-8), 20.0

# ---- ratios ---------------------------------------------------------------------------------------------------------


def bounded_exp(exponent: Tensor) -> Tensor:
    """exp, its argument at most RATIO_EXPONENT_MAX: constant above."""
    return exponent.clamp(max=RATIO_EXPONENT_MAX).exp()


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, layout: Layout, level: str) -> Tensor:
    """ρ = exp(ℓ - ℓ_old) per token, or exp of its completion mean at sequence level (GSPO); broadcasts over rows."""
    exponent = (logprobs - old_logprobs).masked_fill(mask == 0, 0)
    return bounded_exp(layout.mean(exponent, mask) if level == "sequence" else exponent)


def gmpo_log_ratios(
    log_ratio: Tensor, advantage: Tensor | float, epsilon_low: Tensor | float, epsilon_high: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """log ρ bounded by ε_high where A > 0, by -ε_low where A < 0, and where one of the bounds holds (GMPO, Eq. 4)."""
    advantage, low, high = (
        torch.as_tensor(x, dtype=log_ratio.dtype, device=log_ratio.device)
        for x in (advantage, epsilon_low, epsilon_high)
    )
    log_ratio = log_ratio.masked_fill((low + high).isnan(), torch.nan)
    is_low, is_high = (log_ratio < -low) & (advantage < 0), (log_ratio > high) & (advantage > 0)
    return torch.where(is_low, -low, torch.where(is_high, high, log_ratio)), is_low, is_high


def vespo_log_weight(log_ratio: Tensor, importance_weight: Tensor | None, mask: Tensor, layout: Layout) -> Tensor:
    """log w of a completion: Σ of its tokens' log-ratios and log importance weights, each bounded. Detached."""
    log_ratio = log_ratio.detach().clamp(-VESPO_LOG_MAX, VESPO_LOG_MAX)
    if importance_weight is not None:
        log_ratio = log_ratio + importance_weight.log().clamp(VESPO_LOG_MIN, VESPO_LOG_MAX)
    return layout.broadcast(layout.sum(log_ratio * mask).clamp(VESPO_LOG_MIN, VESPO_LOG_MAX))


# ---- policy terms ---------------------------------------------------------------------------------------------------


def _cap(delta: Tensor | float | None, ratio: Tensor) -> Tensor:
    """delta as it broadcasts over the rows; infinity where it is 0, or None."""
    cap = torch.as_tensor(0 if delta is None else delta, dtype=ratio.dtype, device=ratio.device)
    return cap.masked_fill(cap <= 0, torch.inf)


def _bounds(ratio: Tensor, epsilon_low: Tensor | float, epsilon_high: Tensor | float) -> tuple[Tensor, Tensor]:
    """1 - ε_low and 1 + ε_high."""
    return tuple(
        torch.as_tensor(x, dtype=ratio.dtype, device=ratio.device) for x in (1 - epsilon_low, 1 + epsilon_high)
    )  # type: ignore[return-value]


def clipped_objective(
    ratio: Tensor, advantage: Tensor | float, epsilon_low: Tensor | float, epsilon_high: Tensor | float,
    delta: Tensor | float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """J = min(ρA, clip(ρ)A), ρ capped at delta first (0: not); and where the lower or the upper clip holds. NaN where a
    bound is."""
    low_bound, high_bound = _bounds(ratio, epsilon_low, epsilon_high)
    # Sequence level has one ratio per completion, but bounds may be per row.
    cap = _cap(delta, ratio)
    ratio = ratio.expand(torch.broadcast_shapes(ratio.shape, low_bound.shape, high_bound.shape, cap.shape))
    clipped = ratio.clamp(low_bound, high_bound) * advantage
    free = ratio.clamp(max=cap) * advantage
    advantage = torch.as_tensor(advantage)
    low = (ratio < low_bound) & (advantage < 0)
    high = (ratio > high_bound) & (advantage > 0)
    return torch.where((clipped < free) | clipped.isnan(), clipped, free), low, high


def clipped_objective_slope(
    ratio: Tensor, advantage: Tensor, epsilon_low: Tensor | float, epsilon_high: Tensor | float,
    delta: Tensor | float | None,
) -> Tensor:  # fmt: skip
    """dJ/dρ of `clipped_objective`: that of the unclipped branch where both are equal."""
    inside, cap = ratio.clamp(*_bounds(ratio, epsilon_low, epsilon_high)), _cap(delta, ratio)
    take = inside * advantage < ratio.clamp(max=cap) * advantage
    return torch.where(take, torch.where(inside == ratio, advantage, 0), torch.where(ratio > cap, 0, advantage))


def cispo_weight(ratio: Tensor, epsilon_low: Tensor | float, epsilon_high: Tensor | float) -> Tensor:
    """clip(ρ), detached: J = clip(ρ) A ℓ (CISPO, MiniMax-M1)."""
    return ratio.detach().clamp(*_bounds(ratio, epsilon_low, epsilon_high))


def _by_sign(positive: Tensor, above: float, elsewhere: float, like: Tensor) -> Tensor:
    """One of two numbers, in the dtype of `like`: of numbers alone torch.where makes float32."""
    first, second = (torch.full((), x, dtype=like.dtype, device=like.device) for x in (above, elsewhere))
    return torch.where(positive, first, second)


def _sapo_temperature(advantage: Tensor | float, like: Tensor, config: MDPGRPOConfig) -> Tensor:
    positive = torch.as_tensor(advantage, device=like.device) > 0
    return _by_sign(positive, config.sapo_temperature_pos, config.sapo_temperature_neg, like)


def sapo_gate(ratio: Tensor, advantage: Tensor | float, config: MDPGRPOConfig) -> Tensor:
    """(4 / τ) sigmoid(τ (ρ - 1)), τ by the sign of A: J is A times it (SAPO, Eq. 6)."""
    tau = _sapo_temperature(advantage, ratio, config)
    return torch.sigmoid(tau * (ratio - 1)) * 4 / tau


def sapo_gate_slope(ratio: Tensor, advantage: Tensor | float, config: MDPGRPOConfig) -> Tensor:
    """Its derivative with respect to ρ."""
    s = torch.sigmoid(_sapo_temperature(advantage, ratio, config) * (ratio - 1))
    return 4 * s * (1 - s)


def vespo_weight(log_weight: Tensor, advantage: Tensor | float, config: MDPGRPOConfig) -> Tensor:
    """φ(w) = exp(λ + k log w - λ w), k and λ by the sign of A: J = φ A ℓ (VESPO). φ(1) = 1."""
    positive = torch.as_tensor(advantage, device=log_weight.device) >= 0
    k = _by_sign(positive, config.vespo_k_pos, config.vespo_k_neg, log_weight)
    rate = _by_sign(positive, config.vespo_lambda_pos, config.vespo_lambda_neg, log_weight)
    return (rate + k * log_weight - rate * log_weight.exp()).exp()


# ---- KL -------------------------------------------------------------------------------------------------------------


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """k1 = ℓ - ℓ_ref, k2 = (ℓ - ℓ_ref)²/2, k3 = exp(ℓ_ref - ℓ) - (ℓ_ref - ℓ) - 1 (Schulman, "Approximating KL"), and
    abs = |ℓ - ℓ_ref| (verl).

    Second: where k3's ℓ_ref - ℓ was clamped at KL_EXPONENT_MAX; its gradient is 0 there.
    """
    d = ref_logprobs - logprobs
    if estimator != "k3":
        return {"k1": -d, "k2": d.square() / 2, "abs": d.abs()}[estimator], torch.zeros_like(d, dtype=torch.bool)
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
    if estimator == "abs":
        return torch.where(d.isnan(), d, -d.sign())
    return torch.where(d > KL_EXPONENT_MAX, 0, 1 - d.clamp(max=KL_EXPONENT_MAX).exp())
