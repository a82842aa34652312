"""Which implementation an op runs on: what is there, what `auto` takes and why, and a report of it.

`torch` is the reference in plain PyTorch and runs anywhere; `triton` are the fused kernels, on a GPU, or on the CPU in
Triton's interpreter for tests (TRITON_INTERPRET=1, very slow).
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os

import torch

from .config import unknown_name

NAMES = ("torch", "triton")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
log = logging.getLogger("mdpgrpo_fast")


@functools.cache
def _triton_missing() -> str | None:
    """Why the kernels cannot be imported; None where they can."""
    try:
        from .kernels import library  # noqa: F401
    except Exception as e:  # whatever keeps them from loading is what the user has to see
        return f"its kernels cannot be imported: {type(e).__name__}: {e}"
    return None


@torch.compiler.assume_constant_result  # for the compiler: nothing of it can change during a process
def triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot serve a tensor of this device and dtype; None where they can."""
    if dtype not in KERNEL_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in KERNEL_DTYPES)
        return f"it takes {names}, not {str(dtype).removeprefix('torch.')}"
    if device.type not in ("cuda", "cpu"):
        return f"it runs on CUDA devices, not on {device.type}"
    # On the CPU the environment is asked first: there Triton need not be installed.
    if device.type == "cpu" and not interpreting():
        return "the tensors are on the CPU, where it runs only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0 or above, not {torch.cuda.get_device_capability(device)}"
    return _triton_missing()


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def say_once(level: int, message: str) -> None:
    log.log(level, message)


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs: the named one, or for `auto` triton on a GPU and torch on the CPU.

    Raises: ConfigError for an unknown name; ValueError where the named one cannot run, with the reason. What `auto`
    takes is logged once per case, as a warning where a GPU has to do without its kernels.
    """
    if backend not in ("auto", *NAMES):
        raise unknown_name("backend", backend, ["auto", *NAMES])
    if backend == "torch":
        return backend
    # In the interpreter only an explicit choice runs kernels on the CPU: `auto` stays with what is fast there.
    on_cpu = backend == "auto" and device.type == "cpu"
    reason = "the tensors are on the CPU" if on_cpu else triton_refuses(device, dtype)
    if backend == "triton" and reason:
        raise ValueError(f"backend 'triton' cannot run: {reason}")
    if backend == "auto" and not torch.compiler.is_compiling():
        if reason is None:
            say_once(logging.INFO, f"backend triton: the tensors are {dtype} on {device.type}")
        else:
            level = logging.WARNING if device.type == "cuda" else logging.INFO
            say_once(level, f"backend torch: {reason}")
    return "torch" if reason else "triton"


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
        reason = triton_refuses(device, torch.bfloat16)
        print(f"{name}:")
        print("  torch   ready: the reference in plain PyTorch, every dtype")
        print(f"  triton  {'ready: fused kernels' if reason is None else 'not here: ' + reason}")
        print(f"  auto    takes {choose('auto', device, torch.bfloat16)}; float64 runs on torch")
