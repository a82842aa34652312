"""The tile of a row: one per vocabulary size, dtype and GPU, so that a new batch shape never tunes or compiles again.

All kernels share it: the order of a row's sums follows from it, so log-probs of `token_logprobs` and of `token_loss`
are the same bits, whatever else is in the batch. Measured once per machine on scratch memory and kept in a file,
because two runs that tuned differently would differ in the last bit.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
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
# A candidate replaces the default only where it wins by more than timings scatter.
MARGIN = 0.03
LARGEST_SCRATCH = 256 << 20


def interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def width_of(dtype: torch.dtype) -> int:
    """Elements of a 16-byte access."""
    return 16 // dtype.itemsize


def fit(tile: Tile, vocab: int) -> Tile:
    """No larger than the row needs, and no more threads than the tile has vectors."""
    block_v = max(128, min(tile.block_v, triton.next_power_of_2(vocab)))
    return tile._replace(block_v=block_v, warps=max(1, min(tile.warps, block_v // 256)))


def launch_options(tile: Tile, dtype: torch.dtype, vocab: int) -> dict[str, Any]:
    """The constexpr arguments and compiler options that a tile stands for."""
    # As many registers as the programs of a multiprocessor leave each other: left alone, the assembler may spill to
    # make room for more programs than will ever come.
    registers = {"maxnreg": min(255, 65536 // (32 * tile.warps * tile.programs) // 8 * 8)} if tile.programs else {}
    return {
        **registers,
        "V": vocab,
        "BLOCK_V": tile.block_v,
        "WIDTH": width_of(dtype),
        "STAGES": tile.stages,
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
    _tuned[_key(vocab, dtype, device)] = tile = _measure(vocab, dtype, device)
    _save(_key(vocab, dtype, device), tile)
    return tile


# ---- what has been measured -----------------------------------------------------------------------------------------

_tuned: dict[str, Tile] = {}


@functools.cache
def _key(vocab: int, dtype: torch.dtype, device: torch.device) -> str:
    p = torch.cuda.get_device_properties(device)
    return (
        f"{p.name} sm_{p.major}{p.minor}, triton {triton.__version__}, V {vocab}, {str(dtype).removeprefix('torch.')}"
    )


def cache_file() -> Path:
    home = os.environ.get("MDPGRPO_CACHE_DIR") or Path.home() / ".cache" / "mdpgrpo_fast"
    return Path(home) / "tiles.json"


def _read() -> dict[str, list[int]]:
    try:
        return json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}


def _known(vocab: int, dtype: torch.dtype, device: torch.device) -> Tile | None:
    key = _key(vocab, dtype, device)
    if key not in _tuned:
        saved = _read().get(key)
        if saved is None:
            return None
        _tuned[key] = Tile(*saved)
    return _tuned[key]


def _save(key: str, tile: Tile) -> None:
    """Whole or not at all; a cache that cannot be written costs the next process a measurement, no more."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({**_read(), key: tile}, indent=1, sort_keys=True))
        temporary.replace(path)
    except OSError:
        pass


def choose(candidates: list[Tile], seconds: Callable[[Tile], float]) -> Tile:
    """The fastest; the first unless another wins by more than MARGIN. Those that do not fit the GPU drop out."""
    times = {}
    for tile in candidates:
        try:
            times[tile] = seconds(tile)
        except (triton.runtime.OutOfResources, triton.CompilationError):
            continue
    first = next(iter(times))
    best = min(times, key=times.__getitem__)
    return best if times[best] < (1 - MARGIN) * times[first] else first


def _measure(vocab: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """Times the objective with gradient on scratch rows."""
    from .token_loss import scratch_run

    candidates = list(dict.fromkeys(fit(tile, vocab) for tile in CANDIDATES))
    if len(candidates) == 1:
        return candidates[0]
    with torch.no_grad(), on_device(device):
        run = scratch_run(vocab, dtype, device, max(1, LARGEST_SCRATCH // (vocab * dtype.itemsize)))
        return choose(candidates, lambda tile: triton.testing.do_bench(lambda: run(tile), 5, 20, return_mode="median"))
