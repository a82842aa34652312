"""The objective over materialised logits: rewards or advantages and logits in, loss, gradient and statistics out.

Up to three launches: `_completions_kernel` (lengths, and what couples the tokens of a completion),
`_token_loss_kernel` (every row: advantage, one sweep for the log-sum-exp, objective, one for the gradient) and
`_totals_kernel` (sums, in a fixed order). Where what couples them needs ℓ or the entropy of the whole completion, as ρ
does off-policy at sequence level, `_logprobs_kernel` comes first; the main kernel then reuses its statistics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schemas import BNPO, DAPO, DR_GRPO, GRPO, Groups, Rows, Settings, new_outputs
from .completions import Coupling, launch_coupling, launch_totals
from .logprobs import _least, launch_logprobs
from .method import _advantage_of, _coupled, _token_objective, _token_share
from .rows import (
    LOG2E,
    _columns,
    _completion_of,
    _kept,
    _read_row,
    _row_at,
    _target,
    _temperature,
    _token,
    _write_gradient,
    _write_zeros,
)
from .tiles import (
    Tile,
    TileSource,
    all_but,
    compiler_options,
    grid_for,
    kernel_groups,
    kernel_rows,
    kernel_settings,
    on_device,
    row_tile,
)

READS_SETTINGS = all_but(Settings, "group_size top_entropy_quantile")
READS_ROWS = all_but(Rows, "sampling_logprobs")
# Of `_scale_kernel` on a multiprocessor. With a program per row, 10^5 would start for the rows of a head's weight, only
# to see a scale of 1.
SCALE_WARPS = 32


@triton.jit(
    do_not_specialize=["n_rows", "row_length", "tiles", "num_completions", "G"],
    do_not_specialize_on_alignment=[
        "denominator_ptr", "lengths_ptr", "ratio_ptr", "slope_ptr", "drift_ptr", "statistics_ptr", "per_row_ptr",
        "marks_ptr",
    ],
)  # fmt: skip
def _token_loss_kernel(
    logits_ptr, gradient_ptr, rows, is_per_row, groups, settings, denominator_ptr, lengths_ptr, ratio_ptr, slope_ptr,
    drift_ptr, statistics_ptr, per_row_ptr, marks_ptr, n_rows, row_length, tiles, num_completions, stride_lb, stride_ll,
    stride_gb, stride_gl, G, BLOCK_G: tl.constexpr, tile,
):  # fmt: skip
    """Rows program_id, program_id + programs, ...: the whole objective of each, and its gradient row.

    Per row, ∂loss/∂z = a (onehot - p) + a_kl (onehot - p_kl), a = c / τ: a cross-entropy with one weight per row. An
    entropy bonus adds b p (log p + H).
    """
    first = tl.program_id(0)
    n = tl.cast(n_rows, tl.int64)
    for index in range(first, n_rows if tile.persistent else first + 1, tl.num_programs(0) if tile.persistent else 1):
        row = tl.cast(index, tl.int64)
        logits = _row_at(logits_ptr, row, row_length, stride_lb, stride_ll, tile.axis == 1)
        gradient = logits
        if gradient_ptr is not None:
            gradient = _row_at(
                gradient_ptr, row, row_length, stride_gb, stride_gl, tile.write_axis == 1 and not tile.wraps
            )
        if _kept(rows, row):
            completion, known = _completion_of(rows, row, row_length, num_completions)
            tau = _temperature(rows, is_per_row, settings, completion, row, True)
            k, k_kl = LOG2E / tau, LOG2E / settings.kl_temperature
            token = _token(rows.tokens, row, tile)
            if statistics_ptr is not None:
                # Not from the logits: nothing here keeps a fast warp from overwriting them before a slow one reads.
                z = tl.load(statistics_ptr + 4 * n + row)
                peak = tl.load(statistics_ptr + row)
                log_total = tl.load(statistics_ptr + n_rows + row)
                entropy = tl.load(statistics_ptr + 2 * n + row)
                log_total_kl = tl.load(statistics_ptr + 3 * n + row)
                least = _least(rows, row, z)
            else:
                z = tl.where(known, _target(logits, token, settings.softcap), float("nan"))
                least = _least(rows, row, z)
                peak, log_total, entropy, log_total_kl = _read_row(
                    logits, tiles, k, k_kl, settings.softcap, least,
                    "evict_first" if gradient_ptr is None else "evict_last", settings.two_temperatures, tile,
                )  # fmt: skip
            # After the sweep, so that it has the registers.
            advantage, beta = _advantage_of(rows, is_per_row, groups, settings, G, completion, row, True, BLOCK_G)
            logprob = (z - peak) / tau - log_total
            kl_logprob = (z - peak) / settings.kl_temperature - log_total_kl if settings.two_temperatures else logprob
            coupled = _coupled(ratio_ptr, slope_ptr, drift_ptr, completion, True)
            loss, c, kl, c_kl, bonus, ratio, clipped_low, clipped_high, clamped = _token_objective(
                logprob, kl_logprob, entropy, tau, advantage, beta, coupled, rows, is_per_row, settings, completion,
                row, True,
            )  # fmt: skip
            share = _token_share(denominator_ptr, lengths_ptr, settings, completion, True)

            tl.store(per_row_ptr + row, logprob)
            tl.store(per_row_ptr + n + row, entropy)
            tl.store(per_row_ptr + 2 * n + row, kl)
            tl.store(per_row_ptr + 3 * n + row, ratio)
            tl.store(per_row_ptr + 4 * n + row, share * loss)
            tl.store(marks_ptr + row, clipped_low)
            tl.store(marks_ptr + n + row, clipped_high)
            tl.store(marks_ptr + 2 * n + row, clamped)

            if gradient_ptr is not None:
                a, a_kl = share * c / tau, 0.0
                if settings.two_temperatures:
                    a_kl = share * c_kl / settings.kl_temperature
                else:
                    a += share * c_kl / tau
                idle, b = (a == 0.0) & (a_kl == 0.0), None
                if rows.entropy_coef is not None or settings.entropy_coef is not None:
                    b = share * bonus / tau
                    idle = idle & (b == 0.0)
                if idle:
                    _write_zeros(logits, gradient, tiles, tile)
                else:
                    _write_gradient(logits, gradient, tiles, token, peak, log_total, log_total_kl, entropy, a, a_kl, b,
                                    k, k_kl, settings.softcap, least, settings.two_temperatures, tile)  # fmt: skip
        else:
            for i in tl.static_range(5):
                tl.store(per_row_ptr + i * n + row, 1.0 if i == 3 else 0.0)
            for i in tl.static_range(3):
                tl.store(marks_ptr + i * n + row, False)
            if gradient_ptr is not None:
                _write_zeros(logits, gradient, tiles, tile)


@triton.jit(do_not_specialize=["n_rows", "row_length", "tiles"], do_not_specialize_on_alignment=["scale_ptr"])
def _scale_kernel(gradient_ptr, scale_ptr, n_rows, row_length, tiles, stride_gb, stride_gl, tile):
    """gradient *= scale; a scale of 1 costs a launch of few programs and no traffic, and the host never looks."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
            row = tl.cast(index, tl.int64)
            gradient = _row_at(gradient_ptr, row, row_length, stride_gb, stride_gl, tile.axis == 1)
            for i in tl.range(0, tiles, num_stages=tile.stages):
                columns = _columns(i * tile.block, tile, tile.axis)
                g = tl.load(gradient + columns).to(tl.float32) * scale
                tl.store(gradient + columns, g.to(gradient.dtype.element_ty))
            if tile.vocab % tile.block != 0:
                columns = _columns(tile.vocab // tile.block * tile.block, tile, tile.axis)
                g = tl.load(gradient + columns, mask=columns < tile.vocab, other=0.0).to(tl.float32) * scale
                tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=columns < tile.vocab)


# ---- launchers ------------------------------------------------------------------------------------------------------


def launch_token_loss(
    logits: Tensor, gradient: Tensor | None, rows: Rows, groups: Groups, settings: Settings, denominator: Tensor | None,
    num_completions: int, max_completion_length: int, *, tile_of: TileSource,
    launch_rows: Callable[..., None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss (), rows (5, N) as in ROWS, marks (3, N) as in MARKS, KL per completion (B,), totals (8,) as in TOTALS.

    logits (B, L, V), or (1, T, V) with completion (T,), unit stride in V; N rows in all. denominator: a float32 scalar,
    or None: that of this batch. `gradient` is written, and may be the logits; None: no gradient.
    launch_rows: in place of the launch of `_token_loss_kernel`.
    """
    b, length, vocab = logits.shape
    n = b * length
    settings = (settings if groups.rewards is not None else settings.without_groups()).settled(rows)
    per_row, marks = new_outputs(n, logits.device)
    coupling, statistics = Coupling(), None
    if n:
        if settings.couples or settings.aggregation == GRPO or denominator is None:
            logprobs = None
            if settings.first_pass(rows):
                logprobs, statistics = launch_logprobs(logits, rows, settings, num_completions, tile_of=tile_of)
            coupling = launch_coupling(logprobs, statistics, rows, groups, settings, num_completions, length)
        if denominator is None:
            assert coupling.lengths is not None
            denominator = default_denominator(coupling.lengths, settings, max_completion_length)
        if launch_rows is not None:
            launch_rows(
                logits, gradient, rows, settings, denominator, coupling, statistics, per_row, marks, num_completions
            )
        else:
            tile = tile_of()
            with on_device(logits.device):
                _token_loss_kernel[grid_for(tile, n, logits.device)](
                    logits, gradient, *kernel_rows(rows, num_completions, READS_ROWS), kernel_groups(groups),
                    kernel_settings(settings, READS_SETTINGS), denominator, *coupling, statistics, per_row, marks, n,
                    length, vocab // tile.block, num_completions, *logits.stride()[:2],
                    *((0, 0) if gradient is None else gradient.stride()[:2]), settings.group_size,
                    triton.next_power_of_2(settings.group_size), row_tile(tile, logits, gradient),
                    **compiler_options(tile),
                )  # fmt: skip
    loss, completion_kl, totals = launch_totals(per_row, marks, rows, num_completions, length)
    return loss, per_row, marks, completion_kl, totals


def default_denominator(lengths: Tensor, settings: Settings, max_completion_length: int) -> Tensor:
    """As `reference.default_denominator`, on the device."""
    count = lengths.sum() if settings.aggregation in (DAPO, BNPO) else (lengths > 0).sum()
    return (count * max_completion_length if settings.aggregation == DR_GRPO else count).float()


def launch_scale(gradient: Tensor, scale: Tensor, *, tile_of: TileSource) -> None:
    """gradient (B, L, V), unit stride in V, times a scalar on its device, in place."""
    b, length, vocab = gradient.shape
    if b * length == 0:
        return
    tile = tile_of()
    tile = tile._replace(programs=max(1, SCALE_WARPS // tile.warps))
    with on_device(gradient.device):
        _scale_kernel[grid_for(tile, b * length, gradient.device)](
            gradient, scale, b * length, length, vocab // tile.block, *gradient.stride()[:2], row_tile(tile, gradient),
            **compiler_options(tile),
        )  # fmt: skip


def scratch_run(vocab: int, dtype: torch.dtype, device: torch.device, n_rows: int) -> Callable[[Tile], None]:
    """The objective on random rows of its own, on-policy with a KL term, as a function of the tile alone."""
    # A generator of its own: tuning must not move the user's.
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(1, n_rows, vocab, device=device, dtype=dtype).normal_(generator=generator)
    gradient, one = torch.empty_like(logits), torch.ones(1, device=device)
    rows = Rows(
        torch.zeros(n_rows, dtype=torch.long, device=device), advantage=one, kl_beta=one,
        ref_logprobs=torch.full((n_rows,), -10.0, device=device),
    )  # fmt: skip
    settings = Settings(epsilon_low=0.2, epsilon_high=0.2)
    return lambda tile: launch_token_loss(
        logits, gradient, rows, Groups(), settings, one, 1, n_rows, tile_of=lambda: tile
    )  # type: ignore[return-value]
