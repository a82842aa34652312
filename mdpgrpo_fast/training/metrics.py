"""Metrics of a step: group health, per-temperature slots, token statistics, and why a gradient is zero."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ..config import MDPGRPOConfig, TrainConfig
from ..evaluation.answers import MUCH_TRUNCATED, truncation_note
from ..evaluation.scores import from_scores
from ..log import counted
from ..reference import TOTALS, Advantages, TokenLoss
from .batch import Batch
from .scale import scale_note
from .update.weights import share_outside

GOAL = 0.5  # the share of constraints under which a response counts as a failure, the paper's goal mean
SUMS = ("dropped", "kl_clamped", "tokens_per_second")
MAXIMA = ("ratio_max", "memory_mb", "reward_max", "staleness", "skipped_updates", "bad_updates")
MINIMA = ("reward_min",)


def step_metrics(batch: Batch, updated: dict[str, Any], method: MDPGRPOConfig, memory_mb: float) -> dict[str, Any]:
    """A step's row of metrics.jsonl on one rank, without its times; updated: what `TrainingLoop.update` returned."""
    rollout, has_kl = batch.rollout, method.kl_in_loss
    quality = from_scores(batch.examples, batch.scores)
    no_weight = batch.weight is not None and bool((batch.weight[batch.mask] == 0).all())
    return {
        **updated,
        **group_health(batch.rewards, batch.valid, batch.adv, has_kl or method.has_entropy_bonus),
        **{name: quality[name] for name in ("reward", "reward_std", "rewards")},
        "hsr": quality["hsr"],
        "ssr": quality["ssr"],
        "completion_length": rollout.lengths.float().mean().item(),
        "truncated": 1 - rollout.finished.float().mean().item(),
        "staleness": batch.staleness,
        "dropped": sum(s.total is None for s in batch.scores),
        "lost": dict(Counter(s.cause or "no reward applies" for s in batch.scores if s.total is None)),
        "problem": next((s.problem for s in batch.scores if s.total is None), None),
        "trace": next((s.trace for s in batch.scores if s.trace), None),
        "reward_min": min((s.total for s in batch.scores if s.total is not None), default=None),
        "reward_max": max((s.total for s in batch.scores if s.total is not None), default=None),
        "slots": slot_statistics(batch, method),
        "out_of_bounds": None if batch.outside is None else share_outside(batch.outside, batch.mask, method),
        "memory_mb": memory_mb,
        "note": why_zero(
            updated["loss"], updated["grad_norm"], int(batch.mask.sum()), batch.adv, method, has_kl, no_weight
        ),
    }


def step_notes(row: dict[str, Any], run: TrainConfig, method: MDPGRPOConfig) -> list[tuple[str, str]]:
    """(what a line is said once for, the line) of all that a user should know of a step. row: its metrics."""
    notes = [(row["note"], row["note"])] if row["note"] else []
    if row["skipped_updates"]:
        why = "its loss or gradient is not finite: bad_steps.jsonl" if row["bad_updates"] else "float16 overflowed"
        notes.append(("skipped" + why, f"{counted(row['skipped_updates'], 'update')} skipped, {why}"))
    if row["dropped"]:
        notes.append(("dropped", f"{row['dropped']} samples dropped, the first because {row['problem']}"))
    off_scale = scale_note(row["reward_min"], row["reward_max"], row["advantage_mean"], run, method)
    if off_scale:
        notes.append(("scale", off_scale))
    if row["truncated"] > MUCH_TRUNCATED:
        notes.append(("truncated", truncation_note(row["truncated"], run.max_completion_length)))
    return notes


def group_health(rewards: Tensor, valid: Tensor, adv: Advantages, never_idle: bool) -> dict[str, float]:
    """Shares of the P groups with a known weakness of z-score GRPO, and the mean advantage. rewards, valid: (P, G).

    never_idle: the loss has a term that A = 0 does not take away, KL or entropy.
    """
    best = rewards.masked_fill(~valid, -torch.inf).amax(1)
    no_advantage = (adv.advantage == 0).all(1)
    kept = rewards[valid]
    return {
        "advantage_mean": adv.advantage[valid].mean().item() if kept.numel() else 0.0,
        "zero_variance_groups": (adv.std == 0).float().mean().item(),
        "large_z_groups": (adv.z.abs().amax(1) > 2).float().mean().item(),
        # All members under the goal, and yet plain z would reinforce the best of them.
        "gain_below_goal_groups": ((best < GOAL) & (adv.z.amax(1) > 0)).float().mean().item(),
        "zero_gradient_groups": 0.0 if never_idle else no_advantage.float().mean().item(),
    }


def slot_statistics(batch: Batch, config: MDPGRPOConfig) -> list[dict[str, Any]]:
    """Reward mean and spread of each temperature of the group; with an importance weight, its effective sample size as
    a share of the tokens, and the share of weights out of bounds."""
    rewards, valid, weight, mask, rows = batch.rewards, batch.valid, batch.weight, batch.mask, []
    slots = torch.tensor(config.slot_temperatures, device=rewards.device)
    for tau in sorted(set(config.slot_temperatures)):
        pick = (slots == slots.new_tensor(tau)).expand_as(rewards)
        r = rewards[pick & valid]
        ess = outside = None
        if weight is not None and batch.outside is not None:
            own = pick.flatten()
            w, outside = weight[own][mask[own]], share_outside(batch.outside[own], mask[own], config)
            ess = (w.sum().square() / (w.square().sum() * w.numel()).clamp(min=1e-12)).item() if w.numel() else None
        rows.append(
            {
                "temperature": tau,
                "reward": r.mean().item() if r.numel() else None,
                "reward_std": r.std(correction=0).item() if r.numel() else None,
                "ess": ess,
                "out_of_bounds": outside,
            }
        )
    return rows


class TokenStatistics:
    """Token-weighted means over the micro-batches of a step, read from the device once."""

    def __init__(self) -> None:
        self._totals: list[Tensor] = []

    def add(self, out: TokenLoss) -> None:
        self._totals.append(out.totals)

    def read(self) -> dict[str, float]:
        assert self._totals, "read before add"
        table = torch.stack(self._totals).double()
        column = {name: table[:, i] for i, name in enumerate(TOTALS)}
        n = column["tokens"].sum().clamp(min=1)
        means = ("kl", "entropy", "clip_low", "clip_high", "ratio_mean")
        values = [(column[name] * column["tokens"]).sum() / n for name in means]
        values += [column["ratio_max"].amax(), column["kl_clamped"].sum()]
        return dict(zip([*means, "ratio_max", "kl_clamped"], torch.stack(values).tolist(), strict=True))


def why_zero(
    loss: float, grad_norm: float, rollout_tokens: int, adv: Advantages, config: MDPGRPOConfig, has_kl: bool,
    no_weight: bool = False,
) -> str | None:  # fmt: skip
    """One line on why the loss or the gradient is 0 at this step; None where neither is. no_weight: whether every
    importance weight is 0."""
    if rollout_tokens == 0:
        return "no token counts: every completion was dropped or masked as truncated"
    if grad_norm == 0:
        if bool((adv.advantage == 0).all()):
            anchor = "the goal anchor is off" if config.alpha == 0 else "the goal anchor is 0 too"
            kl = "the policy still equals the reference" if has_kl else "there is no KL term"
            return f"the gradient is 0: the rewards of every group are all equal, so z = 0, {anchor} and {kl}"
        if no_weight:
            return (
                "the gradient is 0 because every importance weight is 0: all out of bounds (--importance-weight-floor, "
                "--importance-weight-cap)"
            )
        return "the gradient is 0 although advantages are not: every token's ratio is clipped, or gradients underflow"
    if abs(loss) < 1e-7:
        return "the loss is 0 but its gradient is not: on-policy the ratio is 1 and the advantages cancel in the mean"
    return None


def over_ranks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One metrics row of those of all ranks: means, but sums of SUMS, MAXIMA and MINIMA; nested ones by name.

    None counts for nothing; text is the first there is; what was lost is summed by its cause. Lists have the same
    length.
    """
    out: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [v for row in rows if (v := row.get(name)) is not None]
        if not values or isinstance(values[0], str):
            out[name] = values[0] if values else None
        elif name == "lost":
            out[name] = dict(sum(map(Counter, values), Counter()))
        elif isinstance(values[0], dict):
            out[name] = over_ranks(values)
        elif isinstance(values[0], list):
            out[name] = [over_ranks(list(parts)) for parts in zip(*values, strict=True)]
        else:
            joins = [(SUMS, sum), (MAXIMA, max), (MINIMA, min)]
            join: Any = next((j for names, j in joins if name in names), statistics.fmean)
            out[name] = join(values)
    return out
