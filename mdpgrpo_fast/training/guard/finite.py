"""Numbers that are not finite: updates that are skipped for them, and weights that are not saved."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .. import distributed

# Its square, which AdamW keeps, is infinite in float32 above.
MOST_NORM = 1e19


class BadStepsError(FloatingPointError):
    """Too many steps in a row had an update that was skipped; the weights are as good as before them."""


class BadSteps:
    """Counts steps in a row with a skipped update. limit: how many of them end the run."""

    def __init__(self, limit: int) -> None:
        self.limit, self.in_a_row = limit, 0

    def record(self, row: dict[str, Any]) -> None:
        """A step's metrics, of the run before it was resumed."""
        self.in_a_row = self.in_a_row + 1 if row.get("bad_updates") else 0

    def check(self, row: dict[str, Any], bad: list[dict[str, Any]]) -> None:
        """Raises BadStepsError where there are too many. bad: the updates of the step that were skipped."""
        self.record(row)
        if self.in_a_row >= self.limit:
            raise BadStepsError(
                f"{self.in_a_row} steps in a row, the last of them step {row['step']}, had an update that could not be "
                f"made (max_bad_steps): {bad[-1]['why']}; bad_steps.jsonl has their rows"
            )


def why_bad(loss: float, norm: float, clipped: bool) -> str | None:
    """Why an update would spoil the weights or AdamW's state; None: it would not."""
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    if not math.isfinite(norm):
        return f"its loss is {loss:g}, and the norm of its gradient is {norm}"
    if not clipped and norm > MOST_NORM:
        return f"the norm of its gradient, {norm:g}, is too large for AdamW's float32 (max_grad_norm clips it)"
    return None


@torch.no_grad()
def check_weights(accelerator: Accelerator, model: nn.Module, step: int, alone: bool = False) -> None:
    """Called by all ranks, unless `alone`. Raises FloatingPointError on all where a trained weight of one is not
    finite."""
    norms, names = [], []
    for name, p in model.named_parameters():
        own: Any = getattr(p, "ds_tensor", p)  # ZeRO-3's shard, else FSDP's
        own = own.to_local() if hasattr(own, "to_local") else own
        if p.requires_grad and own.numel():
            norms.append(torch.linalg.vector_norm(own.detach(), torch.inf).float())
            names.append(name)
    bad = torch.stack(norms).isfinite().logical_not().nonzero().flatten().tolist() if norms else []
    if len(bad) if alone else distributed.max_over_ranks(accelerator, len(bad)):
        first = f" ({names[bad[0]]} is the first)" if bad else ""
        raise FloatingPointError(f"weights are not finite after step {step}{first}: nothing of them is saved")
