"""Group statistics, advantages and KL coefficients alone; `token_loss` computes them in its own rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schemas import Groups, Settings
from .completions import ADVANTAGES
from .method import _advantages, _group_statistics, _rewards
from .tiles import FP_FUSION, kernel_groups, kernel_settings, on_device


@triton.jit(do_not_specialize=["n_prompts", "G"])
def _advantages_kernel(groups, settings, per_group_ptr, per_completion_ptr, n_prompts, G, BLOCK_G: tl.constexpr):
    prompt = tl.program_id(0).to(tl.int64)
    statistics = _group_statistics(groups, settings, prompt, G, BLOCK_G)
    tl.store(per_group_ptr + prompt, statistics[0])
    tl.store(per_group_ptr + n_prompts + prompt, statistics[1])
    slots = tl.arange(0, BLOCK_G)
    r, valid = _rewards(groups, prompt * G + slots, slots < G)
    z, delta, advantage, beta = _advantages(r, valid, statistics, groups, settings, prompt, G)
    out = per_completion_ptr + prompt * G + slots
    step = n_prompts * G
    tl.store(out, z, mask=slots < G)
    tl.store(out + step, delta, mask=slots < G)
    tl.store(out + 2 * step, advantage, mask=slots < G)
    tl.store(out + 3 * step, beta, mask=slots < G)


def launch_advantages(groups: Groups, settings: Settings) -> tuple[Tensor, Tensor]:
    """(2, P): mean, std; (4, P, G): z, δ, A, KL coefficient; float32."""
    p, g, device = len(groups.num_constraints), settings.group_size, groups.rewards.device
    per_group = torch.empty(2, p, dtype=torch.float32, device=device)
    per_completion = torch.empty(4, p, g, dtype=torch.float32, device=device)
    if p:
        with on_device(device):
            _advantages_kernel[(p,)](
                kernel_groups(groups._replace(slots=None)), kernel_settings(settings, ADVANTAGES), per_group,
                per_completion, p, g, BLOCK_G=triton.next_power_of_2(g), num_warps=1, **FP_FUSION,
            )  # fmt: skip
    return per_group, per_completion
