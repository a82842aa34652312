"""The objective on statistics of rows that are already known: no logits, a few numbers a row.

`linear_token_loss` meets a chunk of logits once. Its gradient is written unweighted, and what it has to be weighted
with comes from here, in time for the two small matrices that are made of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schemas import MARKS, ROWS, TOTALS
from .completions import _completions_kernel, _totals_kernel
from .method import _objective, _share
from .rows import _value
from .tiles import BLOCK_ROWS, on_device

BLOCK = 256
# Pointers to vectors that may begin anywhere (see token_loss).
SMALL = """statistics_ptr mask_ptr completion_ptr old_ptr ref_ptr weight_ptr temperature_ptr low_ptr high_ptr
advantage_ptr beta_ptr denominator_ptr lengths_ptr ratio_ptr slope_ptr rows_ptr marks_ptr weights_ptr""".split()


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=SMALL)
def _objective_kernel(
    statistics_ptr, mask_ptr, completion_ptr, old_ptr, ref_ptr, weight_ptr, temperature_ptr, low_ptr, high_ptr,
    advantage_ptr, beta_ptr, denominator_ptr, lengths_ptr, ratio_ptr, slope_ptr, rows_ptr, marks_ptr, weights_ptr,
    n_rows, temperature, epsilon_low, epsilon_high, delta, kl_temperature, SEQUENCE: tl.constexpr,
    ESTIMATOR: tl.constexpr, MEAN_OF_MEANS: tl.constexpr, RESCALE: tl.constexpr, TWO: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Everything that `_token_loss_kernel` says of a row, and the weights of ∂ℓ/∂x, at the KL's temperature too."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n_rows
    n = tl.cast(n_rows, tl.int64)
    kept = inside
    if HAS_MASK:
        kept = inside & (tl.load(mask_ptr + rows, mask=inside, other=0) != 0)
    completion = tl.load(completion_ptr + rows, mask=kept, other=0)
    advantage = tl.load(advantage_ptr + rows, mask=kept, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + rows, mask=kept, other=0.0).to(tl.float32)
    tau = _value(temperature_ptr, temperature, completion, rows, 1, kept, HAS_TEMPERATURE)
    low = _value(low_ptr, epsilon_low, completion, rows, 1, kept, HAS_LOW)
    high = _value(high_ptr, epsilon_high, completion, rows, 1, kept, HAS_HIGH)
    z = tl.load(statistics_ptr + 4 * n + rows, mask=kept, other=0.0) - tl.load(
        statistics_ptr + rows, mask=kept, other=0.0
    )
    # NaN where τ is not above 0, as in the kernels that read the logits.
    logprob = z / tl.where(tau > 0, tau, float("nan")) - tl.load(statistics_ptr + n + rows, mask=kept, other=0.0)
    kl_logprob = logprob
    if TWO:
        kl_logprob = z / kl_temperature - tl.load(statistics_ptr + 3 * n + rows, mask=kept, other=0.0)
    sequence_ratio, sequence_slope, length = 1.0, 0.0, 1.0
    if SEQUENCE:
        sequence_ratio = tl.load(ratio_ptr + completion, mask=kept, other=1.0)
        sequence_slope = tl.load(slope_ptr + completion, mask=kept, other=0.0)
    if MEAN_OF_MEANS:
        length = tl.load(lengths_ptr + completion, mask=kept, other=1.0)
    loss, c, kl, c_kl, ratio, clipped_low, clipped_high, clamped = _objective(
        logprob, kl_logprob, old_ptr, ref_ptr, weight_ptr, rows, kept, tau, advantage, beta, low, high, delta,
        sequence_ratio, sequence_slope, SEQUENCE, ESTIMATOR, RESCALE, HAS_OLD, HAS_REF, HAS_WEIGHT, HAS_DELTA,
    )  # fmt: skip
    share = _share(denominator_ptr, length, MEAN_OF_MEANS)
    entropy = tl.load(statistics_ptr + 2 * n + rows, mask=kept, other=0.0)
    tl.store(rows_ptr + rows, tl.where(kept, logprob, 0.0), mask=inside)
    tl.store(rows_ptr + n + rows, tl.where(kept, entropy, 0.0), mask=inside)
    tl.store(rows_ptr + 2 * n + rows, tl.where(kept, kl, 0.0), mask=inside)
    tl.store(rows_ptr + 3 * n + rows, tl.where(kept, ratio, 1.0), mask=inside)
    tl.store(rows_ptr + 4 * n + rows, tl.where(kept, share * loss, 0.0), mask=inside)
    tl.store(marks_ptr + rows, kept & clipped_low, mask=inside)
    tl.store(marks_ptr + n + rows, kept & clipped_high, mask=inside)
    tl.store(marks_ptr + 2 * n + rows, kept & clamped, mask=inside)
    if not TWO:
        c += c_kl
    tl.store(weights_ptr + rows, tl.where(kept, share * c, 0.0), mask=inside)
    if TWO:
        tl.store(weights_ptr + n + rows, tl.where(kept, share * c_kl, 0.0), mask=inside)


def launch_objective(
    statistics: Tensor,
    logprobs: Tensor | None,
    mask: Tensor | None,
    completion: Tensor,
    n_completions: int,
    advantage: Tensor,
    kl_beta: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weight: Tensor | None,
    temperature: Tensor | None,
    epsilon_low: Tensor | None,
    epsilon_high: Tensor | None,
    lengths: Tensor,
    denominator: Tensor,
    numbers: tuple[float, float, float, float, float],
    sequence: bool,
    estimator: int,
    mean_of_means: bool,
    rescale: bool,
    two: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(5, N) rows and (3, N) marks as in `token_loss`, and (1 or 2, N) weights: ∂loss/∂ℓ, and at the KL's temperature.

    statistics (5, N) of `launch_logprobs`; logprobs (N,), wanted at sequence level; every knob and completion (N,), one
    value per row; lengths (B,), denominator a scalar, float32; numbers: τ, ε_low, ε_high, delta (0: none), the KL's τ.
    At sequence level the rows must be all that their completions have.
    """
    n, device = statistics.shape[1], statistics.device
    rows = torch.empty(len(ROWS), n, dtype=torch.float32, device=device)
    marks = torch.empty(len(MARKS), n, dtype=torch.bool, device=device)
    weights = torch.empty(1 + two, n, dtype=torch.float32, device=device)
    if n == 0:
        return rows, marks, weights
    has = {
        "RESCALE": rescale,
        "HAS_MASK": mask is not None,
        "HAS_WEIGHT": importance_weight is not None,
        "HAS_TEMPERATURE": temperature is not None,
        "HAS_LOW": epsilon_low is not None,
        "HAS_HIGH": epsilon_high is not None,
        "HAS_DELTA": numbers[3] > 0,
    }
    ratio = slope = None
    with on_device(device):
        if sequence:
            own_lengths, ratio, slope = torch.empty(3, n_completions, dtype=torch.float32, device=device)
            _completions_kernel[(n_completions,)](
                mask, completion, logprobs, old_logprobs, importance_weight, temperature, epsilon_low, epsilon_high,
                advantage, kl_beta, None, None, None, None, own_lengths, ratio, slope, n, n, 1, *(1,) * 5,
                *numbers[:4], *(0.0,) * 6, SEQUENCE=True, PACKED=True, HAS_OLD=old_logprobs is not None,
                HAS_REWARDS=False, HAS_VALID=False, HAS_SLOTS=False, SAMPLE_STD=False, GOAL_MEAN=0, BINOMIAL=False,
                PROSPECT=False, PROSPECT_ON_GOAL=False, BLOCK_G=1, BLOCK=BLOCK_ROWS, **has,
            )  # fmt: skip
        _objective_kernel[(triton.cdiv(n, BLOCK),)](
            statistics, mask, completion, old_logprobs, ref_logprobs, importance_weight, temperature, epsilon_low,
            epsilon_high, advantage, kl_beta, denominator, lengths, ratio, slope, rows, marks, weights, n, *numbers,
            SEQUENCE=sequence, ESTIMATOR=estimator, MEAN_OF_MEANS=mean_of_means, TWO=two,
            HAS_OLD=old_logprobs is not None, HAS_REF=ref_logprobs is not None, BLOCK=BLOCK, num_warps=4, **has,
        )  # fmt: skip
    return rows, marks, weights


def launch_totals(
    rows: Tensor, marks: Tensor, mask: Tensor | None, completion: Tensor, n_completions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, (B,) mean KL of each completion and the (8,) totals of rows and marks, in one fixed order of summation."""
    n, device = rows.shape[1], rows.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    completion_kl = torch.empty(n_completions, dtype=torch.float32, device=device)
    totals = torch.empty(len(TOTALS), dtype=torch.float32, device=device)
    if n == 0:
        return loss.zero_(), completion_kl.zero_(), totals.zero_()
    with on_device(device):
        _totals_kernel[(n_completions + 1,)](
            rows, marks, mask, completion, completion_kl, totals, loss, n, n, n_completions,
            HAS_MASK=mask is not None, PACKED=True, BLOCK=BLOCK_ROWS, num_warps=8,
        )  # fmt: skip
    return loss, completion_kl, totals
