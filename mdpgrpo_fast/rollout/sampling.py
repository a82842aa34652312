"""Sampling of a token a row: temperature per row, top-k, top-p and min-p, and the log-probs of what was drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import backends
from ..ops.logprobs import token_logprobs

BLOCK = 512  # tokens of a partial sum
# Elements worked on at once on the CPU, about what its cache holds.
CHUNK = 1 << 18
# Top-p alone sorts this many of a row's tokens before it tries more; a GPU sorts the row and spares itself the look.
CANDIDATES = 1024
NOISE = 2**53  # noise is below it: what a double tells apart in [0, 1)


def sample(
    logits: Tensor, temperature: Tensor | None, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One token a row, int64, its log-probs under what it was drawn from and under the policy, the log of the share of
    probability that truncation left, and a logit that tells what it left, float32: (R,) each.

    logits (R, V); temperature (R,) above 0, or None: the most likely token, whatever the truncation. The temperature
    comes first, then top-k, top-p (a token goes when those before it already hold top_p) and min-p, each on what is
    left and 0, 1 and 0 for none. Of equals at its border top-k takes any, so that k stay. NaN gives NaN log-probs.
    noise (R,): int64, uniform in [0, NOISE), from which alone the draw follows; None: from the device's generator.

    The share is log Σ p over the tokens that were left, at the row's temperature, 0 where nothing was cut: so the first
    log-prob is that of the whole distribution at this temperature less it. The logit is halfway between the smallest
    that was left and the largest that was not, so that logits that are rounded otherwise elsewhere stay on their side;
    -inf where nothing was cut. Where the two are equal, both are on its side.
    """
    vocab = logits.shape[1]
    truncated = temperature is not None and (0 < top_k < vocab or top_p < 1 or min_p > 0)
    backend = backends.choose("auto", logits.device, logits.dtype)
    if backend == "triton" and not truncated:
        from ..kernels.triton import library

        tokens, sampling, policy = library.sample(logits, temperature, noise)
        return tokens, sampling, policy, *_all_of(sampling)
    if temperature is not None and noise is None:
        noise = torch.randint(NOISE, (len(logits),), device=logits.device)
    if backend == "cpu":
        from ..kernels import cpu

        return cpu.sample(logits, temperature, (top_k, top_p, min_p), noise)
    if temperature is None:
        tokens = logits.argmax(1)
        policy = logprobs(logits, tokens, 1.0)
        return tokens, policy, policy, *_all_of(policy)
    assert noise is not None
    # In double: a float has too few values for the last tokens of a large vocabulary.
    u = noise.double() / NOISE
    if truncated:
        z, ids, logit_floor = _truncated(logits, temperature, top_k, top_p, min_p)
        p = z.softmax(1)
        place = draw(p, u)[:, None]
        tokens = (place if ids is None else ids.gather(1, place)).squeeze(1)
        sampling = z.log_softmax(1).gather(1, place).squeeze(1)
        # Of one and the same token, so that nothing has to be summed again; rounding must not make it a share above 1.
        log_kept = (logprobs(logits, tokens, temperature) - sampling).clamp(max=0)
    else:
        rows = max(1, CHUNK // vocab) if logits.device.type == "cpu" else len(logits)
        parts = zip(logits.split(rows), temperature[:, None].split(rows), u.split(rows), strict=True)
        tokens = torch.cat([draw((x.float() / tau).softmax(1), v) for x, tau, v in parts])
        sampling = logprobs(logits, tokens, temperature)
        log_kept, logit_floor = _all_of(sampling)
    return tokens, sampling, logprobs(logits, tokens, 1.0), log_kept, logit_floor


def _all_of(sampling: Tensor) -> tuple[Tensor, Tensor]:
    """The log of the share and the logit of rows of which nothing was cut."""
    return torch.zeros_like(sampling), torch.full_like(sampling, -torch.inf)


def logprobs(logits: Tensor, tokens: Tensor, temperature: Tensor | float) -> Tensor:
    # Tokens of these very rows are in range; to look would be a wait for the device.
    found, _ = token_logprobs(logits[:, None], tokens[:, None], temperature=temperature, check_values=False)
    return found.squeeze(1).float()


def draw(p: Tensor, u: Tensor) -> Tensor:
    """The first place (R,) of each row of p (R, C) where its cumulative sum exceeds u (R,) of the row's total.

    p float32 at least 0, u float64 in [0, 1). Partial sums of blocks first, then the sums inside one block.
    """
    whole = p.shape[1] // BLOCK * BLOCK
    sums = p[:, :whole].unflatten(1, (-1, BLOCK)).sum(2).double()
    if whole < p.shape[1]:
        sums = torch.cat([sums, p[:, whole:].sum(1, keepdim=True).double()], 1)
    block, rest = _first_over(sums, u)
    places = block[:, None] * BLOCK + torch.arange(BLOCK, device=p.device)
    inside = p.gather(1, places.clamp(max=p.shape[1] - 1)).double() * (places < p.shape[1])
    return block * BLOCK + _first_over(inside, rest)[0]


def _first_over(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The place (R,) where the running sum of w (R, C) exceeds u of the whole, and which share of that place u is."""
    running = w.cumsum(1)
    # Below 1 also after rounding, so that a place of probability 0 is never the first to exceed.
    target = u.clamp(max=1 - 2**-53) * running[:, -1]
    place = (running <= target[:, None]).sum(1)
    own = w.gather(1, place[:, None]).squeeze(1)
    before = running.gather(1, place[:, None]).squeeze(1) - own
    return place, ((target - before) / own).clamp(min=0)


def _truncated(
    logits: Tensor, temperature: Tensor, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """z = logits / temperature of the tokens that may be left, -inf where one is not; their ids, None for all tokens;
    the logit (R,) between those that are left and the others.

    The first two (R, C), the most likely first where there are ids.
    """
    tau = temperature[:, None]
    ids: Tensor | None = None
    values, next_one = logits, None
    if 0 < top_k < logits.shape[1]:
        # And the first that top-k does not keep.
        values, ids = logits.topk(top_k + 1)
        next_one = values[:, top_k]
        values, ids = values[:, :top_k], ids[:, :top_k]
        z = values.float() / tau
        log_total = z.logsumexp(1, keepdim=True)
    elif top_p < 1:
        values, z, ids, log_total = _most_likely(logits, temperature, top_p)
    else:
        z = logits.float() / tau
    if top_p < 1:
        p = (z - log_total).exp()
        z = z.masked_fill(p.cumsum(1) - p >= top_p, -torch.inf)
    if min_p > 0:
        z = z.masked_fill(z < z.amax(1, keepdim=True) + math.log(min_p), -torch.inf)
    values, cut = values.float(), z == -torch.inf
    largest_cut = values.where(cut, -torch.inf).amax(1)
    if next_one is not None:
        largest_cut = torch.maximum(largest_cut, next_one.float())
    return z, ids, (values.where(~cut, torch.inf).amin(1) + largest_cut) / 2


def _most_likely(logits: Tensor, temperature: Tensor, top_p: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, z and ids (R, C) of enough of each row's most likely tokens that top_p is held before the last, and
    log Σ exp z (R, 1) of all."""
    vocab, tau = logits.shape[1], temperature[:, None]
    size = min(CANDIDATES, vocab) if logits.device.type == "cpu" else vocab
    while True:
        values, ids = logits.topk(size) if size < vocab else logits.sort(descending=True)
        z = values.float() / tau
        log_total = z[:, :1] - logprobs(logits, ids[:, 0], temperature)[:, None]
        if size == vocab or bool(((z - log_total).exp()[:, :-1].sum(1) >= top_p).all()):
            return values, z, ids, log_total
        size = min(8 * size, vocab)
