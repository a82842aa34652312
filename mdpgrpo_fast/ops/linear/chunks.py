"""The loop behind `linear_token_loss`: rows in chunks, their logits in a reused workspace, gradients while it is hot.

A chunk's logits become the gradient of ℓ in place, without the weights of its rows: those are applied to the two small
matrices that are made of it, hidden (n, D) before d weight and d hidden (n, D) after. So nothing about a row has to be
known before its logits are read. They are read twice where its gradient is no multiple of ∂ℓ/∂x: `needs_mixing`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import onednn
from ...kernels.schemas import NUM_STATISTICS, Rows, gradient_dtype
from ...reference import entropy_quantile
from ..backends import constant
from . import sharded
from .engines import ENTROPY, Engine, Weighed, logprobs_of
from .select import Selection

# Rows of one tile of a GPU's matmul, and the most rows of one matmul for logits. That matmul has the same size for
# every chunk, the last one padded: the order of its sums, and so a row's log-prob, never depends on the batch.
TILE, CALL = 128, 512
# Of a CPU's: rows in fours or eights are summed in the same order wherever they are.
CPU_TILE = 16
# Columns of the weight that are widened to float32 at once where a device has no mixed matmul.
SLAB = 2048


class Chunking(NamedTuple):
    rows: int  # most rows of a chunk
    call: int  # rows of one matmul for logits; rows are padded to a multiple of it


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool


@constant
def default_workspace(device: torch.device, split: bool = False) -> int:
    """Bytes. On a GPU few, large chunks: with each the float32 sum of d weight is read and written once.

    split: the vocabulary is split over ranks, which must cut the same chunks whatever memory each of them has.
    """
    if device.type != "cuda" or split:
        return 256 << 20
    return min(1 << 30, torch.cuda.get_device_properties(device).total_memory // 64)


def bytes_per_row(vocab: int, dtype: torch.dtype, fp32_logits: bool) -> int:
    """Of the workspace: logits, and apart from them their gradient where it has another dtype."""
    return vocab * (dtype.itemsize + 4 if fp32_logits and dtype.itemsize == 2 else dtype.itemsize)


def chunking(width: int, row_bytes: int, budget: int, device: torch.device) -> Chunking:
    """As many rows as the budget holds, in whole tiles; on a GPU fewer where the d hidden matmul fills it better."""
    max_rows = max(1, budget // row_bytes)
    if device.type != "cuda":
        return (
            Chunking(max_rows, max_rows) if max_rows < CPU_TILE else Chunking(max_rows // CPU_TILE * CPU_TILE, CPU_TILE)
        )
    if max_rows < TILE:
        return Chunking(max_rows, max_rows)
    processors = torch.cuda.get_device_properties(device).multi_processor_count

    def filled(rows: int) -> float:
        tiles = rows // TILE * -(-width // (2 * TILE))
        return tiles / (-(-tiles // processors) * processors)

    # The number of tiles that takes least time per row; more rows where two are as good.
    calls = -(-(max_rows // TILE) // (CALL // TILE))
    call = max_rows // calls // TILE * TILE
    rows = max((n * call for n in range((calls + 1) // 2, calls + 1)), key=lambda n: (round(filled(n), 2), n))
    return Chunking(rows, call)


def plan(n_rows: int, chunk: int, extents: list[int] | None) -> list[tuple[int, int]] | None:
    """Ranges of rows. With extents, the rows of each completion in order, none is divided; None if one has to be."""
    if extents is None:
        return [(start, min(start + chunk, n_rows)) for start in range(0, n_rows, chunk)]
    if max(extents, default=0) > chunk:
        return None
    found, start, stop = [], 0, 0
    for extent in extents:
        if stop + extent - start > chunk:
            found.append((start, stop))
            start = stop
        stop += extent
    return [*found, (start, stop)] if stop > start else found


# ---- matmuls --------------------------------------------------------------------------------------------------------


def into_logits(
    out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float
) -> None:  # fmt: skip
    """out (n, V) = scale (hidden weightᵀ + bias), rounded once to the dtype of out."""
    if out.dtype == hidden.dtype:
        start = out if bias is None else bias
        torch.addmm(start, hidden, weight.t(), beta=0 if bias is None else scale, alpha=scale, out=out)
        return
    if out.device.type == "cuda":
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for first in range(0, len(weight), SLAB):
            torch.mm(wide, weight[first : first + SLAB].t().to(out.dtype), out=out[:, first : first + SLAB])
    if bias is not None:
        out += bias
    if scale != 1:
        out *= scale


def accumulate(out: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
    """out (V, D) (+)= gradientᵀ (n, V) hidden (n, D), in the dtype of out."""
    beta = 0 if first else 1
    if out.dtype == gradient.dtype:
        torch.addmm(out, gradient.t(), hidden, beta=beta, out=out)
    elif out.device.type == "cuda":
        # addmm refuses a float32 sum of bfloat16 products in some releases of torch, baddbmm in none.
        torch.ops.aten.baddbmm.dtype_out(
            out[None], gradient.t()[None], hidden[None], out.dtype, beta=beta, out=out[None]
        )  # fmt: skip
    else:
        wide = hidden.to(out.dtype)
        for start in range(0, len(out), SLAB):
            part = out[start : start + SLAB]
            torch.addmm(part, gradient[:, start : start + SLAB].t().to(out.dtype), wide, beta=beta, out=part)


def new_rows(n: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, V), uninitialised; on a GPU every row begins on 16 bytes, without which kernels and matmuls are slow.

    On 16 elements even: kernels are compiled for strides of that kind.
    """
    width = 16 if device.type == "cuda" else 1
    return torch.empty(n, -(-vocab // width) * width, dtype=dtype, device=device)[:, :vocab]


class Head:
    """hidden (B, L, D), of which some rows take part, and the linear layer after it, chunk by chunk.

    The matmuls have the dtype of hidden. chunks: ranges of the rows that take part; group: name of the process group
    that the vocabulary is split over, "": it is whole.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs, selection: Selection,
        chunks: list[tuple[int, int]], size: Chunking, logit_scale: float, fp32_logits: bool, group: str,
    ) -> None:  # fmt: skip
        self.hidden, self.index, self.rows = hidden, selection.taken, selection.rows
        self.weight, self.bias = (None if x is None else x.detach().to(hidden.dtype) for x in (weight, bias))
        self.scale, self.group, self.chunks, self.size = logit_scale, group, chunks, size
        vocab, width, device = len(weight), hidden.shape[2], hidden.device
        longest = max((stop - start for start, stop in chunks), default=0)
        wide = fp32_logits and hidden.dtype.itemsize == 2
        self.logits: Tensor | None = new_rows(
            -(-longest // size.call) * size.call, vocab, torch.float32 if wide else hidden.dtype, device
        )
        self.gradient = new_rows(longest, vocab, hidden.dtype, device) if wide and any(needs) else None
        kept = gradient_dtype(hidden.dtype)
        self.d_hidden = self.d_weight = self.d_bias = None
        if needs.hidden:
            make = torch.empty if self.index is None else torch.zeros
            self.d_hidden = make(hidden.shape, dtype=kept, device=device)
        # Sums over chunks are kept in float32; a single one is no sum.
        summed = kept if len(chunks) == 1 and weight.dtype == hidden.dtype else torch.promote_types(kept, torch.float32)
        self.weight_dtype = gradient_dtype(weight.dtype)
        if needs.weight:
            make = torch.empty if chunks else torch.zeros
            self.d_weight = make(vocab, width, dtype=summed, device=device)
        if needs.bias:
            make = torch.empty if chunks else torch.zeros
            self.d_bias = make(vocab, dtype=summed, device=device)
        self.first = True

    def take(self, start: int, stop: int) -> Tensor:
        """(n, D) hidden states of rows, 0 where a row does not count."""
        _, length, width = self.hidden.shape
        if self.index is not None:
            places = self.index[start:stop]
            h = self.hidden[places.div(length, rounding_mode="floor"), places % length]
        elif self.hidden.is_contiguous():
            h = self.hidden.view(-1, width)[start:stop]
        else:
            places = torch.arange(start, stop, device=self.hidden.device)
            h = self.hidden[places.div(length, rounding_mode="floor"), places % length]
        mask = self.rows.mask
        # What a masked row holds may be NaN, and NaN times no weight would still be NaN.
        return h if mask is None else h.masked_fill(~mask[start:stop, None], 0)

    def forward(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(n, D) hidden states and (n, V) logits of rows; the logits are overwritten by the next chunk's."""
        h, call = self.take(start, stop), self.size.call
        n = len(h)
        if n % call:
            h = torch.nn.functional.pad(h, (0, 0, 0, -n % call))
        # On the CPU a call is a tile, and all tiles are one matmul.
        step = call if h.device.type == "cuda" else len(h)
        assert self.weight is not None and self.logits is not None
        for first in range(0, len(h), max(1, step)):
            into_logits(self.logits[first : first + step], h[first : first + step], self.weight, self.bias, self.scale)
        return h[:n], self.logits[:n]

    def target(self, z: Tensor) -> Tensor:
        """Where the gradient of the logits z goes: over them, or beside them where they have another dtype."""
        return z if self.gradient is None else self.gradient[: len(z)]

    def backward(self, g: Tensor, h: Tensor, weights: Tensor, unit: float | Tensor, start: int, stop: int) -> None:
        """From g (n, V), the gradient of each row's ℓ, and weights (n,): d hidden, d weight, d bias.

        unit: what all weights are divided by before they meet a dtype of little range.
        """
        assert self.weight is not None
        weights = weights * self.scale if self.scale != 1 else weights
        if self.d_hidden is not None:
            d = (onednn.mm(g, self.weight) * weights[:, None]).to(self.d_hidden.dtype)
            flat = self.d_hidden.view(-1, d.shape[1])
            if self.index is None:
                flat[start:stop] = d
            else:
                flat.index_copy_(0, self.index[start:stop], d)
        small = weights / unit
        if self.d_weight is not None:
            accumulate(self.d_weight, g, (h * small[:, None]).to(h.dtype), self.first)
        if self.d_bias is not None:
            accumulate(self.d_bias[:, None], g, small[:, None].to(h.dtype), self.first)
        self.first = False

    def weigh(self, weights: Tensor) -> None:
        """d hidden of rows (N,) times their weights, where it was made without them."""
        assert self.d_hidden is not None
        flat = self.d_hidden.view(-1, self.d_hidden.shape[-1])
        if self.index is None:
            flat.mul_(weights[:, None])
        else:
            flat.index_copy_(0, self.index, (flat[self.index] * weights[:, None]).to(flat.dtype))

    def gradients(self, unit: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden, weight and bias, each empty where it is not needed; float16 ones as float32."""
        # Room for the copy in another dtype.
        self.logits = self.gradient = self.weight = None
        if self.d_hidden is not None and self.group:
            sharded.sum_over_ranks(self.d_hidden, self.group)
        found = []
        for x in (self.d_weight, self.d_bias):
            if x is not None:
                x = x.mul_(unit) if isinstance(unit, Tensor) else x
                x = x.to(self.weight_dtype)
            found.append(self.hidden.new_empty(0) if x is None else x)
        return (self.hidden.new_empty(0) if self.d_hidden is None else self.d_hidden, *found)  # type: ignore[return-value]


# ---- passes over all chunks -----------------------------------------------------------------------------------------


def score(head: Head, engine: Engine, z: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """ℓ (n,) and (5, n) statistics of whole rows, wherever their columns are; 0 where a row does not count."""
    if not head.group:
        return engine.score(z, rows)
    s, tau = engine.settings, engine.temperature(rows)
    statistics = sharded.merge(engine.score(z, rows)[1], rows.tokens, z.shape[1], tau, s.kl_temperature, head.group)
    logprobs = logprobs_of(statistics, tau)
    if rows.mask is not None:
        statistics.masked_fill_(~rows.mask, 0)
        logprobs.masked_fill_(~rows.mask, 0)
    return logprobs, statistics


def joined(scores: list[tuple[Tensor, Tensor]], like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ℓ (N,) and statistics (5, N) of all chunks."""
    if not scores:
        return like.new_zeros(0, dtype=dtype), like.new_zeros(NUM_STATISTICS, 0, dtype=dtype)
    logprobs, statistics = zip(*scores, strict=True)
    return torch.cat(logprobs), torch.cat(statistics, 1)


def score_all(head: Head, engine: Engine) -> tuple[Tensor, Tensor]:
    """ℓ (N,) and (5, N) statistics: one matmul."""
    scores = [score(head, engine, head.forward(a, b)[1], head.rows.part(a, b)) for a, b in head.chunks]
    return joined(scores, head.hidden, engine.dtype)


def weigh_all(
    head: Head, engine: Engine, lengths: Tensor, denominator: Tensor, unit: float | Tensor
) -> Iterator[Weighed]:
    """The objective of every chunk, its logits read once, and the gradients on the way: three matmuls at the most."""
    num_completions = len(lengths)
    for a, b in head.chunks:
        rows = head.rows.part(a, b)
        h, z = head.forward(a, b)
        g = head.target(z)
        if needs_mixing(head, engine):
            logprobs, statistics = score(head, engine, z, rows)
            weighed = weigh(engine, logprobs, statistics, rows, lengths, denominator, num_completions)
            head.backward(g, h, mix(engine, z, g, statistics, weighed.weights, rows), unit, a, b)
        else:
            weighed = weigh(engine, *engine.unit(z, g, rows), rows, lengths, denominator, num_completions)
            head.backward(g, h, weighed.weights[0], unit, a, b)
        yield weighed


def needs_mixing(head: Head, engine: Engine) -> bool:
    """Whether a row's gradient is no multiple of ∂ℓ/∂x: ℓ at two temperatures and the entropy are mixed by their
    weights, which follow from the whole row."""
    return bool(engine.settings.two_temperatures or engine.settings.has_bonus(head.rows) or head.group)


def weigh(
    engine: Engine, logprobs: Tensor, statistics: Tensor, rows: Rows, lengths: Tensor, denominator: Tensor,
    num_completions: int,
) -> Weighed:  # fmt: skip
    """The objective of rows that are all of a call where it asks for those of the most entropy."""
    share = engine.settings.top_entropy_quantile
    if share < 1:
        entropy = statistics[ENTROPY]
        keep = torch.ones_like(entropy, dtype=torch.bool) if rows.mask is None else rows.mask
        floor = entropy_quantile(entropy, keep, share)
        rows = rows._replace(entropy_floor=floor.expand_as(entropy).contiguous())
    return engine.objective(logprobs, statistics, rows, lengths, denominator, num_completions)


def unit_all(head: Head, engine: Engine) -> tuple[Tensor, Tensor]:
    """ℓ (N,) and (5, N) statistics, and ∂ℓ/∂hidden in place of d hidden: two matmuls."""
    found = []
    for a, b in head.chunks:
        h, z = head.forward(a, b)
        g, rows = head.target(z), head.rows.part(a, b)
        ones = torch.ones(1, b - a, dtype=engine.dtype, device=z.device)
        if head.group:
            found.append(score(head, engine, z, rows))
            mix(engine, z, g, found[-1][1], ones, rows)
        else:
            found.append(engine.unit(z, g, rows))
        head.backward(g, h, ones[0], 1.0, a, b)
    return joined(found, head.hidden, engine.dtype)


def backward_all(head: Head, engine: Engine, statistics: Tensor, weights: Tensor, unit: float | Tensor) -> None:
    """The gradients where all statistics and weights (1 to 3, N) are known: the logits once more, two matmuls after."""
    for a, b in head.chunks:
        h, z = head.forward(a, b)
        g, part = head.target(z), statistics[:, a:b].contiguous()
        size = mix(engine, z, g, part, weights[:, a:b], head.rows.part(a, b))
        head.backward(g, h, size, unit, a, b)


def mix(engine: Engine, z: Tensor, g: Tensor, statistics: Tensor, weights: Tensor, rows: Rows) -> Tensor:
    """The weighted gradient of rows into g, divided by the size of their weights, which is returned: (n,)."""
    size = weights.abs().sum(0)
    # A row without weight is 0; one whose weight is NaN stays so.
    engine.mix(z, g, statistics, weights / torch.where(size == 0, 1, size), rows)
    return size
