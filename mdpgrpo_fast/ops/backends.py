"""Which implementation an op runs on: what is there, what `auto` takes and why, and a report of it.

`torch` is the reference in plain PyTorch and runs anywhere; `triton` are the fused kernels, on a GPU, or on the CPU in
Triton's interpreter for tests (TRITON_INTERPRET=1, very slow); `cpu` and `cuda` are the compiled kernels of csrc/, for
the CPU and for Hopper.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..config import unknown_name
from ..kernels import binaries
from ..log import say_once

NAMES = ("torch", "triton", "cpu", "cuda")
# Importing it registers the backend's ops.
MODULES = {"triton": "triton.library", "cpu": "cpu", "cuda": "cuda"}
HOPPER = ((9, 0), (10, 0))  # the compute capabilities that csrc/cuda is built for
F = TypeVar("F", bound=Callable[..., Any])
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def constant(function: F) -> F:
    """torch.compiler.assume_constant_result, without the import of the whole compiler that it begins with, half of what
    importing a loss would take. For a function whose answers do not change during a process."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def library(backend: str) -> Any:
    """The module that holds a backend's ops and launchers."""
    return importlib.import_module(f"..kernels.{MODULES[backend]}", __package__)


@functools.cache
def _missing(backend: str) -> str | None:
    """Why a backend's kernels cannot be had in this installation; None where their ops are registered now."""
    if backend != "triton" and (reason := binaries.why_missing(backend)):
        return reason
    try:
        library(backend)
    except Exception as e:  # whatever keeps them from loading is what the user has to see
        return f"its kernels cannot be imported: {type(e).__name__}: {e}"
    return None


def _triton_refuses(device: torch.device) -> str | None:
    if device.type not in ("cuda", "cpu"):
        return f"it runs on CUDA devices, not on {device.type}"
    # On the CPU the environment is asked first: there Triton need not be installed.
    if device.type == "cpu" and not interpreting():
        return "the tensors are on the CPU, where it runs only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0 or above, not {torch.cuda.get_device_capability(device)}"
    return _missing("triton")


def _cpu_refuses(device: torch.device) -> str | None:
    return _missing("cpu") if device.type == "cpu" else f"it runs on the CPU, not on {device.type}"


def _cuda_refuses(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {'the CPU' if device.type == 'cpu' else device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability not in HOPPER:
        return f"it needs compute capability {' or '.join(f'{a}.{b}' for a, b in HOPPER)}, not {capability}"
    return _missing("cuda")


_REFUSES = {"triton": _triton_refuses, "cpu": _cpu_refuses, "cuda": _cuda_refuses}


@constant
def refuses(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a fused backend cannot serve a tensor of this device and dtype; None where it can."""
    if dtype not in KERNEL_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in KERNEL_DTYPES)
        return f"it takes {names}, not {str(dtype).removeprefix('torch.')}"
    return _REFUSES[backend](device)


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def _crossovers() -> dict[str, list[dict[str, Any]]]:
    """GPU -> where the Hopper kernel was measured to be faster; `benchmarks/compiled/crossovers.py` writes it."""
    text = Path(binaries.__file__).with_name("crossovers.json").read_text(encoding="utf-8")
    found: dict[str, list[dict[str, Any]]] = json.loads(text)
    return found


def hopper_wins(device: torch.device, dtype: torch.dtype, vocab: int, n_rows: int) -> bool:
    """Whether the Hopper kernel was faster than Triton's at such a size: as long or longer, wider by up to a half."""
    # While compiling, the rows are no number to compare with.
    if torch.compiler.is_compiling() or not _crossovers() or refuses("cuda", device, dtype):
        return False
    name = str(dtype).removeprefix("torch.")
    return any(
        x["dtype"] == name and x["vocab"] / 1.5 <= vocab <= x["vocab"] * 1.5 and n_rows >= x["rows"]
        for x in _crossovers().get(torch.cuda.get_device_name(device), [])
    )


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs: the named one; for `auto` triton on a GPU and cpu on the CPU, else torch.

    `token_loss` asks `hopper_wins` in place of triton.
    Raises: ConfigError for an unknown name; ValueError where the named one cannot run, with the reason. What `auto`
    takes is logged once per case, as a warning where fast kernels could be and are not.
    """
    if backend not in ("auto", *NAMES):
        raise unknown_name("backend", backend, ["auto", *NAMES])
    if backend == "torch":
        return backend
    # In the interpreter only an explicit choice runs Triton on the CPU: `auto` takes what is fast there.
    name = backend if backend != "auto" else "cpu" if device.type == "cpu" else "triton"
    reason = refuses(name, device, dtype)
    if backend != "auto":
        if reason:
            raise ValueError(f"backend {backend!r} cannot run: {reason}")
    elif not torch.compiler.is_compiling():
        if reason is None:
            say_once(logging.INFO, f"backend {name}: the tensors are {dtype} on {device.type}")
        else:
            # float64 on the CPU is asked for by who wants the reference.
            expected = device.type not in ("cuda", "cpu") or (device.type == "cpu" and dtype not in KERNEL_DTYPES)
            say_once(logging.INFO if expected else logging.WARNING, f"backend torch, not {name}: {reason}")
    return "torch" if reason else name


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def backend_report() -> None:
    """Prints the backends of the ops, whether each can run here and why not, and which one `auto` takes."""
    print(f"torch {torch.__version__}, triton {_version('triton')}, CUDA {torch.version.cuda or 'not in this torch'}")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        name = "CPU" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
        print(f"{name}:")
        print("  torch   ready: the reference in plain PyTorch, every dtype")
        for backend in NAMES[1:]:
            reason = refuses(backend, device, torch.bfloat16)
            what = "compiled kernels" if backend in ("cpu", "cuda") else "fused kernels"
            what += f" ({binaries.variant(backend)})" if reason is None and backend in ("cpu", "cuda") else ""
            print(f"  {backend:7} {'not here: ' + reason if reason else 'ready: ' + what}")
        print(f"  auto    takes {choose('auto', device, torch.bfloat16)}; float64 runs on torch")
