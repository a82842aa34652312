"""The public functions: checks at the door, then a backend. Each backend is proven against `reference`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .config import ConfigError, MDPGRPOConfig, unknown_name
from .reference import Advantages, TokenLoss

# backend -> op -> function with the reference's signature. A later backend is one more row.
_BACKENDS: dict[str, dict[str, Callable[..., Any]]] = {
    "torch": {
        "advantages": reference.advantages,
        "token_loss": reference.token_loss,
        "token_logprobs": reference.token_logprobs,
    },
}


def _backend(op: str, backend: str) -> Callable[..., Any]:
    name = "torch" if backend == "auto" else backend
    if name not in _BACKENDS:
        raise unknown_name("backend", backend, ["auto", *_BACKENDS])
    return _BACKENDS[name][op]


def _check(ok: bool, name: str, got: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {expected}; got {got}")


def _check_shape(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    if x is not None:
        _check(tuple(x.shape) == shape, name, f"shape {tuple(x.shape)}", f"of shape {shape}")


def advantages(
    rewards: Tensor,
    num_constraints: Tensor,
    config: MDPGRPOConfig,
    *,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> Advantages:
    """Dual-anchor, prospect-shaped advantages and the KL coefficient of every completion (paper, Eq. 3 to 6).

    Args:
        rewards: (P, G) float, the G rewards of each prompt's group; G = config.num_generations.
        num_constraints: (P,) K, the number of constraints of each prompt, at least 1.
        valid: (P, G) bool, completions whose reward counts; the others get A = 0. Default: all.
        backend: "auto" or "torch".

    Returns: Advantages with mean, std (P,) and z, delta, advantage, kl_beta (P, G).
    Raises: ValueError for a shape that does not fit, a non-finite reward or K < 1; ConfigError for an unknown backend.
    """
    _check(rewards.ndim == 2, "rewards", f"shape {tuple(rewards.shape)}", "of shape (P, G)")
    _check(rewards.is_floating_point(), "rewards", rewards.dtype, "floating point")
    _check(rewards.shape[1] == config.num_generations, "rewards", f"G = {rewards.shape[1]}",
           f"(P, G) with G = num_generations = {config.num_generations}")  # fmt: skip
    _check_shape("num_constraints", num_constraints, (rewards.shape[0],))
    _check_shape("valid", valid, tuple(rewards.shape))
    _check(valid is None or valid.dtype == torch.bool, "valid", valid if valid is None else valid.dtype, "bool")
    counted = rewards if valid is None else rewards.masked_fill(~valid, 0)
    _check(bool(counted.isfinite().all()), "rewards", "NaN or infinity", "finite (pass valid= to leave samples out)")
    _check(bool((num_constraints >= 1).all()), "num_constraints", num_constraints.tolist(), "at least 1")
    return _backend("advantages", backend)(counted, num_constraints, config, valid)


def token_loss(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    advantage: Tensor,
    kl_beta: Tensor,
    config: MDPGRPOConfig,
    *,
    max_completion_length: int | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weight: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    denominator: Tensor | float | None = None,
    backend: str = "auto",
) -> TokenLoss:
    """The clipped policy objective with sign-dependent KL over completion tokens, aggregated to one loss.

    Args:
        logits: (B, L, V) float, row l predicting tokens[:, l]; the only input that gets a gradient.
        tokens: (B, L) integers in [0, V); masked positions may hold any of them.
        mask: (B, L) bool or number, non-zero where the token belongs to the completion.
        advantage, kl_beta: (B,) from `advantages`.
        config: clip range, estimator, levels, aggregation.
        max_completion_length: L of the `dr_grpo` normaliser in tokens; default: the width of tokens.
        old_logprobs: (B, L) of the sampling policy at `temperature`; absent: on-policy, ratio 1.
        ref_logprobs: (B, L) of the reference policy at config.kl_temperature; absent: no KL term.
        importance_weight: (B, L), multiplies the policy term only; detached.
        temperature: (B,) or a number, of the policy term's log-probs.
        softcap: final logit soft-cap still to be applied (a model's own forward has applied it).
        denominator: what the sum is divided by, for the batch of all micro-batches and ranks; default: this one's.
        backend: "auto" or "torch".

    Returns: TokenLoss; `.loss` is a scalar with gradient.
    Raises: ValueError naming the argument that does not fit; ConfigError for an unknown backend.
    """
    _check_logits(logits, tokens, temperature, softcap)
    _check(max_completion_length is None or max_completion_length >= 1, "max_completion_length", max_completion_length,
           "at least 1")  # fmt: skip
    shape, b = tuple(tokens.shape), tokens.shape[0]
    for name, x in (("mask", mask), ("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs),
                    ("importance_weight", importance_weight)):  # fmt: skip
        _check_shape(name, x, shape)
    _check_shape("advantage", advantage, (b,))
    _check_shape("kl_beta", kl_beta, (b,))
    if config.temperature_objective == "corrected" and importance_weight is None:
        raise ConfigError("importance_weight is required by temperature_objective = corrected")
    return _backend("token_loss", backend)(
        logits,
        tokens,
        mask,
        advantage,
        kl_beta,
        config,
        max_completion_length=max_completion_length or tokens.shape[1],
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        importance_weight=importance_weight,
        temperature=temperature,
        softcap=softcap,
        denominator=denominator,
    )


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens, differentiable, and the detached entropy in nats: (B, L) float each.

    logits (B, L, V), tokens (B, L) in [0, V), temperature (B,) or a number. Raises as `token_loss` does.
    """
    _check_logits(logits, tokens, temperature, softcap)
    return _backend("token_logprobs", backend)(logits, tokens, temperature, softcap)


def _check_logits(logits: Tensor, tokens: Tensor, temperature: Tensor | float, softcap: float | None) -> None:
    _check(logits.ndim == 3, "logits", f"shape {tuple(logits.shape)}", "of shape (B, L, V)")
    _check(logits.is_floating_point(), "logits", logits.dtype, "floating point")
    _check_shape("tokens", tokens, tuple(logits.shape[:2]))
    _check(tokens.dtype in (torch.int32, torch.int64), "tokens", tokens.dtype, "int32 or int64")
    _check(softcap is None or softcap > 0, "softcap", softcap, "above 0, or None")
    if isinstance(temperature, Tensor) and temperature.ndim:
        _check_shape("temperature", temperature, (logits.shape[0],))
    # On an accelerator the look would stall the stream; there the gather itself asserts.
    if not isinstance(temperature, Tensor):
        _check(temperature > 0, "temperature", temperature, "above 0")
    elif temperature.device.type == "cpu":
        _check(bool((temperature > 0).all()), "temperature", temperature.tolist(), "above 0 in every row")
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = int(tokens.min()), int(tokens.max())
        _check(low >= 0 and high < logits.shape[2], "tokens", f"range {low} to {high}", f"in [0, {logits.shape[2]})")
