"""The public functions: checks at the door, then a backend. Each backend is proven against `reference`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from . import fused, reference
from .backends import choose, hopper_wins
from .checks import (
    check_advantages,
    check_device,
    check_groups,
    check_logits,
    check_objective,
    check_rewards,
    check_shape,
    refuse,
)
from .config import MDPGRPOConfig
from .reference import Advantages, Layout, TokenLoss


def advantages(
    rewards: Tensor,
    num_constraints: Tensor,
    config: MDPGRPOConfig,
    *,
    valid: Tensor | None = None,
    groups: Tensor | None = None,
    check_values: bool | None = None,
    backend: str = "auto",
) -> Advantages:
    """Dual-anchor, prospect-shaped advantages and the KL coefficient of every completion (paper, Eq. 3 to 6).

    Args:
        rewards: (P, G) float, the G rewards of each prompt's group; G = config.num_generations. With groups: (B,).
        num_constraints: (P,) K, the number of constraints of each prompt, at least 1.
        valid: bool, of the rewards' shape: completions whose reward counts; the others get A = 0. Default: all.
        groups: (B,) group 0 .. P-1 of each completion, where completions of a group are not neighbours.
        check_values: look for non-finite rewards and K < 1; default: where looking is free, on the CPU.
        backend: "auto", "torch", "triton", "cpu" or "cuda"; all but torch give float32.

    Returns: Advantages with mean, std (P,) and z, delta, advantage, kl_beta of the rewards' shape.
    Raises: ValueError for a shape that does not fit, a non-finite reward, K < 1, a group that is not of size G, or a
        backend that cannot run here, with the reason; ConfigError for an unknown backend.
    """
    shape, slots = rewards.shape, None
    if groups is not None:
        rewards, valid, slots = _by_group(rewards, valid, groups, config.num_generations)
    check_rewards(rewards, num_constraints, valid, config.num_generations, check_values)
    name = choose(backend, rewards.device, _as_kernel_dtype(rewards))
    if name == "torch":
        out = _reference_advantages(rewards, num_constraints, config, valid)
    else:
        out = fused.advantages(name, rewards, num_constraints, config, valid)
    if slots is None:
        return out
    each = {n: getattr(out, n).flatten()[slots].view(shape) for n in ("z", "delta", "advantage", "kl_beta")}
    return dataclasses.replace(out, **each)


def token_loss(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    config: MDPGRPOConfig,
    *,
    rewards: Tensor | None = None,
    num_constraints: Tensor | None = None,
    valid: Tensor | None = None,
    groups: Tensor | None = None,
    advantage: Tensor | float | None = None,
    kl_beta: Tensor | float | None = None,
    completion: Tensor | None = None,
    num_completions: int | None = None,
    max_completion_length: int | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weight: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    epsilon_low: Tensor | float | None = None,
    epsilon_high: Tensor | float | None = None,
    softcap: float | None = None,
    denominator: Tensor | float | None = None,
    in_place: bool = False,
    check_values: bool | None = None,
    backend: str = "auto",
) -> TokenLoss:
    """The clipped policy objective with sign-dependent KL over completion tokens, aggregated to one loss.

    Rows are tokens: padded (B, L), or packed (T,) with `completion` saying whose each row is, in any order. A knob is a
    number, a tensor (B,) with one value per completion, or one of the rows' shape; where B = T it means completions.

    Args:
        logits: (B, L, V) or (T, V) float, the row at a token predicting it; the only input that gets a gradient. Any
            strides with unit stride in V (others are copied).
        tokens: rows of integers in [0, V); masked ones too.
        mask: rows of bool or number, non-zero where the token belongs to the completion; None: all. What masked rows of
            float inputs hold does not matter.
        config: advantages, clip range, estimator, levels, aggregation.
        rewards, num_constraints, valid, groups: see `advantages`; B = P * G completions, by groups or with `groups`.
        advantage, kl_beta: knobs, instead of rewards; of `advantages` or any other estimator.
        completion: (T,) integers in [0, B), packed rows only, with num_completions = B (default: that of the rewards).
        max_completion_length: L of the `dr_grpo` normaliser in tokens; default: the width of tokens (padded only).
        old_logprobs: rows, of the sampling policy at `temperature`; absent: on-policy, ratio 1.
        ref_logprobs: rows, of the reference policy at config.kl_temperature; absent: no KL term.
        importance_weight: rows, multiplies the policy term only; detached.
        temperature: knob, of the policy term's log-probs.
        epsilon_low, epsilon_high: knobs, clip range; default: the config's.
        softcap: final logit soft-cap still to be applied (a model's own forward has applied it).
        denominator: what the sum is divided by, for the batch of all micro-batches and ranks; default: this one's.
        in_place: not with torch: the gradient overwrites the logits, which no one may use again; saves their memory.
            Not for float16, whose gradient is kept in float32 until the loss scale has reached it.
        check_values: look for tokens, rewards, temperatures out of range; default: where looking is free, on the CPU.
            Elsewhere they give a NaN loss.
        backend: "auto", "torch", "triton", "cpu" or "cuda".

    Returns: TokenLoss; `.loss` is a scalar with gradient. All but torch compute in float32 and write the gradient in
        this call, in the dtype of the logits; the backward pass only scales it.
    Raises: ValueError naming the argument that does not fit, or why the backend cannot run; ConfigError for an unknown.
    """
    if rewards is not None and num_completions is None and completion is not None:
        num_completions = rewards.numel()
    rows, count = check_logits(logits, tokens, mask, completion, num_completions, temperature, softcap, check_values)
    check_objective(
        logits, rows, count, config, completion, max_completion_length, check_values, denominator=denominator,
        old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, importance_weight=importance_weight,
        epsilon_low=epsilon_low, epsilon_high=epsilon_high,
    )  # fmt: skip
    check_device(logits, rewards=rewards, num_constraints=num_constraints, valid=valid, groups=groups,
                 advantage=advantage, kl_beta=kl_beta)  # fmt: skip
    check_advantages(rewards, num_constraints, valid, groups, advantage, kl_beta, rows, count)
    rewards, valid, slots = grouped_rewards(rewards, num_constraints, valid, groups, config, check_values)
    _refuse_overwritten(logits)
    name = choose(backend, logits.device, logits.dtype)
    if (
        backend == "auto"
        and name == "triton"
        and hopper_wins(logits.device, logits.dtype, logits.shape[-1], logits.shape[:-1].numel())
    ):
        name = "cuda"
    common: dict[str, Any] = {
        "completion": completion,
        "max_completion_length": max_completion_length or max(rows[-1], 1),
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "importance_weight": importance_weight,
        "temperature": temperature,
        "epsilon_low": config.epsilon_low if epsilon_low is None else epsilon_low,
        "epsilon_high": config.epsilon_high if epsilon_high is None else epsilon_high,
        "softcap": softcap,
        "denominator": denominator.reshape(()) if isinstance(denominator, Tensor) else denominator,
    }
    if name == "torch":
        if in_place:
            refuse("in_place", True, "left off: backend torch computes the gradient in the backward pass")
        if rewards is not None and num_constraints is not None:
            advantage, kl_beta = advantages_of(name, rewards, num_constraints, config, valid, slots)
        assert advantage is not None and kl_beta is not None
        return reference.token_loss(
            logits, tokens, mask, config, advantage=advantage, kl_beta=kl_beta, num_completions=count, **common
        )  # type: ignore[arg-type]
    if in_place:
        _check_in_place(logits)
    out = fused.token_loss(
        name, logits, tokens, mask, config, count=count, rewards=rewards, num_constraints=num_constraints, valid=valid,
        slots=slots, advantage=advantage, kl_beta=kl_beta, in_place=in_place, **common,
    )  # fmt: skip
    if in_place and out.loss.requires_grad:
        _mark_overwritten(logits)
    return out


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    completion: Tensor | None = None,
    num_completions: int | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    check_values: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens, differentiable, and the detached entropy in nats; each of the shape of tokens.

    logits (B, L, V), or (T, V); tokens, mask, temperature, softcap, check_values and backend as in `token_loss`; masked
    rows give 0 and cost no read. A temperature of one value per completion needs `completion` (T,) for packed rows.
    Raises as `token_loss` does.
    """
    if logits.ndim == 2 and completion is None:
        # Without a map every row is its own completion.
        completion, num_completions = torch.arange(len(logits), device=logits.device), len(logits)
    _, count = check_logits(logits, tokens, mask, completion, num_completions, temperature, softcap, check_values)
    _refuse_overwritten(logits)
    name = choose(backend, logits.device, logits.dtype)
    if name != "torch":
        return fused.token_logprobs(name, logits, tokens, mask, completion, count, temperature, softcap)
    at = Layout(count, completion).knob(temperature, torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if mask is None:
        return reference.token_logprobs(logits, tokens, at, softcap)
    keep = mask != 0
    logprobs, entropy = reference.token_logprobs(logits.masked_fill(~keep[..., None], 0), tokens, at, softcap)
    return logprobs.masked_fill(~keep, 0), entropy.masked_fill(~keep, 0)


def grouped_rewards(
    rewards: Tensor | None, num_constraints: Tensor | None, valid: Tensor | None, groups: Tensor | None,
    config: MDPGRPOConfig, check_values: bool | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Checked rewards and valid (P, G), and the place of each completion in them where groups are given."""
    slots = None
    if rewards is not None and groups is not None:
        rewards, valid, slots = _by_group(rewards, valid, groups, config.num_generations)
    if rewards is not None and num_constraints is not None:
        check_rewards(rewards, num_constraints, valid, config.num_generations, check_values)
    return rewards, valid, slots


def advantages_of(
    backend: str, rewards: Tensor, num_constraints: Tensor, config: MDPGRPOConfig, valid: Tensor | None,
    slots: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A and KL coefficient (B,) of the completions, from what `grouped_rewards` returns."""
    if backend == "torch":
        adv = _reference_advantages(rewards, num_constraints, config, valid)
    else:
        adv = fused.advantages(backend, rewards, num_constraints, config, valid)
    place = slice(None) if slots is None else slots
    return adv.advantage.flatten()[place], adv.kl_beta.flatten()[place]


def _reference_advantages(
    rewards: Tensor, num_constraints: Tensor, config: MDPGRPOConfig, valid: Tensor | None
) -> Advantages:
    # A reward that does not count may be anything.
    counted = rewards if valid is None else rewards.masked_fill(~valid, 0)
    return reference.advantages(counted, num_constraints, config, valid)


def _as_kernel_dtype(rewards: Tensor) -> torch.dtype:
    # Rewards of any float dtype are computed in float32 by a kernel, but float64 asks for float64.
    return rewards.dtype if rewards.dtype == torch.float64 else torch.float32


def _by_group(
    rewards: Tensor, valid: Tensor | None, groups: Tensor, group_size: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(B,) rewards as (P, G), with the place of each completion in them."""
    check_groups(groups, rewards, group_size)
    check_shape("valid", valid, tuple(rewards.shape))
    order = groups.argsort(stable=True)
    slots = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    by_group = None if valid is None else valid[order].view(-1, group_size)
    return rewards[order].view(-1, group_size), by_group, slots


# ---- logits that have been overwritten ------------------------------------------------------------------------------


def _check_in_place(logits: Tensor) -> None:
    if logits.stride(-1) != 1:
        refuse("in_place", f"True with logits of stride {logits.stride()}", "off without unit stride in V")
    if logits.dtype == torch.float16:
        refuse("in_place", "True with float16", "off: a float16 gradient underflows before it is scaled")
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        refuse("in_place", "True with logits that are a leaf", "off for a leaf, whose gradient would be itself")
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride < extent:
                refuse("in_place", f"True with logits of stride {logits.stride()}", "off where rows overlap")
            extent = stride * size


def _place(logits: Tensor) -> tuple[Tensor, tuple[object, ...]]:
    """The tensor whose memory it is, and where in it: two views of one slice are the same place."""
    base = logits if logits._base is None else logits._base
    return base, (logits.storage_offset(), tuple(logits.shape), logits.stride())


def _mark_overwritten(logits: Tensor) -> None:
    if torch.compiler.is_compiling() or logits.is_inference():  # inference tensors count no versions
        return
    base, place = _place(logits)
    version, places = getattr(base, "_overwritten", (-1, []))
    # The write has moved the version by one. By more, and someone has filled the memory again.
    kept: list[object] = places if version + 1 == logits._version else []
    base._overwritten = (logits._version, [*kept, place])  # type: ignore[attr-defined]


def _refuse_overwritten(logits: Tensor) -> None:
    if torch.compiler.is_compiling() or logits.is_inference():  # inference tensors count no versions
        return
    base, place = _place(logits)
    version, places = getattr(base, "_overwritten", (-1, []))
    if version == logits._version and place in places:
        refuse("logits", "logits that hold their gradient, after token_loss(in_place=True)", "logits")
