"""Autograd around the fused ops `mdpgrpo_fast::<backend>_<op>`, which write the gradient in the forward pass.

The functions take checked inputs of the public functions and bring them to the ops' form: logits (B, L, V) or
(1, T, V), all else flat.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..config import MDPGRPOConfig
from ..kernels.schemas import KNOBS, Groups, Rows, Settings
from ..log import say_once
from ..reference import Advantages, TokenLoss


def _op(backend: str, name: str) -> Any:
    return getattr(torch.ops.mdpgrpo_fast, f"{backend}_{name}")


# ---- inputs ---------------------------------------------------------------------------------------------------------


def flat(x: Tensor | None) -> Tensor | None:
    """Detached, of one dimension, contiguous."""
    return None if x is None else x.detach().reshape(-1).contiguous()


def as_bytes(x: Tensor | None) -> Tensor | None:
    """Non-zero means yes, as contiguous bytes."""
    if x is None:
        return None
    x = (x if x.dtype == torch.bool else x != 0).reshape(-1).contiguous()
    # torch 2.11's compiler cannot view a bool as something else.
    return x.to(torch.uint8) if torch.compiler.is_compiling() else x.view(torch.uint8)


def flat_rows(rows: Rows, num_completions: int, device: torch.device, dtype: torch.dtype | None = None) -> Rows:
    """Rows as given to a public function, in the form that everything below takes. dtype: of the knobs, if any.

    A number is in Settings and becomes None, but for advantages, whose kernels take tensors alone.
    """

    def knob(name: str, x: Any) -> Tensor | None:
        if x is None or (not isinstance(x, Tensor) and name not in ("advantage", "kl_beta")):
            return None
        x = scalar(x, device, dtype or torch.float32) if not isinstance(x, Tensor) else x
        if x.ndim == 0:  # a scalar may lie on the CPU, as elsewhere in PyTorch
            x = x.to(device).expand(num_completions)
        return flat(x if dtype is None else x.to(dtype))

    others = rows._replace(mask=None)._asdict().items()
    members = {n: knob(n, x) if n in KNOBS else flat(x) for n, x in others}
    return Rows(**{**members, "mask": as_bytes(rows.mask)})


def scalar(x: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """() on the device. A number is filled in there: a copy from the host would wait for it."""
    if isinstance(x, Tensor):
        return x.detach().reshape(()).to(device, dtype)
    return torch.full((), float(x), dtype=dtype, device=device)


def _flat_groups(groups: Groups) -> list[Tensor | None]:
    std = None if groups.batch_std is None else scalar(groups.batch_std, groups.rewards.device, torch.float32)
    each = flat(groups.rewards), flat(groups.num_constraints), as_bytes(groups.valid), flat(groups.slots)
    return list(Groups(*each, batch_std=std))


def _as_padded(logits: Tensor) -> Tensor:
    """(1, T, V) of packed logits, and unit stride in V, by a copy and a notice where it is not."""
    logits = logits if logits.ndim == 3 else logits[None]
    if logits.stride(-1) == 1 or logits.shape[-1] == 1:
        return logits
    if not torch.compiler.is_compiling():
        say_once(logging.WARNING, "logits are copied: the kernels need unit stride in the vocabulary")
    return logits.contiguous()


def saved_gradient(saved: Tensor) -> Tensor:
    """A saved gradient to write to: its own memory, or a copy where another backward pass may want it (retain_graph).

    While compiling there is no asking, and functionalisation would copy what is written to anyway.
    """
    kept = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
    return saved.detach().clone() if kept else saved.detach()


# ---- the objective --------------------------------------------------------------------------------------------------


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, backend: str, in_place: bool, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        if in_place:
            outputs = _op(backend, "token_loss_")(logits, *args)
            torch.autograd.graph.increment_version(logits)
            gradient = logits
        else:
            gradient, *outputs = _op(backend, "token_loss")(logits, *args)
        # A second backward pass then raises torch's own error, and so does one after someone has written to it.
        ctx.save_for_backward(gradient)
        ctx.backend, ctx.dtype = backend, logits.dtype
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None]:
        if grad_loss is None:
            return None, None, None, None
        (gradient,) = ctx.saved_tensors
        if gradient.dtype != ctx.dtype:  # float16: rounded only after the loss scale
            return (gradient.detach() * grad_loss).to(ctx.dtype), None, None, None
        gradient = saved_gradient(gradient)
        _op(ctx.backend, "scale_")(gradient, grad_loss)
        return gradient, None, None, None


def token_loss(
    backend: str, logits: Tensor, rows: Rows, groups: Groups, settings: Settings, denominator: Tensor | float | None,
    num_completions: int, max_completion_length: int, in_place: bool,
) -> TokenLoss:  # fmt: skip
    """`ops.token_loss` on a fused backend. rows: as given; groups: of `advantages.grouped`."""
    if denominator is not None:
        denominator = scalar(denominator, logits.device, torch.float32)
    args = (
        list(flat_rows(rows, num_completions, logits.device)), _flat_groups(groups), denominator, num_completions,
        max_completion_length, list(settings.numbers), list(settings.flags),
    )  # fmt: skip
    x = _as_padded(logits)
    if torch.is_grad_enabled() and logits.requires_grad:
        outputs = _TokenLoss.apply(x, backend, in_place, args)
    else:
        outputs = _op(backend, "token_loss_value")(x, *args)
    return as_token_loss(outputs, rows.tokens.shape)


def as_token_loss(outputs: Any, shape: torch.Size) -> TokenLoss:
    """The outputs of an op (schemas.OUTPUTS); what is said of each row in the rows' shape."""
    loss, per_row, marks, completion_kl, totals = outputs
    logprobs, entropy, kl, ratio, _ = (x.view(shape) for x in per_row.unbind())
    clipped_low, clipped_high, _ = (x.view(shape) for x in marks.unbind())
    return TokenLoss(loss, logprobs, entropy, kl, ratio, clipped_low, clipped_high, completion_kl, totals)


# ---- log-probs ------------------------------------------------------------------------------------------------------


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, backend: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        logprobs, statistics = _op(backend, "token_logprobs")(logits, *args)
        ctx.save_for_backward(logits, statistics)
        ctx.backend, ctx.args = backend, args
        entropy = statistics[2].clone()
        ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, _: Any) -> tuple[Tensor | None, None, None]:
        if grad_logprobs is None:
            return None, None, None
        logits, statistics = ctx.saved_tensors
        backward = _op(ctx.backend, "token_logprobs_backward")
        return backward(logits, grad_logprobs.contiguous(), *ctx.args, statistics), None, None


def token_logprobs(
    backend: str, logits: Tensor, rows: Rows, num_completions: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`ops.token_logprobs` on a fused backend."""
    temperature = 1.0 if isinstance(rows.temperature, Tensor) else float(rows.temperature)
    settings = Settings(temperature=temperature, softcap=softcap or 0.0)
    args = (
        list(flat_rows(rows, num_completions, logits.device)), num_completions, list(settings.numbers),
        list(settings.flags),
    )  # fmt: skip
    logprobs, entropy = _TokenLogprobs.apply(_as_padded(logits), backend, args)
    return logprobs.view(rows.tokens.shape), entropy.view(rows.tokens.shape)


# ---- advantages -----------------------------------------------------------------------------------------------------


def advantages(backend: str, groups: Groups, config: MDPGRPOConfig) -> Advantages:
    """`ops.advantages` on a fused backend: float32 whatever the rewards are."""
    settings = Settings.of(config, Rows(None))
    per_group, per_completion = _op(backend, "advantages")(
        _flat_groups(groups._replace(slots=None)), list(settings.numbers), list(settings.flags)
    )
    return Advantages(*per_group.unbind(), *per_completion.unbind())
