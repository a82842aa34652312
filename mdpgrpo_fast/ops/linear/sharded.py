"""Heads that are not whole on this rank: gathered where a shard is storage, merged where the vocabulary is split.

FSDP2 (DTensor) and DeepSpeed's ZeRO-3 keep a part of the weight between uses; ranks have different tokens. A
vocabulary-parallel head stays split: every rank has all tokens and V / ranks columns of their logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import look, refuse
from .engines import ENTROPY, LOG_TOTAL, LOG_TOTAL_KL, PEAK, TARGET

# Groups whose ranks have compared their splits. Later differences show in `merge`, which needs no call of its own.
_compared: set[str] = set()


def is_dtensor(x: Any) -> bool:
    # By name: importing the class for the question would cost every process that has none.
    return type(x).__name__ == "DTensor"


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.ranks, None


def whole(x: Tensor) -> Tensor:
    """A DTensor gathered over its mesh; any other tensor as it is.

    Its gradient is the mean over the ranks, each of which has tokens of its own, as FSDP2 and DDP reduce theirs.
    """
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial

    mesh = x.device_mesh  # type: ignore[attr-defined]
    full: Tensor = x.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # type: ignore[attr-defined]
    if full.requires_grad:
        full = _MeanGradient.apply(full, mesh.size())
    return full


@contextmanager
def gathered(*parameters: Tensor | None) -> Iterator[None]:
    """ZeRO-3 parameters are whole inside; without any, nothing happens and DeepSpeed is not imported."""
    # One that a module's own pass holds gathered has its numbers already, and must not be partitioned under it.
    partitioned = [p for p in parameters if p is not None and hasattr(p, "ds_id") and p.numel() == 0]
    with ExitStack() as stack:
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        yield


# ---- a vocabulary split over ranks ----------------------------------------------------------------------------------


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def check_split(columns: int, group: dist.ProcessGroup) -> None:
    """Every rank has as many columns; asked once for each group. Raises ValueError, on every rank."""
    if group.group_name in _compared or torch.compiler.is_compiling():
        return
    found: list[int | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, columns, group=group)
    _refuse_uneven(found)
    _compared.add(group.group_name)


def _refuse_uneven(columns: list[Any]) -> None:
    if len(set(columns)) > 1:
        refuse("weight", f"{columns} rows on the ranks of vocab_group", "split evenly over them")


def merge(
    statistics: Tensor, tokens: Tensor, columns: int, temperature: Tensor | float, kl_temperature: float, name: str
) -> Tensor:
    """(5, n) statistics of the whole rows from those of each rank's columns; the same bits on every rank.

    tokens: (n,), those among this rank's columns in [0, columns). One all-gather of seven numbers a row.
    Raises: ValueError where the ranks have different columns and looking is free; elsewhere the statistics are NaN.
    """
    local = (tokens >= 0) & (tokens < columns)
    group = _group(name)
    mine = statistics.clone()
    # Elsewhere it is what a backend found at a token that is not there.
    mine[TARGET] = torch.where(local, mine[TARGET], 0)
    mine = torch.cat([mine, torch.stack([local.to(mine), torch.full_like(mine[0], columns)])])
    each = mine.new_empty(dist.get_world_size(group), *mine.shape)
    dist.all_gather_into_tensor(each.view(-1, mine.shape[1]), mine, group=group)
    even = (each[:, 6] == columns).all(0)
    if look(mine, None) and mine.numel():
        _refuse_uneven([int(x) for x in each[:, 6, 0]])
    peaks, peak = each[:, PEAK], each[:, PEAK].amax(0)
    shift = (peaks - peak) / temperature
    part = (shift + each[:, LOG_TOTAL]).exp()
    total = part.sum(0)
    # A rank's mean of (z - maximum) / τ is log Σ - entropy.
    mean = part * (each[:, LOG_TOTAL] - each[:, ENTROPY] + shift)
    out = torch.empty_like(statistics)
    out[PEAK], out[LOG_TOTAL] = peak, total.log()
    out[ENTROPY] = out[LOG_TOTAL] - torch.where(part > 0, mean, 0).sum(0) / total
    out[LOG_TOTAL_KL] = ((peaks - peak) / kl_temperature + each[:, LOG_TOTAL_KL]).exp().sum(0).log()
    # A token that no rank has is none.
    out[TARGET] = torch.where((each[:, 5].sum(0) == 1) & even, each[:, TARGET].sum(0), torch.nan)
    return out


def sum_over_ranks(x: Tensor, name: str) -> None:
    """In place: the ranks' parts of d hidden."""
    dist.all_reduce(x, group=_group(name))


def rank_of(name: str) -> int:
    return dist.get_rank(_group(name))
