"""Several processes on one machine, joined by gloo."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 300  # seconds: far more than any test here takes, so that ranks that wait for each other fail by name


def start(rank: int, function: Callable[..., None], ranks: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.save(function(rank, ranks, *args), f"{folder}/{rank}.pt")
    dist.barrier()
    # No destruction of process groups and no shutdown of the interpreter: gloo's threads take the GIL to free tensors
    # of finished work, which then waits for ever (the group joins its threads) or aborts (the interpreter is gone).
    os._exit(0)


def spawn(function: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """What the function returns on each of the ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    running = mp.spawn(start, (function, ranks, port, str(folder), args), nprocs=ranks, join=False)
    assert running is not None
    end = time.monotonic() + PATIENCE
    while not running.join(timeout=5):
        if time.monotonic() > end:
            for process in running.processes:
                process.kill()
            pytest.fail(
                f"{function.__name__} on {ranks} ranks was still running after {PATIENCE} s: a rank waits for another"
            )
    return [torch.load(folder / f"{i}.pt") for i in range(ranks)]


def fleet(rank: int, ranks: int, tasks: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What each of several functions returns, one after another in one process group: starting one takes seconds."""
    return {name: function(rank, ranks, *args) for name, (function, *args) in tasks.items()}


def spawn_fleet(tasks: dict[str, tuple[Any, ...]], ranks: int, folder: Path) -> dict[str, list[Any]]:
    """tasks: name -> function and its arguments. By name, what the function returned on each rank."""
    found = spawn(fleet, ranks, folder, tasks)
    return {name: [one[name] for one in found] for name in tasks}
