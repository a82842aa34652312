"""Autograd around the fused ops `mdpgrpo_fast::<backend>_<op>`, which write the gradient in the forward pass.

The functions take checked arguments of `ops` and bring them to the ops' form: logits (B, L, V) or (1, T, V), all else
flat.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..config import MDPGRPOConfig
from ..kernels.schemas import AGGREGATION, GOAL_MEAN
from ..log import say_once
from ..reference import Advantages, TokenLoss

Knob = Tensor | float


def _op(backend: str, name: str) -> Any:
    return getattr(torch.ops.mdpgrpo_fast, f"{backend}_{name}")


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().reshape(-1).contiguous()


def _flags(x: Tensor | None) -> Tensor | None:
    """Non-zero means yes, as contiguous bytes."""
    return None if x is None else (x if x.dtype == torch.bool else x != 0).reshape(-1).contiguous().view(torch.uint8)


def _knob(x: Knob, count: int, device: torch.device) -> Tensor | None:
    """A tensor of one value per completion or per row; None where it is a number, which goes its own way."""
    if not isinstance(x, Tensor):
        return None
    if x.ndim == 0:  # a scalar may lie on the CPU, as elsewhere in PyTorch
        x = x.to(device).expand(count)
    return x.detach().reshape(-1).contiguous()


def _number(x: Knob) -> float:
    return 1.0 if isinstance(x, Tensor) else float(x)


def _as_rows(logits: Tensor) -> Tensor:
    """(1, T, V) of packed logits, and unit stride in V, by a copy and a notice where it is not."""
    logits = logits if logits.ndim == 3 else logits[None]
    if logits.stride(-1) == 1 or logits.shape[-1] == 1:
        return logits
    if not torch.compiler.is_compiling():
        say_once(logging.WARNING, "logits are copied: the kernels need unit stride in the vocabulary")
    return logits.contiguous()


# ---- the objective --------------------------------------------------------------------------------------------------


def _kept_graph() -> bool:
    """Whether this backward pass keeps its graph for another one (retain_graph)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


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
        gradient = ctx.saved_tensors[0].detach()
        if gradient.dtype != ctx.dtype:  # float16: rounded only after the loss scale
            return (gradient * grad_loss).to(ctx.dtype), None, None, None
        # While compiling there is no asking, and functionalisation would copy what is written to anyway.
        if torch.compiler.is_compiling() or _kept_graph():
            gradient = gradient.clone()
        _op(ctx.backend, "scale_")(gradient, grad_loss)
        return gradient, None, None, None


def token_loss(
    backend: str,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    config: MDPGRPOConfig,
    *,
    count: int,
    completion: Tensor | None,
    rewards: Tensor | None,
    num_constraints: Tensor | None,
    valid: Tensor | None,
    slots: Tensor | None,
    advantage: Knob | None,
    kl_beta: Knob | None,
    max_completion_length: int,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weight: Tensor | None,
    temperature: Knob,
    epsilon_low: Knob,
    epsilon_high: Knob,
    softcap: float | None,
    denominator: Knob | None,
    in_place: bool,
) -> TokenLoss:
    """`ops.token_loss` on a fused backend. count: B; rewards, valid by group, slots (B,) the places in them."""
    same = not isinstance(temperature, Tensor) and temperature == config.kl_temperature
    if ref_logprobs is None:
        same = True
    device = logits.device

    def per_completion(x: Knob | None) -> Tensor | None:
        if x is None or isinstance(x, Tensor):
            return None if x is None else _knob(x, count, device)
        return torch.full((count,), float(x), dtype=torch.float32, device=device)

    if denominator is not None:
        if isinstance(denominator, Tensor):
            denominator = denominator.detach().to(device=device, dtype=torch.float32)
        else:
            denominator = torch.full((), float(denominator), dtype=torch.float32, device=device)
    numbers = [
        _number(temperature),
        _number(epsilon_low),
        _number(epsilon_high),
        config.delta or 0.0,
        softcap or 0.0,
        config.kl_temperature,
        *_advantage_numbers(config),
    ]
    flags = [
        int(config.importance_level == "sequence"),
        int(config.kl_estimator[1]),
        AGGREGATION.index(config.aggregation),
        int(config.rescale_per_row),
        int(not same),
        config.num_generations,
        *_advantage_flags(config),
    ]
    args = (
        _flat(tokens),
        _flags(mask),
        _flat(completion),
        count,
        _flat(rewards),
        _flat(num_constraints),
        _flags(valid),
        _flat(slots),
        per_completion(advantage),
        per_completion(kl_beta),
        _flat(old_logprobs),
        _flat(ref_logprobs),
        _flat(importance_weight),
        _knob(temperature, count, device),
        _knob(epsilon_low, count, device),
        _knob(epsilon_high, count, device),
        denominator,
        max_completion_length,
        numbers,
        flags,
    )
    x = _as_rows(logits)
    if torch.is_grad_enabled() and logits.requires_grad:
        outputs = _TokenLoss.apply(x, backend, in_place, args)
    else:
        outputs = _op(backend, "token_loss_value")(x, *args)
    loss, rows, marks, completion_kl, totals = outputs
    shape = tokens.shape
    logprobs, entropy, kl, ratio, _ = (r.view(shape) for r in rows.unbind())
    clipped_low, clipped_high, _ = (m.view(shape) for m in marks.unbind())
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
        gradient = _op(ctx.backend, "token_logprobs_backward")(
            grad_logprobs.contiguous(), logits, *ctx.args, statistics
        )
        return gradient, None, None


def token_logprobs(
    backend: str,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    completion: Tensor | None,
    count: int,
    temperature: Knob,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`ops.token_logprobs` on a fused backend."""
    args = (
        _flat(tokens), _flags(mask), _flat(completion), count, _knob(temperature, count, logits.device),
        _number(temperature), softcap or 0.0,
    )  # fmt: skip
    logprobs, entropy = _TokenLogprobs.apply(_as_rows(logits), backend, args)
    return logprobs.view(tokens.shape), entropy.view(tokens.shape)


# ---- advantages -----------------------------------------------------------------------------------------------------


def _advantage_numbers(config: MDPGRPOConfig) -> list[float]:
    c = config
    return [c.alpha, c.prospect_beta, c.prospect_gain, c.prospect_loss, *c.betas]


def _advantage_flags(config: MDPGRPOConfig) -> list[int]:
    c = config
    return [
        int(c.group_std == "sample"),
        GOAL_MEAN.index(c.goal_mean),
        int(c.goal_std == "binomial"),
        int(c.prospect),
        int(c.prospect_on_goal),
    ]


def advantages(
    backend: str, rewards: Tensor, num_constraints: Tensor, config: MDPGRPOConfig, valid: Tensor | None
) -> Advantages:
    """`ops.advantages` on a fused backend: float32 whatever the rewards are."""
    sample, goal, *switches = _advantage_flags(config)
    groups, completions = _op(backend, "advantages")(
        rewards.detach().contiguous(), num_constraints.contiguous(), _flags(valid), _advantage_numbers(config),
        bool(sample), goal, *(bool(s) for s in switches),
    )  # fmt: skip
    return Advantages(*groups.unbind(), *completions.unbind())
