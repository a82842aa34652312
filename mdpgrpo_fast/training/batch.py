"""A step's completions with their rewards and advantages, and the micro-batches that forward passes take."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError, MDPGRPOConfig, TrainConfig
from ..data import Example
from ..models.packing import PackedRow, Packing, bins, pack
from ..models.shared_prompt import upload
from ..reference import Advantages
from ..rewards import Score
from ..rollout.generate import Rollout

DEFAULT_BUDGET = 8192  # tokens of a packed forward pass
# Pairs of a query with a key, masked ones too, over those of padded rows: as many as fewer tokens elsewhere outweigh.
MAX_PAIR_RATIO = 2.0


@dataclass
class Batch:
    """One step's completions with everything the updates need. B = P * G rows, groups adjacent."""

    rollout: Rollout
    examples: list[Example]
    responses: list[str]
    scores: list[Score]
    rewards: Tensor  # (P, G)
    valid: Tensor  # (P, G) bool
    adv: Advantages
    mask: Tensor  # (B, L) bool: tokens that count in the loss
    counted: list[int]  # B: tokens that count
    contributing: list[int]  # B: of those, what the loss is to look at (skip_idle)
    prompt_lengths: list[int]  # B
    lengths: list[int]  # B: tokens of each completion
    weight: Tensor | None = None  # (B, L) importance weight of the sampler's log-probs, where the method has one
    outside: Tensor | None = None  # (B, L) bool: weights that were out of bounds
    logit_floor: Tensor | None = None  # (B, L) what tells the tokens that log-probs are over, truncated_logprobs only
    sampling: Tensor | None = None  # (B, L) the sampler's log-probs, where the loss measures its drift by them
    kl: Tensor | None = None  # (B, L) KL estimates whose sums the rewards of the advantages lack, kl_in = reward only
    staleness: int = 0  # steps whose updates the weights that sampled lack


@dataclass
class MicroBatch:
    """Completions of one forward pass: padded rows, or packed groups."""

    inputs: PackedRow | tuple[Tensor, Tensor, Tensor, Tensor]  # or prompt ids, their mask, tokens, their mask
    mask: Tensor | None  # of the rows of tokens; None: all
    lengths: list[int]  # tokens of each completion that the loss looks at
    prompts: list[int]  # tokens through the model: of each prompt in it
    completions: list[list[int]]  # and of the completions of each prompt
    counted: int  # tokens that count, whether or not the loss looks at them
    objective: dict[str, Any] = field(default_factory=dict)  # what else the loss takes of these completions
    rows: Any = None  # of the batch, as an index: those of padded rows

    def of(self, values: Tensor) -> Tensor:
        """Its tokens' of (B, L) values of the batch, in the form of its rows."""
        if isinstance(self.inputs, PackedRow):
            return values.flatten()[self.inputs.source]
        return values[self.rows, : self.inputs[2].shape[1]]

    def put(self, found: Tensor, values: Tensor) -> None:
        """The inverse: values of its rows go to their places in (B, L). An empty one has nothing to put."""
        if isinstance(self.inputs, PackedRow):
            if self.counted:
                values.view(-1)[self.inputs.source] = found
        else:
            values[self.rows, : found.shape[1]] = found


# ---- padded rows ----------------------------------------------------------------------------------------------------


def padded_micro_batches(
    batch: Batch, method: MDPGRPOConfig, size: int, part: list[int] | None = None
) -> list[MicroBatch]:
    """Of `size` rows each, cut to their own longest prompt and completion. part: rows of the batch; None: all."""
    r, micro_batches = batch.rollout, []
    every = range(len(r.tokens)) if part is None else part
    for start in range(0, len(every), size):
        members = every[start : start + size]
        rows: Any = slice(start, start + size)
        if part is not None:
            rows = upload(torch.tensor(members), r.tokens.device)
        prompt_lengths, lengths = ([of[i] for i in members] for of in (batch.prompt_lengths, batch.lengths))
        first, width = r.prompt_ids.shape[1] - max(prompt_lengths), max(lengths)
        inputs = (r.prompt_ids[rows, first:], r.prompt_mask[rows, first:], r.tokens[rows, :width], r.mask[rows, :width])
        made = MicroBatch(
            inputs=inputs,
            mask=batch.mask[rows, :width],
            lengths=[batch.contributing[i] for i in members],
            prompts=prompt_lengths,
            completions=[[n] for n in lengths],
            counted=sum(batch.counted[i] for i in members),
            rows=rows,
        )
        made.objective = _objective(batch, method, made)
        micro_batches.append(made)
    return micro_batches


def _objective(batch: Batch, method: MDPGRPOConfig, made: MicroBatch) -> dict[str, Any]:
    """Knobs of a micro-batch's completions, and what it has per token."""
    rows, weight, sampling = made.rows, batch.weight, batch.sampling
    return {
        "advantage": batch.adv.advantage.flatten()[rows],
        "kl_beta": batch.adv.kl_beta.flatten()[rows],
        "temperature": batch.rollout.temperature[rows] if method.temperature_objective == "per_row" else 1.0,
        "importance_weight": None if weight is None else made.of(weight),
        **({} if sampling is None else {"sampling_logprobs": made.of(sampling)}),
        **({} if batch.logit_floor is None else {"logit_floor": made.of(batch.logit_floor)}),
    }


# ---- packed groups --------------------------------------------------------------------------------------------------


def micro_batch_budget(
    packing: Packing, prompt_lengths: list[int], run: TrainConfig, method: MDPGRPOConfig
) -> tuple[int, str | None]:
    """Tokens of a packed forward pass; or 0, to pad, and the reason in one line.

    prompt_lengths: of all prompts of the run. Raises: ConfigError for fewer tokens than the largest group may need.
    """
    g, completion, given = method.num_generations, run.max_completion_length, run.tokens_per_micro_batch
    longest, mean = max(prompt_lengths), sum(prompt_lengths) / len(prompt_lengths)
    largest_group = longest + g * completion
    mode = packing.mode_for(longest + completion)
    if mode is None:
        reason = f"prompts cannot be shared inside a group: {packing.too_long}"
        if run.packing == "on":
            raise ConfigError(reason)
        return 0, reason
    pair_ratio = (mean + g * completion) ** 2 / (g * (mean + completion) ** 2)
    if mode == "masks" and pair_ratio > MAX_PAIR_RATIO and run.packing == "auto":
        return 0, (
            f"prompts are not shared inside a group: under masks attention would look at {pair_ratio:.1f} times the "
            "pairs; shorter completions, --attention sdpa where the model has it, or --packing on change that"
        )
    if given is not None and given < largest_group:
        raise ConfigError(
            f"tokens_per_micro_batch must hold a whole group: a prompt of {longest} and {g} completions of "
            f"{completion} tokens make {largest_group}; got {given}"
        )
    # Under masks attention grows with the square of what is packed together: no more than one group needs.
    return given or (largest_group if mode == "masks" else max(DEFAULT_BUDGET, largest_group)), None


def budget_and_notes(
    packing: Packing | None, prompt_lengths: list[int], run: TrainConfig, method: MDPGRPOConfig
) -> tuple[int, list[str]]:
    """The same of a run, and what is to be said of it. packing: None, where groups are padded as asked for."""
    if packing is None:
        return 0, []
    budget, why_padded = micro_batch_budget(packing, prompt_lengths, run, method)
    if why_padded:
        return budget, [why_padded]
    unused = run.micro_batch_size != TrainConfig.micro_batch_size
    return budget, ["micro_batch_size is not used: groups are packed, by tokens_per_micro_batch"] * unused


def bin_groups(
    batch: Batch, method: MDPGRPOConfig, budget: int, part: list[int] | None = None
) -> list[list[list[int]]]:
    """Groups of each micro-batch, each a list of rows; only those that the loss looks at, or at least counts.

    part: groups of the batch; None: all.
    """
    # bnpo divides by the tokens of its own micro-batch, looked at or not.
    needed = batch.counted if method.aggregation == "bnpo" else batch.contributing
    size = method.num_generations
    starts = [g * size for g in (range(len(needed) // size) if part is None else part)]
    groups = [[i for i in range(s, s + size) if needed[i]] for s in starts]
    groups = [rows for rows in groups if rows]
    costs = [batch.prompt_lengths[rows[0]] + sum(batch.lengths[i] for i in rows) for rows in groups]
    return [[groups[i] for i in b] for b in bins(costs, budget)] if groups else []


def packed_micro_batches(
    batch: Batch, method: MDPGRPOConfig, binned: list[list[list[int]]], num_passes: int
) -> list[MicroBatch]:
    """A micro-batch for each of `bin_groups`, and empty ones up to num_passes: every rank runs as many passes."""
    r, micro_batches = batch.rollout, []
    for groups in binned:
        packed = pack(r.prompt_ids, batch.prompt_lengths, r.tokens, batch.lengths, groups)
        made = MicroBatch(
            inputs=packed,
            mask=None,
            lengths=[batch.contributing[i] for i in packed.rows],
            prompts=[end - start for start, end in packed.layout.prompts],
            completions=[[end - start for start, end in spans] for spans in packed.layout.completions],
            counted=sum(packed.lengths),
            rows=upload(torch.tensor(packed.rows), r.tokens.device),
        )
        made.objective = _objective(batch, method, made)
        micro_batches.append(made)
    while len(micro_batches) < num_passes:
        micro_batches.append(_empty_micro_batch(batch))
    return micro_batches


def _empty_micro_batch(batch: Batch) -> MicroBatch:
    """The first token of the first completion, which does not count."""
    r = batch.rollout
    packed = pack(r.prompt_ids, batch.prompt_lengths, r.tokens, [1], [[0]])
    zero = torch.zeros(1, device=r.tokens.device)
    objective = {"advantage": zero, "kl_beta": zero, "temperature": 1.0}
    objective["importance_weight"] = None if batch.weight is None else zero
    objective |= {} if batch.sampling is None else {"sampling_logprobs": zero}
    objective |= {} if batch.logit_floor is None else {"logit_floor": zero}
    return MicroBatch(packed, zero.bool(), [0], batch.prompt_lengths[:1], [[1]], 0, objective)


# ---- parts with an update of their own ------------------------------------------------------------------------------


def mini_batches(groups: int, parts: int, seed: str) -> list[list[int] | None]:
    """Which of the groups of a rank each part has, in a random order of the seed, as many on every rank as on another.

    One part has all of them: None. The groups of a part stand in the batch's own order, where like prompts are
    neighbours.
    """
    if parts == 1:
        return [None]
    order = random.Random(seed).sample(range(groups), groups)
    bounds = [i * groups // parts for i in range(parts + 1)]
    return [sorted(order[start:end]) for start, end in itertools.pairwise(bounds)]


# ---- dynamic sampling -----------------------------------------------------------------------------------------------


def replace_groups(rollout: Rollout, groups: list[int], by: Rollout, size: int) -> Rollout:
    """The rollout with some of its groups of `size` rows replaced by those of another, in order."""
    device = rollout.tokens.device
    rows = (torch.tensor(groups, device=device)[:, None] * size + torch.arange(size, device=device)).flatten()

    def replaced(name: str) -> Tensor:
        old: Tensor = getattr(rollout, name)
        new: Tensor = getattr(by, name)
        if old.ndim == 2:
            width = max(old.shape[1], new.shape[1])
            on_the_left = name.startswith("prompt")
            old, new = (
                torch.nn.functional.pad(x, (gap, 0) if on_the_left else (0, gap))
                for x in (old, new)
                for gap in [width - x.shape[1]]
            )
        return old.index_copy(0, rows, new)

    return Rollout(**{f.name: replaced(f.name) for f in fields(Rollout)})
