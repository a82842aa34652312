"""The ops `mdpgrpo_fast::linear_*`: the rows that take part, cut into chunks, and the passes over them.

As torch.library ops they are opaque to torch.compile, which would unroll the loop over chunks. No autograd here.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.schemas import (
    AGGREGATION,
    CISPO,
    GMPO,
    MARKS,
    NUM_STATISTICS,
    NUM_TOTALS,
    PPO_CLIP,
    ROWS,
    VESPO,
    Rows,
    Settings,
    gradient_dtype,
)
from ...kernels.schemas import SETTINGS as _SETTINGS
from ...reference import Layout, default_denominator, token_shares
from . import sharded
from .chunks import (
    Chunking,
    Head,
    Needs,
    backward_all,
    bytes_per_row,
    chunking,
    needs_mixing,
    plan,
    score_all,
    unit_all,
    weigh,
    weigh_all,
)
from .engines import ENTROPY, Engine, engine_for
from .select import Selection, select


class _Call(NamedTuple):
    """The arguments that all the ops share, beside hidden, weight and bias, in the order of their schemas."""

    rows: list[Tensor | None]
    num_completions: int
    lengths: Tensor | None
    numbers: list[float]
    flags: list[int]
    logit_scale: float
    fp32_logits: bool
    backend: str
    workspace_bytes: int
    group: str

    @property
    def settings(self) -> Settings:
        return Settings.read(self.numbers, self.flags)

    def select(self, weight: Tensor, row_length: int, skip_idle: bool, sequence: bool) -> Selection:
        rows = Rows(*self.rows)
        if self.group:
            rows = rows._replace(tokens=rows.tokens - sharded.rank_of(self.group) * len(weight))
        return select(rows, self.num_completions, row_length, self.lengths, skip_idle, sequence)

    def size(self, hidden: Tensor, weight: Tensor) -> Chunking:
        vocab, width = weight.shape
        row = bytes_per_row(vocab, hidden.dtype, self.fp32_logits)
        return chunking(width, row, self.workspace_bytes, hidden.device)

    def head(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs
    ) -> tuple[Head, Engine, Selection]:  # fmt: skip
        """For log-probs, which need no row but those that count."""
        chosen, size = self.select(weight, hidden.shape[1], False, False), self.size(hidden, weight)
        chunks = plan(len(chosen.rows.tokens), size.rows, None)
        assert chunks is not None
        head = Head(hidden, weight, bias, needs, chosen, chunks, size, self.logit_scale, self.fp32_logits, self.group)
        return head, engine_for(self.backend, self.settings, hidden.dtype), chosen


def _scatter(x: Tensor, index: Tensor | None, n: int) -> Tensor:
    """(..., N) of the rows that took part as (..., T), 0 at the others."""
    if index is None:
        return x
    return x.new_zeros((*x.shape[:-1], n)).index_copy_(-1, index, x)


def _coupling(settings: Settings, rows: Rows, num_completions: int) -> tuple[Settings, bool]:
    """The settings, simpler where they come to the same, and whether a completion's rows must be seen together."""
    s = settings.settled(rows)
    if rows.old_logprobs is None and not s.masks_off_policy:
        # On-policy every ratio is 1, and where all tokens of a completion are alike, so are their gradients.
        knobs = rows._replace(kl_beta=None, entropy_coef=None)
        alike = not (any(knobs.per_row(num_completions)) or s.rescale or s.top_entropy_quantile < 1)
        alike = alike and rows.importance_weight is None and rows.entropy_floor is None and not s.entropy_floor
        coupled_kl = s.sequence and s.unbiased_kl and rows.ref_logprobs is not None
        if (alike or s.loss == CISPO) and not coupled_kl:
            s = s._replace(sequence=0, loss=PPO_CLIP if s.loss == GMPO else s.loss)
    on_policy_vespo = s.loss == VESPO and rows.old_logprobs is None and rows.importance_weight is None
    return s, s.couples and not (on_policy_vespo and not s.sequence and not s.masks_off_policy)


def _token_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], denominator: Tensor | None,
    max_completion_length: int, skip_idle: bool, *args: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    call, wanted = _Call(*args), Needs(*needs)
    settings, rows, b = call.settings, Rows(*call.rows), call.num_completions
    n = len(rows.tokens)
    settings, together = _coupling(settings, rows, b)
    quantile = settings.top_entropy_quantile < 1
    # The quantile is that of all rows; and with a bonus none is idle.
    skip_idle = skip_idle and not quantile and not settings.has_bonus(rows)
    chosen = call.select(weight, hidden.shape[1], skip_idle, together)
    index, rows = chosen.taken, chosen.rows
    engine = engine_for(call.backend, settings, hidden.dtype)
    lengths, aggregation = chosen.lengths.to(engine.dtype), AGGREGATION[settings.aggregation]
    if denominator is None:
        denominator = default_denominator(lengths, aggregation, max_completion_length)
    denominator = denominator.to(engine.dtype)
    if chosen.violated is not None:
        denominator = torch.where(chosen.violated, torch.nan, denominator)
    unit: float | Tensor = 1.0
    if hidden.dtype == torch.float16:
        shares = token_shares(lengths, Layout(b), aggregation, denominator)
        unit = shares.amax() if shares.numel() else 1.0

    size, total, once = call.size(hidden, weight), len(rows.tokens), True
    chunks = plan(total, size.rows, None)
    assert chunks is not None
    if together:
        # ρ wants all rows of a completion: in one chunk, or, where that cannot be, in a pass over all chunks before.
        undivided = None if chosen.extents is None else plan(total, size.rows, chosen.extents)
        chunks, once = chunks if undivided is None else undivided, undivided is not None
    once = once and (len(chunks) == 1 or not quantile)
    head = Head(hidden, weight, bias, wanted, chosen, chunks, size, call.logit_scale, call.fp32_logits, call.group)
    if once and any(wanted) and chunks:
        found = list(weigh_all(head, engine, lengths, denominator, unit))
        per_row, marks = torch.cat([w.per_row for w in found], 1), torch.cat([w.marks for w in found], 1)
    elif wanted == Needs(True, False, False) and not needs_mixing(head, engine):
        # Of a frozen head a row's weight may come when all is done.
        per_row, marks, weights = weigh(engine, *unit_all(head, engine), rows, lengths, denominator, b)
        head.weigh(weights[0])
    else:
        logprobs, statistics = score_all(head, engine)
        per_row, marks, weights = weigh(engine, logprobs, statistics, rows, lengths, denominator, b)
        if any(wanted):
            backward_all(head, engine, statistics, weights, unit)
    loss, completion_kl, totals = engine.totals(per_row, marks, rows, b)
    if chosen.violated is not None:
        loss = torch.where(chosen.violated, torch.nan, loss)
    per_row = _scatter(per_row, index, n)
    if index is not None:
        absent = torch.ones(n, dtype=torch.bool, device=hidden.device).index_fill_(0, index, False)
        per_row[ROWS.index("ratio")].masked_fill_(absent, 1)
    return *head.gradients(unit), loss, per_row, _scatter(marks, index, n), completion_kl, totals


def _token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, unit_gradient: bool, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs and entropy (T,), statistics (5, T), and ∂ℓ/∂hidden where it is asked for."""
    call = _Call(*args)
    head, engine, chosen = call.head(hidden, weight, bias, Needs(unit_gradient, False, False))
    logprobs, statistics = unit_all(head, engine) if unit_gradient else score_all(head, engine)
    if chosen.violated is not None:
        logprobs = torch.where(chosen.violated, torch.nan, logprobs)
    n = hidden.shape[0] * hidden.shape[1]
    statistics = _scatter(statistics, chosen.taken, n)
    logprobs = _scatter(logprobs, chosen.taken, n)
    return logprobs, statistics[ENTROPY].clone(), statistics, head.gradients(1.0)[0]


def _token_logprobs_backward(
    gradient: Tensor, statistics: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool],
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d hidden, d weight, d bias from that of ℓ (T,): the logits are built once more."""
    head, engine, chosen = _Call(*args).head(hidden, weight, bias, Needs(*needs))
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
    backward_all(head, engine, statistics, weights[None], unit)
    return head.gradients(unit)


def _scale(x: Tensor, scale: Tensor, backend: str) -> None:
    """x *= scale. A scale of 1 costs no traffic: on the CPU it is looked at, a kernel looks for itself."""
    if backend in ("triton", "cuda") and x.ndim > 1:
        from ...kernels.triton.tiles import CANDIDATES, fit
        from ...kernels.triton.token_loss import launch_scale

        # Of another width than the vocabulary's: nothing is measured for it.
        launch_scale(x if x.ndim == 3 else x[None], scale, tile_of=lambda: fit(CANDIDATES[0], x.shape[-1]))
    elif x.device.type != "cpu" or float(scale) != 1:
        x.mul_(scale)


# ---- registration ---------------------------------------------------------------------------------------------------

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_CALL = (
    f"Tensor?[] rows, SymInt num_completions, Tensor? lengths, {_SETTINGS}, float logit_scale, bool fp32_logits, "
    "str backend, int workspace_bytes, str group"
)
_GRADIENTS = "Tensor d_hidden, Tensor d_weight, Tensor d_bias"
SCHEMAS = {
    "linear_token_loss": f"({_HEAD}, bool[] needs, Tensor? denominator, SymInt max_completion_length, bool skip_idle, "
    f"{_CALL}) -> ({_GRADIENTS}, Tensor loss, Tensor per_row, Tensor marks, Tensor completion_kl, Tensor totals)",
    "linear_token_logprobs": f"({_HEAD}, bool unit_gradient, {_CALL}) -> (Tensor logprobs, Tensor entropy, "
    "Tensor statistics, Tensor d_hidden)",
    "linear_token_logprobs_backward": f"(Tensor gradient, Tensor statistics, {_HEAD}, bool[] needs, {_CALL}) -> "
    f"({_GRADIENTS})",
    "linear_scale_": "(Tensor(a!) x, Tensor scale, str backend) -> ()",
}


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Any, *_: Any) -> tuple[Tensor, ...]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(shape, dtype=gradient_dtype(x.dtype)) if need else hidden.new_empty((0,))
        for shape, x, need in zip(shapes, (hidden, weight, weight), needs, strict=True)
    )


def _real(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _fake_token_loss(hidden: Tensor, *args: Any) -> Any:
    call, n, real = _Call(*args[6:]), hidden.shape[0] * hidden.shape[1], _real(hidden)
    sizes = ((), (len(ROWS), n), (len(MARKS), n), (call.num_completions,), (NUM_TOTALS,))
    dtypes = (real, real, torch.bool, real, real)
    outputs = (hidden.new_empty(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True))
    return *_fake_gradients(hidden, *args), *outputs


def _fake_token_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, unit: bool, *_: Any) -> Any:
    n, real = hidden.shape[0] * hidden.shape[1], _real(hidden)
    vector = hidden.new_empty((n,), dtype=real)
    dtype = gradient_dtype(hidden.dtype) if unit else None
    unit_gradient = hidden.new_empty(hidden.shape if unit else (0,), dtype=dtype)
    return vector, torch.empty_like(vector), hidden.new_empty((NUM_STATISTICS, n), dtype=real), unit_gradient


_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "linear_token_loss": (_token_loss, _fake_token_loss),
    "linear_token_logprobs": (_token_logprobs, _fake_token_logprobs),
    "linear_token_logprobs_backward": (
        _token_logprobs_backward,
        lambda gradient, statistics, *args: _fake_gradients(*args),
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
