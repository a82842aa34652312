"""Which rows take part in `linear_token_loss`: those that can contribute, in the order in which chunks want them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...reference import Layout
from .engines import Rows

KNOBS = ("advantage", "kl_beta", "temperature", "epsilon_low", "epsilon_high")


def may_look(device: torch.device) -> bool:
    """Whether looking at values waits for nothing."""
    return device.type == "cpu"


class Selection(NamedTuple):
    """The rows that take part. taken (N,): which of all T, None: all; extents: rows of each completion, if known."""

    taken: Tensor | None
    rows: Rows
    extents: list[int] | None
    lengths: Tensor  # (B,) float32 tokens that count, of all rows
    violated: Tensor | None  # bool scalar: a completion is unknown, or the lengths given are not those of the mask


def select(
    tokens: Tensor,
    mask: Tensor | None,
    completion: Tensor | None,
    count: int,
    row_length: int,
    lengths: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    skip_idle: bool,
    sequence: bool,
) -> Selection:
    """Leaves out what cannot contribute: masked rows, and idle ones, whose A is 0 and that have no KL term.

    On the CPU the rows are looked at. On a GPU that would wait for the device: there `lengths` says how many rows each
    completion has, 0 where it has none that contribute; without it all rows stay, under a mask.
    inputs: the members of Rows from advantage on, (T,) or, of KNOBS, (B,).
    """
    n, device = len(tokens), tokens.device
    looking, packed, violated = may_look(device), completion is not None, None
    keep = torch.ones(n, dtype=torch.bool, device=device) if mask is None else mask != 0
    if completion is None:
        completion = torch.arange(n, device=device).div(row_length, rounding_mode="floor")
    elif count:
        known = (completion >= 0) & (completion < count)
        completion, violated = torch.where(known, completion, 0), (keep & ~known).any()
    completion = completion.long()
    layout = Layout(count, completion)
    counts = layout.sum(keep.float())
    # Log-probs and importance weights have one value per row, also where there are as many rows as completions.
    each = [
        x[completion] if x is not None and name in KNOBS and x.numel() == count else x
        for x, name in zip(inputs, Rows._fields[3:], strict=True)
    ]
    idle = _idle(each, keep, layout, sequence) if skip_idle else torch.zeros_like(keep)
    kept, under = keep & ~idle, None
    index: Tensor | None = None
    extents: list[int] | None = None
    if looking:
        if not bool(kept.all()):
            index = kept.nonzero().squeeze(1)
    elif lengths is not None:
        # From pinned memory the copy is queued behind the work before it, and the host goes on.
        given = (lengths.pin_memory() if device.type == "cuda" else lengths).to(device, non_blocking=True)
        out = (given == 0)[completion]
        wrong = ((given != 0) & (given != counts)).any() | (keep & out & ~idle).any()
        violated = wrong if violated is None else violated | wrong
        extents = lengths.tolist()
        index = _places(keep & ~out, sum(extents))
    else:
        under = None if mask is None and not skip_idle else kept
        extents = None if packed else [row_length] * count
    if sequence and packed:
        rows_of = completion if index is None else completion[index]
        order = rows_of.argsort(stable=True)
        index = order if index is None else index[order]
    if sequence and looking:
        rows_of = completion if index is None else completion[index]
        extents = rows_of.bincount(minlength=count).tolist()
    rows = [x if x is None or index is None else x[index] for x in (tokens, under, completion, *each)]
    return Selection(index, Rows(*rows), extents, counts, violated)  # type: ignore[arg-type]


def _idle(each: list[Tensor | None], keep: Tensor, layout: Layout, sequence: bool) -> Tensor:
    """(T,) bool, rows whose A is 0 and that have no KL term."""
    advantage, kl_beta, _, ref, *_ = each
    assert advantage is not None and kl_beta is not None
    idle = advantage == 0 if ref is None else (advantage == 0) & (kl_beta == 0)
    # One ratio for the completion: all of its rows or none.
    return layout.spread(layout.sum((keep & ~idle).float()) == 0) if sequence else idle


def _places(kept: Tensor, total: int) -> Tensor:
    """(total,) indices of the kept rows, of which there should be as many; nothing waits for the device."""
    # Each to the place of its rank among them; the others to one place too many.
    place = torch.where(kept, (kept.cumsum(0) - 1).clamp(max=total), total)
    index = torch.zeros(total + 1, dtype=torch.long, device=kept.device)
    return index.scatter_(0, place, torch.arange(len(kept), device=kept.device))[:total]
