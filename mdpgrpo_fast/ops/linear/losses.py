"""The objective straight from hidden states and lm_head: never more logits than those of a chunk of rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...config import Backend, MDPGRPOConfig
from ...kernels.schemas import Rows, Settings
from ...reference import TokenLoss
from ..advantages import grouped, with_advantages
from ..backends import choose
from ..checks import (
    Numbers,
    as_rewards,
    check_advantages,
    check_device,
    check_flags,
    check_objective,
    check_tensor,
)
from ..fused import as_token_loss, flat_rows, saved_gradient, scalar
from . import op, sharded  # noqa: F401  op registers the ops
from .checks import Lengths, check_head, check_lengths, compute_dtype
from .chunks import default_workspace

Knob = Tensor | float


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    config: MDPGRPOConfig,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    rewards: Numbers | None = None,
    num_constraints: Numbers | float | None = None,
    valid: Tensor | None = None,
    groups: Tensor | None = None,
    advantage: Knob | None = None,
    kl_beta: Knob | None = None,
    completion: Tensor | None = None,
    num_completions: int | None = None,
    max_completion_length: int | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weight: Tensor | None = None,
    temperature: Knob = 1.0,
    epsilon_low: Knob | None = None,
    epsilon_high: Knob | None = None,
    delta: Knob | None = None,
    sampling_logprobs: Tensor | None = None,
    logit_floor: Tensor | None = None,
    entropy_coef: Knob | None = None,
    entropy_floor: Knob | None = None,
    softcap: float | None = None,
    denominator: Knob | None = None,
    lengths: Lengths | None = None,
    skip_idle: bool = True,
    workspace_bytes: int | None = None,
    fp32_logits: bool = False,
    vocab_group: dist.ProcessGroup | None = None,
    check_values: bool | None = None,
    backend: Backend = "auto",
) -> TokenLoss:
    """`token_loss` of logits = softcap(logit_scale (hidden weightᵀ + bias)), which are never built as a whole.

    Three matmuls where hidden and weight are trained, two where one of them is frozen, one where there is no gradient;
    all of them in this call, and the backward pass only scales what it finds. One more where the objective of a row
    waits for others: tokens of a completion share a ratio, a weight or a gate (importance_level = sequence, gmpo,
    vespo, off_policy_threshold) and a completion has more rows than a chunk, or its rows are packed on a GPU without
    `lengths`; or top_entropy_quantile asks for the entropies of several chunks. With a frozen head that costs nothing:
    d hidden is weighted when all is done (but with an entropy bonus, or two temperatures). Same bits in every run, and
    a row's log-prob does not depend on what else is in the batch. Under autocast the matmuls have its dtype.

    Args:
        hidden: (B, L, D), or packed (T, D) with `completion`, float: the states that lm_head would see, each at the
            position that predicts its token. Any strides. Gets a gradient.
        weight: (V, D), of the dtype of hidden, or float32 (master weights: the matmuls have the dtype of hidden, in
            which a copy is made for the call). Gets a gradient in its own dtype, summed in float32 (V, D) where there
            is more than one chunk; where it is frozen none is computed or allocated. An FSDP2 DTensor or a ZeRO-3
            parameter is gathered; a DTensor's gradient is the mean over its mesh.
        bias: (V,), like weight.
        logit_scale: what the head's output is multiplied by, before the soft-cap.
        lengths: how many rows of each completion count (B,), on the host, where mask is on a GPU: what does not count
            is then left out of the matmuls without waiting for the device. 0 leaves a completion out that has A = 0 and
            no KL term (with an entropy bonus or a quantile of entropies none is). Numbers that are not the mask's give
            a NaN loss. On the CPU the mask itself is looked at. On a GPU without lengths every row is multiplied, and
            those that do not count are ignored.
        skip_idle: leave out rows with A = 0 and no KL term, exact for loss and gradients, but none where there is an
            entropy bonus or a quantile of entropies; they report as masked rows do (on a GPU with lengths, those of
            completions whose length is given as 0). False: their log-probs and entropy are computed all the same.
        workspace_bytes: of the chunk's logits; None: 256 MiB on the CPU and with vocab_group, else on a GPU 1 GiB, or a
            64th of its memory where that is less. Beside it and the gradients, memory does not grow with T by more than
            a few numbers a row.
        fp32_logits: keep a chunk's logits in float32 although hidden is bfloat16 or float16.
        vocab_group: weight (and bias) are this rank's V / ranks rows of a head that is split over the ranks of this
            process group, in order; hidden and all else is the same on all of them. The gradient of hidden is whole.
        All others: as in `token_loss`, with the same defaults.

    Returns: TokenLoss, `.loss` with gradients for hidden, weight and bias.
    Raises: ValueError naming the argument that does not fit, before anything is allocated; ConfigError.
    """
    check_tensor("hidden", hidden)
    check_flags(skip_idle=skip_idle, fp32_logits=fp32_logits, check_values=check_values)
    rewards = None if rewards is None else as_rewards(rewards, hidden.device)
    if rewards is not None and num_completions is None and completion is not None:
        num_completions = rewards.numel()
    rows = Rows(
        tokens, mask, completion, advantage, kl_beta, old_logprobs, ref_logprobs, importance_weight, temperature,
        epsilon_low, epsilon_high, delta, sampling_logprobs, logit_floor, entropy_coef,
        entropy_floor,
    )  # fmt: skip
    if workspace_bytes is None:
        workspace_bytes = default_workspace(hidden.device, vocab_group is not None)
    options = logit_scale, fp32_logits, workspace_bytes, vocab_group
    shape, num_completions = check_head(hidden, weight, bias, rows, num_completions, softcap, *options, check_values)
    check_objective(rows, shape, num_completions, config, max_completion_length, denominator, check_values, "hidden")
    check_device(hidden, "hidden", rewards=rewards, num_constraints=num_constraints, valid=valid, groups=groups)
    check_advantages(rows, num_completions, rewards, num_constraints, valid, groups)
    host_lengths = check_lengths(lengths, rows, shape, num_completions)
    by_group = grouped(rewards, num_constraints, valid, groups, config, check_values, hidden.device)
    dtype = compute_dtype(hidden)
    name = choose(backend, hidden.device, dtype)
    rows = with_advantages(rows, name, by_group, config)
    settings, real = Settings.of(config, rows, softcap), torch.float64 if dtype == torch.float64 else torch.float32
    with sharded.gathered(weight, bias):
        head, needs = _whole_head(hidden, weight, bias, dtype)
        args = (
            needs, None if denominator is None else scalar(denominator, hidden.device, real),
            config.horizon or max_completion_length or max(shape[-1], 1), skip_idle,
            *_call(rows, num_completions, host_lengths, settings, name, hidden.device, real, *options),
        )  # fmt: skip
        outputs = _LinearTokenLoss.apply(*head, args)
    return as_token_loss(outputs, tokens.shape)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    completion: Tensor | None = None,
    num_completions: int | None = None,
    temperature: Knob = 1.0,
    softcap: float | None = None,
    logit_floor: Tensor | None = None,
    lengths: Lengths | None = None,
    workspace_bytes: int | None = None,
    fp32_logits: bool = False,
    vocab_group: dist.ProcessGroup | None = None,
    check_values: bool | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` from hidden states and the head: log-probs, differentiable, and the detached entropy in nats.

    Without gradient one matmul. With one: two where the head is frozen, of which the backward pass does none; four
    where it is trained, as what a row's gradient is multiplied by is known only there. For the objective of this
    library `linear_token_loss` needs less. Arguments, errors and memory as there; masked rows give 0.
    """
    check_tensor("hidden", hidden)
    check_flags(fp32_logits=fp32_logits, check_values=check_values)
    if hidden.ndim == 2 and completion is None:
        # Without a map every row is its own completion.
        completion, num_completions = torch.arange(len(hidden), device=hidden.device), len(hidden)
    rows = Rows(tokens, mask, completion, temperature=temperature, logit_floor=logit_floor)
    if workspace_bytes is None:
        workspace_bytes = default_workspace(hidden.device, vocab_group is not None)
    options = logit_scale, fp32_logits, workspace_bytes, vocab_group
    shape, num_completions = check_head(hidden, weight, bias, rows, num_completions, softcap, *options, check_values)
    host_lengths = check_lengths(lengths, rows, shape, num_completions)
    dtype = compute_dtype(hidden)
    name = choose(backend, hidden.device, dtype)
    tau = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    settings = Settings(temperature=tau, softcap=softcap or 0.0)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    with sharded.gathered(weight, bias):
        head, needs = _whole_head(hidden, weight, bias, dtype)
        args = _call(rows, num_completions, host_lengths, settings, name, hidden.device, real, *options)
        logprobs, entropy = _LinearTokenLogprobs.apply(*head, needs, args)
    return logprobs.view(shape), entropy.view(shape)


# ---- arguments ------------------------------------------------------------------------------------------------------


def _whole_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor | None], list[bool]]:
    """hidden (B, L, D), or (1, T, D) of packed states, weight and bias gathered; and which of them want a gradient."""
    padded = (hidden if hidden.ndim == 3 else hidden[None]).to(dtype)
    head = (padded, sharded.whole(weight), None if bias is None else sharded.whole(bias))
    return head, [torch.is_grad_enabled() and x is not None and x.requires_grad for x in head]


def _call(
    rows: Rows, num_completions: int, lengths: Tensor | None, settings: Settings, backend: str, device: torch.device,
    real: torch.dtype, logit_scale: float, fp32_logits: bool, workspace_bytes: int, group: dist.ProcessGroup | None,
) -> tuple[Any, ...]:  # fmt: skip
    """What all ops take beside hidden, weight and bias, in the order of their schemas."""
    return (
        list(flat_rows(rows, num_completions, device, real)), num_completions, lengths, list(settings.numbers),
        list(settings.flags), float(logit_scale), fp32_logits, backend, workspace_bytes,
        "" if group is None else group.group_name,
    )  # fmt: skip


# ---- autograd -------------------------------------------------------------------------------------------------------


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    gradient = saved_gradient(gradient)
    torch.ops.mdpgrpo_fast.linear_scale_(gradient, scale, backend)
    return gradient.to(dtype)  # float16: rounded only after the loss scale


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, args: tuple[Any, ...]) -> Any:
        *gradients, loss, per_row, marks, completion_kl, totals = torch.ops.mdpgrpo_fast.linear_token_loss(
            hidden, weight, bias, *args
        )
        ctx.save_for_backward(*gradients)
        ctx.backend = args[-3]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(per_row, marks, completion_kl, totals)
        ctx.set_materialize_grads(False)
        return loss, per_row, marks, completion_kl, totals

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None, None
        found = [
            _scaled(x, grad_loss, dtype, ctx.backend) if need else None
            for x, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return *found, None


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], args: tuple[Any, ...]
    ) -> Any:
        unit_gradient = needs == [True, False, False]
        logprobs, entropy, statistics, unit = torch.ops.mdpgrpo_fast.linear_token_logprobs(
            hidden, weight, bias, unit_gradient, *args
        )
        ctx.unit_gradient, ctx.needs, ctx.args, ctx.dtype = unit_gradient, needs, args, hidden.dtype
        ctx.save_for_backward(*([unit] if unit_gradient else [hidden, weight, bias, statistics]))
        ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_logprobs is None:
            return None, None, None, None, None
        if ctx.unit_gradient:
            weights, mask = grad_logprobs, Rows(*ctx.args[0]).mask
            if mask is not None:
                # A row that does not count has no gradient, whatever comes in.
                weights = weights.masked_fill(mask == 0, 0)
            unit = saved_gradient(ctx.saved_tensors[0])
            return unit.mul_(weights.view(*unit.shape[:-1], 1)).to(ctx.dtype), None, None, None, None
        hidden, weight, bias, statistics = ctx.saved_tensors
        with sharded.gathered(weight, bias):
            found = torch.ops.mdpgrpo_fast.linear_token_logprobs_backward(
                grad_logprobs.contiguous(), statistics, hidden, weight, bias, ctx.needs, *ctx.args
            )
        dtypes = (hidden.dtype, weight.dtype, weight.dtype)
        return *(x.to(d) if need else None for x, d, need in zip(found, dtypes, ctx.needs, strict=True)), None, None
