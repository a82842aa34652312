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
from pathlib import Path
from typing import Any

import torch
import triton

from ...log import log
from ...version import __version__
from .tiles import CANDIDATES, Tile, fit, interpreted, on_device
from .token_loss import scratch_run

# A candidate replaces the default only where it wins by more than timings scatter.
MARGIN = 0.03
LARGEST_SCRATCH = 512 << 20


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
    shown = ", ".join(f"{'/'.join(map(str, tile))} {t:.4g}" for tile, t in times.items())
    log.info("tiles by block/warps/stages/programs, ms: %s", shown)
    first = next(iter(times))
    best = min(times, key=times.__getitem__)
    return best if times[best] < (1 - MARGIN) * times[first] else first


def _measure(vocab: int, dtype: torch.dtype, device: torch.device) -> Tile | None:
    """Times the objective with gradient on scratch rows. None where there is no memory for it."""
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
