"""Group statistics, advantages and KL coefficients alone, for logging; `token_loss` computes them in its own rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .method import _group
from .tiles import on_device


@triton.jit(
    do_not_specialize=["n_prompts", "G"],
    do_not_specialize_on_alignment=["rewards_ptr", "constraints_ptr", "valid_ptr", "groups_ptr", "completions_ptr"],
)
def _advantages_kernel(
    rewards_ptr, constraints_ptr, valid_ptr, groups_ptr, completions_ptr, n_prompts, G, alpha, prospect_beta,
    prospect_gain, prospect_loss, beta_pos, beta_neg, HAS_VALID: tl.constexpr, SAMPLE_STD: tl.constexpr,
    GOAL_MEAN: tl.constexpr, BINOMIAL: tl.constexpr, PROSPECT: tl.constexpr, PROSPECT_ON_GOAL: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    prompt = tl.program_id(0).to(tl.int64)
    mean, std, z, delta, advantage, beta = _group(
        rewards_ptr, constraints_ptr, valid_ptr, prompt, G, alpha, prospect_beta, prospect_gain, prospect_loss,
        beta_pos, beta_neg, HAS_VALID, SAMPLE_STD, GOAL_MEAN, BINOMIAL, PROSPECT, PROSPECT_ON_GOAL, BLOCK_G,
    )  # fmt: skip
    tl.store(groups_ptr + prompt, mean)
    tl.store(groups_ptr + n_prompts + prompt, std)
    slots = tl.arange(0, BLOCK_G)
    out = completions_ptr + prompt * G + slots
    step = n_prompts * G
    tl.store(out, z, mask=slots < G)
    tl.store(out + step, delta, mask=slots < G)
    tl.store(out + 2 * step, advantage, mask=slots < G)
    tl.store(out + 3 * step, beta, mask=slots < G)


def launch_advantages(
    rewards: Tensor,
    num_constraints: Tensor,
    valid: Tensor | None,
    numbers: list[float],
    sample_std: bool,
    goal_mean: int,
    binomial: bool,
    prospect: bool,
    prospect_on_goal: bool,
) -> tuple[Tensor, Tensor]:
    """(2, P): mean, std; (4, P, G): z, δ, A, KL coefficient; float32.

    rewards (P, G), num_constraints (P,), valid (P * G,) uint8, all contiguous; numbers: α, prospect β, λ₊, λ₋, β₊, β₋.
    """
    p, g = rewards.shape
    groups = torch.empty(2, p, dtype=torch.float32, device=rewards.device)
    completions = torch.empty(4, p, g, dtype=torch.float32, device=rewards.device)
    if p:
        with on_device(rewards.device):
            _advantages_kernel[(p,)](
                rewards, num_constraints, valid, groups, completions, p, g, *numbers, HAS_VALID=valid is not None,
                SAMPLE_STD=sample_std, GOAL_MEAN=goal_mean, BINOMIAL=binomial, PROSPECT=prospect,
                PROSPECT_ON_GOAL=prospect_on_goal, BLOCK_G=triton.next_power_of_2(g), num_warps=1,
            )  # fmt: skip
    return groups, completions
