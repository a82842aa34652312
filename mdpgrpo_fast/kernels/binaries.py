"""Compiled parts of csrc/, `cpu`, and `cuda` for Hopper: loads them, keeps why one is not there, fills their inputs.

They bind to libtorch's stable C ABI and to nothing of Python: one file serves every Python and every torch from 2.10.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from .schemas import Groups, Rows, Settings

OLDEST_TORCH = (2, 10)
HOW = {
    "cpu": "without a C++ compiler, or with MDPGRPO_BUILD=none; with a compiler, `pip install .` builds it",
    "cuda": "without a CUDA toolkit; with nvcc 12.8 or newer on the path or in CUDA_HOME, `pip install .` builds it",
}


def file_of(part: str) -> Path:
    """In the package, or where MDPGRPO_LIBRARIES says, for builds of another kind."""
    return Path(os.environ.get("MDPGRPO_LIBRARIES") or Path(__file__).parent) / f"_{part}.abi3.so"


def torch_version(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in version.split("+")[0].split(".")[:2])


@functools.cache
def why_missing(part: str) -> str | None:
    """Loads a part; None where its ops are there, else the reason, with the original error."""
    path = file_of(part)
    if not path.exists():
        return f"its compiled part is not there: the package was built {HOW[part]}"
    if torch_version(torch.__version__) < OLDEST_TORCH:
        return f"its compiled part needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, not {torch.__version__}"
    if part == "cuda" and torch.version.cuda is None:
        return f"its compiled part needs a torch that is built with CUDA, not {torch.__version__}"
    try:
        library = _library(path)
    except OSError as e:
        return f"its compiled part cannot be loaded: {e}"
    error = library.mdpgrpo_error().decode()
    return f"its compiled part cannot be used: {error}" if error else None


@functools.cache
def _library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))  # which registers its ops with torch
    for name in ("mdpgrpo_error", "mdpgrpo_variant"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def variant(part: str) -> str:
    """Which of its variants a loaded part takes on this machine: the instruction set, or the architectures."""
    name: bytes = _library(file_of(part)).mdpgrpo_variant()
    return name.decode()


# ---- inputs ---------------------------------------------------------------------------------------------------------

# Of the members that are not float32.
DTYPES = {
    "tokens": torch.int64,
    "mask": torch.uint8,
    "completion": torch.int64,
    "valid": torch.uint8,
    "slots": torch.int64,
}


def as_raw(x: Tensor | None, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """As raw ops take a tensor: contiguous and of one dtype; an empty one for what is not given."""
    return like.new_empty(0, dtype=dtype) if x is None else x.to(dtype).contiguous()


def inputs(like: Tensor, settings: Settings, *members: Rows | Groups) -> dict[str, Tensor]:
    """Rows, groups and settings as raw ops take them, by name; they check all of it before a pointer is read."""
    found = {n: as_raw(x, like, DTYPES.get(n, torch.float32)) for m in members for n, x in m._asdict().items()}
    numbers = torch.tensor(settings.numbers, dtype=torch.float64, device="cpu")
    return {**found, "numbers": numbers, "flags": torch.tensor(settings.flags, dtype=torch.int64, device="cpu")}
