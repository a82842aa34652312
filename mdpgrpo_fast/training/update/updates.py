"""The optimiser updates on a batch of completions: its parts, their micro-batches, old and reference log-probs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from ...config import MDPGRPOConfig, TrainConfig
from ...models.policy import Policy
from ...models.shared_prompt import upload
from ...reference import TOTALS, TokenLoss, default_denominator, kl_penalty
from .. import distributed
from ..batch import Batch, MicroBatch, bin_groups, mini_batches, packed_micro_batches, padded_micro_batches
from ..guard.finite import why_bad
from ..metrics import TokenStatistics
from ..timing import StageClock
from .entropy import EntropyControl
from .reference import Reference
from .weights import left_out


@dataclass
class Passes:
    """Micro-batches that went through the model in a step: without a gradient, and with one in each of its passes."""

    without: list[MicroBatch] = field(default_factory=list)
    trained: list[MicroBatch] = field(default_factory=list)


class Updates:
    """Updates the policy on batches. policy: not wrapped; model: as it is wrapped; budget: tokens of a packed forward
    pass, 0: pad; begin_change: called before each change of what a checkpoint holds."""

    def __init__(
        self, run: TrainConfig, method: MDPGRPOConfig, accelerator: Accelerator, policy: Policy, model: Any,
        optimizer: Any, scheduler: Any, reference: Reference, budget: int,
        begin_change: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.run, self.method, self.accelerator, self.policy, self.model = run, method, accelerator, policy, model
        self.optimizer, self.scheduler, self.reference, self.budget = optimizer, scheduler, reference, budget
        self.begin_change, self.entropy = begin_change, EntropyControl(method)
        self.bad: list[dict[str, Any]] = []  # updates of the last batch that were not made, each with the reason

    @staticmethod
    def count(run: TrainConfig, steps: int) -> int:
        """Optimiser updates of so many steps, which the schedule of the learning rate is over."""
        return steps * run.updates_per_rollout * run.mini_batches

    # ---- what a step's passes are of --------------------------------------------------------------------------------

    def micro_batches(self, batch: Batch, part: list[int] | None = None) -> list[MicroBatch]:
        """The micro-batches of this rank, as many as on every other. part: groups of the batch; None: all."""
        g = self.method.num_generations
        if not self.budget:
            rows = None if part is None else [i for group in part for i in range(group * g, (group + 1) * g)]
            return padded_micro_batches(batch, self.method, self.run.micro_batch_size, rows)
        binned = bin_groups(batch, self.method, self.budget, part)
        num_passes = distributed.max_over_ranks(self.accelerator, max(1, len(binned)))
        return packed_micro_batches(batch, self.method, binned, num_passes)

    def take_kl_off(self, batch: Batch, clock: StageClock, passes: Passes) -> None:
        """Under kl_in = reward: batch.kl becomes the KL estimate of each token between policy and reference, exactly 0
        where they are equal: both come from the same passes."""
        if not self.method.needs_reference or self.method.kl_in_loss:
            return
        own = batch.rollout.mask
        # Of all completions, whatever they are to the loss.
        whole = replace(batch, mask=own, counted=batch.lengths, contributing=batch.lengths)
        with clock.stage("reference"):
            micro_batches = self.micro_batches(whole)
            policy, ref = self.no_logprobs(batch), self.no_logprobs(batch)
            with self.accelerator.autocast():
                for m in micro_batches:
                    found = self.policy.logprobs(
                        m.inputs, m.mask, m.lengths, self.method.kl_temperature, self.run.backend
                    )
                    m.put(found, policy)
            self.reference.logprobs(micro_batches, ref)
            batch.kl = kl_penalty(policy, ref, self.method.kl_estimator)[0].masked_fill(~own, 0)
        passes.without += micro_batches * 2

    def no_logprobs(self, batch: Batch) -> Tensor:
        """(B, L) zeros in the dtype of the objective's log-probs."""
        double = next(self.policy.parameters()).dtype == torch.float64
        tokens = batch.rollout.tokens
        return torch.zeros(tokens.shape, dtype=torch.float64 if double else torch.float32, device=tokens.device)

    # ---- the updates ------------------------------------------------------------------------------------------------

    def apply(self, batch: Batch, number: int, clock: StageClock, passes: Passes | None = None) -> dict[str, Any]:
        """All optimiser updates on the batch of a step; the metrics of the last pass over it.

        Each part of a pass has an update of its own, whose normalisers are of the whole part: of all ranks and
        micro-batches. passes: is told the micro-batches. An update whose loss or gradient is not finite is not made: it
        is in `bad`.
        """
        run, passes, self.bad, skipped = self.run, passes or Passes(), [], 0
        old, ref = self.no_logprobs(batch), None
        row: dict[str, Any] = {}
        for update in range(run.updates_per_rollout):
            with clock.stage("forward"):
                seed = f"{run.seed} {number} {update}"
                chosen = mini_batches(batch.rewards.shape[0], run.mini_batches, seed)
                if update == 0 or run.mini_batches > 1:
                    parts = [self.micro_batches(batch, part) for part in chosen]
                passes.trained = [m for part in parts for m in part]
            if update == 0:
                with clock.stage("reference"):
                    self.old_logprobs(parts[1:], old, passes)
                    ref = self.reference_logprobs(parts, old, passes)
            stats, rows = TokenStatistics(), []
            for i, (groups, part) in enumerate(zip(chosen, parts, strict=True)):
                # The first part of all is the policy's own: its old log-probs are those of its forward passes.
                is_first = update == 0 and i == 0
                rows.append(self.one_update(batch, groups, part, old, ref, is_first, stats, clock))
                skipped += not rows[-1]["made"]
                if rows[-1]["bad"]:
                    self.bad.append({"update": update, "part": i, "why": rows[-1]["bad"]})
            row = {
                "loss": statistics.fmean(r["loss"] for r in rows),
                **stats.read(),
                "grad_norm": statistics.fmean(r["grad_norm"] for r in rows),
                "learning_rate": rows[-1]["learning_rate"],
                "skipped_updates": skipped,
                "bad_updates": len(self.bad),
            }
        if self.method.off_policy_threshold is not None:
            counted = sum(r["counted"] for r in rows)
            row["off_policy_masked"] = sum(r["masked"] for r in rows) / max(1, counted)
        if self.method.has_entropy_bonus:
            row["entropy_coef"] = rows[-1]["entropy_coef"]
        if batch.kl is not None:
            row["kl"] = (batch.kl.sum() / batch.rollout.mask.sum()).item()
        return row

    def old_logprobs(self, parts: list[list[MicroBatch]], into: Tensor, passes: Passes) -> None:
        """Log-probs of parts by the policy before any update, at the objective's temperature, without a gradient."""
        with self.accelerator.autocast():
            for m in (m for part in parts for m in part):
                tau, floor = m.objective["temperature"], m.objective.get("logit_floor")
                m.put(self.policy.logprobs(m.inputs, m.mask, m.lengths, tau, self.run.backend, floor), into)
                passes.without.append(m)

    def reference_logprobs(self, parts: list[list[MicroBatch]], like: Tensor, passes: Passes) -> Tensor | None:
        """(B, L), of the reference; None where the loss has no KL."""
        if not self.method.kl_in_loss:
            return None
        ref, micro_batches = torch.zeros_like(like), [m for part in parts for m in part]
        self.reference.logprobs(micro_batches, ref)
        passes.without += micro_batches
        return ref

    def one_update(
        self, batch: Batch, groups: list[int] | None, part: list[MicroBatch], old: Tensor, ref: Tensor | None,
        is_first: bool, stats: TokenStatistics, clock: StageClock,
    ) -> dict[str, Any]:  # fmt: skip
        """One optimiser update on a part of the batch, groups of it (None: all)."""
        acc, run, method = self.accelerator, self.run, self.method
        tokens = batch.mask.sum(1)
        if groups is not None:
            g = method.num_generations
            tokens = tokens.view(-1, g)[upload(torch.tensor(groups), tokens.device)].flatten()
        horizon = method.horizon or run.max_completion_length
        denominator: Tensor | None = acc.reduce(default_denominator(tokens, method.aggregation, horizon).float(), "sum")
        # DDP averages gradients over ranks; the denominator has already counted them all.
        scale: float = acc.num_processes
        if method.aggregation == "bnpo":
            denominator, scale = None, 1 / max(1, sum(m.counted > 0 for m in part))
        loss_sum, entropy_coef = torch.zeros((), device=acc.device), self.entropy.applied
        totals, threshold = [], method.off_policy_threshold
        masked = torch.zeros((), dtype=torch.int64, device=acc.device)
        for i, micro_batch in enumerate(part):
            acc.sync_gradients = i == len(part) - 1
            logprobs = None if is_first else micro_batch.of(old)
            refs = None if ref is None else micro_batch.of(ref)
            out = self.forward_backward(micro_batch, logprobs, refs, denominator, scale, loss_sum, clock)
            loss_sum += out.loss.detach() * scale
            if threshold is not None:
                masked += left_out(micro_batch, out.logprobs, logprobs, threshold)
            if is_first:
                micro_batch.put(out.logprobs, old)
            stats.add(out)
            totals.append(out.totals)
        with clock.stage("optimizer"):
            norm = acc.clip_grad_norm_(self.model.parameters(), run.max_grad_norm or float("inf"))
            loss, norm = distributed.loss_and_norm(acc, loss_sum, norm)
            learning_rate = self.scheduler.get_last_lr()[0]
            made, bad = self.step(loss, norm)
        if made and self.entropy.adapts:
            self.entropy.follow(self.mean_entropy(torch.stack(totals)))
        return {
            "loss": loss,
            "grad_norm": norm,
            "made": made,
            "bad": bad,
            "learning_rate": learning_rate,
            "entropy_coef": entropy_coef,
            **({} if threshold is None else {"masked": masked.item(), "counted": int((tokens > 0).sum())}),
        }

    def step(self, loss: float, norm: float) -> tuple[bool, str | None]:
        """The optimiser's step, and the schedule's, unless the numbers, alike on all ranks, forbid it; whether it was
        made, and what was wrong with it: nothing where float16's scale was too large, which is lowered then.

        Raises: FloatingPointError under DeepSpeed, which has made it in its backward pass.
        """
        scaler, bad = self.accelerator.scaler, why_bad(loss, norm, self.run.max_grad_norm > 0)
        self.begin_change()
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            skipped = self.optimizer.step_was_skipped
            if bad and not skipped:
                raise FloatingPointError(f"DeepSpeed has made an update that spoils the weights: {bad}")
            # Its norm is that of an earlier update then.
            bad = "its gradient is not finite" if skipped and self.run.mixed_precision != "fp16" else None
        if bad is None:
            self.optimizer.step()
        elif scaler is not None:
            if math.isfinite(loss) and scaler.get_scale() > 1:
                bad = None
            scaler.update()
            self.optimizer.zero_grad()
            return False, bad
        made = bad is None and not self.optimizer.step_was_skipped
        if made:
            self.scheduler.step()
        self.optimizer.zero_grad()
        return made, bad

    def mean_entropy(self, totals: Tensor) -> float:
        """Of the tokens of an update's micro-batches (TOTALS of each), over all ranks."""
        tokens, entropy = totals[:, TOTALS.index("tokens")], totals[:, TOTALS.index("entropy")]
        found = self.accelerator.reduce(torch.stack([(tokens * entropy).sum(), tokens.sum()]), "sum")
        return float(found[0] / found[1].clamp(min=1))

    def forward_backward(
        self, micro_batch: MicroBatch, old: Tensor | None, ref: Tensor | None, denominator: Tensor | None, scale: float,
        so_far: Tensor, clock: StageClock,
    ) -> TokenLoss:  # fmt: skip
        """Adds the gradient of scale · loss; reduced over ranks where `sync_gradients` says that it is the last.

        so_far: the losses of the micro-batches before."""
        acc, method = self.accelerator, self.method
        # Shards are reduced each time: otherwise every rank would keep gradients of all weights.
        reduced = acc.sync_gradients or distributed.is_sharded(acc)
        with nullcontext() if reduced else acc.no_sync(self.model):
            with clock.stage("forward"):
                out: TokenLoss = self.model(
                    micro_batch.inputs, micro_batch.mask, method, micro_batch.lengths, **micro_batch.objective,
                    max_completion_length=method.horizon or self.run.max_completion_length, old_logprobs=old,
                    ref_logprobs=ref, denominator=denominator, backend=self.run.backend, **self.entropy.objective(),
                )  # fmt: skip
            if acc.sync_gradients and acc.distributed_type == DistributedType.DEEPSPEED:
                # It makes the update within its backward pass.
                self.begin_change()
                loss = acc.reduce(so_far + out.loss.detach() * scale, "mean").item()
                if bad := why_bad(loss, 0.0, True):
                    raise FloatingPointError(f"an update cannot be made, and DeepSpeed skips none: {bad}")
            with clock.stage("backward"):
                acc.backward(out.loss * scale)
        return out
