"""Small kernels around the rows: what couples the tokens of a completion, and the sums over rows.

Both walk the rows of a completion in order, so that every sum has one fixed order and no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schemas import GMPO as LOSS_GMPO
from ..schemas import VESPO as LOSS_VESPO
from ..schemas import Groups, Rows, Settings, new_totals
from .method import (
    CISPO,
    GMPO,
    VESPO,
    VESPO_LOG_MAX,
    VESPO_LOG_MIN,
    _advantage_of,
    _bounded,
    _gmpo_log_ratios,
    _importance_ratio,
    _kl_penalty,
    _ratio_objective,
    _weighed,
)
from .rows import _knob
from .tiles import BLOCK_ROWS, FP_FUSION, all_but, kernel_groups, kernel_rows, kernel_settings, on_device

# What kernels read of settings and rows. G is an argument of its own, which they are not compiled for.
ADVANTAGES = tuple(
    "alpha prospect_beta prospect_gain prospect_loss kl_beta_pos kl_beta_neg sample_std goal_mean binomial prospect "
    "prospect_on_goal scale leave_one_out advantage_clip".split()
)
Names = tuple[str, ...]
# Where only ℓ and weights are summed, where slopes are, and with those of the KL term.
SUM_SETTINGS: Names = ("sequence", "loss", "masks_off_policy")
SUM_ROWS: Names = ("mask", "completion", "old_logprobs", "importance_weight", "sampling_logprobs")
KL_SETTINGS: Names = ("kl_temperature", "estimator", "two_temperatures", "unbiased_kl")
KL_ROWS: Names = ("kl_beta", "ref_logprobs")
SLOPE_SETTINGS = all_but(
    Settings, f"softcap aggregation group_size top_entropy_quantile entropy_coef {' '.join(KL_SETTINGS)}"
)
SLOPE_ROWS = all_but(Rows, f"tokens logit_floor entropy_coef {' '.join(KL_ROWS)}")


class Coupling(NamedTuple):
    """What the tokens of a completion share, (B,) float32 each: its tokens; ρ, of GMPO the geometric mean, of VESPO
    log w; -c through ρ; the mean of ℓ_sampling - ℓ."""

    lengths: Tensor | None = None
    ratio: Tensor | None = None
    slope: Tensor | None = None
    drift: Tensor | None = None


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
    do_not_specialize_on_alignment=[
        "logprobs_ptr", "statistics_ptr", "lengths_ptr", "ratio_ptr", "slope_ptr", "drift_ptr"
    ],
)  # fmt: skip
def _completions_kernel(
    logprobs_ptr, statistics_ptr, rows, is_per_row, groups, settings, lengths_ptr, ratio_ptr, slope_ptr, drift_ptr,
    n_rows, row_length, G, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per completion, as of `Coupling`: its tokens; ρ or log w; Σ over its tokens of (w dJ/dρ - β KL) ρ / tokens, which
    every token of it shares as derivative with respect to ℓ; its drift."""
    completion = tl.program_id(0).to(tl.int64)
    n = tl.cast(n_rows, tl.int64)
    blocks = tl.cdiv(row_length if rows.completion is None else n_rows, BLOCK)
    length = 0.0
    log_ratio = 0.0
    drift = 0.0
    for i in range(0, blocks):
        row, mine = _rows_of(i, rows, completion, n_rows, row_length, BLOCK)
        length += tl.sum(mine.to(tl.float32), axis=0)
        if logprobs_ptr is not None:
            new = tl.load(logprobs_ptr + row, mask=mine, other=0.0)
            if drift_ptr is not None:
                given = rows.old_logprobs if rows.sampling_logprobs is None else rows.sampling_logprobs
                gap = tl.load(given + row, mask=mine, other=0.0).to(tl.float32) - new
                drift += tl.sum(tl.where(mine, gap, 0.0), axis=0)
            if rows.old_logprobs is not None:
                old = tl.load(rows.old_logprobs + row, mask=mine, other=0.0).to(tl.float32)
                own = new - old
                if settings.loss == VESPO:
                    own = _bounded(own, -VESPO_LOG_MAX, VESPO_LOG_MAX)
                elif settings.loss == GMPO:
                    advantage, _ = _advantage_of(rows, is_per_row, groups, settings, G, completion, row, mine, BLOCK_G)
                    own, _, _ = _gmpo_log_ratios(own, advantage, rows, is_per_row, settings, completion, row, mine)
                log_ratio += tl.sum(tl.where(mine, own, 0.0), axis=0)
        if settings.loss == VESPO and rows.importance_weight is not None:
            weight = tl.load(rows.importance_weight + row, mask=mine, other=1.0).to(tl.float32)
            weight = _bounded(tl.log(weight), VESPO_LOG_MIN, VESPO_LOG_MAX)
            log_ratio += tl.sum(tl.where(mine, weight, 0.0), axis=0)
    tl.store(lengths_ptr + completion, length)
    drift = drift / tl.maximum(length, 1.0)
    if drift_ptr is not None:
        tl.store(drift_ptr + completion, drift)
    if settings.loss == VESPO:
        tl.store(ratio_ptr + completion, _bounded(log_ratio, VESPO_LOG_MIN, VESPO_LOG_MAX))
    if slope_ptr is not None:
        ratio, slope = _importance_ratio(log_ratio / tl.maximum(length, 1.0))
        total = 0.0
        for i in range(0, blocks):
            row, mine = _rows_of(i, rows, completion, n_rows, row_length, BLOCK)
            advantage, beta = _advantage_of(rows, is_per_row, groups, settings, G, completion, row, mine, BLOCK_G)
            part = 0.0
            if settings.loss == GMPO:
                part = advantage
            elif settings.loss != CISPO:
                _, part, _, _ = _ratio_objective(ratio, advantage, rows, is_per_row, settings, completion, row, mine)
            tau, entropy = 1.0, 0.0
            if settings.rescale:
                tau = _knob(rows.temperature, is_per_row.temperature, settings.temperature, completion, row, mine)
            if statistics_ptr is not None:
                entropy = tl.load(statistics_ptr + 2 * n + row, mask=mine, other=0.0)
            part = _weighed(part, entropy, tau, advantage, drift, rows, is_per_row, settings, completion, row, mine)
            if settings.unbiased_kl and rows.ref_logprobs is not None:
                kl_logprob = tl.load(logprobs_ptr + row, mask=mine, other=0.0)
                if settings.two_temperatures:
                    z = tl.load(statistics_ptr + 4 * n + row, mask=mine, other=0.0)
                    z -= tl.load(statistics_ptr + row, mask=mine, other=0.0)
                    kl_logprob = z / settings.kl_temperature - tl.load(
                        statistics_ptr + 3 * n + row, mask=mine, other=0.0
                    )
                ref = tl.load(rows.ref_logprobs + row, mask=mine, other=0.0).to(tl.float32)
                kl, _, _ = _kl_penalty(kl_logprob, ref, settings.estimator)
                part -= beta * kl
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
    logprobs: Tensor | None, statistics: Tensor | None, rows: Rows, groups: Groups, settings: Settings,
    num_completions: int, row_length: int, knobs_per_row: bool = False,
) -> Coupling:  # fmt: skip
    """What the tokens of each completion share. logprobs (N,), statistics (5, N): wanted where Settings.first_pass.

    knobs_per_row: they have one value per row, also where there are as many rows as completions.
    """
    n, device, s = len(rows.tokens), rows.tokens.device, settings
    lengths = torch.empty(num_completions, dtype=torch.float32, device=device)
    ratio = slope = drift = None
    names: Names = ()
    members: Names = ("mask", "completion")
    if s.couples:
        names, members = SUM_SETTINGS, SUM_ROWS
    if s.sequence or s.loss == LOSS_GMPO:
        names, members = SLOPE_SETTINGS, SLOPE_ROWS
        ratio, slope = torch.empty(2, num_completions, dtype=torch.float32, device=device)
    elif s.loss == LOSS_VESPO:
        ratio = torch.empty(num_completions, dtype=torch.float32, device=device)
    has_kl = s.sequence and s.unbiased_kl and rows.ref_logprobs is not None
    if has_kl:
        names, members = (*names, *KL_SETTINGS), (*members, *KL_ROWS)
    if s.masks_off_policy:
        drift = torch.empty(num_completions, dtype=torch.float32, device=device)
    has_floor = slope is not None and (rows.entropy_floor is not None or s.entropy_floor != 0)
    if not has_floor and not (has_kl and s.two_temperatures):
        statistics = None
    given, is_per_row = kernel_rows(rows, 0 if knobs_per_row else num_completions, members)
    with on_device(device):
        _completions_kernel[(num_completions,)](
            logprobs, statistics, given, is_per_row, kernel_groups(groups if slope is not None else Groups()),
            kernel_settings(s, names), lengths, ratio, slope, drift, n, row_length, s.group_size,
            BLOCK_G=triton.next_power_of_2(s.group_size), BLOCK=BLOCK_ROWS, **FP_FUSION,
        )  # fmt: skip
    return Coupling(lengths, ratio, slope, drift)


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
