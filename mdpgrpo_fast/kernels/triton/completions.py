"""Small kernels around the rows: what couples the tokens of a completion, and the sums over rows.

Both walk the rows of a completion in order, so that every sum has one fixed order and no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schemas import Groups, Rows, Settings, new_totals
from .method import _advantage_of, _clipped_objective, _importance_ratio
from .rows import _knob
from .tiles import BLOCK_ROWS, FP_FUSION, all_but, kernel_groups, kernel_rows, kernel_settings, on_device

# What kernels read of settings and rows. G is an argument of its own, which they are not compiled for.
ADVANTAGES = tuple(
    "alpha prospect_beta prospect_gain prospect_loss kl_beta_pos kl_beta_neg sample_std goal_mean binomial prospect "
    "prospect_on_goal".split()
)
READS_SETTINGS = all_but(Settings, "softcap kl_temperature estimator aggregation two_temperatures group_size")
READS_ROWS = all_but(Rows, "tokens ref_logprobs")


class Coupling(NamedTuple):
    """What the tokens of a completion share, (B,) float32 each: its tokens; at sequence level its ρ, and -c."""

    lengths: Tensor | None = None
    ratio: Tensor | None = None
    slope: Tensor | None = None


@triton.jit
def _rows_of(i, rows, completion, n_rows, row_length, BLOCK: tl.constexpr):
    """Block i of the rows that may be a completion's, and which of them are its kept tokens."""
    if rows.completion is not None:
        row = i * BLOCK + tl.arange(0, BLOCK)
        mine = row < n_rows
        mine = mine & (tl.load(rows.completion + row, mask=mine, other=-1) == completion)
    else:
        place = i * BLOCK + tl.arange(0, BLOCK)
        row = completion * row_length + place
        mine = place < row_length
    if rows.mask is not None:
        mine = mine & (tl.load(rows.mask + row, mask=mine, other=0) != 0)
    return row, mine


# Pointers to vectors that may begin anywhere: read one element at a time, they gain nothing from being aligned, and a
# kernel for every combination would be compiled.
@triton.jit(
    do_not_specialize=["n_rows", "row_length", "G"],
    do_not_specialize_on_alignment=["logprobs_ptr", "lengths_ptr", "ratio_ptr", "slope_ptr"],
)
def _completions_kernel(
    logprobs_ptr, rows, is_per_row, groups, settings, lengths_ptr, ratio_ptr, slope_ptr, n_rows, row_length, G,
    BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per completion: its tokens; at sequence level its ρ, and Σ over its tokens of w dJ/dρ ρ / tokens, which every
    token of it shares as derivative with respect to ℓ."""
    completion = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(row_length if rows.completion is None else n_rows, BLOCK)
    length = 0.0
    log_ratio = 0.0
    for i in range(0, blocks):
        row, mine = _rows_of(i, rows, completion, n_rows, row_length, BLOCK)
        length += tl.sum(mine.to(tl.float32), axis=0)
        if logprobs_ptr is not None:
            new = tl.load(logprobs_ptr + row, mask=mine, other=0.0)
            old = tl.load(rows.old_logprobs + row, mask=mine, other=0.0).to(tl.float32)
            log_ratio += tl.sum(tl.where(mine, new - old, 0.0), axis=0)
    tl.store(lengths_ptr + completion, length)
    if settings.sequence:
        ratio, slope = _importance_ratio(log_ratio / tl.maximum(length, 1.0))
        total = 0.0
        for i in range(0, blocks):
            row, mine = _rows_of(i, rows, completion, n_rows, row_length, BLOCK)
            advantage, _ = _advantage_of(rows, is_per_row, groups, settings, G, completion, row, mine, BLOCK_G)
            _, part, _, _ = _clipped_objective(ratio, advantage, rows, is_per_row, settings, completion, row, mine)
            if rows.importance_weight is not None:
                part *= tl.load(rows.importance_weight + row, mask=mine, other=0.0).to(tl.float32)
            if settings.rescale:
                part *= _knob(rows.temperature, is_per_row.temperature, settings.temperature, completion, row, mine)
            total += tl.sum(tl.where(mine, part, 0.0), axis=0)
        tl.store(ratio_ptr + completion, ratio)
        tl.store(slope_ptr + completion, total * slope / tl.maximum(length, 1.0))


@triton.jit(do_not_specialize=["n_rows", "row_length", "num_completions"])
def _totals_kernel(
    per_row_ptr, marks_ptr, rows, completion_kl_ptr, totals_ptr, loss_ptr, n_rows, row_length, num_completions,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b < B: mean KL of completion b. Program B: loss, means, shares and maximum over all rows."""
    completion = tl.program_id(0).to(tl.int64)
    n = tl.cast(n_rows, tl.int64)
    if completion < num_completions:
        length = 0.0
        own_kl = 0.0
        for i in range(0, tl.cdiv(row_length if rows.completion is None else n_rows, BLOCK)):
            own, inside = _rows_of(i, rows, completion, n_rows, row_length, BLOCK)
            length += tl.sum(inside.to(tl.float32), axis=0)
            own_kl += tl.sum(tl.load(per_row_ptr + 2 * n + own, mask=inside, other=0.0), axis=0)
        tl.store(completion_kl_ptr + completion, own_kl / tl.maximum(length, 1.0))
    else:
        count = tl.zeros((BLOCK,), tl.float32)
        loss = tl.zeros((BLOCK,), tl.float32)
        kl = tl.zeros((BLOCK,), tl.float32)
        entropy = tl.zeros((BLOCK,), tl.float32)
        ratio = tl.zeros((BLOCK,), tl.float32)
        ratio_max = tl.zeros((BLOCK,), tl.float32)
        low = tl.zeros((BLOCK,), tl.float32)
        high = tl.zeros((BLOCK,), tl.float32)
        clamped = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n_rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            mine = row < n_rows
            if rows.mask is not None:
                mine = mine & (tl.load(rows.mask + row, mask=mine, other=0) != 0)
            count += mine.to(tl.float32)
            entropy += tl.load(per_row_ptr + n + row, mask=mine, other=0.0)
            kl += tl.load(per_row_ptr + 2 * n + row, mask=mine, other=0.0)
            r = tl.load(per_row_ptr + 3 * n + row, mask=mine, other=0.0)
            ratio += r
            ratio_max = tl.maximum(ratio_max, r)
            loss += tl.load(per_row_ptr + 4 * n + row, mask=mine, other=0.0)
            low += tl.load(marks_ptr + row, mask=mine, other=0).to(tl.float32)
            high += tl.load(marks_ptr + n + row, mask=mine, other=0).to(tl.float32)
            clamped += tl.load(marks_ptr + 2 * n + row, mask=mine, other=0).to(tl.float32)
        tokens = tl.sum(count, axis=0)
        share = 1.0 / tl.maximum(tokens, 1.0)
        tl.store(loss_ptr, tl.sum(loss, axis=0))
        tl.store(totals_ptr, tokens)
        tl.store(totals_ptr + 1, tl.sum(kl, axis=0) * share)
        tl.store(totals_ptr + 2, tl.sum(entropy, axis=0) * share)
        tl.store(totals_ptr + 3, tl.sum(low, axis=0) * share)
        tl.store(totals_ptr + 4, tl.sum(high, axis=0) * share)
        tl.store(totals_ptr + 5, tl.sum(ratio, axis=0) * share)
        tl.store(totals_ptr + 6, tl.max(ratio_max, axis=0))
        tl.store(totals_ptr + 7, tl.sum(clamped, axis=0))


# ---- launchers ------------------------------------------------------------------------------------------------------


def launch_coupling(
    logprobs: Tensor | None, rows: Rows, groups: Groups, settings: Settings, num_completions: int, row_length: int,
    knobs_per_row: bool = False,
) -> Coupling:  # fmt: skip
    """What the tokens of each completion share. logprobs (N,): wanted at sequence level where there are old ones.

    knobs_per_row: they have one value per row, also where there are as many rows as completions.
    """
    n, device = len(rows.tokens), rows.tokens.device
    lengths = torch.empty(num_completions, dtype=torch.float32, device=device)
    ratio = slope = None
    if settings.sequence:
        ratio, slope = torch.empty(2, num_completions, dtype=torch.float32, device=device)
    given, is_per_row = kernel_rows(rows, 0 if knobs_per_row else num_completions, READS_ROWS)
    with on_device(device):
        _completions_kernel[(num_completions,)](
            logprobs, given if logprobs is not None else given._replace(old_logprobs=None), is_per_row,
            kernel_groups(groups), kernel_settings(settings, READS_SETTINGS), lengths, ratio, slope, n, row_length,
            settings.group_size, BLOCK_G=triton.next_power_of_2(settings.group_size), BLOCK=BLOCK_ROWS,
            **FP_FUSION,
        )  # fmt: skip
    return Coupling(lengths, ratio, slope)


def launch_totals(
    per_row: Tensor, marks: Tensor, rows: Rows, num_completions: int, row_length: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, (B,) mean KL of each completion and the (8,) totals, in one fixed order of summation.

    row_length: rows of a completion, where rows have no map of completions.
    """
    n, device = per_row.shape[1], per_row.device
    loss, completion_kl, totals = new_totals(num_completions, device)
    if n == 0:
        return loss.zero_(), completion_kl.zero_(), totals.zero_()
    given, _ = kernel_rows(rows, num_completions, ("mask", "completion"))
    with on_device(device):
        _totals_kernel[(num_completions + 1,)](
            per_row, marks, given, completion_kl, totals, loss, n, row_length or n, num_completions, BLOCK=BLOCK_ROWS,
            num_warps=8, **FP_FUSION,
        )  # fmt: skip
    return loss, completion_kl, totals
