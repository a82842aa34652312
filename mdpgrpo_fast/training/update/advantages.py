"""Advantages of a step's completions, of this rank's rewards alone or with the statistics of all ranks' rewards."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ... import reference
from ...config import Backend, MDPGRPOConfig
from ...ops.advantages import advantages
from ...reference import Advantages
from ...rewards import Score


def of_the_batch(method: MDPGRPOConfig) -> bool:
    """Whether advantages take part in statistics of all rewards of a step."""
    return method.scale_rewards == "batch" or method.multi_objective_aggregation == "normalize_then_sum"


def step_advantages(
    rewards: Tensor, num_constraints: Tensor, valid: Tensor, scores: list[Score], weights: list[float],
    method: MDPGRPOConfig, *, running: tuple[float, float] | None, accelerator: Accelerator | None, backend: Backend,
) -> Advantages:  # fmt: skip
    """Advantages (P, G) of this rank's completions.

    scores, weights: of the P * G completions, and of each of their rewards. accelerator: for the statistics of all
    ranks, which then call this together; None: of these rewards alone.
    """
    if not of_the_batch(method):
        return advantages(rewards, num_constraints, method, valid=valid, running=running, backend=backend)
    common: dict[str, Any] = {"valid": valid, "running": running, "backend": backend}
    if method.scale_rewards == "batch":
        everyone, theirs = _gathered(accelerator, rewards.masked_fill(~valid, 0), valid)
        std = reference.batch_deviation(everyone, theirs, method.group_std)
        return advantages(rewards, num_constraints, method, batch_std=std, **common)
    nan = float("nan")
    table = [[nan if v is None else float(v) for v in s.parts.values()] or [nan] * len(weights) for s in scores]
    parts = torch.tensor(table, device=rewards.device).view(*rewards.shape, len(weights))
    shares = torch.tensor(weights, device=rewards.device)
    sums = reference.decoupled_sums(parts, shares, valid, method)
    everyone, theirs = _gathered(accelerator, sums, valid)
    std = reference.batch_deviation(everyone, theirs, method.group_std)
    return advantages(rewards, num_constraints, method, parts=parts, part_weights=shares, batch=(0.0, std), **common)


def _gathered(accelerator: Accelerator | None, rewards: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Of all ranks, which have as many prompts each."""
    if accelerator is None or accelerator.num_processes == 1:
        return rewards, valid
    both = accelerator.gather(torch.stack([rewards, valid.to(rewards.dtype)], -1))
    return both[..., 0].contiguous(), both[..., 1] > 0
