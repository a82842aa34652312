"""The objective on statistics of rows that are already known: no logits, a few numbers a row.

`linear_token_loss` meets a chunk of logits once. Its gradient is written unweighted, and what it has to be weighted
with comes from here, in time for the two small matrices that are made of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schemas import Groups, Rows, Settings, new_outputs
from .completions import ADVANTAGES, Coupling, launch_coupling
from .method import _coupled, _token_objective, _token_share
from .rows import _knob
from .tiles import FP_FUSION, all_but, kernel_rows, kernel_settings, on_device

BLOCK = 128  # one row a thread
# What the objective of a row is made of, beside its logits.
READS_SETTINGS = all_but(Settings, f"softcap group_size top_entropy_quantile {' '.join(ADVANTAGES)}")
READS_ROWS = all_but(Rows, "tokens sampling_logprobs logit_floor")


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=[
        "statistics_ptr", "denominator_ptr", "lengths_ptr", "ratio_ptr", "slope_ptr", "drift_ptr", "weights_ptr"
    ],
)  # fmt: skip
def _objective_kernel(
    statistics_ptr, rows, is_per_row, settings, denominator_ptr, lengths_ptr, ratio_ptr, slope_ptr, drift_ptr,
    per_row_ptr, marks_ptr, weights_ptr, n_rows, BLOCK: tl.constexpr,
):  # fmt: skip
    """Everything that `_token_loss_kernel` says of a row, and the weights of ∂ℓ/∂x, at the KL's temperature too, and of
    -∂H/∂x."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n_rows
    n = tl.cast(n_rows, tl.int64)
    kept = inside
    if rows.mask is not None:
        kept = inside & (tl.load(rows.mask + row, mask=inside, other=0) != 0)
    completion = tl.load(rows.completion + row, mask=kept, other=0)
    advantage = _knob(rows.advantage, is_per_row.advantage, 0.0, completion, row, kept)
    beta = _knob(rows.kl_beta, is_per_row.kl_beta, 0.0, completion, row, kept)
    tau = _knob(rows.temperature, is_per_row.temperature, settings.temperature, completion, row, kept)
    z = tl.load(statistics_ptr + 4 * n + row, mask=kept, other=0.0) - tl.load(
        statistics_ptr + row, mask=kept, other=0.0
    )
    # NaN where τ is not above 0, as in the kernels that read the logits.
    logprob = z / tl.where(tau > 0, tau, float("nan")) - tl.load(statistics_ptr + n + row, mask=kept, other=0.0)
    kl_logprob = logprob
    if settings.two_temperatures:
        kl_logprob = z / settings.kl_temperature - tl.load(statistics_ptr + 3 * n + row, mask=kept, other=0.0)
    coupled = _coupled(ratio_ptr, slope_ptr, drift_ptr, completion, kept)
    entropy = tl.load(statistics_ptr + 2 * n + row, mask=kept, other=0.0)
    loss, c, kl, c_kl, bonus, ratio, clipped_low, clipped_high, clamped = _token_objective(
        logprob, kl_logprob, entropy, tau, advantage, beta, coupled, rows, is_per_row, settings, completion, row, kept
    )
    share = _token_share(denominator_ptr, lengths_ptr, settings, completion, kept)
    tl.store(per_row_ptr + row, tl.where(kept, logprob, 0.0), mask=inside)
    tl.store(per_row_ptr + n + row, tl.where(kept, entropy, 0.0), mask=inside)
    tl.store(per_row_ptr + 2 * n + row, tl.where(kept, kl, 0.0), mask=inside)
    tl.store(per_row_ptr + 3 * n + row, tl.where(kept, ratio, 1.0), mask=inside)
    tl.store(per_row_ptr + 4 * n + row, tl.where(kept, share * loss, 0.0), mask=inside)
    tl.store(marks_ptr + row, kept & clipped_low, mask=inside)
    tl.store(marks_ptr + n + row, kept & clipped_high, mask=inside)
    tl.store(marks_ptr + 2 * n + row, kept & clamped, mask=inside)
    if not settings.two_temperatures:
        c += c_kl
    tl.store(weights_ptr + row, tl.where(kept, share * c, 0.0), mask=inside)
    if settings.two_temperatures:
        tl.store(weights_ptr + n + row, tl.where(kept, share * c_kl, 0.0), mask=inside)
    if rows.entropy_coef is not None or settings.entropy_coef is not None:
        place = weights_ptr + (1 + settings.two_temperatures) * n + row
        tl.store(place, tl.where(kept, share * bonus, 0.0), mask=inside)


def launch_objective(
    statistics: Tensor, logprobs: Tensor | None, rows: Rows, settings: Settings, lengths: Tensor, denominator: Tensor,
    num_completions: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(5, N) rows and (3, N) marks as in `token_loss`, and (1 to 3, N) weights: ∂loss/∂ℓ, where there are two
    temperatures at the KL's, and where there is an entropy bonus -∂loss/∂H.

    statistics (5, N) and logprobs (N,), wanted where Settings.first_pass, of `launch_logprobs`; every member of rows
    (N,), with a completion each; lengths (B,), denominator a scalar, float32. Where Settings.couples the rows must be
    all that their completions have.
    """
    settings = settings.without_groups().settled(rows)
    n, device = statistics.shape[1], statistics.device
    per_row, marks = new_outputs(n, device)
    terms = 1 + settings.two_temperatures + settings.has_bonus(rows)
    weights = torch.empty(terms, n, dtype=torch.float32, device=device)
    if n == 0:
        return per_row, marks, weights
    # One value per row, also where there are as many rows as completions.
    given, is_per_row = kernel_rows(rows, 0, READS_ROWS)
    coupling = Coupling()
    if settings.couples:
        if not settings.first_pass(rows):
            logprobs = None
        coupling = launch_coupling(logprobs, statistics, rows, Groups(), settings, num_completions, n, True)
    with on_device(device):
        _objective_kernel[(triton.cdiv(n, BLOCK),)](
            statistics, given, is_per_row, kernel_settings(settings, READS_SETTINGS), denominator, lengths,
            *coupling[1:], per_row, marks, weights, n, BLOCK=BLOCK, num_warps=4, **FP_FUSION,
        )  # fmt: skip
    return per_row, marks, weights
