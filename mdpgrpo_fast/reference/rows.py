"""Rows of logits: whose they are, their log-probs and entropy, and the head that logits come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which completion a row belongs to: rows (B, L) of B completions, or rows (T,) with a map to them."""

    num_completions: int  # B
    completion: Tensor | None = None  # (T,) integers

    def sum(self, x: Tensor) -> Tensor:
        """Sum over each completion's rows: (B,)."""
        if self.completion is None:
            return x.sum(1)
        return x.new_zeros(self.num_completions).index_add(0, self.completion, x)

    def mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """Mean over each completion's rows of which mask is 1, x 0 elsewhere, as it broadcasts over the rows."""
        return self.broadcast(self.sum(x) / self.sum(mask).clamp(min=1))

    def broadcast(self, x: Tensor) -> Tensor:
        """One value per completion (B,), as it broadcasts over the rows."""
        return x[:, None] if self.completion is None else x[self.completion]

    def knob(self, x: Tensor | float, dtype: torch.dtype) -> Tensor | float:
        """A number, one value per completion (B,) or one per row, as it broadcasts over the rows; detached."""
        if not isinstance(x, Tensor):
            return x
        x = x.detach().to(dtype)
        return self.broadcast(x) if tuple(x.shape) == (self.num_completions,) else x


def as_float(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


def scaled_logits(logits: Tensor, temperature: Tensor | float, softcap: float | None) -> Tensor:
    """Soft-cap, then division by the temperature: a number, or a tensor that broadcasts over the rows (..., V)."""
    x = as_float(logits)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if isinstance(temperature, Tensor):
        return x / temperature.to(x.dtype)[..., None]
    return x if temperature == 1 else x / temperature


def token_logprobs(
    logits: Tensor, tokens: Tensor, temperature: Tensor | float = 1.0, softcap: float | None = None,
    entropy_gradient: bool = False, logit_floor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ℓ = log softmax(x/τ)[token] and the entropy of each row's distribution, detached but with entropy_gradient.

    logits (..., V), tokens (...); temperature: a number, or a tensor that broadcasts over the rows. logit_floor (...):
    the softmax is over a support, the logits (after the soft-cap) that are not under it, nor under the token's own.

    ℓ of a token whose logit is -inf is -inf. A row that has +inf or NaN, or nothing but -inf, is no distribution: NaN.
    """
    x = scaled_logits(logits, temperature, softcap)
    if logit_floor is not None:
        with torch.no_grad():
            z = scaled_logits(logits, 1.0, softcap)
            floor = torch.minimum(logit_floor.to(z.dtype)[..., None], z.gather(-1, tokens[..., None].long()))
            outside = z < floor
        x = x.masked_fill(outside, -torch.inf)
    lse = x.logsumexp(-1)
    lse = lse * torch.where(lse == torch.inf, torch.nan, 1.0).to(lse.dtype)  # no distribution, and no ℓ of -inf
    target = x.gather(-1, tokens[..., None].long()).squeeze(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        p = (x - lse[..., None]).exp()
        # p * x with x = -inf is 0 in the limit, NaN in arithmetic.
        entropy = lse - (p * x.masked_fill(p == 0, 0)).sum(-1)
    return target - lse, entropy


def entropy_quantile(entropy: Tensor, keep: Tensor, share: float) -> Tensor:
    """(): the entropy that the `share` of the kept rows with the most of it reach: torch.quantile's at 1 - share.

    Of no kept row 0. Nothing waits for the device, and there may be any number of rows.
    """
    rows = entropy.detach().masked_fill(~keep, -torch.inf).flatten().sort().values
    if not len(rows):
        return entropy.new_zeros(())
    n = keep.sum()
    place = len(rows) - n + (1 - share) * (n - 1).clamp(min=0).to(torch.float64)
    low = place.floor().clamp(max=len(rows) - 1).long()
    # Not by indexing, which would look at the index.
    below, above = rows.gather(0, torch.stack([low, (low + 1).clamp(max=len(rows) - 1)])).unbind()
    return torch.where(n == 0, 0, torch.lerp(below, above, (place - low).to(rows.dtype)))


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, logit_scale: float = 1.0) -> Tensor:
    """(..., V) = logit_scale (hidden (..., D) weightᵀ (V, D) + bias (V,)): what `linear_token_loss` never builds."""
    return logit_scale * torch.nn.functional.linear(hidden, weight, bias)
