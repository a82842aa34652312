"""Inputs of the benchmarks on hidden states and a head, the reference's answer for them, and bare matmuls beside them.

The work that has to be done is counted in matmuls of T x V x D multiply-adds: three with a trained head, two with a
frozen one, one for scoring. Their time is measured in the same rounds as every candidate's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import (
    CUDA,
    DEVICE,
    DTYPE,
    Candidate,
    Measured,
    Results,
    Unavailable,
    relative_error,
    release,
    require_close,
)
from problems.token_loss import GROUP
from torch import Tensor

# (tokens, vocabulary, width): the targets' first, then the sweep over T, then what does not fit any other way.
GPU_SHAPES = (
    (8192, 128256, 3072),
    (2048, 128256, 3072),
    (32768, 128256, 3072),
    (131072, 256000, 2304),
    (512, 128256, 3072),
)
CPU_SHAPES = ((2048, 32000, 512), (512, 32000, 512), (4096, 32000, 512))
# Relative norm errors; on a GPU hidden states, logits and gradients are rounded to bfloat16 on the way.
GRADIENT_TOLERANCE = 2e-2 if CUDA else 1e-4
VALUE_TOLERANCE = 1e-2 if CUDA else 1e-4
# Truth is computed so many rows at a time.
TRUTH_ROWS = 512


def shapes(most: int) -> tuple[tuple[int, int, int], ...]:
    """Those of this device, the first `most` of a GPU's. BENCH_SHAPES replaces them: tokens x vocabulary x width."""
    given = os.environ.get("BENCH_SHAPES")
    if given:
        return tuple(tuple(map(int, s.split("x"))) for s in given.split(","))  # type: ignore[misc]
    return GPU_SHAPES[:most] if CUDA else CPU_SHAPES


@dataclass
class LinearProblem:
    """B completions of L tokens, all of which count; off-policy by a tenth of a nat, every eighth token clipped."""

    hidden: Tensor  # (B, L, D)
    weight: Tensor  # (V, D)
    tokens: Tensor  # (B, L)
    advantage: Tensor  # (B,)
    old_logprobs: Tensor  # (B, L)
    ref_logprobs: Tensor
    incoming: Tensor  # (B, L), the gradient that comes in for log-probs
    temperature: Tensor  # (B,)

    @property
    def unit_flop(self) -> float:
        """One matmul."""
        return 2.0 * self.tokens.numel() * self.weight.numel()

    def leaves(self, frozen: bool) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(not frozen)

    def row(self, case: str) -> dict[str, Any]:
        b, length, width = self.hidden.shape
        vocab = len(self.weight)
        sizes = {"tokens": b * length, "vocab": vocab, "width": width, "completions": b, "length": length}
        size = round(b * length * vocab * self.hidden.element_size() / 1e6, 1)
        return {"case": case, **sizes, "dtype": str(self.hidden.dtype).removeprefix("torch."), "logits_mb": size}


_latest: list[tuple[tuple[int, int, int], LinearProblem]] = []


def problem(n_tokens: int, vocab: int, width: int) -> LinearProblem:
    """The inputs of a shape; those of the shape before are given up first."""
    key = (n_tokens, vocab, width)
    if not _latest or _latest[0][0] != key:
        _latest.clear()
        release()
        _latest.append((key, _build(*key)))
    return _latest[0][1]


def _build(n_tokens: int, vocab: int, width: int) -> LinearProblem:
    g = torch.Generator(device=DEVICE).manual_seed(n_tokens + vocab)
    length = min(1024, n_tokens // GROUP)
    b = n_tokens // length

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=DEVICE)

    weight = (normal(vocab, width) / width**0.5).to(DTYPE)
    hidden, tokens = 2 * normal(b, length, width), torch.randint(0, vocab, (b, length), generator=g, device=DEVICE)
    # Every third state points at its token, as those of a trained model do.
    hidden[:, ::3] += 11 * weight[tokens[:, ::3]].float()
    hidden = hidden.to(DTYPE)
    logprobs = torch.cat([_logits(h, weight).log_softmax(-1).gather(1, t[:, None])[:, 0]
                          for h, t in _blocks(hidden, tokens)]).view(b, length)  # fmt: skip
    release()
    # No ratio near a clip bound: a rounded logit would take it to the other side, and its whole row with it.
    old = logprobs + (0.1 * normal(b, length)).clamp(-0.12, 0.12)
    old[:, ::8] = logprobs[:, ::8] + 0.5
    return LinearProblem(
        hidden, weight, tokens, normal(b), old, logprobs + 0.1 * normal(b, length),
        normal(b, length), torch.tensor([0.7, 0.9, 1.0, 1.2], device=DEVICE).repeat(b // 4),
    )  # fmt: skip


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return (
        hidden.float() @ weight.float().t() if not CUDA else torch.ops.aten.mm.dtype(hidden, weight.t(), torch.float32)
    )


def _blocks(hidden: Tensor, *rows: Tensor) -> list[tuple[Tensor, ...]]:
    flat = (hidden.flatten(0, 1), *(r.flatten() for r in rows))
    return list(zip(*(x.split(TRUTH_ROWS) for x in flat), strict=True))


# ---- the answer -----------------------------------------------------------------------------------------------------


@dataclass
class LinearTruth:
    """A value, d hidden (B, L, D) and d weight (V, D), in float32 from exact logits; no gradient for scoring."""

    value: Tensor
    scale: float  # of an error in `value`
    d_hidden: Tensor | None
    d_weight: Tensor | None

    def check(self, value: Tensor, gradients: tuple[Tensor | None, ...], name: str) -> dict[str, Any]:
        error = (value.detach().to(self.value) - self.value).norm().item() / self.scale
        entry: dict[str, Any] = {f"{name}_error": require_close(name, error, VALUE_TOLERANCE)}
        for what, got, wanted in zip(("d_hidden", "d_weight"), gradients, (self.d_hidden, self.d_weight), strict=False):
            if got is not None and wanted is not None:
                found = relative_error(got.reshape(wanted.shape), wanted)
                entry[f"{what}_error"] = require_close(what, found, GRADIENT_TOLERANCE)
        return entry


def truth(
    p: LinearProblem, weigh: Callable[[Tensor], tuple[Tensor, Tensor, float]], gradients: bool, frozen: bool
) -> LinearTruth:
    """weigh: log-probs (B, L) at temperature 1, a leaf -> value, its derivative by them (B, L), scale of an error."""
    ell = torch.cat([_logits(h, p.weight).log_softmax(-1).gather(1, t[:, None])[:, 0]
                     for h, t in _blocks(p.hidden, p.tokens)]).view_as(p.tokens)  # fmt: skip
    value, c, scale = weigh(ell.requires_grad_())
    if not gradients:
        return LinearTruth(value, scale, None, None)
    d_hidden, d_weight = [], None if frozen else torch.zeros(p.weight.shape, device=DEVICE)
    precision = torch.get_float32_matmul_precision()
    # On a GPU tf32: an error of 3e-4 is far below the tolerance, and true float32 takes seconds.
    torch.set_float32_matmul_precision("high" if CUDA else precision)
    wide = p.weight.float()
    for h, t, w in _blocks(p.hidden, p.tokens, c):
        g = -_logits(h, p.weight).softmax(-1)
        g[torch.arange(len(t)), t] += 1
        g *= w[:, None]
        d_hidden.append(g @ wide)
        if d_weight is not None:
            d_weight.addmm_(g.t(), h.float())
        del g
    torch.set_float32_matmul_precision(precision)
    del wide
    release()
    return LinearTruth(value, scale, torch.cat(d_hidden).view(p.hidden.shape), d_weight)


# ---- candidates and figures -----------------------------------------------------------------------------------------


def bare_matmuls(p: LinearProblem, count: int, rows: int = 4096) -> Candidate:
    """logits, then d hidden, then d weight, of some rows at a time so that it fits; nothing else. Not verified."""
    hidden, n = p.hidden.flatten(0, 1), p.tokens.numel()
    rows = min(rows, n)
    z = torch.empty(rows, len(p.weight), dtype=p.weight.dtype, device=DEVICE)
    d, dw = torch.empty_like(hidden[:rows]), torch.empty_like(p.weight) if count > 2 else None

    def run() -> None:
        for start in range(0, n, rows):
            h = hidden[start : start + rows]
            torch.mm(h, p.weight.t(), out=z[: len(h)])
            if count > 1:
                torch.mm(z[: len(h)], p.weight, out=d[: len(h)])
            if dw is not None:
                torch.mm(z[: len(h)].t(), h, out=dw)

    return Candidate(run)


def add_figures(results: Results, measured: Measured, p: LinearProblem, count: int) -> None:
    """TFLOP/s of the matmuls that are needed, whatever is done, and the time beside that of the matmuls alone."""
    bare = measured.entries["matmuls"].get("ms")
    for entry in measured.entries.values():
        if "ms" in entry:
            entry["tflop_s"] = float(f"{count * p.unit_flop / entry['ms'] / 1e9:.4g}")
            if bare is not None:
                entry["x_matmuls"] = float(f"{entry['ms'] / bare:.4g}")
    results.write()


# Above so many bytes a candidate that builds all logits, with what it needs beside them, is not tried.
LOGITS_LIMIT = (60 << 30) if CUDA else (8 << 30)


def refuse_logits(p: LinearProblem, copies: float) -> None:
    n_bytes = p.tokens.numel() * len(p.weight) * p.hidden.element_size()
    if copies * n_bytes > LOGITS_LIMIT:
        raise Unavailable(f"not run: about {copies * n_bytes / 1e9:.0f} GB for logits and what is made of them")
