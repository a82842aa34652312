"""The objective over logits: checks, a backend, and the reference or a fused op, proven against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..config import Backend, MDPGRPOConfig
from ..kernels.schemas import Rows, Settings
from ..reference import TokenLoss
from . import fused
from .advantages import grouped, with_advantages
from .backends import choose, hopper_wins
from .checks import (
    Numbers,
    as_rewards,
    check_advantages,
    check_device,
    check_flags,
    check_in_place,
    check_objective,
    check_rows,
    check_tensor,
    refuse,
)
from .overwritten import mark_overwritten, refuse_overwritten


def token_loss(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    config: MDPGRPOConfig,
    *,
    rewards: Numbers | None = None,
    num_constraints: Numbers | float | None = None,
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
    delta: Tensor | float | None = None,
    sampling_logprobs: Tensor | None = None,
    logit_floor: Tensor | None = None,
    entropy_coef: Tensor | float | None = None,
    entropy_floor: Tensor | float | None = None,
    softcap: float | None = None,
    denominator: Tensor | float | None = None,
    in_place: bool = False,
    check_values: bool | None = None,
    backend: Backend = "auto",
) -> TokenLoss:
    """The policy objective of config.loss with sign-dependent KL over completion tokens, aggregated to one loss.

    Rows are tokens: padded (B, L), or packed (T,) with `completion` saying whose each row is, in any order. A knob is a
    number, a tensor (B,) with one value per completion, or one of the rows' shape; where B = T it means completions.

    Args:
        logits: (B, L, V) or (T, V) float, the row at a token predicting it; the only input that gets a gradient. Any
            strides with unit stride in V (others are copied). -inf is a token of no probability. Where the row's own
            token has it (ℓ = -inf), or a row has +inf or NaN or nothing but -inf (ℓ = NaN), the loss is NaN, and so is
            all of that row's gradient, whatever the advantage and the clip: such a token cannot have been drawn.
        tokens: rows of integers in [0, V); masked ones too.
        mask: rows of bool or number, non-zero where the token belongs to the completion; None: all. What masked rows of
            float inputs hold does not matter.
        config: advantages, clip range, estimator, levels, aggregation.
        rewards, num_constraints, valid, groups: see `advantages`; B = P * G completions, by groups or with `groups`.
        advantage, kl_beta: knobs, instead of rewards; of `advantages` or any other estimator.
        completion: (T,) integers in [0, B), packed rows only, with num_completions = B (default: that of the rewards).
        max_completion_length: L of the `dr_grpo` normaliser in tokens, where config.horizon is unset; default: the
            width of tokens (padded only).
        old_logprobs: rows, of the sampling policy at `temperature`; absent: on-policy, ratio 1.
        ref_logprobs: rows, of the reference policy at config.kl_temperature; absent: no KL term.
        importance_weight: rows, multiplies the policy term only; detached.
        temperature: knob, of the policy term's log-probs.
        epsilon_low, epsilon_high: knobs, clip range; default: the config's.
        delta: knob, cap of the ratio before the clip (two-sided clipping); 0: none; default: the config's.
        sampling_logprobs: rows, of the sampler, for config.off_policy_threshold; default: old_logprobs. One that is NaN
            leaves its completion in.
        logit_floor: rows, the logit (after the soft-cap) under which a token is outside of the support that truncated
            sampling kept: log-probs, ratios, entropy and gradients are then over the support alone, to which the row's
            token always belongs, with every logit that is not under its own. The KL keeps all tokens.
        entropy_coef: knob, coefficient of the entropy bonus; default: the config's.
        entropy_floor: knob, the entropy under which a row is in neither the policy term nor the bonus; 0: none;
            default: that of config.top_entropy_quantile over the rows of this call, for which all but torch read the
            logits once more.
        softcap: final logit soft-cap still to be applied (a model's own forward has applied it).
        denominator: what the sum is divided by, for the batch of all micro-batches and ranks; default: this one's.
        in_place: not with torch: the gradient overwrites the logits, which no one may use again; saves their memory.
            This function and `token_logprobs` refuse them afterwards, and views of them, `detach()` and `.data`;
            autograd refuses a backward pass that saved them. What copies them afterwards (`logits + 0`, `clone`,
            NumPy) copies gradients, and no one sees it. Not for float16, whose gradient is kept in float32 until the
            loss scale has reached it.
        check_values: look for tokens, rewards, temperatures out of range; default: where looking is free, on the CPU.
            Elsewhere they give a NaN loss.
        backend: "auto", "torch", "triton", "cpu" or "cuda".

    Returns: TokenLoss; `.loss` is a scalar with gradient. All but torch compute in float32 and write the gradient in
        this call, in the dtype of the logits; the backward pass only scales it.
    Raises: ValueError naming the argument that does not fit, or why the backend cannot run; ConfigError for an unknown.
    """
    check_tensor("logits", logits)
    check_flags(in_place=in_place, check_values=check_values)
    rewards = None if rewards is None else as_rewards(rewards, logits.device)
    if rewards is not None and num_completions is None and completion is not None:
        num_completions = rewards.numel()
    rows = Rows(
        tokens, mask, completion, advantage, kl_beta, old_logprobs, ref_logprobs, importance_weight, temperature,
        epsilon_low, epsilon_high, delta, sampling_logprobs, logit_floor, entropy_coef,
        entropy_floor,
    )  # fmt: skip
    shape, num_completions = check_rows(logits, rows, num_completions, softcap, check_values)
    check_objective(rows, shape, num_completions, config, max_completion_length, denominator, check_values)
    check_device(logits, rewards=rewards, num_constraints=num_constraints, valid=valid, groups=groups)
    check_advantages(rows, num_completions, rewards, num_constraints, valid, groups)
    by_group = grouped(rewards, num_constraints, valid, groups, config, check_values, logits.device)
    refuse_overwritten(logits)
    name = choose(backend, logits.device, logits.dtype)
    size = logits.shape[:-1].numel()
    # The Hopper kernel takes no rows with a logit_floor: backend cuda hands them on to Triton's.
    hands_on = rows.logit_floor is not None
    if (
        backend == "auto"
        and name == "triton"
        and not hands_on
        and hopper_wins(logits.device, logits.dtype, logits.shape[-1], size)
    ):
        name = "cuda"
    longest = config.horizon or max_completion_length or max(shape[-1], 1)
    if name == "torch":
        if in_place:
            refuse("in_place", True, "left off: backend torch computes the gradient in the backward pass")
        rows = with_advantages(rows, name, by_group, config)
        return reference.token_loss(
            logits, config=config, num_completions=num_completions, max_completion_length=longest, softcap=softcap,
            denominator=denominator.reshape(()) if isinstance(denominator, Tensor) else denominator, **rows._asdict(),
        )  # fmt: skip
    if in_place:
        check_in_place(logits)
    if config.top_entropy_quantile < 1:
        with torch.no_grad():
            _, entropy = fused.token_logprobs(name, logits, rows.for_logprobs(), num_completions, softcap)
        keep = torch.ones_like(entropy, dtype=torch.bool) if rows.mask is None else rows.mask != 0
        floor = reference.entropy_quantile(entropy, keep, config.top_entropy_quantile)
        # A row that is the quantile itself is not to fall to another kernel's last bits.
        rows = rows._replace(entropy_floor=floor * (1 - 2**-20))
    settings = Settings.of(config, rows, softcap)
    out = fused.token_loss(name, logits, rows, by_group, settings, denominator, num_completions, longest, in_place)
    if in_place and out.loss.requires_grad:
        mark_overwritten(logits)
    return out
