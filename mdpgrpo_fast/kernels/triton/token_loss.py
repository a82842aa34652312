"""The objective over materialised logits: rewards or advantages and logits in, loss, gradient and statistics out.

Up to three launches: `_completions_kernel` (lengths, and what couples the tokens of a completion at sequence level),
`_token_loss_kernel` (every row: advantage, one sweep for the log-sum-exp, objective, one for the gradient) and
`_totals_kernel` (sums, in a fixed order). Off-policy at sequence level `_logprobs_kernel` comes first, because ρ needs
ℓ of the whole completion; the main kernel then reuses its statistics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schemas import MARKS, ROWS, TOTALS, Flags, Numbers
from .completions import _advantage_of, _completions_kernel, _totals_kernel
from .logprobs import launch_logprobs
from .method import _objective, _share
from .rows import (
    LOG2E,
    _columns,
    _completion_of,
    _read_row,
    _target,
    _temperature,
    _token,
    _value,
    _write_gradient,
    _write_zeros,
)
from .tiles import BLOCK_ROWS, CANDIDATES, Tile, fit, grid_for, launch_options, on_device, per_row
from .tuning import tile_for

# Pointers to vectors that may begin anywhere, as slices of a batch do: read one element at a time, they gain nothing
# from being aligned, and a kernel for every combination would be compiled.
SMALL = """tokens_ptr mask_ptr completion_ptr old_ptr ref_ptr weight_ptr temperature_ptr low_ptr high_ptr advantage_ptr
beta_ptr rewards_ptr constraints_ptr valid_ptr slots_ptr denominator_ptr lengths_ptr ratio_ptr slope_ptr statistics_ptr
rows_ptr marks_ptr""".split()


@triton.jit(
    do_not_specialize=["n_rows", "row_length", "tiles", "n_completions", "G"], do_not_specialize_on_alignment=SMALL
)
def _token_loss_kernel(
    logits_ptr, gradient_ptr, tokens_ptr, mask_ptr, completion_ptr, old_ptr, ref_ptr, weight_ptr, temperature_ptr,
    low_ptr, high_ptr, advantage_ptr, beta_ptr, rewards_ptr, constraints_ptr, valid_ptr, slots_ptr, denominator_ptr,
    lengths_ptr, ratio_ptr, slope_ptr, statistics_ptr, rows_ptr, marks_ptr, n_rows, row_length, tiles, n_completions,
    stride_lb, stride_ll, stride_gb, stride_gl, G, temperature_per_row, low_per_row, high_per_row, advantage_per_row,
    beta_per_row, temperature, epsilon_low, epsilon_high, delta, softcap, kl_temperature, alpha, prospect_beta,
    prospect_gain, prospect_loss, beta_pos, beta_neg, SEQUENCE: tl.constexpr, ESTIMATOR: tl.constexpr,
    MEAN_OF_MEANS: tl.constexpr, RESCALE: tl.constexpr, TWO: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    HAS_MASK: tl.constexpr, PACKED: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_STATISTICS: tl.constexpr, HAS_REWARDS: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_SLOTS: tl.constexpr, SAMPLE_STD: tl.constexpr, GOAL_MEAN: tl.constexpr,
    BINOMIAL: tl.constexpr, PROSPECT: tl.constexpr, PROSPECT_ON_GOAL: tl.constexpr, BLOCK_G: tl.constexpr,
    V: tl.constexpr, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr, AXIS: tl.constexpr, STAGES: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Rows program_id, program_id + programs, ...: the whole objective of each, and its gradient row.

    Per row, ∂loss/∂z = a (onehot - p) + a_kl (onehot - p_kl), a = c / τ: a cross-entropy with one weight per row.
    """
    first = tl.program_id(0)
    for index in range(first, n_rows if PERSISTENT else first + 1, tl.num_programs(0) if PERSISTENT else 1):
        # Offsets of rows exceed 2³¹ elements long before memory is full.
        row = tl.cast(index, tl.int64)
        logits = logits_ptr + row // row_length * stride_lb + row % row_length * stride_ll
        gradient = logits
        if HAS_GRADIENT:
            gradient = gradient_ptr + row // row_length * stride_gb + row % row_length * stride_gl
        kept = True
        if HAS_MASK:
            kept = tl.load(mask_ptr + row) != 0
        if kept:
            completion, known = _completion_of(completion_ptr, row, row_length, n_completions, PACKED)
            advantage, beta = _advantage_of(
                advantage_ptr, beta_ptr, rewards_ptr, constraints_ptr, valid_ptr, slots_ptr, completion, row, True,
                advantage_per_row, beta_per_row, G, alpha, prospect_beta, prospect_gain, prospect_loss, beta_pos,
                beta_neg, HAS_REWARDS, HAS_VALID, HAS_SLOTS, SAMPLE_STD, GOAL_MEAN, BINOMIAL, PROSPECT,
                PROSPECT_ON_GOAL, BLOCK_G,
            )  # fmt: skip
            tau = _temperature(temperature_ptr, temperature, completion, row, temperature_per_row, HAS_TEMPERATURE)
            low = _value(low_ptr, epsilon_low, completion, row, low_per_row, True, HAS_LOW)
            high = _value(high_ptr, epsilon_high, completion, row, high_per_row, True, HAS_HIGH)
            k, k_kl = LOG2E / tau, LOG2E / kl_temperature
            token = _token(tokens_ptr, row, V)
            if HAS_STATISTICS:
                # Not from the logits: nothing here keeps a fast warp from overwriting them before a slow one reads.
                z = tl.load(statistics_ptr + 4 * tl.cast(n_rows, tl.int64) + row)
                peak = tl.load(statistics_ptr + row)
                log_total = tl.load(statistics_ptr + n_rows + row)
                entropy = tl.load(statistics_ptr + 2 * tl.cast(n_rows, tl.int64) + row)
                log_total_kl = tl.load(statistics_ptr + 3 * tl.cast(n_rows, tl.int64) + row)
            else:
                z = tl.where(known, _target(logits, token, softcap, HAS_SOFTCAP), float("nan"))
                peak, log_total, entropy, log_total_kl = _read_row(
                    logits, tiles, k, k_kl, softcap, "evict_last" if HAS_GRADIENT else "evict_first", TWO, HAS_SOFTCAP,
                    V, BLOCK_V, WIDTH, AXIS, STAGES,
                )  # fmt: skip
            logprob = (z - peak) / tau - log_total

            kl_logprob = (z - peak) / kl_temperature - log_total_kl if TWO else logprob
            sequence_ratio, sequence_slope, length = 1.0, 0.0, 1.0
            if SEQUENCE:
                sequence_ratio = tl.load(ratio_ptr + completion)
                sequence_slope = tl.load(slope_ptr + completion)
            if MEAN_OF_MEANS:
                length = tl.load(lengths_ptr + completion)
            loss, c, kl, c_kl, ratio, clipped_low, clipped_high, clamped = _objective(
                logprob, kl_logprob, old_ptr, ref_ptr, weight_ptr, row, True, tau, advantage, beta, low, high, delta,
                sequence_ratio, sequence_slope, SEQUENCE, ESTIMATOR, RESCALE, HAS_OLD, HAS_REF, HAS_WEIGHT, HAS_DELTA,
            )  # fmt: skip
            share = _share(denominator_ptr, length, MEAN_OF_MEANS)

            n = tl.cast(n_rows, tl.int64)
            tl.store(rows_ptr + row, logprob)
            tl.store(rows_ptr + n + row, entropy)
            tl.store(rows_ptr + 2 * n + row, kl)
            tl.store(rows_ptr + 3 * n + row, ratio)
            tl.store(rows_ptr + 4 * n + row, share * loss)
            tl.store(marks_ptr + row, clipped_low)
            tl.store(marks_ptr + n + row, clipped_high)
            tl.store(marks_ptr + 2 * n + row, clamped)

            if HAS_GRADIENT:
                a, a_kl = share * c / tau, 0.0
                if TWO:
                    a_kl = share * c_kl / kl_temperature
                else:
                    a += share * c_kl / tau
                if (a == 0.0) & (a_kl == 0.0):
                    _write_zeros(gradient, tiles, V, BLOCK_V, WIDTH, AXIS)
                else:
                    _write_gradient(logits, gradient, tiles, token, peak, log_total, log_total_kl, a, a_kl, k, k_kl,
                                    softcap, TWO, HAS_SOFTCAP, V, BLOCK_V, WIDTH, AXIS, STAGES)  # fmt: skip
        else:
            n = tl.cast(n_rows, tl.int64)
            for i in tl.static_range(5):
                tl.store(rows_ptr + i * n + row, 1.0 if i == 3 else 0.0)
            for i in tl.static_range(3):
                tl.store(marks_ptr + i * n + row, False)
            if HAS_GRADIENT:
                _write_zeros(gradient, tiles, V, BLOCK_V, WIDTH, AXIS)


@triton.jit(do_not_specialize=["n_rows", "row_length", "tiles"], do_not_specialize_on_alignment=["scale_ptr"])
def _scale_kernel(
    gradient_ptr, scale_ptr, n_rows, row_length, tiles, stride_gb, stride_gl, V: tl.constexpr, BLOCK_V: tl.constexpr,
    WIDTH: tl.constexpr, AXIS: tl.constexpr, STAGES: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """gradient *= scale; a scale of 1 costs the launch and no traffic, and the host never looks."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        first = tl.program_id(0)
        for index in range(first, n_rows if PERSISTENT else first + 1, tl.num_programs(0) if PERSISTENT else 1):
            row = tl.cast(index, tl.int64)
            gradient = gradient_ptr + row // row_length * stride_gb + row % row_length * stride_gl
            for i in tl.range(0, tiles, num_stages=STAGES):
                columns = _columns(i * BLOCK_V, BLOCK_V, WIDTH, AXIS)
                g = tl.load(gradient + columns).to(tl.float32) * scale
                tl.store(gradient + columns, g.to(gradient.dtype.element_ty))
            if V % BLOCK_V != 0:
                columns = _columns(V // BLOCK_V * BLOCK_V, BLOCK_V, WIDTH, AXIS)
                g = tl.load(gradient + columns, mask=columns < V, other=0.0).to(tl.float32) * scale
                tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=columns < V)


# ---- launchers ------------------------------------------------------------------------------------------------------


def launch_token_loss(
    logits: Tensor,
    gradient: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    completion: Tensor | None,
    n_completions: int,
    rewards: Tensor | None,
    num_constraints: Tensor | None,
    valid: Tensor | None,
    slots: Tensor | None,
    advantage: Tensor | None,
    kl_beta: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weight: Tensor | None,
    temperature: Tensor | None,
    epsilon_low: Tensor | None,
    epsilon_high: Tensor | None,
    denominator: Tensor | None,
    max_completion_length: int,
    numbers: Numbers,
    flags: Flags,
    tile: Tile | None = None,
    launch_rows: Callable[..., None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (), rows (5, N) as in ROWS, marks (3, N) as in MARKS, KL per completion (B,), totals (8,) as in TOTALS.

    logits (B, L, V), or (1, T, V) with completion (T,), unit stride in V; N rows in all. Everything else is flat and
    contiguous: tokens, mask (uint8), old_logprobs, ref_logprobs, importance_weight (N,); advantage, kl_beta,
    temperature, epsilon_low, epsilon_high (n_completions,) or (N,); rewards and valid (uint8) (P * G,) by groups,
    num_constraints (P,), slots (n_completions,) place of each completion in the rewards, None: in order; denominator a
    float32 scalar, or None: that of this batch. `gradient` is written, and may be the logits; None: no gradient.
    launch_rows: in place of `_token_loss_kernel`, with its tensors and the numbers and flags.
    """
    b, length, vocab = logits.shape
    n, device, f = b * length, logits.device, flags
    loss = torch.empty((), dtype=torch.float32, device=device)
    rows = torch.empty(len(ROWS), n, dtype=torch.float32, device=device)
    marks = torch.empty(len(MARKS), n, dtype=torch.bool, device=device)
    completion_kl = torch.empty(n_completions, dtype=torch.float32, device=device)
    totals = torch.empty(len(TOTALS), dtype=torch.float32, device=device)
    if n == 0:
        return loss.zero_(), rows, marks, completion_kl.zero_(), totals.zero_()
    advantage_numbers = numbers[6:]
    knobs = [per_row(x, n_completions) for x in (temperature, epsilon_low, epsilon_high, advantage, kl_beta)]
    method = {
        "RESCALE": f.rescale,
        "HAS_MASK": mask is not None,
        "PACKED": completion is not None,
        "HAS_WEIGHT": importance_weight is not None,
        "HAS_TEMPERATURE": temperature is not None,
        "HAS_LOW": epsilon_low is not None,
        "HAS_HIGH": epsilon_high is not None,
        "HAS_DELTA": numbers.delta > 0,
        "HAS_REWARDS": rewards is not None,
        "HAS_VALID": valid is not None,
        "HAS_SLOTS": slots is not None,
        "SAMPLE_STD": f.sample_std,
        "GOAL_MEAN": f.goal_mean,
        "BINOMIAL": f.binomial,
        "PROSPECT": f.prospect,
        "PROSPECT_ON_GOAL": f.prospect_on_goal,
        "BLOCK_G": triton.next_power_of_2(f.group_size),
    }
    lengths = ratio = slope = statistics = None
    with on_device(device):
        if f.sequence or f.aggregation == 0 or denominator is None:
            logprobs = None
            if f.sequence and old_logprobs is not None:
                logprobs, statistics = launch_logprobs(
                    logits, tokens, mask, completion, n_completions, temperature, numbers.temperature,
                    numbers.kl_temperature, numbers.softcap, f.two_temperatures,
                )  # fmt: skip
            lengths = torch.empty(n_completions, dtype=torch.float32, device=device)
            if f.sequence:
                ratio, slope = torch.empty(2, n_completions, dtype=torch.float32, device=device)
            _completions_kernel[(n_completions,)](
                mask, completion, logprobs, old_logprobs, importance_weight, temperature, epsilon_low, epsilon_high,
                advantage, kl_beta, rewards, num_constraints, valid, slots, lengths, ratio, slope, n, length,
                f.group_size, *knobs, *numbers[:4], *advantage_numbers, SEQUENCE=f.sequence,
                HAS_OLD=logprobs is not None, BLOCK=BLOCK_ROWS, **method,
            )  # fmt: skip
        if denominator is None:
            assert lengths is not None
            count = lengths.sum() if f.aggregation in (1, 3) else (lengths > 0).sum()
            denominator = (count * max_completion_length if f.aggregation == 2 else count).float()
        if launch_rows is not None:
            launch_rows(
                logits, gradient, tokens, mask, completion, n_completions, old_logprobs, ref_logprobs,
                importance_weight, temperature, epsilon_low, epsilon_high, advantage, kl_beta, denominator, lengths,
                ratio, slope, statistics, rows, marks, numbers, flags,
            )  # fmt: skip
        else:
            tile = tile or tile_for(vocab, logits.dtype, device)
            options = launch_options(tile, logits)
            _token_loss_kernel[grid_for(tile, n, device)](
                logits, gradient, tokens, mask, completion, old_logprobs, ref_logprobs, importance_weight, temperature,
                epsilon_low, epsilon_high, advantage, kl_beta, rewards, num_constraints, valid, slots, denominator,
                lengths, ratio, slope, statistics, rows, marks, n, length, vocab // tile.block_v, n_completions,
                *logits.stride()[:2], *((0, 0) if gradient is None else gradient.stride()[:2]), f.group_size, *knobs,
                *numbers, SEQUENCE=f.sequence, ESTIMATOR=f.estimator, MEAN_OF_MEANS=f.aggregation == 0,
                TWO=f.two_temperatures, HAS_GRADIENT=gradient is not None, HAS_OLD=old_logprobs is not None,
                HAS_REF=ref_logprobs is not None, HAS_SOFTCAP=numbers.softcap > 0,
                HAS_STATISTICS=statistics is not None, **method, **options,
            )  # fmt: skip
        _totals_kernel[(n_completions + 1,)](
            rows, marks, mask, completion, completion_kl, totals, loss, n, length, n_completions,
            HAS_MASK=mask is not None, PACKED=completion is not None, BLOCK=BLOCK_ROWS, num_warps=8,
        )  # fmt: skip
    return loss, rows, marks, completion_kl, totals


def launch_scale(gradient: Tensor, scale: Tensor, tuned: bool = True) -> None:
    """gradient (B, L, V), unit stride in V, times a scalar on its device, in place.

    tuned: with the tile of this V; False for matrices of another width than the vocabulary's.
    """
    b, length, vocab = gradient.shape
    if b * length == 0:
        return
    tile = tile_for(vocab, gradient.dtype, gradient.device) if tuned else fit(CANDIDATES[0], vocab)
    with on_device(gradient.device):
        _scale_kernel[grid_for(tile, b * length, gradient.device)](
            gradient, scale, b * length, length, vocab // tile.block_v, gradient.stride(0), gradient.stride(1),
            **launch_options(tile, gradient),
        )  # fmt: skip


def scratch_run(vocab: int, dtype: torch.dtype, device: torch.device, n_rows: int) -> Callable[[Tile], None]:
    """The objective on random rows of its own, on-policy with a KL term, as a function of the tile alone."""
    # A generator of its own: tuning must not move the user's.
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(1, n_rows, vocab, device=device, dtype=dtype).normal_(generator=generator)
    gradient, tokens = torch.empty_like(logits), torch.zeros(n_rows, dtype=torch.long, device=device)
    one, ref = torch.ones(1, device=device), torch.full((n_rows,), -10.0, device=device)
    numbers = Numbers(1.0, 0.2, 0.2, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0)
    flags = Flags(False, 3, 1, False, False, 1, False, 0, False, False, False)

    def run(tile: Tile) -> None:
        launch_token_loss(logits, gradient, tokens, None, None, 1, None, None, None, None, one, one, None, ref, None,
                          None, None, None, one, n_rows, numbers, flags, tile)  # fmt: skip

    return run
