"""The Hopper kernel (csrc/cuda) as torch.library ops `mdpgrpo_fast::cuda_*`.

It takes the rows of `token_loss`; whatever is beside them, and the other ops, are the Triton kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .schemas import Flags, Launchers, Numbers, register
from .triton import library
from .triton.advantages import launch_advantages
from .triton.token_loss import launch_token_loss as launch_triton_token_loss


def _real(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if x is None else x.to(torch.float32)


def _index(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.int64) if x is None else x.to(torch.int64)


def _launch_rows(
    logits: Tensor, gradient: Tensor | None, tokens: Tensor, mask: Tensor | None, completion: Tensor | None,
    n_completions: int, old_logprobs: Tensor | None, ref_logprobs: Tensor | None, importance_weight: Tensor | None,
    temperature: Tensor | None, epsilon_low: Tensor | None, epsilon_high: Tensor | None, advantage: Tensor,
    kl_beta: Tensor, denominator: Tensor, lengths: Tensor | None, ratio: Tensor | None, slope: Tensor | None,
    statistics: Tensor | None, rows: Tensor, marks: Tensor, numbers: Numbers, flags: Flags,
) -> None:  # fmt: skip
    at, f = logits, flags
    torch.ops.mdpgrpo_fast._cuda_token_loss_rows(
        logits=logits, gradient=_real(None, at) if gradient is None else gradient, tokens=_index(tokens, at),
        mask=at.new_empty(0, dtype=torch.uint8) if mask is None else mask, completion=_index(completion, at),
        old_logprobs=_real(old_logprobs, at), ref_logprobs=_real(ref_logprobs, at),
        importance_weight=_real(importance_weight, at), temperature=_real(temperature, at),
        epsilon_low=_real(epsilon_low, at), epsilon_high=_real(epsilon_high, at), advantage=_real(advantage, at),
        kl_beta=_real(kl_beta, at), denominator=denominator, lengths=_real(lengths, at), ratio=_real(ratio, at),
        slope=_real(slope, at), statistics=_real(statistics, at), n_completions=n_completions,
        temperature_value=numbers.temperature, epsilon_low_value=numbers.epsilon_low,
        epsilon_high_value=numbers.epsilon_high, delta=numbers.delta, softcap=numbers.softcap,
        kl_temperature=numbers.kl_temperature, estimator=f.estimator, sequence=bool(f.sequence),
        mean_of_means=f.aggregation == 0, rescale=bool(f.rescale), two=bool(f.two_temperatures), rows=rows, marks=marks,
    )  # fmt: skip


def launch_token_loss(
    logits: Tensor, gradient: Tensor | None, tokens: Tensor, mask: Tensor | None, completion: Tensor | None,
    n_completions: int, rewards: Tensor | None, num_constraints: Tensor | None, valid: Tensor | None,
    slots: Tensor | None, advantage: Tensor | None, kl_beta: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `kernels.token_loss.launch_token_loss`, with advantages in a launch of their own."""
    if rewards is not None:
        assert num_constraints is not None
        numbers, flags = rest[-2:]
        _, completions = launch_advantages(
            rewards.view(-1, flags.group_size), num_constraints, valid, list(numbers[6:]), *flags[6:]
        )
        advantage, kl_beta = completions[2:].flatten(1).unbind()
        if slots is not None:
            advantage, kl_beta = advantage[slots], kl_beta[slots]
    # No tile: it is the Triton kernel's.
    return launch_triton_token_loss(  # type: ignore[call-arg]  # of what *rest holds, the end is known here alone
        logits, gradient, tokens, mask, completion, n_completions, None, None, None, None, advantage, kl_beta, *rest,
        None, _launch_rows,
    )  # fmt: skip


LAUNCHERS = Launchers(**{**library.LAUNCHERS._asdict(), "token_loss": launch_token_loss})
# Kept: the ops live as long as their library.
_library = register("cuda", LAUNCHERS, ("CUDA", "CPU"))
