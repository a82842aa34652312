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
from ...config import MDPGRPOConfig
from ...kernels.schemas import AGGREGATION, ESTIMATORS, LOSSES, NUM_STATISTICS, Rows, Settings
from ...reference import Layout, Objective
from ..backends import library

PEAK, LOG_TOTAL, ENTROPY, LOG_TOTAL_KL, TARGET = range(NUM_STATISTICS)
# The torch backend works on as many rows at once as stay in a core's cache.
CACHE_BYTES = 4 << 20
# exp of it is 0; its product with 0 is 0, which that of -inf is not.
LOWEST = -1e5


class Weighed(NamedTuple):
    """(5, N) rows and (3, N) marks as of the token_loss ops; weights (1 to 3, N): ∂loss/∂ℓ, where there are two
    temperatures at the KL's τ, and where there is an entropy bonus -∂loss/∂H."""

    per_row: Tensor
    marks: Tensor
    weights: Tensor


def logprobs_of(statistics: Tensor, temperature: Tensor | float) -> Tensor:
    return (statistics[TARGET] - statistics[PEAK]) / temperature - statistics[LOG_TOTAL]


def config_of(settings: Settings) -> MDPGRPOConfig:
    """Choices of the token objective under the names that the reference knows them by."""
    s = settings
    names: dict[str, Any] = {
        "loss": LOSSES[s.loss],
        "importance_level": "sequence" if s.sequence else "token",
        "kl_estimator": ESTIMATORS[s.estimator - 1],
        "kl_gradient": "unbiased" if s.unbiased_kl else "plain",
    }
    kinds = ("sapo_temperature", "vespo_k", "vespo_lambda")
    numbers = [f"{kind}_{sign}" for kind in kinds for sign in ("pos", "neg")]
    return MDPGRPOConfig(
        temperature_objective="per_row", rescale_per_row=bool(s.rescale),
        off_policy_threshold=s.off_policy_threshold if s.masks_off_policy else None, **names,
        **{name: getattr(s, name) for name in numbers},
    )  # fmt: skip


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
        found = torch.zeros(NUM_STATISTICS, n, dtype=self.dtype, device=logits.device)
        for block in self._blocks(logits):
            z, slope = self._capped(logits[block])
            gap, p = (x[: len(z)] for x in self._room(logits))
            token, tau = rows.tokens[block, None].long().clamp(0, z.shape[1] - 1), self._temperature(rows, block)
            peak = z.amax(1, keepdim=True)
            found[PEAK, block], found[TARGET, block] = peak.squeeze(1), z.gather(1, token).squeeze(1)
            torch.sub(z, peak, out=gap)
            if s.two_temperatures:
                found[LOG_TOTAL_KL, block] = torch.div(gap, s.kl_temperature, out=p).exp_().sum(1).log_()
            self._leave_support(gap, z, found[TARGET, block], rows, block)
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
        if not s.two_temperatures:
            found[LOG_TOTAL_KL] = found[LOG_TOTAL]
        # A token that is none has no probability; with a vocabulary split over ranks it is another rank's.
        found[TARGET].masked_fill_((rows.tokens < 0) | (rows.tokens >= logits.shape[1]), torch.nan)
        logprobs = logprobs_of(found, self.temperature(rows))
        if rows.mask is not None:
            found.masked_fill_(~rows.mask, 0)
            logprobs.masked_fill_(~rows.mask, 0)
        return logprobs, found

    def _leave_support(self, x: Tensor, z: Tensor, target: Tensor, rows: Rows, block: slice) -> None:
        """x = LOWEST where a logit is under the row's floor and under its token's own."""
        if rows.logit_floor is not None:
            floor = torch.minimum(rows.logit_floor[block].to(self.dtype), target)
            x.masked_fill_(z < floor[:, None], LOWEST)

    def mix(self, logits: Tensor, gradient: Tensor, statistics: Tensor, weights: Tensor, rows: Rows) -> None:
        """Σ w ∂ℓ/∂x over the temperatures, and the entropy bonus, into gradient, which may be the logits.

        weights: (1 to 3, n), as of Weighed.
        """
        s, size = self.settings, logits.shape[1]
        bonus = weights[1 + s.two_temperatures] if len(weights) > 1 + s.two_temperatures else None
        for block in self._blocks(logits):
            z, slope = self._capped(logits[block])
            gap, p = (x[: len(z)] for x in self._room(logits))
            torch.sub(z, statistics[PEAK, block, None], out=gap)
            local = (rows.tokens[block, None] >= 0) & (rows.tokens[block, None] < size)
            token, tau = rows.tokens[block, None].long().clamp(0, size - 1), self._temperature(rows, block)
            torch.div(gap, tau, out=p).sub_(statistics[LOG_TOTAL, block, None])
            self._leave_support(p, z, statistics[TARGET, block], rows, block)
            scaled = own = weights[0, block, None] / tau
            if bonus is not None:
                # -∂H/∂x = p (log p + H) / τ: p times another factor than the one of ∂ℓ/∂x.
                factor = p.clamp(min=LOWEST).add_(statistics[ENTROPY, block, None]).mul_(bonus[block, None] / tau)
                p.exp_().mul_(scaled - factor)
                scaled = torch.ones_like(scaled)
            else:
                p.exp_()
            if s.two_temperatures:
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
        self, logprobs: Tensor, statistics: Tensor, rows: Rows, lengths: Tensor, denominator: Tensor,
        num_completions: int,
    ) -> Weighed:  # fmt: skip
        """The reference's objective of these rows, and its derivatives written out."""
        s, layout = self.settings, Layout(num_completions, rows.completion)
        keep = torch.ones_like(rows.completion, dtype=torch.bool) if rows.mask is None else rows.mask
        members = rows._asdict().items()
        known = ("tokens", "mask", "completion", "logit_floor")
        given: Any = {n: self._value(n, x, keep) for n, x in members if n not in known}
        kl_logprobs = logprobs
        if s.two_temperatures:
            gap = statistics[TARGET] - statistics[PEAK]
            kl_logprobs = (gap / s.kl_temperature - statistics[LOG_TOTAL_KL]).masked_fill(~keep, 0)
        config = config_of(s)
        parts = reference.token_objective(
            logprobs, kl_logprobs, statistics[ENTROPY], keep, layout, config, **given
        )  # fmt: skip
        c = self._policy_slope(logprobs, parts, given, keep, layout, config)
        c_kl = torch.zeros_like(c)
        if given["ref_logprobs"] is not None:
            c_kl = given["kl_beta"] * reference.kl_penalty_slope(
                kl_logprobs, given["ref_logprobs"], config.kl_estimator
            )
            if s.unbiased_kl:
                c_kl = c_kl * parts.kl_ratio
        share = reference.token_shares(lengths, layout, AGGREGATION[s.aggregation], denominator)
        weights = [c, c_kl] if s.two_temperatures else [c + c_kl]
        if s.has_bonus(rows):
            weights.append(parts.gate.to(self.dtype) * given["entropy_coef"])
        per_row = torch.stack([logprobs, statistics[ENTROPY], parts.kl, parts.ratio, parts.per_token * share])
        marks = torch.stack([parts.clipped_low, parts.clipped_high, parts.kl_clamped])
        return Weighed(per_row, marks, (torch.stack(weights) * share).masked_fill(~keep, 0))

    def _policy_slope(
        self, logprobs: Tensor, parts: Objective, given: dict[str, Any], keep: Tensor, layout: Layout,
        config: MDPGRPOConfig,
    ) -> Tensor:  # fmt: skip
        """∂loss/∂ℓ of a row through everything but the KL's own ℓ, without the share of the aggregation."""
        s, mask, advantage = self.settings, keep.to(self.dtype), given["advantage"]
        bounds = {n: given[n] for n in ("epsilon_low", "epsilon_high")}
        old = given["old_logprobs"]
        log_ratio = torch.zeros_like(logprobs) if old is None else (logprobs - old).masked_fill(~keep, 0)
        exponent = layout.mean(log_ratio, mask) if s.sequence else log_ratio
        name, w = config.loss, parts.weight
        # Per row: what does not go through ρ, and dloss/dlog ρ.
        direct, through = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
        if name == "cispo":
            direct = -w * reference.cispo_weight(parts.ratio, **bounds) * advantage
        elif name == "vespo":
            weight = given["importance_weight"]
            log_weight = reference.vespo_log_weight(log_ratio, weight, mask, layout)
            direct = -w * reference.vespo_weight(log_weight, advantage, config) * advantage
        elif name == "sapo":
            through = -w * reference.sapo_gate_slope(parts.ratio, advantage, config) * advantage * parts.ratio
        elif name == "gmpo":
            bounded, low, high = reference.gmpo_log_ratios(log_ratio, advantage, **bounds)
            exponent = layout.mean(bounded.masked_fill(~keep, 0), mask)
            through = layout.mean((-w * advantage * parts.ratio).masked_fill(~keep, 0), mask).masked_fill(low | high, 0)
        else:
            slope = reference.clipped_objective_slope(parts.ratio, advantage, delta=given["delta"], **bounds)
            through = -w * slope * parts.ratio
        is_over = exponent > reference.RATIO_EXPONENT_MAX
        kl_through = torch.zeros_like(logprobs)
        if s.unbiased_kl and given["ref_logprobs"] is not None:
            kl_through = given["kl_beta"] * parts.kl
        if s.sequence:
            through, kl_through = (layout.mean(x.masked_fill(~keep, 0), mask) for x in (through, kl_through))
        kl_exponent = exponent if name != "gmpo" else log_ratio
        kl_through = kl_through.masked_fill(kl_exponent > reference.RATIO_EXPONENT_MAX, 0)
        c = direct + through.masked_fill(is_over, 0) + kl_through
        # As `reference.token_objective` has it of ℓ that is -inf or NaN.
        return torch.where(logprobs > -torch.inf, c, torch.nan)

    def _value(self, name: str, x: Tensor | None, keep: Tensor) -> Tensor | float | None:
        """A member of rows, 0 where a row is not kept; the number of the settings, or None, where it is not given."""
        if x is None:
            return getattr(self.settings, name, None)
        x = x.to(self.dtype)
        # Bounds and temperatures are divided by and compared with, also where no one looks.
        return x if name in Settings._fields else x.masked_fill(~keep, 0)

    def totals(self, per_row: Tensor, marks: Tensor, rows: Rows, num_completions: int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, (B,) mean KL of each completion, (8,) totals."""
        counted = torch.ones_like(per_row[0]) if rows.mask is None else rows.mask.to(per_row.dtype)
        layout = Layout(num_completions, rows.completion)
        completion_kl, totals = reference.batch_totals(counted, layout, per_row[1], per_row[2], per_row[3], *marks)
        return per_row[4].sum(), completion_kl, totals


class KernelRows:
    """In the kernels of a backend of the fused ops; float32 arithmetic."""

    dtype = torch.float32

    def __init__(self, settings: Settings, backend: str) -> None:
        self.settings, self.launch = settings, library(backend).LAUNCHERS

    def temperature(self, rows: Rows) -> Tensor | float:
        return self.settings.temperature if rows.temperature is None else rows.temperature

    def score(self, z: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        known = _without_completions(rows), self.settings, 0
        found: tuple[Tensor, Tensor] = self.launch.logprobs(z[None], *known, **self.launch.options(z))
        return found

    def unit(self, z: Tensor, gradient: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        known = _without_completions(rows), self.settings._replace(two_temperatures=0), 0, gradient[None]
        found: tuple[Tensor, Tensor] = self.launch.logprobs(z[None], *known, **self.launch.options(z))
        return found

    def mix(self, logits: Tensor, gradient: Tensor, statistics: Tensor, weights: Tensor, rows: Rows) -> None:
        two = self.settings.two_temperatures
        bonus = {"grad_entropy": weights[1 + two]} if len(weights) > 1 + two else {}
        self.launch.logprobs_backward(
            logits[None], weights[0], _without_completions(rows), self.settings, 0, statistics,
            weights[1] if two else None, gradient[None], **bonus, **self.launch.options(logits),
        )  # fmt: skip

    def objective(
        self, logprobs: Tensor, statistics: Tensor, rows: Rows, lengths: Tensor, denominator: Tensor,
        num_completions: int,
    ) -> Weighed:  # fmt: skip
        given = statistics, logprobs, _with_bytes(rows), self.settings, lengths, denominator, num_completions
        return Weighed(*self.launch.objective(*given))

    def totals(self, per_row: Tensor, marks: Tensor, rows: Rows, num_completions: int) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = self.launch.totals(per_row, marks, _with_bytes(rows), num_completions)
        return found


def _with_bytes(rows: Rows) -> Rows:
    return rows if rows.mask is None else rows._replace(mask=rows.mask.view(torch.uint8))


def _without_completions(rows: Rows) -> Rows:
    """Without their completions, none of which is counted: every knob is one per row."""
    return _with_bytes(rows)._replace(completion=None)


Engine = TorchRows | KernelRows


def engine_for(backend: str, settings: Settings, dtype: torch.dtype) -> Engine:
    """dtype: of the logits. csrc/cuda is for logits that are there whole: `cuda` has Triton's kernels here."""
    return TorchRows(settings, dtype) if backend == "torch" else KernelRows(settings, backend)
