"""Tiles of a row: the candidates of `tuning`, and what a launch is given (alignment, compiler options, grid, inputs).

Triton kernels take NamedTuples: a member that is None or a `tl.constexpr` is known when the kernel is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schemas import GRPO, NUM_NUMBERS, Groups, Rows, Settings, on_16_bytes


class Tile(NamedTuple):
    """What tuning chooses for a vocabulary, a dtype and a GPU."""

    block: int  # columns
    warps: int
    stages: int  # loads in flight ahead of their use; 1 leaves it to the hardware
    programs: int  # persistent programs per multiprocessor; 0: one program per row


# Where a launcher has its tile from. A measurement, the first time: only where there are rows to launch for.
TileSource = Callable[[], Tile]


class RowTile(NamedTuple):
    """What a kernel is compiled for: a row of V logits in tiles, and how a tile lies in the threads. All constexpr."""

    vocab: Any
    block: Any
    width: Any  # neighbours that a thread holds, 16 bytes
    axis: Any  # 1: a thread has neighbours; 0: neighbouring threads have, for rows that are not aligned
    write_axis: Any  # the same for the sweep that writes
    wraps: Any  # whether that begins at each row's first whole 16 bytes and ends with what lies before them
    stages: Any
    persistent: Any


# One program per row leaves it to the hardware how many rows are in flight. Few persistent programs keep the rows in
# flight within the L2 cache: 132 rows of 256 KB are 34 MB, so that the gradient sweep finds them there (on an H200 the
# profiler counts two passes over memory in place of three); their threads then need several loads in flight each.
CANDIDATES = (
    Tile(4096, 8, 1, 0),
    Tile(8192, 8, 1, 0),
    Tile(2048, 8, 1, 4),
    Tile(8192, 8, 1, 4),
    Tile(16384, 16, 1, 1),
    Tile(8192, 32, 1, 1),
    Tile(16384, 32, 1, 1),
)
# Of every launch: Triton's default changes with its version, and with it the last bit.
FP_FUSION = {"enable_fp_fusion": True}
BLOCK_ROWS = 1024  # rows of (N,) vectors that one program of the small kernels takes at a time


def interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def width_of(dtype: torch.dtype) -> int:
    """Elements of a 16-byte access."""
    return 16 // dtype.itemsize


def aligned(rows: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    return rows.data_ptr() % 16 == 0 and all(n * rows.element_size() % 16 == 0 for n in rows.stride()[:-1])


def fit(tile: Tile, vocab: int) -> Tile:
    """No larger than the row needs, and no more threads than the tile has vectors."""
    block = max(128, min(tile.block, triton.next_power_of_2(vocab)))
    return tile._replace(block=block, warps=max(1, min(tile.warps, block // 256)))


def row_tile(tile: Tile, logits: Tensor, gradient: Tensor | None = None) -> RowTile:
    """The tile of these rows and of those that are written, as kernels take it."""
    gradient = logits if gradient is None else gradient
    vocab, width, axis = logits.shape[-1], width_of(logits.dtype), aligned(logits)
    wraps = False
    if not axis and logits.data_ptr() % 16 == gradient.data_ptr() % 16 == 0:
        gaps = (a - b for a, b in zip(logits.stride()[:-1], gradient.stride()[:-1], strict=True))
        wraps = all(gap % width == 0 for gap in gaps) and vocab % tile.block >= width
        wraps = wraps and gradient.element_size() >= logits.element_size()
    write_axis = wraps or (axis and aligned(gradient))
    # Element by element there is nothing to gain from loading ahead, and registers to lose.
    stages = tile.stages if axis else 1
    return _row_tile(vocab, tile.block, width, int(axis), int(write_axis), wraps, stages, tile.programs > 0)


# The same constexpr objects in each call: comparing new ones takes Triton longer than all else of a launch.
@functools.cache
def _row_tile(*members: int) -> RowTile:
    return RowTile(*map(tl.constexpr, members))


def compiler_options(tile: Tile) -> dict[str, Any]:
    """Keyword arguments of a launch that are the compiler's."""
    # As many registers as the programs of a multiprocessor leave each other: left alone, the assembler may spill to
    # make room for more programs than will ever come.
    registers = {"maxnreg": min(255, 65536 // (32 * tile.warps * tile.programs) // 8 * 8)} if tile.programs else {}
    return {**registers, "num_warps": tile.warps, **FP_FUSION}


def grid_for(tile: Tile, n_rows: int, device: torch.device) -> tuple[int]:
    """One flat dimension: y and z end at 65535."""
    if tile.programs == 0 or device.type != "cuda":
        return (n_rows,)
    return (min(n_rows, tile.programs * torch.cuda.get_device_properties(device).multi_processor_count),)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the tensor's device, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ---- inputs ---------------------------------------------------------------------------------------------------------


def all_but(members: type[Rows] | type[Settings], left_out: str) -> tuple[str, ...]:
    """All members but those that a kernel does not read: it would be compiled again for each of their choices."""
    return tuple(name for name in members._fields if name not in left_out.split())


def kernel_rows(rows: Rows, num_completions: int, names: tuple[str, ...]) -> tuple[Rows, Rows]:
    """The named members of rows as a kernel takes them, and which of its knobs have one value per row.

    A kernel is compiled for what is there, not for where it lies: a slice that begins off 16 bytes is copied.
    """
    given = [on_16_bytes(x) if x is not None and n in names else None for n, x in zip(Rows._fields, rows, strict=True)]
    return Rows(*given), _is_per_row(rows.per_row(num_completions), names)


@functools.cache
def _is_per_row(knobs: Rows, names: tuple[str, ...]) -> Rows:
    return Rows(*(tl.constexpr(bool(x)) if n in names else None for n, x in knobs._asdict().items()))


def kernel_groups(groups: Groups) -> Groups:
    """Each member begins on 16 bytes."""
    return Groups(*(None if x is None else on_16_bytes(x) for x in groups))


@functools.lru_cache(maxsize=256)
def kernel_settings(settings: Settings, names: tuple[str, ...]) -> Settings:
    """The named settings as a kernel takes them: numbers at run time, choices and what is off known to the compiler."""
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(settings, name)
        if name == "aggregation":
            value = min(value, GRPO + 1)  # whether it is a mean of means is all that a kernel asks
        if Settings._fields.index(name) >= NUM_NUMBERS:
            value = tl.constexpr(value)
        elif name in ("delta", "softcap", "entropy_coef", "entropy_floor", "advantage_clip"):
            value = value or None
        found[name] = value
    return Settings(*(found.get(name) for name in Settings._fields))  # type: ignore[arg-type]
