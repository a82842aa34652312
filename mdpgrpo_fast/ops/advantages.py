"""Advantages: dual-anchor, prospect-shaped, with the KL coefficient of every completion; rewards by group."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import reference
from ..config import Backend, ConfigError, MDPGRPOConfig
from ..kernels.schemas import Groups, Rows
from ..reference import Advantages
from . import fused
from .backends import choose
from .checks import check_device, check_groups, check_rewards, check_shape, refuse


def advantages(
    rewards: Tensor,
    num_constraints: Tensor,
    config: MDPGRPOConfig,
    *,
    valid: Tensor | None = None,
    groups: Tensor | None = None,
    running: tuple[float, float] | None = None,
    check_values: bool | None = None,
    backend: Backend = "auto",
) -> Advantages:
    """Dual-anchor, prospect-shaped advantages and the KL coefficient of every completion (paper, Eq. 3 to 6).

    Args:
        rewards: (P, G) float, the G rewards of each prompt's group; G = config.num_generations. With groups: (B,).
        num_constraints: (P,) K, the number of constraints of each prompt, at least 1.
        valid: bool, of the rewards' shape: completions whose reward counts; the others get A = 0. Default: all.
        groups: (B,) group 0 .. P-1 of each completion, where completions of a group are not neighbours.
        running: median and standard deviation of the rewards seen before, for goal_mean and goal_std "running", which
            are computed in PyTorch on every backend.
        check_values: look for non-finite rewards and K < 1; default: where looking is free, on the CPU.
        backend: "auto", "torch", "triton", "cpu" or "cuda"; all but torch give float32.

    Returns: Advantages with mean, std (P,) and z, delta, advantage, kl_beta of the rewards' shape.
    Raises: ValueError for a shape that does not fit, a non-finite reward, K < 1, a group that is not of size G, or a
        backend that cannot run here, with the reason; ConfigError for an unknown backend.
    """
    if num_constraints is None:
        refuse("num_constraints", None, "of shape (P,)")
    if config.running_goal and running is None:
        refuse("running", None, "(median, deviation) where goal_mean or goal_std is running")
    by_group = grouped(rewards, num_constraints, valid, groups, config, check_values, running)
    # Rewards of any float dtype are computed in float32 by a kernel, but float64 asks for float64.
    dtype = rewards.dtype if rewards.dtype == torch.float64 else torch.float32
    chosen = choose(backend, rewards.device, dtype)
    out = _advantages("torch" if config.running_goal else chosen, by_group, config, running)
    if by_group.slots is None:
        return out
    names = ("z", "delta", "advantage", "kl_beta")
    each = {n: getattr(out, n).flatten()[by_group.slots].view(rewards.shape) for n in names}
    return dataclasses.replace(out, **each)


def grouped(
    rewards: Tensor | None, num_constraints: Tensor | None, valid: Tensor | None, groups: Tensor | None,
    config: MDPGRPOConfig, check_values: bool | None, running: tuple[float, float] | None = None,
) -> Groups:  # fmt: skip
    """Checked: rewards and valid (P, G), num_constraints (P,), and the place of each completion where it has a map."""
    if rewards is None or num_constraints is None:
        return Groups()
    if config.running_goal and running is None:
        raise ConfigError(
            f"goal_mean = {config.goal_mean}, goal_std = {config.goal_std} need the rewards seen before: make "
            "advantages with `advantages(..., running=)` and give those in place of rewards"
        )
    slots, size = None, config.num_generations
    check_device(rewards, "rewards", num_constraints=num_constraints, valid=valid, groups=groups)
    if groups is not None:
        check_groups(groups, rewards, size)
        check_shape("valid", valid, tuple(rewards.shape))
        order = groups.argsort(stable=True)
        slots = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        valid = None if valid is None else valid[order].view(-1, size)
        rewards = rewards[order].view(-1, size)
    check_rewards(rewards, num_constraints, valid, size, check_values)
    batch_std = None
    if config.scale_rewards == "batch":
        counted = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
        batch_std = reference.batch_deviation(rewards.masked_fill(~counted, 0).float(), counted, config.group_std)
    return Groups(rewards, num_constraints, valid, slots, batch_std)


def with_advantages(rows: Rows, backend: str, groups: Groups, config: MDPGRPOConfig) -> Rows:
    """Rows with A and KL coefficient (B,) of their completions, where there are rewards (of `grouped`)."""
    if groups.rewards is None:
        return rows
    found = _advantages(backend, groups, config)
    place = slice(None) if groups.slots is None else groups.slots
    return rows._replace(advantage=found.advantage.flatten()[place], kl_beta=found.kl_beta.flatten()[place])


def _advantages(
    backend: str, groups: Groups, config: MDPGRPOConfig, running: tuple[float, float] | None = None
) -> Advantages:
    if backend != "torch":
        return fused.advantages(backend, groups, config)
    # A reward that does not count may be anything.
    counted = groups.rewards if groups.valid is None else groups.rewards.masked_fill(~groups.valid, 0)
    return reference.advantages(counted, groups.num_constraints, config, groups.valid, running)
