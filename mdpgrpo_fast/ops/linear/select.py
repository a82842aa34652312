"""Which rows take part in `linear_token_loss`: those that can contribute, in the order in which chunks want them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.schemas import KNOBS, Rows
from ...reference import Layout


def may_look(device: torch.device) -> bool:
    """Whether looking at values waits for nothing."""
    return device.type == "cpu"


class Selection(NamedTuple):
    """The rows that take part, in the order of the chunks, one value per row each, with a bool mask if any."""

    taken: Tensor | None  # (N,) which of all T rows they are; None: all
    rows: Rows
    extents: list[int] | None  # rows of each completion, if known
    lengths: Tensor  # (B,) float32 tokens that count, of all rows
    violated: Tensor | None  # bool scalar: a completion is unknown, or the lengths given are not those of the mask


def select(
    rows: Rows, num_completions: int, row_length: int, lengths: Tensor | None, skip_idle: bool, sequence: bool
) -> Selection:
    """Leaves out what cannot contribute: masked rows, and idle ones, whose A is 0 and that have no KL term.

    On the CPU the rows are looked at. On a GPU that would wait for the device: there `lengths` says how many rows each
    completion has, 0 where it has none that contribute; without it all rows stay, under a mask.
    """
    tokens, mask, completion = rows.tokens, rows.mask, rows.completion
    n, device = len(tokens), tokens.device
    looking, packed, violated = may_look(device), completion is not None, None
    keep = torch.ones(n, dtype=torch.bool, device=device) if mask is None else mask != 0
    if completion is None:
        completion = torch.arange(n, device=device).div(row_length, rounding_mode="floor")
    elif num_completions:
        known = (completion >= 0) & (completion < num_completions)
        completion, violated = torch.where(known, completion, 0), (keep & ~known).any()
    completion = completion.long()
    layout = Layout(num_completions, completion)
    counts = layout.sum(keep.float())
    # Log-probs and importance weights have one value per row, also where there are as many rows as completions.
    each = {
        name: x[completion] if x is not None and name in KNOBS and x.numel() == num_completions else x
        for name, x in rows._asdict().items()
    }
    rows = Rows(**{**each, "completion": completion})
    idle = _idle(rows, keep, layout, sequence) if skip_idle else torch.zeros_like(keep)
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
        extents = None if packed else [row_length] * num_completions
    if sequence and packed:
        rows_of = completion if index is None else completion[index]
        order = rows_of.argsort(stable=True)
        index = order if index is None else index[order]
    if sequence and looking:
        rows_of = completion if index is None else completion[index]
        extents = rows_of.bincount(minlength=num_completions).tolist()
    rows = Rows(*(x if x is None or index is None else x[index] for x in rows._replace(mask=under)))
    return Selection(index, rows, extents, counts, violated)


def _idle(rows: Rows, keep: Tensor, layout: Layout, sequence: bool) -> Tensor:
    """(T,) bool, rows whose A is 0 and that have no KL term; sequence: none where another of the completion is not."""
    idle = rows.advantage == 0 if rows.ref_logprobs is None else (rows.advantage == 0) & (rows.kl_beta == 0)
    # One ratio for the completion: all of its rows or none.
    return layout.broadcast(layout.sum((keep & ~idle).float()) == 0) if sequence else idle


def _places(kept: Tensor, total: int) -> Tensor:
    """(total,) indices of the kept rows, of which there should be as many; nothing waits for the device."""
    # Each to the place of its rank among them; the others to one place too many.
    place = torch.where(kept, (kept.cumsum(0) - 1).clamp(max=total), total)
    index = torch.zeros(total + 1, dtype=torch.long, device=kept.device)
    return index.scatter_(0, place, torch.arange(len(kept), device=kept.device))[:total]
