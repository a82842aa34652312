"""The compiled CPU kernels (csrc/cpu) as torch.library ops `mdpgrpo_fast::cpu_*`, and their launchers.

A launcher allocates the results and hands everything to one raw op by name. Arguments and results are those of the
Triton launchers of the same names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import binaries
from .binaries import as_raw, inputs
from .schemas import NUM_STATISTICS, Groups, Launchers, Rows, Settings, new_outputs, new_totals, register

if _reason := binaries.why_missing("cpu"):
    raise ImportError(_reason)

_raw = torch.ops.mdpgrpo_fast
CPU = torch.device("cpu")  # whatever torch's default device is


def launch_token_loss(
    logits: Tensor, gradient: Tensor | None, rows: Rows, groups: Groups, settings: Settings, denominator: Tensor | None,
    num_completions: int, max_completion_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n = logits.shape[0] * logits.shape[1]
    per_row, marks = new_outputs(n, CPU)
    loss, completion_kl, totals = new_totals(num_completions, CPU)
    if n == 0:
        return loss.zero_(), per_row, marks, completion_kl.zero_(), totals.zero_()
    _raw._cpu_token_loss(
        logits=logits, gradient=logits.new_empty(0) if gradient is None else gradient,
        **inputs(logits, settings, rows, groups), denominator=as_raw(denominator, logits),
        num_completions=num_completions, max_completion_length=max_completion_length, loss=loss, per_row=per_row,
        marks=marks, completion_kl=completion_kl, totals=totals,
    )  # fmt: skip
    return loss, per_row, marks, completion_kl, totals


def launch_logprobs(
    logits: Tensor, rows: Rows, settings: Settings, num_completions: int, gradient: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    n = logits.shape[0] * logits.shape[1]
    logprobs = torch.empty(n, dtype=torch.float32, device=CPU)
    statistics = torch.empty(NUM_STATISTICS, n, dtype=torch.float32, device=CPU)
    if n:
        _raw._cpu_logprobs(
            logits=logits, gradient=logits.new_empty(0) if gradient is None else gradient,
            **inputs(logits, settings, rows), num_completions=num_completions, logprobs=logprobs,
            statistics=statistics,
        )  # fmt: skip
    return logprobs, statistics


def launch_logprobs_backward(
    logits: Tensor, grad_logprobs: Tensor, rows: Rows, settings: Settings, num_completions: int, statistics: Tensor,
    grad_kl: Tensor | None = None, gradient: Tensor | None = None, grad_entropy: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if gradient is None:
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=CPU)
    if gradient.numel():
        _raw._cpu_logprobs_backward(
            logits=logits, gradient=gradient, grad_logprobs=as_raw(grad_logprobs, logits),
            grad_kl=as_raw(grad_kl, logits), grad_entropy=as_raw(grad_entropy, logits),
            **inputs(logits, settings, rows), num_completions=num_completions, statistics=as_raw(statistics, logits),
        )  # fmt: skip
    return gradient


def launch_objective(
    statistics: Tensor, logprobs: Tensor | None, rows: Rows, settings: Settings, lengths: Tensor, denominator: Tensor,
    num_completions: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n = statistics.shape[1]
    per_row, marks = new_outputs(n, CPU)
    kinds = 1 + settings.two_temperatures + settings.has_bonus(rows)
    weights = torch.empty(kinds, n, dtype=torch.float32, device=CPU)
    if n:
        _raw._cpu_objective(
            statistics=as_raw(statistics, statistics), logprobs=as_raw(logprobs, statistics),
            **inputs(statistics, settings, rows), lengths=as_raw(lengths, statistics),
            denominator=as_raw(denominator, statistics), num_completions=num_completions, per_row=per_row, marks=marks,
            weights=weights,
        )  # fmt: skip
    return per_row, marks, weights


def launch_totals(per_row: Tensor, marks: Tensor, rows: Rows, num_completions: int) -> tuple[Tensor, Tensor, Tensor]:
    loss, completion_kl, totals = new_totals(num_completions, CPU)
    if len(rows.tokens) == 0:
        return loss.zero_(), completion_kl.zero_(), totals.zero_()
    _raw._cpu_totals(
        per_row=per_row.contiguous(), marks=marks.contiguous(), **inputs(per_row, Settings(), rows),
        num_completions=num_completions, loss=loss, completion_kl=completion_kl, totals=totals,
    )  # fmt: skip
    return loss, completion_kl, totals


def launch_advantages(groups: Groups, settings: Settings) -> tuple[Tensor, Tensor]:
    p, g = len(groups.num_constraints), settings.group_size
    per_group = torch.empty(2, p, dtype=torch.float32, device=CPU)
    per_completion = torch.empty(4, p, g, dtype=torch.float32, device=CPU)
    if p:
        raw = inputs(groups.rewards, settings, groups)
        _raw._cpu_advantages(**raw, per_group=per_group, per_completion=per_completion)
    return per_group, per_completion


def sample(
    logits: Tensor, temperature: Tensor | None, truncation: tuple[int, float, float], noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `rollout.sampling.sample`; truncation: top_k, top_p, min_p; noise (R,): wanted beside a temperature (R,)."""
    n = len(logits)
    tokens = torch.empty(n, dtype=torch.int64, device=CPU)
    logprobs = torch.empty(4, n, dtype=torch.float32, device=CPU)
    if n:
        _raw._cpu_sample(
            logits=logits[None] if logits.stride(1) == 1 else logits[None].contiguous(),
            temperature=as_raw(temperature, logits), noise=as_raw(noise, logits, torch.int64), tokens=tokens,
            truncation=torch.tensor(truncation, dtype=torch.float64, device=CPU), logprobs=logprobs,
        )  # fmt: skip
    sampling, policy, log_kept, logit_floor = logprobs.unbind()
    return tokens, sampling, policy, log_kept, logit_floor


def launch_scale(gradient: Tensor, scale: Tensor) -> None:
    if gradient.numel():
        _raw._cpu_scale(gradient=gradient, scale=as_raw(scale, gradient))


LAUNCHERS = Launchers(
    options=lambda logits: {},
    token_loss=launch_token_loss,
    logprobs=launch_logprobs,
    logprobs_backward=launch_logprobs_backward,
    objective=launch_objective,
    totals=launch_totals,
    advantages=launch_advantages,
    scale=launch_scale,
)
# Kept: the ops live as long as their library.
_library = register("cpu", LAUNCHERS, ("CPU",))
