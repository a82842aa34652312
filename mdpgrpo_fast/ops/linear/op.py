"""The ops `mdpgrpo_fast::linear_*`: the rows that take part, cut into chunks, and the passes over them.

As torch.library ops they are opaque to torch.compile, which would unroll the loop over chunks. No autograd here.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.schemas import AGGREGATION
from ...reference import TOTALS, Layout, default_denominator, token_shares
from . import sharded
from .chunks import (
    Chunking,
    Head,
    Needs,
    backward_all,
    bytes_per_row,
    chunking,
    joined,
    kept_dtype,
    mix,
    plan,
    score,
    score_all,
    weigh_all,
)
from .engines import ENGINES, ENTROPY, Settings
from .select import Selection, select


def _spread(x: Tensor, index: Tensor | None, n: int) -> Tensor:
    """(..., N) of the rows that took part as (..., T), 0 at the others."""
    if index is None:
        return x
    return x.new_zeros((*x.shape[:-1], n)).index_copy_(-1, index, x)


def _token_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    completion: Tensor | None,
    n_completions: int,
    lengths: Tensor | None,
    advantage: Tensor,
    kl_beta: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weight: Tensor | None,
    temperature: Tensor | None,
    epsilon_low: Tensor | None,
    epsilon_high: Tensor | None,
    denominator: Tensor | None,
    max_completion_length: int,
    numbers: list[float],
    flags: list[int],
    backend: str,
    workspace_bytes: int,
    group: str,
) -> tuple[Tensor, ...]:
    tau, low, high, delta, kl_tau, softcap, scale = numbers
    sequence, estimator, aggregation, rescale, two, fp32_logits, skip_idle, *wanted = flags
    needs = Needs(*map(bool, wanted))
    vocab, n = len(weight), len(tokens)
    if group:
        tokens = tokens - sharded.rank_of(group) * vocab
    knobs = (advantage, temperature, epsilon_low, epsilon_high)
    if sequence and old_logprobs is None and not rescale:
        # On-policy every ratio is 1, and where all tokens of a completion are alike, so are their gradients.
        sequence = importance_weight is not None or any(x is not None and x.numel() != n_completions for x in knobs)
    chosen = select(
        tokens, mask, completion, n_completions, hidden.shape[1], lengths,
        (advantage, kl_beta, old_logprobs, ref_logprobs, importance_weight, *knobs[1:]), bool(skip_idle),
        bool(sequence),
    )  # fmt: skip
    index, rows, extents, counts, violated = chosen
    settings = Settings(
        tau, low, high, delta, kl_tau, softcap, bool(sequence), estimator, AGGREGATION[aggregation], bool(rescale),
        bool(two),
    )  # fmt: skip
    engine = ENGINES[backend](settings, hidden.dtype)
    counts = counts.to(engine.dtype)
    if denominator is None:
        denominator = default_denominator(counts, settings.aggregation, max_completion_length)
    denominator = denominator.to(engine.dtype)
    if violated is not None:
        denominator = torch.where(violated, torch.nan, denominator)
    unit: float | Tensor = 1.0
    if hidden.dtype == torch.float16:
        shares = token_shares(counts, Layout(n_completions), settings.aggregation, denominator)
        unit = shares.amax() if shares.numel() else 1.0

    size = _size(hidden, weight, bool(fp32_logits), workspace_bytes)
    total, once = len(rows.tokens), True
    ranges = plan(total, size.rows, None)
    if sequence:
        # ρ wants all rows of a completion: in one chunk, or, where that cannot be, in a pass over all chunks before.
        undivided = None if extents is None else plan(total, size.rows, extents)
        ranges, once = ranges if undivided is None else undivided, undivided is not None
    assert ranges is not None
    head = Head(hidden, weight, bias, index, rows, scale, needs, ranges, size, bool(fp32_logits), group)
    if once and any(needs) and ranges:
        found = list(weigh_all(head, engine, ranges, counts, denominator, unit))
        per, marks = torch.cat([w.rows for w in found], 1), torch.cat([w.marks for w in found], 1)
    else:
        logprobs, statistics = score_all(head, engine, ranges)
        per, marks, weights = engine.objective(logprobs, statistics, rows, counts, denominator, n_completions)
        if any(needs):
            backward_all(head, engine, ranges, statistics, weights, unit)
    loss, completion_kl, totals = engine.totals(per, marks, rows.mask, rows.completion, n_completions)
    if violated is not None:
        loss = torch.where(violated, torch.nan, loss)
    per = _spread(per, index, n)
    if index is not None:
        absent = torch.ones(n, dtype=torch.bool, device=hidden.device).index_fill_(0, index, False)
        per[3].masked_fill_(absent, 1)
    return *head.gradients(unit), loss, per, _spread(marks, index, n), completion_kl, totals


def _size(hidden: Tensor, weight: Tensor, fp32_logits: bool, workspace_bytes: int) -> Chunking:
    vocab, width = weight.shape
    row = bytes_per_row(vocab, hidden.dtype, fp32_logits)
    return chunking(width, row, workspace_bytes, hidden.device)


class _Logprobs(NamedTuple):
    """The arguments that the ops of log-probs share, beside hidden, weight and bias."""

    tokens: Tensor
    mask: Tensor | None
    completion: Tensor | None
    n_completions: int
    lengths: Tensor | None
    temperature: Tensor | None
    numbers: list[float]  # τ, soft-cap, logit scale
    fp32_logits: bool
    backend: str
    workspace_bytes: int
    group: str

    def head(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs
    ) -> tuple[Head, Any, list[tuple[int, int]], Selection]:  # fmt: skip
        tau, softcap, scale = self.numbers
        tokens = self.tokens - sharded.rank_of(self.group) * len(weight) if self.group else self.tokens
        chosen = select(
            tokens, self.mask, self.completion, self.n_completions, hidden.shape[1], self.lengths,
            (*(None,) * 5, self.temperature, None, None), False, False,
        )  # fmt: skip
        rows = chosen.rows
        settings = Settings(tau, 0, 0, 0, 1, softcap, False, 3, "dapo", False, False)
        size = _size(hidden, weight, self.fp32_logits, self.workspace_bytes)
        ranges = plan(len(rows.tokens), size.rows, None) or []
        head = Head(hidden, weight, bias, chosen.taken, rows, scale, needs, ranges, size, self.fp32_logits, self.group)
        return head, ENGINES[self.backend](settings, hidden.dtype), ranges, chosen


def _token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, unit_gradient: bool, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs and entropy (T,), statistics (5, T), and ∂ℓ/∂hidden where it is asked for."""
    call = _Logprobs(*args)
    head, engine, ranges, chosen = call.head(hidden, weight, bias, Needs(unit_gradient, False, False))
    if unit_gradient:
        found = []
        for a, b in ranges:
            h, z = head.forward(a, b)
            g, rows = head.target(z), head.rows.part(a, b)
            ones = torch.ones(1, b - a, dtype=engine.dtype, device=z.device)
            if call.group:
                found.append(score(head, engine, z, rows))
                mix(engine, z, g, found[-1][1], ones, rows)
            else:
                found.append(engine.unit(z, g, rows))
            head.backward(g, h, ones[0], 1.0, a, b)
        logprobs, statistics = joined(found, hidden, engine.dtype)
    else:
        logprobs, statistics = score_all(head, engine, ranges)
    if chosen.violated is not None:
        logprobs = torch.where(chosen.violated, torch.nan, logprobs)
    n = len(call.tokens)
    statistics = _spread(statistics, chosen.taken, n)
    return _spread(logprobs, chosen.taken, n), statistics[ENTROPY].clone(), statistics, head.gradients(1.0)[0]


def _token_logprobs_backward(
    gradient: Tensor, statistics: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool],
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d hidden, d weight, d bias from that of ℓ (T,): the logits are built once more."""
    call = _Logprobs(*args)
    head, engine, ranges, chosen = call.head(hidden, weight, bias, Needs(*needs))
    weights = gradient if chosen.taken is None else gradient[chosen.taken]
    weights = weights.to(engine.dtype)
    if chosen.rows.mask is not None:
        weights = weights.masked_fill(~chosen.rows.mask, 0)
    unit: float | Tensor = 1.0
    if hidden.dtype == torch.float16 and weights.numel():
        top = weights.abs().amax()
        unit = torch.where(top == 0, 1, top)
    if chosen.taken is not None:
        statistics = statistics[:, chosen.taken]
    backward_all(head, engine, ranges, statistics, weights[None], unit)
    return head.gradients(unit)


def _scale(x: Tensor, scale: Tensor, backend: str) -> None:
    """x *= scale. A scale of 1 costs no traffic: on the CPU it is looked at, a kernel looks for itself."""
    if backend in ("triton", "cuda") and x.ndim > 1:
        from ...kernels.triton.token_loss import launch_scale

        launch_scale(x if x.ndim == 3 else x[None], scale, tuned=False)
    elif x.device.type != "cpu" or float(scale) != 1:
        x.mul_(scale)


# ---- registration ---------------------------------------------------------------------------------------------------

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_ROWS = "Tensor tokens, Tensor? mask, Tensor? completion, SymInt n_completions, Tensor? lengths"
_LOGPROBS = (
    f"{_ROWS}, Tensor? temperature, float[] numbers, bool fp32_logits, str backend, int workspace_bytes, str group"
)
_GRADIENTS = "Tensor d_hidden, Tensor d_weight, Tensor d_bias"
SCHEMAS = {
    "linear_token_loss": f"({_HEAD}, {_ROWS}, Tensor advantage, Tensor kl_beta, Tensor? old_logprobs, "
    "Tensor? ref_logprobs, Tensor? importance_weight, Tensor? temperature, Tensor? epsilon_low, Tensor? epsilon_high, "
    "Tensor? denominator, SymInt max_completion_length, float[] numbers, int[] flags, str backend, "
    f"int workspace_bytes, str group) -> ({_GRADIENTS}, Tensor loss, Tensor rows, Tensor marks, "
    "Tensor completion_kl, Tensor totals)",
    "linear_token_logprobs": f"({_HEAD}, bool unit_gradient, {_LOGPROBS}) -> (Tensor logprobs, Tensor entropy, "
    "Tensor statistics, Tensor d_hidden)",
    "linear_token_logprobs_backward": f"(Tensor gradient, Tensor statistics, {_HEAD}, bool[] needs, {_LOGPROBS}) -> "
    f"({_GRADIENTS})",
    "linear_scale_": "(Tensor(a!) x, Tensor scale, str backend) -> ()",
}


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Any) -> tuple[Tensor, ...]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = (kept_dtype(hidden.dtype), kept_dtype(weight.dtype), kept_dtype(weight.dtype))
    return tuple(
        hidden.new_empty(shape, dtype=dtype) if need else hidden.new_empty((0,))
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


def _real(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _fake_token_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, *args: Any) -> Any:
    n, count, flags, real = tokens.shape[0], args[2], args[15], _real(hidden)
    return (
        *_fake_gradients(hidden, weight, bias, flags[-3:]),
        hidden.new_empty((), dtype=real),
        hidden.new_empty((5, n), dtype=real),
        hidden.new_empty((3, n), dtype=torch.bool),
        hidden.new_empty((count,), dtype=real),
        hidden.new_empty((len(TOTALS),), dtype=real),
    )


def _fake_token_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, unit: bool, *args: Any) -> Any:
    n, real = args[0].shape[0], _real(hidden)
    vector = hidden.new_empty((n,), dtype=real)
    unit_gradient = hidden.new_empty(hidden.shape if unit else (0,), dtype=kept_dtype(hidden.dtype) if unit else None)
    return vector, torch.empty_like(vector), hidden.new_empty((5, n), dtype=real), unit_gradient


_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "linear_token_loss": (_token_loss, _fake_token_loss),
    "linear_token_logprobs": (_token_logprobs, _fake_token_logprobs),
    "linear_token_logprobs_backward": (
        _token_logprobs_backward,
        lambda gradient, statistics, *args: _fake_gradients(*args[:4]),
    ),
    "linear_scale_": (_scale, lambda x, scale, backend: None),
}


def _in_its_own_precision(function: Any) -> Any:
    """Autocast has had its say before the op: inside, a product in float32 is meant."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


_library = torch.library.Library("mdpgrpo_fast", "FRAGMENT")
for _name, (_function, _fake) in _IMPLEMENTATIONS.items():
    _library.define(_name + SCHEMAS[_name])
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _in_its_own_precision(_function), _key)
    torch.library.register_fake(f"mdpgrpo_fast::{_name}", _fake, lib=_library)
