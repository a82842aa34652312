"""The Triton kernels as torch.library ops `mdpgrpo_fast::triton_*`: schemas, fake implementations, launchers.

A later backend registers the same schemas under its own prefix. No autograd here: `fused` wraps the ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .advantages import launch_advantages
from .logprobs import STATISTICS, launch_logprobs, launch_logprobs_backward
from .token_loss import MARKS, ROWS, TOTALS, Flags, Numbers, launch_scale, launch_token_loss

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


def _token_loss(logits: Tensor, *args: object) -> tuple[Tensor, ...]:
    *rest, numbers, flags = args
    gradient = torch.empty(logits.shape, dtype=gradient_dtype(logits.dtype), device=logits.device)
    return gradient, *launch_token_loss(logits, gradient, *rest, Numbers(*numbers), Flags(*flags))  # type: ignore


def _token_loss_value(logits: Tensor, *args: object) -> tuple[Tensor, ...]:
    *rest, numbers, flags = args
    return launch_token_loss(logits, None, *rest, Numbers(*numbers), Flags(*flags))  # type: ignore


def _token_loss_in_place(logits: Tensor, *args: object) -> tuple[Tensor, ...]:
    *rest, numbers, flags = args
    return launch_token_loss(logits, logits, *rest, Numbers(*numbers), Flags(*flags))  # type: ignore


def _logprobs(*args: Any) -> tuple[Tensor, Tensor]:
    *rest, softcap = args
    return launch_logprobs(*rest, 1.0, softcap, False)  # type: ignore


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


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "token_loss": (_token_loss, _fake_token_loss),
    "token_loss_value": (_token_loss_value, _fake_token_loss_value),
    "token_loss_": (_token_loss_in_place, _fake_token_loss_value),
    "token_logprobs": (_logprobs, _fake_logprobs),
    "token_logprobs_backward": (launch_logprobs_backward, lambda g, logits, *args: logits.new_empty(logits.shape)),
    "advantages": (launch_advantages, _fake_advantages),
    "scale_": (launch_scale, lambda gradient, scale: None),
}

_library = torch.library.Library("mdpgrpo_fast", "FRAGMENT")
for _name, (_launch, _fake) in _IMPLEMENTATIONS.items():
    _library.define(f"triton_{_name}{SCHEMAS[_name]}")
    for _key in ("CUDA", "CPU"):  # on the CPU in Triton's interpreter
        _library.impl(f"triton_{_name}", _launch, _key)
    torch.library.register_fake(f"mdpgrpo_fast::triton_{_name}", _fake, lib=_library)
