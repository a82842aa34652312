"""Tiles of a row: shape and alignment, the options of a launch, the grid. What has been measured is in `tuning`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton


class Tile(NamedTuple):
    block_v: int
    warps: int
    stages: int  # loads in flight ahead of their use; 1 leaves it to the hardware
    programs: int  # persistent programs per multiprocessor; 0: one program per row


# One program per row leaves it to the hardware how many rows are in flight. Few persistent programs keep the rows in
# flight within the caches: 132 rows of 256 KB are 34 MB, so that the gradient sweep finds them there.
CANDIDATES = (
    Tile(4096, 8, 1, 0),
    Tile(2048, 8, 1, 0),
    Tile(2048, 8, 1, 4),
    Tile(4096, 8, 1, 2),
    Tile(4096, 8, 3, 2),
    Tile(8192, 16, 1, 1),
    Tile(8192, 16, 4, 1),
    Tile(8192, 32, 1, 1),
)


def interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def width_of(dtype: torch.dtype) -> int:
    """Elements of a 16-byte access."""
    return 16 // dtype.itemsize


def aligned(logits: torch.Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes and ends at one."""
    size = logits.element_size()
    return all(n * size % 16 == 0 for n in (logits.shape[-1], *logits.stride()[:-1])) and logits.data_ptr() % 16 == 0


def fit(tile: Tile, vocab: int) -> Tile:
    """No larger than the row needs, and no more threads than the tile has vectors."""
    block_v = max(128, min(tile.block_v, triton.next_power_of_2(vocab)))
    return tile._replace(block_v=block_v, warps=max(1, min(tile.warps, block_v // 256)))


def launch_options(tile: Tile, logits: torch.Tensor) -> dict[str, Any]:
    """The constexpr arguments and compiler options that a tile stands for, for these rows."""
    # As many registers as the programs of a multiprocessor leave each other: left alone, the assembler may spill to
    # make room for more programs than will ever come.
    registers = {"maxnreg": min(255, 65536 // (32 * tile.warps * tile.programs) // 8 * 8)} if tile.programs else {}
    is_aligned = aligned(logits)
    return {
        **registers,
        "V": logits.shape[-1],
        "BLOCK_V": tile.block_v,
        "WIDTH": width_of(logits.dtype),
        "AXIS": int(is_aligned),
        # Element by element there is nothing to gain from loading ahead, and registers to lose.
        "STAGES": tile.stages if is_aligned else 1,
        "PERSISTENT": tile.programs > 0,
        "num_warps": tile.warps,
        # Triton's default changes with its version, and with it the last bit.
        "enable_fp_fusion": True,
    }


def grid_for(tile: Tile, n_rows: int, device: torch.device) -> tuple[int]:
    if tile.programs == 0 or device.type != "cuda":
        return (n_rows,)
    return (min(n_rows, tile.programs * torch.cuda.get_device_properties(device).multi_processor_count),)


def per_row(x: torch.Tensor | None, n_completions: int) -> int:
    """1 where a knob has one value per row, 0 where it has one per completion."""
    return int(x is not None and x.numel() != n_completions)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the tensor's device, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


BLOCK_ROWS = 1024  # rows of (N,) vectors that one program of the small kernels takes at a time
