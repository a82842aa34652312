"""Shared by the tests of the linear operations: batches of hidden states with a head, and their error budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from helpers.inputs import LossInputs, make_inputs
from helpers.losses import ALL_BACKENDS, CONSTANT, DEVICE, FLAGS, LENGTHS, MAX_LENGTH, PER_TOKEN, assert_within, to
from torch import Tensor

import mdpgrpo_fast
from mdpgrpo_fast.config import MDPGRPOConfig
from mdpgrpo_fast.reference import TokenLoss, linear_logits

BACKENDS = ALL_BACKENDS


@dataclass
class Head:
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0

    def to(self, device: str, dtype: torch.dtype | None = None) -> Head:
        return replace(self, weight=to(self.weight, device, dtype), bias=to(self.bias, device, dtype))

    def leaves(self, frozen: bool = False) -> Head:
        weight = self.weight.detach().clone().requires_grad_(not frozen)
        bias = None if self.bias is None else self.bias.detach().clone().requires_grad_(not frozen)
        return replace(self, weight=weight, bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        return linear_logits(hidden, self.weight, self.bias, self.logit_scale)


class Result(NamedTuple):
    out: TokenLoss
    grads: dict[str, Tensor]


def make_linear(
    seed: int = 0, lengths: tuple[int, ...] = LENGTHS, vocab: int = 37, width: int = 8, dtype: str = "float32",
    bias: bool = False, logit_scale: float = 1.0,
) -> tuple[LossInputs, Head]:  # fmt: skip
    """Hidden states in the place of logits, every third pointing at its token's row of the weight, and a head.

    Recorded log-probs are a few tenths of a nat from those of the head, as in `make_inputs`.
    """
    batch, real = make_inputs(seed, lengths, vocab=vocab), getattr(torch, dtype)
    g = torch.Generator().manual_seed(seed + 1)
    hidden = torch.randn(*batch.tokens.shape, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64)
    peaked = torch.arange(batch.tokens.numel()).view(batch.tokens.shape) % 3 == 0
    hidden += 2 * peaked[..., None] * weight[batch.tokens]
    head = Head(weight, torch.randn(vocab, generator=g, dtype=torch.float64) if bias else None, logit_scale)
    # What the precision can hold is the truth, not what was drawn.
    hidden, head = hidden.to(real).double(), head.to("cpu", real).to("cpu", torch.float64)
    logprobs = head.logits(hidden).log_softmax(-1).gather(-1, batch.tokens[..., None]).squeeze(-1)
    small = torch.float64 if real == torch.float64 else torch.float32
    for name, spread in (("old_logprobs", 0.3), ("ref_logprobs", 0.5)):
        noise = torch.randn(batch.tokens.shape, generator=g, dtype=torch.float64)
        batch.kwargs[name] = (logprobs + spread * noise).to(small)
    return replace(
        batch, logits=hidden.to(real), advantage=batch.advantage.to(small), kl_beta=batch.kl_beta.to(small)
    ), head.to("cpu", real)  # fmt: skip


def budget(head: Head, rows: int, fp32_logits: bool = False) -> int:
    """workspace_bytes for so many rows of a chunk."""
    size = head.weight.dtype.itemsize
    return rows * len(head.weight) * (size + 4 if fp32_logits and size == 2 else size)


def call(backend: str, hidden: Tensor, head: Head, batch: LossInputs, config: MDPGRPOConfig, **more: Any) -> TokenLoss:
    device = hidden.device.type
    options = {"max_completion_length": MAX_LENGTH, **batch.given(), **more}
    options = {k: v if k == "lengths" else to(v, device) for k, v in options.items() if v is not None}
    return mdpgrpo_fast.linear_token_loss(
        hidden, head.weight, to(batch.tokens, device), to(batch.mask, device), config, bias=head.bias,
        logit_scale=head.logit_scale, backend=backend, **options,
    )  # fmt: skip


def gradients(out: TokenLoss, hidden: Tensor, head: Head) -> Result:
    inputs = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    inputs = {k: x for k, x in inputs.items() if x is not None and x.requires_grad}
    found = torch.autograd.grad(out.loss, list(inputs.values()))
    return Result(out, dict(zip(inputs, found, strict=True)))


def run(
    backend: str, batch: LossInputs, head: Head, config: MDPGRPOConfig, device: str = DEVICE, frozen: bool = False,
    **more: Any,
) -> Result:  # fmt: skip
    """The loss and the gradients of hidden, weight and bias."""
    hidden = batch.logits.detach().to(device).requires_grad_()
    head = head.to(device).leaves(frozen)
    return gradients(call(backend, hidden, head, batch, config, **more), hidden, head)


def materialised(batch: LossInputs, head: Head, config: MDPGRPOConfig, **more: Any) -> Result:
    """The reference on logits that are built."""
    hidden, head = batch.logits.detach().requires_grad_(), head.leaves()
    options = {"max_completion_length": MAX_LENGTH, **batch.given(), **more}
    options = {k: v for k, v in options.items() if v is not None}
    out = mdpgrpo_fast.token_loss(head.logits(hidden), batch.tokens, batch.mask, config, backend="torch", **options)
    return gradients(out, hidden, head)


def double(x: Any) -> Any:
    return to(x, dtype=torch.float64)


def truths(batch: LossInputs, head: Head, config: MDPGRPOConfig, **more: Any) -> tuple[Result, Result]:
    """In float64, and torch's own in the precision of the batch; both on the CPU."""
    exact = LossInputs(*map(double, batch), kwargs={k: double(v) for k, v in batch.kwargs.items()})
    return (
        materialised(exact, head.to("cpu", torch.float64), config, **{k: double(v) for k, v in more.items()}),
        materialised(batch, head, config, **more),
    )


def relative(got: Tensor, truth: Tensor) -> float:
    norm = truth.norm().item()
    return (got.detach().cpu().double() - truth).norm().item() / (norm if norm else 1.0)


def assert_agrees(got: Result, truth: Result, own: Result, dtype: torch.dtype, exact_rows: bool = False) -> None:
    """Values and gradients no further from the truth than torch's own of that precision, plus a constant.

    exact_rows: log-probs of float32 logits, which need not be as far off as those of rounded ones.
    """
    values = own if not exact_rows else truth
    for name in ("loss", *PER_TOKEN):
        x, y, z = (getattr(r.out, name) for r in (got, truth, values))
        assert_within(x, y, z, name, torch.float32 if exact_rows or dtype == torch.float32 else dtype)
    for name in FLAGS:
        ours, theirs = getattr(got.out, name).cpu(), getattr(truth.out, name)
        assert dtype in (torch.float16, torch.bfloat16) or torch.equal(ours, theirs), name
    assert got.grads.keys() == truth.grads.keys()
    for name, g in got.grads.items():
        assert g.dtype == dtype and g.shape == truth.grads[name].shape, name
        # Sums of a few rows: what one rounding of a row's weight does shows in the whole.
        allowed = 2 * relative(own.grads[name], truth.grads[name]) + max(2 * CONSTANT[dtype], torch.finfo(dtype).eps)
        found = relative(g, truth.grads[name])
        assert found <= allowed, f"gradient of {name}: off by {found:.2e}, allowed {allowed:.2e}"


def assert_matches(
    backend: str, batch: LossInputs, head: Head, config: MDPGRPOConfig, expected: tuple[Result, Result] | None = None,
    **more: Any,
) -> Result:  # fmt: skip
    """expected: `truths` of the same, where they are at hand."""
    ours = {k: more.pop(k) for k in ("workspace_bytes", "fp32_logits", "lengths", "skip_idle") if k in more}
    truth, own = expected or truths(batch, head, config, **more)
    got = run(backend, batch, head, config, **more, **ours)
    assert_agrees(got, truth, own, batch.logits.dtype, ours.get("fp32_logits", False))
    return got
