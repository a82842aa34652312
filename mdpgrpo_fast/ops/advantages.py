"""Advantages: dual-anchor, prospect-shaped, with the KL coefficient of every completion; rewards by group."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import reference
from ..config import MDPGRPOConfig
from ..reference import Advantages
from . import fused
from .backends import choose
from .checks import (
    check_groups,
    check_rewards,
    check_shape,
)


def advantages(
    rewards: Tensor,
    num_constraints: Tensor,
    config: MDPGRPOConfig,
    *,
    valid: Tensor | None = None,
    groups: Tensor | None = None,
    check_values: bool | None = None,
    backend: str = "auto",
) -> Advantages:
    """Dual-anchor, prospect-shaped advantages and the KL coefficient of every completion (paper, Eq. 3 to 6).

    Args:
        rewards: (P, G) float, the G rewards of each prompt's group; G = config.num_generations. With groups: (B,).
        num_constraints: (P,) K, the number of constraints of each prompt, at least 1.
        valid: bool, of the rewards' shape: completions whose reward counts; the others get A = 0. Default: all.
        groups: (B,) group 0 .. P-1 of each completion, where completions of a group are not neighbours.
        check_values: look for non-finite rewards and K < 1; default: where looking is free, on the CPU.
        backend: "auto", "torch", "triton", "cpu" or "cuda"; all but torch give float32.

    Returns: Advantages with mean, std (P,) and z, delta, advantage, kl_beta of the rewards' shape.
    Raises: ValueError for a shape that does not fit, a non-finite reward, K < 1, a group that is not of size G, or a
        backend that cannot run here, with the reason; ConfigError for an unknown backend.
    """
    shape, slots = rewards.shape, None
    if groups is not None:
        rewards, valid, slots = _by_group(rewards, valid, groups, config.num_generations)
    check_rewards(rewards, num_constraints, valid, config.num_generations, check_values)
    name = choose(backend, rewards.device, _as_kernel_dtype(rewards))
    if name == "torch":
        out = _reference_advantages(rewards, num_constraints, config, valid)
    else:
        out = fused.advantages(name, rewards, num_constraints, config, valid)
    if slots is None:
        return out
    each = {n: getattr(out, n).flatten()[slots].view(shape) for n in ("z", "delta", "advantage", "kl_beta")}
    return dataclasses.replace(out, **each)


def grouped_rewards(
    rewards: Tensor | None, num_constraints: Tensor | None, valid: Tensor | None, groups: Tensor | None,
    config: MDPGRPOConfig, check_values: bool | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Checked rewards and valid (P, G), and the place of each completion in them where groups are given."""
    slots = None
    if rewards is not None and groups is not None:
        rewards, valid, slots = _by_group(rewards, valid, groups, config.num_generations)
    if rewards is not None and num_constraints is not None:
        check_rewards(rewards, num_constraints, valid, config.num_generations, check_values)
    return rewards, valid, slots


def advantages_of(
    backend: str, rewards: Tensor, num_constraints: Tensor, config: MDPGRPOConfig, valid: Tensor | None,
    slots: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A and KL coefficient (B,) of the completions, from what `grouped_rewards` returns."""
    if backend == "torch":
        adv = _reference_advantages(rewards, num_constraints, config, valid)
    else:
        adv = fused.advantages(backend, rewards, num_constraints, config, valid)
    place = slice(None) if slots is None else slots
    return adv.advantage.flatten()[place], adv.kl_beta.flatten()[place]


def _reference_advantages(
    rewards: Tensor, num_constraints: Tensor, config: MDPGRPOConfig, valid: Tensor | None
) -> Advantages:
    # A reward that does not count may be anything.
    counted = rewards if valid is None else rewards.masked_fill(~valid, 0)
    return reference.advantages(counted, num_constraints, config, valid)


def _as_kernel_dtype(rewards: Tensor) -> torch.dtype:
    # Rewards of any float dtype are computed in float32 by a kernel, but float64 asks for float64.
    return rewards.dtype if rewards.dtype == torch.float64 else torch.float32


def _by_group(
    rewards: Tensor, valid: Tensor | None, groups: Tensor, group_size: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(B,) rewards as (P, G), with the place of each completion in them."""
    check_groups(groups, rewards, group_size)
    check_shape("valid", valid, tuple(rewards.shape))
    order = groups.argsort(stable=True)
    slots = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    by_group = None if valid is None else valid[order].view(-1, group_size)
    return rewards[order].view(-1, group_size), by_group, slots
