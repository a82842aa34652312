"""The Hopper kernel (csrc/cuda) as torch.library ops `mdpgrpo_fast::cuda_*`.

It takes the rows of `token_loss`, but for those with a logit_floor; whatever is beside them, those, and the other ops
are the Triton kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .binaries import as_raw, inputs
from .schemas import Groups, Rows, Settings, register
from .triton import library
from .triton.advantages import launch_advantages
from .triton.completions import Coupling
from .triton.token_loss import launch_token_loss as launch_triton_token_loss


def _launch_rows(
    logits: Tensor, gradient: Tensor | None, rows: Rows, settings: Settings, denominator: Tensor, coupling: Coupling,
    statistics: Tensor | None, per_row: Tensor, marks: Tensor, num_completions: int,
) -> None:  # fmt: skip
    coupled = {name: as_raw(x, logits) for name, x in coupling._asdict().items()}
    torch.ops.mdpgrpo_fast._cuda_token_loss_rows(
        logits=logits, gradient=logits.new_empty(0) if gradient is None else gradient,
        **inputs(logits, settings, rows), denominator=denominator, **coupled, statistics=as_raw(statistics, logits),
        num_completions=num_completions, per_row=per_row, marks=marks,
        taken=torch.zeros(1, dtype=torch.int64, device=logits.device),
    )  # fmt: skip


def launch_token_loss(
    logits: Tensor, gradient: Tensor | None, rows: Rows, groups: Groups, settings: Settings, *rest: Any, **options: Any
) -> tuple[Tensor, ...]:
    """As `kernels.triton.token_loss.launch_token_loss`, with advantages in a launch of their own."""
    if groups.rewards is not None:
        _, per_completion = launch_advantages(groups, settings)
        advantage, kl_beta = per_completion[2:].flatten(1).unbind()
        if groups.slots is not None:
            advantage, kl_beta = advantage[groups.slots], kl_beta[groups.slots]
        rows = rows._replace(advantage=advantage, kl_beta=kl_beta)
    launch_rows = _launch_rows if rows.logit_floor is None else None
    return launch_triton_token_loss(
        logits, gradient, rows, Groups(), settings, *rest, launch_rows=launch_rows, **options
    )


LAUNCHERS = library.LAUNCHERS._replace(token_loss=launch_token_loss)
# Kept: the ops live as long as their library.
_library = register("cuda", LAUNCHERS, ("CUDA", "CPU"))
