"""What `linear_token_loss` does with the rows of a chunk, by backend: statistics, weights, gradient in place.

A row's statistics are five numbers, as in the Triton kernels: the maximum m of z (the logit after the soft-cap), log Σ
exp((z - m) / τ), the entropy, the same log Σ at the KL's temperature, and z of the row's token. ℓ follows from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import reference
from ...reference import Layout, Objective

PEAK, LOG_TOTAL, ENTROPY, LOG_TOTAL_KL, TARGET = range(5)
# The torch backend works on as many rows at once as stay in a core's cache.
CACHE_BYTES = 4 << 20
# exp of it is 0; its product with 0 is 0, which that of -inf is not.
LOWEST = -1e5


class Rows(NamedTuple):
    """The N rows that take part, in the order of the chunks, one value per row each."""

    tokens: Tensor  # integers; with a vocabulary split over ranks, relative to this rank's part
    mask: Tensor | None  # bool, where rows that do not count could not be left out
    completion: Tensor
    advantage: Tensor | None = None
    kl_beta: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    importance_weight: Tensor | None = None
    temperature: Tensor | None = None
    epsilon_low: Tensor | None = None
    epsilon_high: Tensor | None = None

    def part(self, start: int, stop: int) -> Rows:
        return Rows(*(None if x is None else x[start:stop] for x in self))  # type: ignore[arg-type]


class Settings(NamedTuple):
    """The knobs that all rows share; the first five where no tensor says otherwise. 0 is "off" for delta, softcap."""

    temperature: float
    epsilon_low: float
    epsilon_high: float
    delta: float
    kl_temperature: float
    softcap: float
    sequence: bool
    estimator: int  # 1, 2, 3
    aggregation: str
    rescale: bool
    two: bool  # the KL's log-probs are at another temperature than the policy's


class Weighed(NamedTuple):
    """(5, N) rows and (3, N) marks as of the token_loss ops; weights (1 or 2, N): ∂loss/∂ℓ, and at the KL's τ."""

    rows: Tensor
    marks: Tensor
    weights: Tensor


def logprobs_of(statistics: Tensor, temperature: Tensor | float) -> Tensor:
    return (statistics[TARGET] - statistics[PEAK]) / temperature - statistics[LOG_TOTAL]


class TorchRows:
    """In PyTorch, a few rows at a time: any device and dtype; float64 for float64."""

    def __init__(self, settings: Settings, dtype: torch.dtype) -> None:
        self.settings = settings
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._buffers: tuple[Tensor, Tensor] | None = None

    def _block_rows(self, z: Tensor) -> int:
        return max(1, CACHE_BYTES // (z.shape[1] * self.dtype.itemsize))

    def _blocks(self, z: Tensor) -> Iterator[slice]:
        size = self._block_rows(z)
        for start in range(0, len(z), size):
            yield slice(start, start + size)

    def _temperature(self, rows: Rows, block: slice) -> Tensor | float:
        tau = self.temperature(rows)
        return tau[block, None] if isinstance(tau, Tensor) else tau

    def _capped(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """z and dz/dx of some rows, in our own memory or that of x if it has the dtype already."""
        x, cap = x.to(self.dtype), self.settings.softcap
        if not cap:
            return x, None
        t = torch.tanh(x / cap)
        return cap * t, 1 - t.square()

    def temperature(self, rows: Rows) -> Tensor | float:
        return self.settings.temperature if rows.temperature is None else rows.temperature.to(self.dtype)

    def score(self, z: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """ℓ (n,) and (5, n) statistics, 0 where a row does not count; z is only read."""
        return self._sweep(z, None, rows)

    def unit(self, z: Tensor, gradient: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The same, and ∂ℓ/∂x of every row into gradient, which may be z."""
        return self._sweep(z, gradient, rows)

    def _room(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Two reused buffers of the size of a block: fresh memory would cost as much as a pass over it."""
        size = min(self._block_rows(z), len(z))
        if self._buffers is None or len(self._buffers[0]) < size:
            self._buffers = tuple(torch.empty(size, z.shape[1], dtype=self.dtype, device=z.device) for _ in range(2))  # type: ignore
        return self._buffers  # type: ignore[return-value]

    def _sweep(self, logits: Tensor, gradient: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        s, n = self.settings, len(logits)
        found = torch.zeros(5, n, dtype=self.dtype, device=logits.device)
        for block in self._blocks(logits):
            z, slope = self._capped(logits[block])
            gap, p = (x[: len(z)] for x in self._room(logits))
            token, tau = rows.tokens[block, None].long().clamp(0, z.shape[1] - 1), self._temperature(rows, block)
            peak = z.amax(1, keepdim=True)
            found[PEAK, block], found[TARGET, block] = peak.squeeze(1), z.gather(1, token).squeeze(1)
            torch.sub(z, peak, out=gap)
            if s.two:
                found[LOG_TOTAL_KL, block] = torch.div(gap, s.kl_temperature, out=p).exp_().sum(1).log_()
            if isinstance(tau, Tensor) or tau != 1:
                gap /= tau
            gap.clamp_(min=LOWEST)
            torch.exp(gap, out=p)
            total = p.sum(1, keepdim=True)
            log_total = total.log()
            found[LOG_TOTAL, block] = log_total.squeeze(1)
            found[ENTROPY, block] = log_total.squeeze(1) - torch.linalg.vecdot(p, gap) / total.squeeze(1)
            if gradient is not None:
                scale = torch.as_tensor(1 / tau, dtype=self.dtype, device=z.device).expand_as(peak)
                self._write(p, -scale / total, scale, token, slope, gradient, rows, block)
        if not s.two:
            found[LOG_TOTAL_KL] = found[LOG_TOTAL]
        # A token that is none has no probability; with a vocabulary split over ranks it is another rank's.
        found[TARGET].masked_fill_((rows.tokens < 0) | (rows.tokens >= logits.shape[1]), torch.nan)
        logprobs = logprobs_of(found, self.temperature(rows))
        if rows.mask is not None:
            found.masked_fill_(~rows.mask, 0)
            logprobs.masked_fill_(~rows.mask, 0)
        return logprobs, found

    def mix(self, logits: Tensor, gradient: Tensor, statistics: Tensor, weights: Tensor, rows: Rows) -> None:
        """Σ w ∂ℓ/∂x over the temperatures into gradient, which may be the logits. weights: (1 or 2, n)."""
        s, size = self.settings, logits.shape[1]
        for block in self._blocks(logits):
            z, slope = self._capped(logits[block])
            gap, p = (x[: len(z)] for x in self._room(logits))
            torch.sub(z, statistics[PEAK, block, None], out=gap)
            local = (rows.tokens[block, None] >= 0) & (rows.tokens[block, None] < size)
            token, tau = rows.tokens[block, None].long().clamp(0, size - 1), self._temperature(rows, block)
            torch.div(gap, tau, out=p).sub_(statistics[LOG_TOTAL, block, None]).exp_()
            scaled = own = weights[0, block, None] / tau
            if s.two:
                p *= scaled
                scaled = weights[1, block, None] / s.kl_temperature
                gap.div_(s.kl_temperature).sub_(statistics[LOG_TOTAL_KL, block, None]).exp_()
                p.addcmul_(gap, scaled)
                own, scaled = own + scaled, torch.ones_like(own)
            self._write(p, -scaled, torch.where(local, own, 0), token, slope, gradient, rows, block)

    def _write(
        self, p: Tensor, factor: Tensor, own: Tensor, token: Tensor, slope: Tensor | None, gradient: Tensor, rows: Rows,
        block: slice,
    ) -> None:  # fmt: skip
        """factor p, plus own at each row's token, through the soft-cap, rounded once."""
        target = gradient[block]
        g = torch.mul(p, factor, out=target if target.dtype == self.dtype else p)
        g.scatter_add_(1, token, own)
        if slope is not None:
            g.mul_(slope)
        if rows.mask is not None:
            g.masked_fill_(~rows.mask[block, None], 0)
        if g is not target:
            target.copy_(g)

    def objective(
        self, logprobs: Tensor, statistics: Tensor, rows: Rows, lengths: Tensor, denominator: Tensor, count: int
    ) -> Weighed:
        """The reference's objective of these rows, and its derivatives written out."""
        s, layout = self.settings, Layout(count, rows.completion)
        keep = torch.ones_like(rows.completion, dtype=torch.bool) if rows.mask is None else rows.mask
        tau = self.temperature(rows)
        low = s.epsilon_low if rows.epsilon_low is None else rows.epsilon_low.to(self.dtype)
        high = s.epsilon_high if rows.epsilon_high is None else rows.epsilon_high.to(self.dtype)
        kl_logprobs = logprobs
        if s.two:
            gap = statistics[TARGET] - statistics[PEAK]
            kl_logprobs = (gap / s.kl_temperature - statistics[LOG_TOTAL_KL]).masked_fill(~keep, 0)
        assert rows.advantage is not None and rows.kl_beta is not None
        advantage, beta = (x.to(self.dtype).masked_fill(~keep, 0) for x in (rows.advantage, rows.kl_beta))
        old = None if rows.old_logprobs is None else rows.old_logprobs.to(self.dtype).masked_fill(~keep, 0)
        ref = None if rows.ref_logprobs is None else rows.ref_logprobs.to(self.dtype).masked_fill(~keep, 0)
        parts = reference.token_objective(
            logprobs, kl_logprobs, keep, layout, advantage=advantage, kl_beta=beta, old_logprobs=old,
            ref_logprobs=ref, importance_weight=rows.importance_weight, temperature=tau, epsilon_low=low,
            epsilon_high=high, delta=s.delta or None, importance_level="sequence" if s.sequence else "token",
            kl_estimator=f"k{s.estimator}", rescale_per_row=s.rescale,
        )  # fmt: skip
        c = -policy_slope(parts.ratio, advantage, low, high, s.delta or None)
        if rows.importance_weight is not None:
            c = c * rows.importance_weight.to(self.dtype).masked_fill(~keep, 0)
        if s.rescale:
            c = c * tau
        exponent = torch.zeros_like(logprobs) if old is None else logprobs - old
        if s.sequence:
            own = layout.sum(keep.to(self.dtype)).clamp(min=1)
            exponent = layout.spread(layout.sum(exponent) / own)
            c = layout.spread(layout.sum(c.masked_fill(~keep, 0)) / own)
        c = torch.where(exponent > reference.RATIO_EXPONENT_MAX, 0, c * parts.ratio)
        # On-policy the slope does not depend on ℓ, but a NaN of it must not get lost.
        c = torch.where(logprobs.isnan(), logprobs, c)
        c_kl = torch.zeros_like(c) if ref is None else beta * kl_slope(kl_logprobs, ref, s.estimator)
        share = reference.token_shares(lengths, layout, s.aggregation, denominator)
        weights = torch.stack([c, c_kl]) if s.two else (c + c_kl)[None]
        loss = torch.where(logprobs.isnan(), logprobs, parts.per_token)
        per_row = torch.stack([logprobs, statistics[ENTROPY], parts.kl, parts.ratio, loss * share])
        marks = torch.stack([parts.clipped_low, parts.clipped_high, parts.kl_clamped])
        return Weighed(per_row, marks, (weights * share).masked_fill(~keep, 0))

    def totals(
        self, rows: Tensor, marks: Tensor, mask: Tensor | None, completion: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, (B,) mean KL of each completion, (8,) totals."""
        counted = torch.ones_like(rows[0]) if mask is None else mask.to(rows.dtype)
        parts = Objective(rows[4], rows[2], rows[3], *marks)
        completion_kl, totals = reference.batch_totals(counted, Layout(count, completion), rows[1], parts)
        return rows[4].sum(), completion_kl, totals


def policy_slope(
    ratio: Tensor, advantage: Tensor, low: Tensor | float, high: Tensor | float, delta: float | None
) -> Tensor:
    """dJ/dρ of `reference.clipped_objective`: the unclipped branch where both are equal."""
    low, high = (torch.as_tensor(x, dtype=ratio.dtype, device=ratio.device) for x in (1 - low, 1 + high))
    inside = ratio.clamp(low, high)
    free = advantage if delta is None else torch.where(ratio > delta, 0, advantage)
    capped = ratio if delta is None else ratio.clamp(max=delta)
    return torch.where(
        inside * advantage < capped * advantage, torch.where(inside == ratio, advantage, 0), free
    )  # fmt: skip


def kl_slope(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    """∂KL/∂ℓ of `reference.kl_penalty`."""
    gap = ref_logprobs - logprobs
    if estimator == 1:
        return torch.where(gap.isnan(), gap, 1)
    if estimator == 2:
        return -gap
    return torch.where(gap > reference.KL_EXPONENT_MAX, 0, 1 - gap.clamp(max=reference.KL_EXPONENT_MAX).exp())


class KernelRows:
    """In the kernels of the fused ops; float32 arithmetic."""

    dtype = torch.float32
    # Modules that have launch_logprobs and launch_logprobs_backward, and launch_objective and launch_totals.
    logprobs: Any
    objectives: Any

    def __init__(self, settings: Settings, dtype: torch.dtype) -> None:
        self.settings = settings

    def _common(self, z: Tensor, rows: Rows) -> Any:
        # No map of completions and none of them counted: every knob is one per row.
        mask = None if rows.mask is None else rows.mask.view(torch.uint8)
        return z[None], rows.tokens, mask, None, 0, rows.temperature, self.settings.temperature

    def temperature(self, rows: Rows) -> Tensor | float:
        return self.settings.temperature if rows.temperature is None else rows.temperature

    def score(self, z: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        s = self.settings
        return self.logprobs.launch_logprobs(*self._common(z, rows), s.kl_temperature, s.softcap, s.two)

    def unit(self, z: Tensor, gradient: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return self.logprobs.launch_logprobs(
            *self._common(z, rows), 1.0, self.settings.softcap, False, gradient=gradient[None]
        )

    def mix(self, logits: Tensor, gradient: Tensor, statistics: Tensor, weights: Tensor, rows: Rows) -> None:
        s, grad_kl = self.settings, weights[1] if len(weights) > 1 else None
        self.logprobs.launch_logprobs_backward(
            weights[0], *self._common(logits, rows), s.softcap, statistics, grad_kl, s.kl_temperature, gradient[None]
        )

    def objective(
        self, logprobs: Tensor, statistics: Tensor, rows: Rows, lengths: Tensor, denominator: Tensor, count: int
    ) -> Weighed:
        s, mask, completion = self.settings, rows.mask, rows.completion
        rest: Any = rows[3:]
        found = self.objectives.launch_objective(
            statistics, logprobs, None if mask is None else mask.view(torch.uint8), completion, count, *rest,
            lengths, denominator, s[:5], s.sequence, s.estimator, s.aggregation == "grpo", s.rescale, s.two,
        )  # fmt: skip
        return Weighed(*found)

    def totals(
        self, rows: Tensor, marks: Tensor, mask: Tensor | None, completion: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        bytes_ = None if mask is None else mask.view(torch.uint8)
        return self.objectives.launch_totals(rows, marks, bytes_, completion, count)


class TritonRows(KernelRows):
    def __init__(self, settings: Settings, dtype: torch.dtype) -> None:
        from ...kernels.triton import logprobs, objective

        super().__init__(settings, dtype)
        self.logprobs, self.objectives = logprobs, objective


class CompiledRows(KernelRows):
    def __init__(self, settings: Settings, dtype: torch.dtype) -> None:
        from ...kernels import cpu

        super().__init__(settings, dtype)
        self.logprobs = self.objectives = cpu


Engine = TorchRows | KernelRows
ENGINES: dict[str, type[TorchRows] | type[KernelRows]] = {
    "torch": TorchRows,
    "triton": TritonRows,
    "cpu": CompiledRows,
    "cuda": TritonRows,  # csrc/cuda is for logits that are there whole
}
