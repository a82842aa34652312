"""Log-probabilities of given tokens and the entropy of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..config import Backend
from ..kernels.schemas import Rows
from ..reference import Layout
from . import fused
from .backends import choose
from .checks import check_flags, check_rows, check_tensor
from .overwritten import refuse_overwritten


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    completion: Tensor | None = None,
    num_completions: int | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_floor: Tensor | None = None,
    check_values: bool | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens, differentiable, and the detached entropy in nats; each of the shape of tokens.

    logits (B, L, V), or (T, V); tokens, mask, temperature, softcap, logit_floor, check_values and backend as in
    `token_loss`; masked rows give 0 and cost no read. A temperature of one value per completion needs `completion`
    (T,) for packed rows. A token of logit -inf has ℓ = -inf; rows with +inf or NaN, or of -inf alone, have NaN.
    Raises as `token_loss` does.
    """
    check_tensor("logits", logits)
    check_flags(check_values=check_values)
    if logits.ndim == 2 and completion is None:
        # Without a map every row is its own completion.
        completion, num_completions = torch.arange(len(logits), device=logits.device), len(logits)
    rows = Rows(tokens, mask, completion, temperature=temperature, logit_floor=logit_floor)
    _, num_completions = check_rows(logits, rows, num_completions, softcap, check_values)
    refuse_overwritten(logits)
    name = choose(backend, logits.device, logits.dtype)
    if name != "torch":
        return fused.token_logprobs(name, logits, rows, num_completions, softcap)
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tau = Layout(num_completions, completion).knob(temperature, real)
    if mask is None:
        return reference.token_logprobs(logits, tokens, tau, softcap, logit_floor=logit_floor)
    keep = mask != 0
    logprobs, entropy = reference.token_logprobs(
        logits.masked_fill(~keep[..., None], 0), tokens, tau, softcap, logit_floor=logit_floor
    )
    return logprobs.masked_fill(~keep, 0), entropy.masked_fill(~keep, 0)
