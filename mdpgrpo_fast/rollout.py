"""Sampling: one generate call for all rows, each row at its own temperature, what was sampled recorded with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .config import ConfigError


@dataclass(frozen=True)
class Rollout:
    """N completions. prompt_ids (N, S) left-padded, tokens (N, L) right-padded, L the longest completion."""

    prompt_ids: Tensor
    prompt_mask: Tensor  # (N, S) bool
    tokens: Tensor
    lengths: Tensor  # (N,) tokens up to and including eos
    finished: Tensor  # (N,) bool: an eos was sampled; False: cut at the length limit
    temperature: Tensor  # (N,) float, 0 for greedy
    sampling_logprobs: Tensor  # (N, L) float under the distribution drawn from: temperature and truncation applied
    policy_logprobs: Tensor  # (N, L) float under the policy at temperature 1, untruncated

    @property
    def mask(self) -> Tensor:
        """(N, L) bool, true on the completion's own tokens; from lengths, never from comparing with pad."""
        return torch.arange(self.tokens.shape[1], device=self.lengths.device) < self.lengths[:, None]


class RowSampler(LogitsProcessor):
    """Temperature per row, then top-k, top-p and min-p; records the log-probs of the tokens that were drawn."""

    def __init__(self, temperature: Tensor, top_k: int, top_p: float, min_p: float) -> None:
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.sampling: list[Tensor] = []
        self.policy: list[Tensor] = []
        self._pending: tuple[Tensor, Tensor] | None = None

    def record(self, drawn: Tensor) -> None:
        """Gather the pending step's log-probs of the drawn tokens (N,)."""
        if self._pending is not None:
            sampling, policy = self._pending
            self.sampling.append(sampling.gather(1, drawn[:, None]).squeeze(1))
            self.policy.append(policy.gather(1, drawn[:, None]).squeeze(1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.record(input_ids[:, -1])
        policy = scores.float().log_softmax(-1)
        sampling = self._truncate(policy / self.temperature[:, None]).log_softmax(-1)
        self._pending = sampling, policy
        return sampling

    def _truncate(self, x: Tensor) -> Tensor:
        if 0 < self.top_k < x.shape[1]:
            x = x.masked_fill(x < x.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p < 1:
            order = x.sort(descending=True)
            p = order.values.softmax(-1)
            # A token goes when those before it already hold top_p; the first always stays.
            drop = p.cumsum(-1) - p >= self.top_p
            x = x.masked_fill(torch.zeros_like(drop).scatter(1, order.indices, drop), -torch.inf)
        if self.min_p > 0:
            p = x.softmax(-1)
            x = x.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), -torch.inf)
        return x


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """All end-of-sequence ids: the tokenizer's, and those of the model's settings that are its special tokens.

    (A configuration that names none still has its class's default id, which may be an ordinary token.)

    Raises: ConfigError where the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token (eos_token)")
    ids = {tokenizer.eos_token_id}
    for source in (model.config, model.generation_config):
        eos = getattr(source, "eos_token_id", None)
        named = eos if isinstance(eos, (list, tuple)) else [eos]
        ids.update(i for i in named if i in tokenizer.added_tokens_decoder)
    return sorted(ids)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """generate() fills unset options from the model's own settings (repetition penalties, top-k): not in here."""
    saved, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = saved


def left_pad(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (N, S) padded on the left, and their bool mask."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


@torch.no_grad()
def generate(
    model: Any,
    prompts: list[list[int]],
    *,
    temperature: list[float] | None,
    eos: list[int],
    max_new_tokens: int,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Rollout:
    """Draw one completion per prompt in one call; row i at temperature[i], or all greedily where it is None.

    prompts: token ids of each row (repeat a prompt for a group). Tokens, lengths, finish reasons and log-probs under
    both the sampling distribution and the policy at temperature 1 are recorded.

    Raises: ValueError where a prompt is empty or temperature is not one number above 0 for each prompt.
    """
    if not prompts or not all(prompts):
        got = f"an empty row {prompts.index([])}" if prompts else "no row"
        raise ValueError(f"prompts must be lists of token ids, at least one and none empty; got {got}")
    if temperature is not None and (len(temperature) != len(prompts) or not all(tau > 0 for tau in temperature)):
        raise ValueError(
            f"temperature must be None (greedy) or one number above 0 for each of the {len(prompts)} prompts; "
            f"got {temperature!r}"
        )
    device, pad = model.device, eos[0]
    ids, mask = left_pad(prompts, pad, device)
    greedy = temperature is None
    tau = torch.tensor(temperature or [1.0] * len(prompts), device=device)
    sampler = RowSampler(tau, *(0, 1.0, 0.0) if greedy else (top_k, top_p, min_p))
    with _plain_generation(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            generation_config=GenerationConfig(
                do_sample=not greedy,
                temperature=None if greedy else 1.0,
                top_k=None if greedy else 0,
                top_p=None if greedy else 1.0,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos,
                pad_token_id=pad,
            ),
            logits_processor=LogitsProcessorList([sampler]),
        )
    sampler.record(out[:, -1])
    tokens = out[:, ids.shape[1] :]
    is_eos = torch.isin(tokens, torch.tensor(eos, device=device))
    finished, width = is_eos.any(1), tokens.shape[1]
    lengths = torch.where(finished, is_eos.int().argmax(1) + 1, width)
    return Rollout(
        prompt_ids=ids,
        prompt_mask=mask,
        tokens=tokens,
        lengths=lengths,
        finished=finished,
        temperature=torch.zeros_like(tau) if greedy else tau,
        # generate() may take a step more than it returns: it looks one step late on devices where looking is slow.
        sampling_logprobs=torch.stack(sampler.sampling[:width], 1),
        policy_logprobs=torch.stack(sampler.policy[:width], 1),
    )


def decode(rollout: Rollout, tokenizer: Any) -> list[str]:
    """The completions as text, without special tokens."""
    rows = [t[:n] for t, n in zip(rollout.tokens.tolist(), rollout.lengths.tolist(), strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
