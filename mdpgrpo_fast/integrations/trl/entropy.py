"""TRL's entropy bonus: a mean over the tokens that it acts on, and its adaptive coefficient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class EntropyBonus:
    """Of one micro-batch. mask: (B, L) of the rows that count; steps: of gradient accumulation.

    kept: (B, L) the rows of most entropy, where a quantile leaves the others out.
    """

    kept: Tensor | None = None

    def __init__(self, trainer: Any, mask: Tensor, steps: int) -> None:
        self.trainer, self.mask, self.steps = trainer, mask, steps
        acts = trainer._entropy_bonus_enabled
        if trainer.use_adaptive_entropy:
            acts = trainer._last_world_entropy <= trainer.args.entropy_target
        self.coef: float = trainer.entropy_coef if acts else 0.0

    @property
    def _on(self) -> Tensor:
        return self.mask if self.kept is None else self.mask * self.kept

    def per_completion(self, aggregation: str, denominator: Tensor, scale: float) -> Tensor:
        """(B,) entropy_coef with which a loss that is aggregated, divided and scaled so has TRL's bonus."""
        share = self.coef / (self._on.sum().clamp(min=1) * self.steps * scale) * denominator
        return share * self.mask.sum(1) if aggregation == "grpo" else share.expand(len(self.mask))

    def follow(self, entropy: Tensor, loss: Tensor, mode: str, averages: bool) -> None:
        """Logs what TRL does, and changes the coefficient as it does.

        entropy: (B, L); loss: () with the bonus; averages: whether TRL's policy_loss is before accumulation.
        """
        t = self.trainer
        if not t._entropy_bonus_enabled:
            return
        total, count = (entropy * self._on).sum(), self._on.sum()
        policy_loss = loss.detach() + self.coef * total / count.clamp(min=1) / self.steps
        policy_loss = policy_loss * self.steps if averages else policy_loss
        t._metrics[mode]["policy_loss"].append(t.accelerator.gather(policy_loss).nanmean().item())
        if mode != "train":
            return
        if t.use_adaptive_entropy:
            window = torch.stack([total, count.to(total.dtype)])
            t._entropy_window_stats = window if t._entropy_window_stats is None else t._entropy_window_stats + window
        if not t.accelerator.sync_gradients:
            return
        if t.use_adaptive_entropy:
            total, count = t.accelerator.reduce(t._entropy_window_stats, "sum")
            t._last_world_entropy, t._entropy_window_stats = (total / count.clamp(min=1)).item(), None
            step = t.args.entropy_coef_delta
            low = t._last_world_entropy <= t.args.entropy_target
            moved = t.entropy_coef + (step if low else -step)
            # Each bound is looked at on its own side only.
            t.entropy_coef = min(moved, t.args.entropy_coef_max) if low else max(moved, t.args.entropy_coef_min)
        t._metrics[mode]["entropy_coef"].append(t.entropy_coef)
