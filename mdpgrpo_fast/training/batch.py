"""A step's completions with their rewards and advantages, and the micro-batches that forward passes take."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..config import MDPGRPOConfig
from ..data import Example
from ..models.packing import Packed, bins, pack
from ..reference import Advantages
from ..rewards import Score
from ..rollout.generate import Rollout


@dataclass
class Batch:
    """One step's completions with everything the updates need. N = P * G rows, groups adjacent."""

    rollout: Rollout
    examples: list[Example]
    responses: list[str]
    scores: list[Score]
    rewards: Tensor  # (P, G)
    valid: Tensor  # (P, G) bool
    adv: Advantages
    mask: Tensor  # (N, L) bool: tokens that count in the loss
    weight: Tensor | None  # (N, L) importance weight, `corrected` only
    counted: list[int]  # N: tokens that count
    contributing: list[int]  # N: of those, what the loss is to look at (skip_idle)
    prompt_lengths: list[int]  # N
    lengths: list[int]  # N: tokens of each completion


@dataclass
class Piece:
    """Completions of one forward pass: padded rows, or packed groups."""

    inputs: Packed | tuple[Tensor, Tensor, Tensor, Tensor]  # or prompt ids, their mask, tokens, their mask
    mask: Tensor | None  # of the rows of tokens; None: all
    lengths: list[int]  # tokens of each completion that the loss looks at
    prompts: list[int]  # tokens through the model: of each prompt in it
    completions: list[list[int]]  # and of the completions of each prompt
    counted: int  # tokens that count, whether or not the loss looks at them
    objective: dict[str, Any] = field(default_factory=dict)  # what else the loss takes of these completions


def _objective(batch: Batch, method: MDPGRPOConfig, rows: Any, weight: Tensor | None) -> dict[str, Any]:
    return {
        "advantage": batch.adv.advantage.flatten()[rows],
        "kl_beta": batch.adv.kl_beta.flatten()[rows],
        "temperature": batch.rollout.temperature[rows] if method.temperature_objective == "per_row" else 1.0,
        "importance_weight": weight,
    }


def padded_pieces(batch: Batch, method: MDPGRPOConfig, size: int) -> list[Piece]:
    """Slices of `size` rows, cut to their own longest prompt and completion."""
    r, pieces = batch.rollout, []
    prompt_lengths, lengths = batch.prompt_lengths, batch.lengths
    for start in range(0, len(r.tokens), size):
        rows = slice(start, start + size)
        first = r.prompt_ids.shape[1] - max(prompt_lengths[rows])
        width = max(lengths[rows])
        inputs = (r.prompt_ids[rows, first:], r.prompt_mask[rows, first:], r.tokens[rows, :width], r.mask[rows, :width])
        weight = None if batch.weight is None else batch.weight[rows, :width]
        pieces.append(
            Piece(
                inputs,
                batch.mask[rows, :width],
                batch.contributing[rows],
                prompt_lengths[rows],
                [[n] for n in lengths[rows]],
                sum(batch.counted[rows]),
                _objective(batch, method, rows, weight),
            )
        )
    return pieces


def packed_bins(batch: Batch, method: MDPGRPOConfig, budget: int) -> list[list[list[int]]]:
    """Groups of each micro-batch, each a list of rows; only those that the loss looks at, or at least counts."""
    # bnpo divides by the tokens of its own micro-batch, looked at or not.
    needed = batch.counted if method.aggregation == "bnpo" else batch.contributing
    size = method.num_generations
    groups = [[i for i in range(s, s + size) if needed[i]] for s in range(0, len(needed), size)]
    groups = [rows for rows in groups if rows]
    costs = [batch.prompt_lengths[rows[0]] + sum(batch.lengths[i] for i in rows) for rows in groups]
    return [[groups[i] for i in b] for b in bins(costs, budget)] if groups else []


def packed_pieces(batch: Batch, method: MDPGRPOConfig, packed: list[list[list[int]]], count: int) -> list[Piece]:
    """A piece for each of `packed_bins`, and as many of nothing as make `count`: every rank runs as many passes."""
    r, pieces = batch.rollout, []
    for groups in packed:
        p = pack(r.prompt_ids, batch.prompt_lengths, r.tokens, batch.lengths, groups)
        weight = None if batch.weight is None else batch.weight.flatten()[p.source]
        rows = torch.tensor(p.rows, device=r.tokens.device)
        pieces.append(
            Piece(
                p,
                None,
                [batch.contributing[i] for i in p.rows],
                [b - a for a, b in p.layout.prompts],
                [[b - a for a, b in spans] for spans in p.layout.completions],
                sum(p.lengths),
                _objective(batch, method, rows, weight),
            )
        )
    while len(pieces) < count:
        # The first token of the first completion, which does not count.
        one = pack(r.prompt_ids, batch.prompt_lengths, r.tokens, [1], [[0]])
        nothing = torch.zeros(1, device=r.tokens.device)
        objective = {"advantage": nothing, "kl_beta": nothing, "temperature": 1.0}
        objective["importance_weight"] = None if batch.weight is None else nothing
        pieces.append(Piece(one, nothing.bool(), [0], batch.prompt_lengths[:1], [[1]], 0, objective))
    return pieces


def replace_groups(rollout: Rollout, groups: list[int], by: Rollout, size: int) -> Rollout:
    """The rollout with some of its groups of `size` rows replaced by those of another, in order."""
    device = rollout.tokens.device
    rows = (torch.tensor(groups, device=device)[:, None] * size + torch.arange(size, device=device)).flatten()

    def one(name: str) -> Tensor:
        ours, theirs = getattr(rollout, name), getattr(by, name)
        if ours.ndim == 2:
            width = max(ours.shape[1], theirs.shape[1])
            left = name.startswith("prompt")
            ours, theirs = (
                torch.nn.functional.pad(x, (gap, 0) if left else (0, gap))
                for x in (ours, theirs)
                for gap in [width - x.shape[1]]
            )
        return ours.index_copy(0, rows, theirs)

    return Rollout(**{f.name: one(f.name) for f in fields(Rollout)})
