"""The fused ops `mdpgrpo_fast::<backend>_<op>`: schemas, fake implementations, registration; what their numbers mean.

A backend brings launchers of one form, so that every op below exists once per backend and is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Numbers(NamedTuple):
    """The real-valued knobs, in the order of the op's `numbers` argument. 0 is "off" for delta and softcap."""

    temperature: float
    epsilon_low: float
    epsilon_high: float
    delta: float
    softcap: float
    kl_temperature: float
    alpha: float
    prospect_beta: float
    prospect_gain: float
    prospect_loss: float
    kl_beta_pos: float
    kl_beta_neg: float


class Flags(NamedTuple):
    """The discrete knobs, in the order of the op's `flags` argument."""

    sequence: bool  # importance ratio per completion
    estimator: int  # 1, 2, 3: k1, k2, k3
    aggregation: int  # 0 grpo, 1 dapo, 2 dr_grpo, 3 bnpo
    rescale: bool  # multiply the policy term by τ
    two_temperatures: bool  # the KL's log-probs are at another temperature than the policy's
    group_size: int  # G
    sample_std: bool
    goal_mean: int  # 0 half, 1 max_half_mean, 2 mean
    binomial: bool
    prospect: bool
    prospect_on_goal: bool


# Rows of the (5, N) float32 output and of the (3, N) bool one, and the members of the (8,) totals.
ROWS = ("logprobs", "entropy", "kl", "ratio", "loss")
MARKS = ("clipped_low", "clipped_high", "kl_clamped")
TOTALS = ("tokens", "kl", "entropy", "clip_low", "clip_high", "ratio_mean", "ratio_max", "kl_clamped")
# Rows of the (5, N) statistics: maximum, log Σ exp, entropy, log Σ exp at the KL temperature, z of the token.
STATISTICS = 5

OBJECTIVE = (
    "Tensor tokens, Tensor? mask, Tensor? completion, SymInt n_completions, Tensor? rewards, Tensor? num_constraints, "
    "Tensor? valid, Tensor? slots, Tensor? advantage, Tensor? kl_beta, Tensor? old_logprobs, Tensor? ref_logprobs, "
    "Tensor? importance_weight, Tensor? temperature, Tensor? epsilon_low, Tensor? epsilon_high, Tensor? denominator, "
    "SymInt max_completion_length, float[] numbers, int[] flags"
)
OUTPUTS = "Tensor loss, Tensor rows, Tensor marks, Tensor completion_kl, Tensor totals"
SCHEMAS = {
    # With a new gradient; without one; with the gradient over the logits.
    "token_loss": f"(Tensor logits, {OBJECTIVE}) -> (Tensor gradient, {OUTPUTS})",
    "token_loss_value": f"(Tensor logits, {OBJECTIVE}) -> ({OUTPUTS})",
    "token_loss_": f"(Tensor(a!) logits, {OBJECTIVE}) -> ({OUTPUTS})",
    "token_logprobs": "(Tensor logits, Tensor tokens, Tensor? mask, Tensor? completion, SymInt n_completions, "
    "Tensor? temperature, float temperature_value, float softcap) -> (Tensor logprobs, Tensor statistics)",
    "token_logprobs_backward": "(Tensor grad_logprobs, Tensor logits, Tensor tokens, Tensor? mask, Tensor? completion, "
    "SymInt n_completions, Tensor? temperature, float temperature_value, float softcap, Tensor statistics) -> Tensor",
    "advantages": "(Tensor rewards, Tensor num_constraints, Tensor? valid, float[] numbers, bool sample_std, "
    "int goal_mean, bool binomial, bool prospect, bool prospect_on_goal) -> (Tensor groups, Tensor completions)",
    "scale_": "(Tensor(a!) gradient, Tensor scale) -> ()",
}


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 has no room for a gradient before the loss scale has reached it."""
    return torch.float32 if dtype == torch.float16 else dtype


class Launchers(NamedTuple):
    """What a backend's ops run. Arguments and results as `kernels.token_loss.launch_token_loss` and its like say."""

    token_loss: Callable[..., tuple[Tensor, ...]]
    logprobs: Callable[..., tuple[Tensor, Tensor]]
    logprobs_backward: Callable[..., Tensor]
    advantages: Callable[..., tuple[Tensor, Tensor]]
    scale: Callable[..., None]


# ---- fake implementations -------------------------------------------------------------------------------------------


def _fake_token_loss_value(logits: Tensor, *args: object) -> tuple[Tensor, ...]:
    n, b = logits.shape[0] * logits.shape[1], args[3]
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty((len(ROWS), n), dtype=torch.float32),
        logits.new_empty((len(MARKS), n), dtype=torch.bool),
        logits.new_empty((b,), dtype=torch.float32),  # type: ignore
        logits.new_empty((len(TOTALS),), dtype=torch.float32),
    )


def _fake_token_loss(logits: Tensor, *args: object) -> tuple[Tensor, ...]:
    return logits.new_empty(logits.shape, dtype=gradient_dtype(logits.dtype)), *_fake_token_loss_value(logits, *args)


def _fake_logprobs(logits: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    n = logits.shape[0] * logits.shape[1]
    return logits.new_empty((n,), dtype=torch.float32), logits.new_empty((STATISTICS, n), dtype=torch.float32)


def _fake_advantages(rewards: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    p, g = rewards.shape
    return rewards.new_empty((2, p), dtype=torch.float32), rewards.new_empty((4, p, g), dtype=torch.float32)


# ---- registration ---------------------------------------------------------------------------------------------------


def register(backend: str, launch: Launchers, keys: tuple[str, ...]) -> torch.library.Library:
    """Defines the ops of a backend for these dispatch keys; no autograd here: `fused` wraps them."""

    def token_loss_value(logits: Tensor, *args: Any, gradient: Tensor | None = None) -> tuple[Tensor, ...]:
        *rest, numbers, flags = args
        return launch.token_loss(logits, gradient, *rest, Numbers(*numbers), Flags(*flags))

    def token_loss(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
        gradient = torch.empty(logits.shape, dtype=gradient_dtype(logits.dtype), device=logits.device)
        return gradient, *token_loss_value(logits, *args, gradient=gradient)

    def token_loss_in_place(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return token_loss_value(logits, *args, gradient=logits)

    def logprobs(*args: Any) -> tuple[Tensor, Tensor]:
        *rest, softcap = args
        return launch.logprobs(*rest, 1.0, softcap, False)

    implementations: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "token_loss": (token_loss, _fake_token_loss),
        "token_loss_value": (token_loss_value, _fake_token_loss_value),
        "token_loss_": (token_loss_in_place, _fake_token_loss_value),
        "token_logprobs": (logprobs, _fake_logprobs),
        "token_logprobs_backward": (launch.logprobs_backward, lambda g, logits, *args: logits.new_empty(logits.shape)),
        "advantages": (launch.advantages, _fake_advantages),
        "scale_": (launch.scale, lambda gradient, scale: None),
    }
    library = torch.library.Library("mdpgrpo_fast", "FRAGMENT")
    for name, (function, fake) in implementations.items():
        library.define(f"{backend}_{name}{SCHEMAS[name]}")
        for key in keys:
            library.impl(f"{backend}_{name}", function, key)
        torch.library.register_fake(f"mdpgrpo_fast::{backend}_{name}", fake, lib=library)
    return library


GOAL_MEAN = ("half", "max_half_mean", "mean")


AGGREGATION = ("grpo", "dapo", "dr_grpo", "bnpo")
