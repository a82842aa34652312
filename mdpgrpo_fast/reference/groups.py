"""Advantages: group statistics, anchors, shaping, KL coefficient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import MDPGRPOConfig
from .rows import as_float


@dataclass(frozen=True)
class Advantages:
    """Group statistics and what follows from them. mean, std: (P,); the others (P, G)."""

    mean: Tensor
    std: Tensor
    z: Tensor
    delta: Tensor
    advantage: Tensor
    kl_beta: Tensor


def group_statistics(rewards: Tensor, valid: Tensor, group_std: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation over the valid completions of each group, and whether they are all equal: (P,) each.

    Rewards a few units in the last place apart are equal. A constant group has its own reward as mean and a deviation
    of exactly 0, whatever rounding a sum would leave.
    """
    n = valid.sum(1)
    if not rewards.shape[1]:  # a batch without groups has no largest reward
        return torch.zeros_like(n, dtype=rewards.dtype), torch.zeros_like(n, dtype=rewards.dtype), n == 0
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


def reward_noise(rewards: Tensor, valid: Tensor) -> Tensor:
    """The distance from the mean that rounding alone makes: 4 units in the last place of the group's largest |r|, or n
    where more than 4 completions are valid, as their sum may be off by n / 2. NaN where a reward is not finite. (P,)"""
    if not rewards.shape[1]:
        return rewards.new_zeros(len(rewards))
    largest = rewards.masked_fill(~valid, 0).abs().amax(1)
    n = valid.sum(1).clamp(min=4).to(rewards.dtype)
    return torch.finfo(rewards.dtype).eps * n * (largest + (largest - largest))


def distance(rewards: Tensor, centre: Tensor, noise: Tensor) -> Tensor:
    """r - centre, exactly 0 where that is no more than the noise: its sign would be that of a rounding. (P, G)

    centre, noise: (P,).
    """
    d = rewards - centre[:, None]
    return torch.where(d.abs() <= noise[:, None], 0, d)


def relative_anchor(
    rewards: Tensor, mean: Tensor, std: Tensor | None, constant: Tensor, noise: Tensor, group_std: str,
    count: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """z = (r - μ) / max(σ, 1e-8), or TRL's (r - μ) / (s + 1e-4); exactly 0 in a constant group, and where r is μ but
    for the noise of `reward_noise` (P,). (P, G)

    std: (P,) of the groups, or () of the batch; None: z = r - μ (Dr. GRPO). count: (P,) completions that μ is of, where
    it is to be that of the others: r - (nμ - r) / (n - 1) = (r - μ) n / (n - 1) (RLOO).
    """
    z = distance(rewards, mean, noise)
    if std is not None:
        scale = std.clamp(min=1e-8) if group_std == "population" else std + 1e-4
        z = z / (scale[:, None] if scale.ndim else scale)
    if count is not None:
        n = count.to(z.dtype)
        z = z * (n / (n - 1).clamp(min=1))[:, None]
    return torch.where(constant[:, None], 0, z)


def batch_deviation(rewards: Tensor, valid: Tensor, group_std: str) -> Tensor:
    """(): standard deviation of all valid rewards of a batch (PPO Lite); 0 where they are equal."""
    _, std, _ = group_statistics(rewards.reshape(1, -1), valid.reshape(1, -1), group_std)
    return std.squeeze(0)


def decoupled_anchor(
    parts: Tensor, weights: Tensor, valid: Tensor, config: MDPGRPOConfig, batch: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """z of several rewards, each normalised in its group and then summed, over the batch's deviation (GDPO); exactly 0
    in a group whose sums are, as where it is constant in all its rewards. (P, G)

    parts (P, G, R): rewards, NaN where one does not apply; weights (R,). batch: mean, which is 0 but for rounding, and
    deviation of `decoupled_sums` over the batch, where that is more than these. Default: 0, and that of these.
    """
    sums = decoupled_sums(parts, weights, valid, config)
    if batch is None:
        mean, std = sums.new_zeros(()), batch_deviation(sums, valid, config.group_std)
    else:
        mean, std = (x.to(sums) for x in batch)
    scale = std.clamp(min=1e-8) if config.group_std == "population" else std + 1e-4
    constant = (sums == 0).all(1, keepdim=True)
    return torch.where((std == 0) | constant, 0, (sums - mean) / scale).masked_fill(~valid, 0)


def decoupled_sums(parts: Tensor, weights: Tensor, valid: Tensor, config: MDPGRPOConfig) -> Tensor:
    """Σ_k w_k z_k over rewards, z_k that of reward k in its group alone; exactly 0 where they cancel but for the
    rounding of their means. (P, G)"""
    total, rounding = torch.zeros_like(parts[..., 0]), torch.zeros_like(parts[..., 0])
    for k in range(parts.shape[2]):
        own = valid & ~parts[..., k].isnan()
        rewards = parts[..., k].masked_fill(~own, 0)
        mean, std, constant = group_statistics(rewards, own, config.group_std)
        count = own.sum(1) if config.baseline == "leave_one_out" else None
        noise = reward_noise(rewards, own)
        z = relative_anchor(rewards, mean, std, constant, noise, config.group_std, count)
        term = weights[k] * z.masked_fill(~own, 0)
        share = noise[:, None] / (rewards - mean[:, None]).abs()  # of z, which is 0 where that is above 1
        total, rounding = total + term, rounding + torch.where(term == 0, 0, term.abs() * share)
    return torch.where(total.abs() <= rounding, 0, total)


def goal_anchor(
    rewards: Tensor, mean: Tensor, num_constraints: Tensor, goal_mean: str, goal_std: str,
    running: tuple[float, float] | None = None, noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """δ = (r - m) / s (paper Eq. 4; s = sqrt(G/(4K)) as released, or the binomial sqrt(1/(4K))); running: m and s for
    the choices of that name, the median and the standard deviation of rewards seen before. 0 where r is m but for the
    noise of `reward_noise` (P,). (P, G)"""
    half, median, deviation = (torch.full_like(mean, x) for x in (0.5, *(running or (torch.nan, torch.nan))))
    m = {"half": half, "max_half_mean": torch.maximum(half, mean), "mean": mean, "running": median}[goal_mean]
    size = rewards.shape[1] if goal_std == "released" else 1
    s = deviation if goal_std == "running" else (size / (4 * num_constraints.to(rewards.dtype))).sqrt()
    return distance(rewards, m, torch.zeros_like(m) if noise is None else noise) / s[:, None].clamp(min=1e-8)


def prospect_shape(v: Tensor, beta: float, gain: float, loss: float) -> Tensor:
    """ψ(v) = λ₊ tanh(βv) for v >= 0, λ₋ tanh(βv) below (Kahneman and Tversky's loss aversion where λ₋ > λ₊)."""
    t = torch.tanh(beta * v)
    return torch.where(v >= 0, gain * t, loss * t)


def mixed(relative: Tensor, goal: Tensor, count: Tensor) -> Tensor:
    """Their sum (P, G), exactly 0 where the two terms cancel but for rounding: at 16 units in the last place of
    |relative| + |goal|, or 4 n where more than 4 completions count, n of them (P,)."""
    noise = 4 * torch.finfo(relative.dtype).eps * count.clamp(min=4).to(relative.dtype)
    total = relative + goal
    return torch.where(total.abs() <= noise[:, None] * (relative.abs() + goal.abs()), 0, total)


def kl_coefficient(advantage: Tensor, beta_pos: float, beta_neg: float) -> Tensor:
    """β₊ where A >= 0, zero included; β₋ where A < 0."""
    return torch.full_like(advantage, beta_pos).masked_fill(advantage < 0, beta_neg)


def advantages(
    rewards: Tensor, num_constraints: Tensor, config: MDPGRPOConfig, valid: Tensor | None = None,
    running: tuple[float, float] | None = None, batch_std: Tensor | None = None, relative: Tensor | None = None,
) -> Advantages:  # fmt: skip
    """A = (1 - α) ψ(z) + α ψ(δ), clipped to ±advantage_clip, and the KL coefficient of every completion. A is
    exactly 0, and takes β₊, where it is 0 but for rounding: `reward_noise`, `mixed`.

    rewards (P, G) float; num_constraints (P,); valid (P, G) bool: completions whose reward counts (default all). The
    others get z = δ = A = 0 and take no part in the group's statistics. running: as of `goal_anchor`.
    batch_std: (), for scale_rewards = batch, where the batch is more than these rewards. relative (P, G): z, of
    `decoupled_anchor`.
    """
    rewards = as_float(rewards)
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    mean, std, constant = group_statistics(rewards, valid, config.group_std)
    # Else the rounding between equal rewards would decide the sign of A, and with it the KL coefficient.
    rewards = torch.where(constant[:, None], mean[:, None], rewards)
    noise = reward_noise(rewards, valid)
    if relative is None:
        scale: Tensor | None = std
        if config.scale_rewards == "batch":
            scale = batch_deviation(rewards, valid, config.group_std) if batch_std is None else batch_std.to(rewards)
        elif config.scale_rewards == "none":
            scale = None
        count = valid.sum(1) if config.baseline == "leave_one_out" else None
        relative = relative_anchor(rewards, mean, scale, constant, noise, config.group_std, count)
    z = relative.to(rewards).masked_fill(~valid, 0)
    delta = goal_anchor(rewards, mean, num_constraints, config.goal_mean, config.goal_std, running, noise)
    delta = delta.masked_fill(~valid, 0)

    def shape(v: Tensor, on: bool) -> Tensor:
        return prospect_shape(v, config.prospect_beta, config.prospect_gain, config.prospect_loss) if on else v

    goal = shape(delta, config.prospect and config.prospect_on_goal)
    advantage = mixed((1 - config.alpha) * shape(z, config.prospect), config.alpha * goal, valid.sum(1))
    if config.advantage_clip:
        advantage = advantage.clamp(-config.advantage_clip, config.advantage_clip)
    return Advantages(mean, std, z, delta, advantage, kl_coefficient(advantage, *config.betas))
