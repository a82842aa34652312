"""The compiled CPU kernels (csrc/cpu) as torch.library ops `mdpgrpo_fast::cpu_*`, and their launchers.

A launcher allocates the results and hands everything to one raw op by name. The raw ops take flat contiguous tensors
of one dtype each, and an empty tensor for what is not given; they check all of it before a pointer is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import binaries
from .schemas import MARKS, ROWS, STATISTICS, TOTALS, Flags, Launchers, Numbers, register

if _reason := binaries.why_missing("cpu"):
    raise ImportError(_reason)

_raw = torch.ops.mdpgrpo_fast


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _real(x: Tensor | None) -> Tensor:
    return _new(0) if x is None else x.to(torch.float32).contiguous()


def _index(x: Tensor | None) -> Tensor:
    return _new(0) if x is None else x.to(torch.int64).contiguous()


def _bytes(x: Tensor | None) -> Tensor:
    return _new(0) if x is None else x.contiguous()


def _numbers(values: Iterable[Any], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([float(x) for x in values], dtype=dtype, device="cpu")


def _outputs(n: int) -> tuple[Tensor, Tensor]:
    return _new(len(ROWS), n), _new(len(MARKS), n, dtype=torch.bool)


def _sums(n_completions: int) -> tuple[Tensor, Tensor, Tensor]:
    return _new(), _new(n_completions), _new(len(TOTALS))


def launch_token_loss(
    logits: Tensor, gradient: Tensor | None, tokens: Tensor, mask: Tensor | None, completion: Tensor | None,
    n_completions: int, rewards: Tensor | None, num_constraints: Tensor | None, valid: Tensor | None,
    slots: Tensor | None, advantage: Tensor | None, kl_beta: Tensor | None, old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None, importance_weight: Tensor | None, temperature: Tensor | None,
    epsilon_low: Tensor | None, epsilon_high: Tensor | None, denominator: Tensor | None, max_completion_length: int,
    numbers: Numbers, flags: Flags,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `kernels.token_loss.launch_token_loss`."""
    n = logits.shape[0] * logits.shape[1]
    rows, marks = _outputs(n)
    loss, completion_kl, totals = _sums(n_completions)
    if n == 0:
        return loss.zero_(), rows, marks, completion_kl.zero_(), totals.zero_()
    _raw._cpu_token_loss(
        logits=logits, gradient=_new(0) if gradient is None else gradient, tokens=_index(tokens), mask=_bytes(mask),
        completion=_index(completion), rewards=_real(rewards), num_constraints=_real(num_constraints),
        valid=_bytes(valid), slots=_index(slots), old_logprobs=_real(old_logprobs), ref_logprobs=_real(ref_logprobs),
        importance_weight=_real(importance_weight), temperature=_real(temperature), epsilon_low=_real(epsilon_low),
        epsilon_high=_real(epsilon_high), advantage=_real(advantage), kl_beta=_real(kl_beta),
        denominator=_real(denominator), numbers=_numbers(numbers), flags=_numbers(flags, torch.int64),
        n_completions=n_completions, max_completion_length=max_completion_length, loss=loss, rows=rows, marks=marks,
        completion_kl=completion_kl, totals=totals,
    )  # fmt: skip
    return loss, rows, marks, completion_kl, totals


def launch_logprobs(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, completion: Tensor | None, n_completions: int,
    temperature: Tensor | None, temperature_value: float, kl_temperature: float, softcap: float, two: bool,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `kernels.logprobs.launch_logprobs`."""
    n = logits.shape[0] * logits.shape[1]
    logprobs, statistics = _new(n), _new(STATISTICS, n)
    if n:
        _raw._cpu_logprobs(
            logits=logits, gradient=_new(0) if gradient is None else gradient, tokens=_index(tokens),
            mask=_bytes(mask), completion=_index(completion), temperature=_real(temperature),
            n_completions=n_completions, temperature_value=temperature_value, kl_temperature=kl_temperature,
            softcap=softcap, two=two, logprobs=logprobs, statistics=statistics,
        )  # fmt: skip
    return logprobs, statistics


def launch_logprobs_backward(
    grad_logprobs: Tensor, logits: Tensor, tokens: Tensor, mask: Tensor | None, completion: Tensor | None,
    n_completions: int, temperature: Tensor | None, temperature_value: float, softcap: float, statistics: Tensor,
    grad_kl: Tensor | None = None, kl_temperature: float = 1.0, gradient: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `kernels.logprobs.launch_logprobs_backward`."""
    if gradient is None:
        gradient = _new(*logits.shape, dtype=logits.dtype)
    if gradient.numel():
        _raw._cpu_logprobs_backward(
            grad_logprobs=_real(grad_logprobs), grad_kl=_real(grad_kl), logits=logits, gradient=gradient,
            tokens=_index(tokens), mask=_bytes(mask), completion=_index(completion), temperature=_real(temperature),
            n_completions=n_completions, temperature_value=temperature_value, kl_temperature=kl_temperature,
            softcap=softcap, statistics=statistics,
        )  # fmt: skip
    return gradient


def launch_objective(
    statistics: Tensor, logprobs: Tensor | None, mask: Tensor | None, completion: Tensor, n_completions: int,
    advantage: Tensor, kl_beta: Tensor, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    importance_weight: Tensor | None, temperature: Tensor | None, epsilon_low: Tensor | None,
    epsilon_high: Tensor | None, lengths: Tensor, denominator: Tensor,
    numbers: tuple[float, float, float, float, float], sequence: bool, estimator: int, mean_of_means: bool,
    rescale: bool, two: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `kernels.objective.launch_objective`."""
    n = statistics.shape[1]
    rows, marks = _outputs(n)
    weights = _new(1 + two, n)
    if n:
        _raw._cpu_objective(
            statistics=statistics.contiguous(), logprobs=_real(logprobs), mask=_bytes(mask),
            completion=_index(completion), old_logprobs=_real(old_logprobs), ref_logprobs=_real(ref_logprobs),
            importance_weight=_real(importance_weight), temperature=_real(temperature), epsilon_low=_real(epsilon_low),
            epsilon_high=_real(epsilon_high), advantage=_real(advantage), kl_beta=_real(kl_beta),
            denominator=_real(denominator), lengths=_real(lengths), numbers=_numbers(numbers),
            n_completions=n_completions, sequence=sequence, estimator=estimator, mean_of_means=mean_of_means,
            rescale=rescale, two=two, rows=rows, marks=marks, weights=weights,
        )  # fmt: skip
    return rows, marks, weights


def launch_totals(
    rows: Tensor, marks: Tensor, mask: Tensor | None, completion: Tensor, n_completions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.objective.launch_totals`."""
    loss, completion_kl, totals = _sums(n_completions)
    if completion.numel() == 0:
        return loss.zero_(), completion_kl.zero_(), totals.zero_()
    _raw._cpu_totals(
        rows=rows.contiguous(), marks=marks.contiguous(), mask=_bytes(mask), completion=_index(completion),
        n_completions=n_completions, loss=loss, completion_kl=completion_kl, totals=totals,
    )  # fmt: skip
    return loss, completion_kl, totals


def launch_advantages(
    rewards: Tensor, num_constraints: Tensor, valid: Tensor | None, numbers: list[float], sample_std: bool,
    goal_mean: int, binomial: bool, prospect: bool, prospect_on_goal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `kernels.advantages.launch_advantages`."""
    p, g = rewards.shape
    groups, completions = _new(2, p), _new(4, p, g)
    if p * g:
        _raw._cpu_advantages(
            rewards=_real(rewards), num_constraints=_real(num_constraints), valid=_bytes(valid),
            numbers=_numbers(numbers), sample_std=sample_std, goal_mean=goal_mean, binomial=binomial,
            prospect=prospect, prospect_on_goal=prospect_on_goal, groups=groups, completions=completions,
        )  # fmt: skip
    return groups, completions


def launch_scale(gradient: Tensor, scale: Tensor) -> None:
    """As `kernels.token_loss.launch_scale`."""
    if gradient.numel():
        _raw._cpu_scale(gradient=gradient, scale=_real(scale))


LAUNCHERS = Launchers(launch_token_loss, launch_logprobs, launch_logprobs_backward, launch_advantages, launch_scale)
# Kept: the ops live as long as their library.
_library = register("cpu", LAUNCHERS, ("CPU",))
