"""The tile of a row: one per vocabulary size, dtype and GPU, so that a new batch shape never tunes or compiles again.

All kernels share it: the order of a row's sums follows from it, so log-probs of `token_logprobs` and of `token_loss`
are the same bits, whatever else is in the batch. Measured once per machine on scratch memory and kept in a file,
because two runs that tuned differently would differ in the last bit.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .. import __version__


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
# A candidate replaces the default only where it wins by more than timings scatter.
MARGIN = 0.03
LARGEST_SCRATCH = 512 << 20


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


def tile_for(vocab: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile that every kernel uses for rows of this vocabulary and dtype on this device."""
    default = fit(CANDIDATES[0], vocab)
    if device.type != "cuda" or interpreted() or os.environ.get("MDPGRPO_AUTOTUNE") == "0":
        return default
    tile = _known(vocab, dtype, device)
    if tile is not None:
        return tile
    if torch.cuda.is_current_stream_capturing():
        return default  # a capture cannot measure; the next call outside of it does
    tile = _measure(vocab, dtype, device)
    if tile is None:
        # Not tried again at every call; the file is left to a process that has the memory.
        return _tuned.setdefault(_key(vocab, dtype, device), default)
    # Another process may have been first: ranks that start together end with one tile.
    tile = _known(vocab, dtype, device) or tile
    _tuned[_key(vocab, dtype, device)] = tile
    _save(_key(vocab, dtype, device), tile)
    return tile


# ---- what has been measured -----------------------------------------------------------------------------------------

_tuned: dict[str, Tile] = {}


@functools.cache
def _key(vocab: int, dtype: torch.dtype, device: torch.device) -> str:
    p = torch.cuda.get_device_properties(device)
    name = str(dtype).removeprefix("torch.")
    return f"{__version__}, {p.name} sm_{p.major}{p.minor}, triton {triton.__version__}, V {vocab}, {name}"


def cache_file() -> Path:
    home = os.environ.get("MDPGRPO_CACHE_DIR") or os.path.expanduser("~/.cache/mdpgrpo_fast")
    return Path(home) / "tiles.json"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _known(vocab: int, dtype: torch.dtype, device: torch.device) -> Tile | None:
    """What this process or the file has. An entry that is no candidate (any more) counts as none."""
    key = _key(vocab, dtype, device)
    if key not in _tuned:
        saved = _read().get(key)
        candidates = [list(fit(tile, vocab)) for tile in CANDIDATES]
        if saved not in candidates:
            return None
        _tuned[key] = Tile(*saved)
    return _tuned[key]


def _save(key: str, tile: Tile) -> None:
    """Whole or not at all; a cache that cannot be written costs the next process a measurement, no more."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump({**_read(), key: list(tile)}, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except OSError:
        pass


def choose(candidates: list[Tile], seconds: Callable[[Tile], float]) -> Tile:
    """The fastest; the first unless another wins by more than MARGIN. Those that the GPU cannot run drop out."""
    times = {}
    for tile in candidates:
        try:
            times[tile] = seconds(tile)
        except (triton.runtime.OutOfResources, triton.CompilationError):
            continue
    if not times:
        return candidates[0]
    first = next(iter(times))
    best = min(times, key=times.__getitem__)
    return best if times[best] < (1 - MARGIN) * times[first] else first


def _measure(vocab: int, dtype: torch.dtype, device: torch.device) -> Tile | None:
    """Times the objective with gradient on scratch rows. None where there is no memory for it."""
    from .token_loss import scratch_run

    candidates = list(dict.fromkeys(fit(tile, vocab) for tile in CANDIDATES))
    if len(candidates) == 1:
        return candidates[0]
    # Many rounds of rows for every multiprocessor, or the last round would decide.
    rows = 16 * torch.cuda.get_device_properties(device).multi_processor_count
    rows = max(1, min(rows, LARGEST_SCRATCH // (vocab * dtype.itemsize)))
    try:
        with torch.no_grad(), on_device(device):
            run = scratch_run(vocab, dtype, device, rows)
            bench = triton.testing.do_bench
            return choose(candidates, lambda tile: bench(lambda: run(tile), 5, 20, return_mode="median"))
    except torch.cuda.OutOfMemoryError:
        return None
