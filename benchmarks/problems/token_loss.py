"""Shapes and random inputs of the benchmarks on logits, the reference's answer for them, and the peers' functions.

Logits are (B, L + 1, V) as a model gives them and Liger wants them; the others take the view without the last position.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import (
    CUDA,
    DEVICE,
    DTYPE,
    GRADIENT_TOLERANCE,
    VALUE_TOLERANCE,
    Unavailable,
    relative_error,
    release,
    require_close,
)
from torch import Tensor

GROUP = 8
# Below this many tokens the reference in eager PyTorch is timed.
REFERENCE_TOKENS = 8192
# In float32 from bfloat16 logits, where truth in float64 would not fit.
TRUTH = torch.float32 if CUDA else torch.float64

# (tokens, vocabulary): the targets' sizes first, then the rest, so that what a time limit cuts off is the sweep.
GPU_SHAPES = (
    (8192, 128256),
    (8192, 32000),
    (512, 128256),
    (8192, 256000),
    (65536, 128256),
    (2048, 128256),
    (32768, 128256),
)
CPU_SHAPES = ((512, 32000),)


def shapes(only: tuple[tuple[int, int], ...] | None = None) -> tuple[tuple[int, int], ...]:
    """Those of this device; of them, on a GPU, `only` these. BENCH_SHAPES replaces them."""
    given = os.environ.get("BENCH_SHAPES")
    if given:
        return tuple(tuple(map(int, s.split("x"))) for s in given.split(","))  # type: ignore[misc]
    if not CUDA:
        return CPU_SHAPES
    return GPU_SHAPES if only is None else only


@dataclass
class Problem:
    """B completions of L tokens, all of which count; P = B / GROUP prompts. Off-policy by a tenth of a nat."""

    padded: Tensor  # (B, L + 1, V)
    tokens: Tensor  # (B, L)
    mask: Tensor  # (B, L) bool
    rewards: Tensor  # (P, GROUP)
    num_constraints: Tensor  # (P,)
    old_logprobs: Tensor  # (B, L)
    ref_logprobs: Tensor
    weights: Tensor  # (B, L), the gradient that comes in for log-probs
    temperature: Tensor  # (B,)

    @property
    def logits(self) -> Tensor:
        """(B, L, V), a view."""
        return self.padded[:, :-1]

    @property
    def count(self) -> int:
        return len(self.tokens)

    @property
    def logits_bytes(self) -> int:
        return self.logits.numel() * self.logits.element_size()

    def leaf(self) -> Tensor:
        return self.logits.detach().requires_grad_()

    def row(self, case: str) -> dict[str, Any]:
        b, length, vocab = self.logits.shape
        dtype = str(self.padded.dtype).removeprefix("torch.")
        sizes = {"tokens": b * length, "vocab": vocab, "dtype": dtype, "completions": b, "length": length}
        return {"case": case, **sizes, "logits_mb": round(self.logits_bytes / 1e6, 1)}


def _build(n_tokens: int, vocab: int) -> Problem:
    g = torch.Generator(device=DEVICE).manual_seed(n_tokens + vocab)
    length = min(1024, n_tokens // GROUP)
    b = n_tokens // length
    prompts = b // GROUP

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=DEVICE)

    tokens = torch.randint(0, vocab, (b, length), generator=g, device=DEVICE)
    padded = torch.empty(b, length + 1, vocab, dtype=DTYPE, device=DEVICE)
    logprobs = torch.empty(b, length, device=DEVICE)
    for x, ids, out in zip(padded, tokens, logprobs, strict=True):
        x.normal_(0, 2, generator=g)
        # Every third softmax is peaked at its token, as those of a trained model are.
        x[:-1:3].scatter_add_(1, ids[::3, None], torch.full_like(x[:-1:3, :1], 13))
        out.copy_(x[:-1].float().log_softmax(-1).gather(1, ids[:, None])[:, 0])
    levels = torch.randint(0, 5, (prompts, GROUP), generator=g, device=DEVICE)
    return Problem(
        padded,
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        levels / 4,
        torch.full((prompts,), 4, device=DEVICE),
        logprobs + 0.1 * normal(b, length),
        logprobs + 0.1 * normal(b, length),
        normal(b, length),
        torch.tensor([0.7, 0.9, 1.0, 1.2], device=DEVICE).repeat(b // 4),
    )


_latest: list[tuple[tuple[int, int], Problem]] = []


def problem(n_tokens: int, vocab: int) -> Problem:
    """The inputs of a shape; those of the shape before are given up first."""
    if not _latest or _latest[0][0] != (n_tokens, vocab):
        _latest.clear()
        release()
        _latest.append(((n_tokens, vocab), _build(n_tokens, vocab)))
    return _latest[0][1]


# ---- the answer -----------------------------------------------------------------------------------------------------


@dataclass
class Truth:
    """The reference's values, and the gradient (L, V) of the first and the last completion."""

    value: Tensor
    gradients: dict[int, Tensor]
    scale: float  # of an error in `value`

    def check(self, value: Tensor, gradient: Tensor | None, name: str) -> dict[str, Any]:
        """Errors of a candidate's value (a loss, or log-probs) and gradient (B, L or L + 1, V); raises Wrong."""
        error = (value.detach().to(self.value) - self.value).norm().item() / self.scale
        entry: dict[str, Any] = {f"{name}_error": require_close(name, error, VALUE_TOLERANCE)}
        if gradient is not None:
            errors = [relative_error(gradient[i, : len(g)], g) for i, g in self.gradients.items()]
            worst = max(errors, key=lambda e: float("inf") if e != e else e)
            entry["gradient_error"] = require_close("gradient", worst, GRADIENT_TOLERANCE[gradient.dtype])
        return entry


def per_completion(p: Problem, function: Callable[[Tensor, int], Tensor], weigh: Callable[[Tensor, int], Tensor],
                   gradients: bool = True) -> tuple[list[Tensor], dict[int, Tensor]]:  # fmt: skip
    """`function(logits (1, L, V), i)` of every completion, in TRUTH precision and one at a time, so that it fits.

    Second: the gradient of `weigh(value, i)` for the first and the last.
    """
    values, found = [], {}
    for i in range(p.count):
        wanted = gradients and i in (0, p.count - 1)
        x = p.logits[i : i + 1].to(TRUTH).requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            value = function(x, i)
            if wanted:
                found[i] = torch.autograd.grad(weigh(value, i), x)[0][0]
        values.append(value.detach())
    release()
    return values, found


# ---- peers ----------------------------------------------------------------------------------------------------------


def peer(module: str, name: str) -> Any:
    """A function of a peer's; Unavailable with the reason where it cannot be imported."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise Unavailable(f"{module.split('.')[0]} cannot be imported: {e}") from None
    except Exception as e:  # a peer's import may fail in ways of its own
        raise Unavailable(f"{module.split('.')[0]} cannot be imported: {type(e).__name__}: {e}") from None


def trl_logprobs() -> Callable[..., tuple[Tensor, Tensor]]:
    """TRL's log-probs and entropy on logits: its Triton kernel on a GPU, its torch path elsewhere."""
    if CUDA:
        return peer("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy")
    return peer("trl.trainer.utils", "selective_log_softmax_and_entropy")


def refuse_reference(p: Problem) -> None:
    n = p.tokens.numel()
    if CUDA and n > REFERENCE_TOKENS:
        one = 4 * p.logits.numel() / 1e9
        raise Unavailable(
            f"not run above {REFERENCE_TOKENS} tokens: each of its float32 temporaries takes {one:.0f} GB"
        )
