"""Whether a vLLM holds the weights that it was sent: a checksum that survives what it does to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .completion import RolloutError

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_STEP = 1 << 22  # elements mixed at once: 32 MiB of int64


def bit_sum(tensor: Tensor) -> int:
    """Checksum of a tensor of any shape and dtype: its elements' raw bits, each mixed to 64 bits, summed modulo 2**64.

    The sum knows no order and zero bits add nothing, so it survives what an engine does to a weight: of a concatenation
    (q, k and v in one), of shards and of zero padding it is the sum of the parts. Returns a signed 64-bit integer.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
    for piece in bits.split(_STEP):
        x = piece.long()
        # Multiply and shift, twice: without the mixing, changes of one bit up here and one down there would cancel.
        for odd, shift in ((-0x61C8864680B583EB, 32), (-0x3B314601E57A13AD, 29)):
            x = x * odd
            x ^= (x >> shift) & ((1 << (64 - shift)) - 1)
        total += x.sum()
    return int(total)


def layout(workers: list[dict[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """dtype of each parameter held, and of each name that may be sent the one that holds it."""
    dtypes: dict[str, str] = {}
    holders: dict[str, str] = {}
    for worker in workers:
        dtypes.update(worker["held"])
        for held in worker["held"]:
            parts = held.split(".")
            options = [worker["packed"].get(p, [p]) for p in parts]
            names = [parts]
            for i, option in enumerate(options):
                names = [[*n[:i], o, *n[i + 1 :]] for n in names for o in option]
            holders.update((".".join(n), held) for n in names)
    return dtypes, holders


def check(workers: list[dict[str, int]], expected: dict[str, int], held: set[str], version: int) -> None:
    """Raises RolloutError where a parameter's checksums are not of what was sent. workers: each one's, by name."""
    if missing := sorted(held - expected.keys()):
        raise RolloutError(f"vLLM holds {missing[0]!r}, and {len(missing)} in all, that no weights were sent for")
    for name, want in expected.items():
        got = [sums[name] for sums in workers if name in sums]
        # Each worker holds all of it, or its shard of it.
        whole = got and not any((g - want) % 2**64 for g in got)
        if not whole and (sum(got) - want) % 2**64:
            raise RolloutError(
                f"vLLM does not hold the weights of version {version}: checksum of {name!r} must be "
                f"{want % 2**64:016x}; got {' '.join(f'{g % 2**64:016x}' for g in got)}"
            )
