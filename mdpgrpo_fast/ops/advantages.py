"""Advantages: dual-anchor, prospect-shaped, with the KL coefficient of every completion; rewards by group."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..config import Backend, ConfigError, MDPGRPOConfig
from ..kernels.schemas import Groups, Rows
from ..reference import Advantages
from ..reference.rows import as_float
from . import fused
from .backends import choose
from .checks import (
    Numbers,
    as_constraints,
    as_rewards,
    as_tensor,
    check_config,
    check_device,
    check_flags,
    check_floating,
    check_groups,
    check_pair,
    check_rewards,
    check_scalar,
    check_shape,
    check_size,
    look,
    refuse,
)

Parts = tuple[Tensor, Tensor]  # (P, G, R) rewards, and the weight of each (R,)


def advantages(
    rewards: Numbers | None = None,
    num_constraints: Numbers | float | None = None,
    config: MDPGRPOConfig | None = None,
    *,
    valid: Numbers | None = None,
    groups: Numbers | None = None,
    running: tuple[float, float] | None = None,
    batch_std: Tensor | float | None = None,
    parts: Numbers | None = None,
    part_weights: Numbers | None = None,
    batch: tuple[Tensor | float, Tensor | float] | None = None,
    check_values: bool | None = None,
    backend: Backend = "auto",
) -> Advantages:
    """Dual-anchor, prospect-shaped advantages and the KL coefficient of every completion (paper, Eq. 3 to 6).

    What is a tensor here may be a list, or an array, of numbers.

    Args:
        rewards: (P, G) float, the G rewards of each prompt's group; G = config.num_generations. With groups: (B,).
            With parts: what the goal anchor takes; default: the weighted sum of the parts that apply. Within ±1e6. One
            that differs from its group's mean, or from the goal, by no more than 4 units in the last place of the
            group's largest (G units where G > 4) is that mean, so that A = 0 has not the sign of a rounding.
        num_constraints: (P,) K, the number of constraints of each prompt, at least 1, or one number for all. Where the
            goal anchor is off (config.alpha = 0) it may be left out; δ is 0 then.
        config: the rule: statistics of the group, anchors, shaping, KL coefficients.
        valid: bool, of the rewards' shape: completions whose reward counts; the others get A = 0. Default: all, with
            parts those to which at least one reward applies.
        groups: (B,) group 0 .. P-1 of each completion, where completions of a group are not neighbours.
        running: median and standard deviation of the rewards seen before, for goal_mean and goal_std "running", which
            are computed in PyTorch on every backend.
        batch_std: for scale_rewards "batch": the standard deviation of more rewards than these, as of all ranks (of
            `mdpgrpo_fast.reference.batch_deviation`). Default: of these.
        parts: for multi_objective_aggregation "normalize_then_sum" (GDPO), and wanted there: (P, G, R), with groups
            (B, R), the single rewards, NaN where one does not apply. Computed in PyTorch on every backend.
        part_weights: (R,) weights of the single rewards; default: all 1.
        batch: mean and standard deviation of the weighted sums of normalised rewards (of
            `mdpgrpo_fast.reference.decoupled_sums`, whose mean is 0 but for rounding: give 0) over more than these, as
            of all ranks. Default: 0, and of these.
        check_values: look for non-finite rewards and K < 1; default: where looking is free, on the CPU.
        backend: "auto", "torch", "triton", "cpu" or "cuda"; all but torch give float32.

    Returns: Advantages with mean, std (P,) and z, delta, advantage, kl_beta of the rewards' shape.
    Raises: ValueError for an argument of a wrong type or shape, a non-finite reward or one beyond ±1e6, K < 1, a group
        that is not of size G, an argument that the config has no use for or lacks, or a backend that cannot run here,
        with the reason; ConfigError for an unknown backend.
    """
    check_config(config)
    assert config is not None
    check_flags(check_values=check_values)
    if config.running_goal and running is None:
        refuse("running", None, "(median, deviation) where goal_mean or goal_std is running")
    if running is not None:
        check_pair("running", running)
    given = rewards, num_constraints, valid, groups, parts
    device = next((x.device for x in given if isinstance(x, Tensor)), torch.device("cpu"))
    decoupled = _check_parts(parts, part_weights, batch, config, device, check_values)
    if decoupled is not None:
        applies = ~decoupled[0].isnan()
        if rewards is None:
            rewards = (decoupled[0].masked_fill(~applies, 0) * decoupled[1]).sum(-1)
        known = applies.any(-1)
        valid = known if valid is None else as_tensor("valid", valid, device, "of bools")
        if valid is not known:
            check_shape("valid", valid, tuple(known.shape))
            valid = valid & known if valid.dtype == torch.bool else valid
    elif rewards is None:
        refuse("rewards", None, "of shape (P, G)")
    by_group = grouped(
        rewards, num_constraints, valid, groups, config, check_values, device, made_first=True, running=running,
        batch_std=batch_std, parts=decoupled,
    )  # fmt: skip
    # Rewards of any float dtype are computed in float32 by a kernel, but float64 asks for float64.
    dtype = by_group.rewards.dtype if by_group.rewards.dtype == torch.float64 else torch.float32
    chosen = choose(backend, by_group.rewards.device, dtype)
    in_torch = config.running_goal or decoupled is not None
    out = _advantages("torch" if in_torch else chosen, by_group, config, running, decoupled, batch)
    if num_constraints is None:
        out = dataclasses.replace(out, delta=torch.zeros_like(out.delta))
    if by_group.slots is None:
        return out
    names = ("z", "delta", "advantage", "kl_beta")
    return dataclasses.replace(out, **{n: getattr(out, n).flatten()[by_group.slots] for n in names})


def grouped(
    rewards: Any, num_constraints: Any, valid: Any, groups: Any, config: MDPGRPOConfig, check_values: bool | None,
    device: torch.device, *, made_first: bool = False, running: tuple[float, float] | None = None,
    batch_std: Tensor | float | None = None, parts: Parts | None = None,
) -> Groups:  # fmt: skip
    """Checked: rewards and valid (P, G), num_constraints (P,), and the place of each completion where it has a map.

    made_first: advantages are what is asked for, and not made on the way to a loss, which has no arguments for all
    that some of them need.
    """
    if rewards is None:
        return Groups()
    if not made_first:
        _refuse_on_the_way(config)
    slots, size = None, config.num_generations
    rewards = as_rewards(rewards, device)
    num_constraints = as_constraints(num_constraints, rewards.numel() // size, rewards.device, config)
    valid = None if valid is None else as_tensor("valid", valid, rewards.device, "of bools")
    groups = None if groups is None else as_tensor("groups", groups, rewards.device, "of whole numbers")
    check_device(rewards, "rewards", num_constraints=num_constraints, valid=valid, groups=groups)
    if parts is not None:
        check_device(rewards, "rewards", parts=parts[0])
        check_shape("parts", parts[0], (*rewards.shape, parts[0].shape[-1]))
    if groups is not None:
        check_groups(groups, rewards, size)
        check_shape("valid", valid, tuple(rewards.shape))
        order = groups.argsort(stable=True)
        slots = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        valid = None if valid is None else valid[order].view(-1, size)
        rewards = rewards[order].view(-1, size)
    check_rewards(rewards, num_constraints, valid, size, check_values)
    if batch_std is not None:
        if config.scale_rewards != "batch":
            refuse("batch_std", "a value", f"left out for scale_rewards = {config.scale_rewards}")
        check_scalar("batch_std", batch_std, least=0)
    by_group = Groups(rewards, num_constraints, valid, slots)
    return by_group._replace(batch_std=_batch_std(by_group, config, batch_std))


def with_advantages(rows: Rows, backend: str, groups: Groups, config: MDPGRPOConfig) -> Rows:
    """Rows with A and KL coefficient (B,) of their completions, where there are rewards (of `grouped`)."""
    if groups.rewards is None:
        return rows
    found = _advantages(backend, groups, config)
    place = slice(None) if groups.slots is None else groups.slots
    return rows._replace(advantage=found.advantage.flatten()[place], kl_beta=found.kl_beta.flatten()[place])


def _refuse_on_the_way(config: MDPGRPOConfig) -> None:
    """Raises ConfigError for advantages that need more than rewards."""
    asked = {
        f"goal_mean = {config.goal_mean}, goal_std = {config.goal_std} need the rewards seen before": (
            config.running_goal, "running="
        ),
        "multi_objective_aggregation = normalize_then_sum needs the single rewards": (
            config.multi_objective_aggregation == "normalize_then_sum", "parts="
        ),
    }  # fmt: skip
    for reason, (holds, argument) in asked.items():
        if holds:
            raise ConfigError(
                f"{reason}: make advantages with `advantages(..., {argument})` and give those in place of rewards"
            )


def _check_parts(
    parts: Any, part_weights: Any, batch: Any, config: MDPGRPOConfig, device: torch.device, check_values: bool | None
) -> Parts | None:
    """Single rewards and their weights, wanted for GDPO and nowhere else."""
    if config.multi_objective_aggregation != "normalize_then_sum":
        for name, x in (("parts", parts), ("part_weights", part_weights), ("batch", batch)):
            if x is not None:
                refuse(name, "a value", "left out but for multi_objective_aggregation = normalize_then_sum")
        return None
    if parts is None:
        refuse("parts", None, "given for multi_objective_aggregation = normalize_then_sum")
    rewards = as_tensor("parts", parts, device, "of numbers")
    rewards = rewards if isinstance(parts, Tensor) or rewards.is_floating_point() else rewards.float()
    check_floating("parts", rewards)
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    if rewards.ndim not in (2, 3) or not rewards.shape[-1]:
        refuse("parts", f"shape {tuple(rewards.shape)}", "of shape (P, G, R), or (B, R) where groups are given")
    if look(rewards, check_values) and bool(rewards.isinf().any()):
        refuse("parts", "infinity", "finite, or NaN where a reward does not apply")
    if look(rewards, check_values):
        check_size("parts", rewards)
    if batch is not None:
        check_pair("batch", batch)
    if part_weights is None:
        return rewards, rewards.new_ones(rewards.shape[-1])
    weights = as_tensor("part_weights", part_weights, device, "of numbers", rewards.dtype)
    check_device(rewards, "parts", part_weights=weights)
    check_shape("part_weights", weights, (rewards.shape[-1],))
    weights = weights.to(rewards.dtype)
    if look(weights, check_values) and not bool(weights.isfinite().all()):
        refuse("part_weights", weights.tolist(), "finite")
    return rewards, weights


def _batch_std(groups: Groups, config: MDPGRPOConfig, given: Tensor | float | None) -> Tensor | None:
    """() of the batch, where it scales: as given, or of these rewards; nothing waits for the device."""
    if config.scale_rewards != "batch":
        return None
    rewards = as_float(groups.rewards)
    if given is not None:
        return fused.scalar(given, rewards.device, rewards.dtype)
    valid = torch.ones_like(rewards, dtype=torch.bool) if groups.valid is None else groups.valid
    return reference.batch_deviation(rewards.masked_fill(~valid, 0), valid, config.group_std)


def _advantages(
    backend: str, groups: Groups, config: MDPGRPOConfig, running: tuple[float, float] | None = None,
    parts: Parts | None = None, batch: Any = None,
) -> Advantages:  # fmt: skip
    if backend != "torch":
        return fused.advantages(backend, groups, config)
    # A reward that does not count may be anything.
    counted = groups.rewards if groups.valid is None else groups.rewards.masked_fill(~groups.valid, 0)
    relative = None
    if parts is not None:
        single, weights = parts
        if groups.slots is not None:
            single = torch.empty_like(single).index_copy_(0, groups.slots, single)
        single = single.reshape(*counted.shape, -1)
        whole = None if batch is None else tuple(fused.scalar(x, single.device, single.dtype) for x in batch)
        relative = reference.decoupled_anchor(single, weights, groups.valid, config, whole)  # type: ignore[arg-type]
    return reference.advantages(
        counted, groups.num_constraints, config, groups.valid, running, groups.batch_std, relative
    )
