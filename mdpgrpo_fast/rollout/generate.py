"""Completions of prompts: all rows in one batch, each at its own temperature, with the log-probs of what was drawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..kernels import onednn
from .decoding import Decoder
from .loop import Steps, complete
from .record import Sampling


@dataclass(frozen=True)
class Rollout:
    """B completions. prompt_ids (B, S) left-padded, tokens (B, L) right-padded, L the longest completion."""

    prompt_ids: Tensor
    prompt_mask: Tensor  # (B, S) bool
    tokens: Tensor
    lengths: Tensor  # (B,) tokens up to and including eos
    finished: Tensor  # (B,) bool: an eos was sampled; False: cut at the length limit
    temperature: Tensor  # (B,) float, 0 for greedy
    sampling_logprobs: Tensor  # (B, L) float under the distribution drawn from: temperature and truncation applied
    policy_logprobs: Tensor  # (B, L) float under the policy at temperature 1, untruncated
    log_kept: Tensor  # (B, L) float, log of the probability that truncation kept at the row's temperature; NaN: unknown

    @property
    def mask(self) -> Tensor:
        """(B, L) bool, true on the completion's own tokens; from lengths, never from comparing with pad."""
        return torch.arange(self.tokens.shape[1], device=self.lengths.device) < self.lengths[:, None]

    @cached_property
    def rows(self) -> list[list[int]]:
        """Token ids of each completion, up to and including eos; brought from the device once."""
        return [t[:n] for t, n in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]


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


def check_prompts(prompts: list[list[int]]) -> None:
    """Raises ValueError where there is no prompt, or an empty one."""
    if not prompts or not all(prompts):
        got = f"an empty row {prompts.index([])}" if prompts else "no row"
        raise ValueError(f"prompts must be lists of token ids, at least one and none empty; got {got}")


def left_pad(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, S) padded on the left, and their bool mask."""
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
    num_generations: int = 1,
    steps: Steps = "auto",
) -> Rollout:
    """Draw num_generations completions of each of P prompts in one batch: B = P * num_generations rows.

    model: a causal language model of transformers, or a PeftModel around one; called as it is, so that hooks of wrapped
        modules run, and without its generation settings.
    prompts: token ids; each different one is prefilled once, also where it is given several times.
    steps: "auto": on a GPU captured in CUDA graphs, where the model's can be, else as "eager", the model as it is.
    temperature: of each row, the rows of a prompt next to each other; None: all rows greedily.

    Raises: ValueError where a prompt is empty, num_generations or max_new_tokens is below 1, temperature is not one
        number above 0 for each row, or the model cannot be used; FloatingPointError where a log-prob is not finite.
    """
    check_prompts(prompts)
    for name, value in (("num_generations", num_generations), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    rows = [p for p in prompts for _ in range(num_generations)]
    if temperature is not None and (len(temperature) != len(rows) or not all(tau > 0 for tau in temperature)):
        raise ValueError(
            f"temperature must be None (greedy) or one number above 0 for each of the {len(rows)} rows; "
            f"got {temperature!r}"
        )
    device = model.device
    place = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, rows)))}
    origin = torch.tensor([place[tuple(p)] for p in rows], device=device)
    ids, mask = left_pad([list(p) for p in place], eos[0], device)
    tau = None if temperature is None else torch.tensor(temperature, dtype=torch.float32, device=device)
    ends = torch.tensor(eos, device=device)
    with onednn.packed(model):
        sampling = Sampling(tau, (top_k, top_p, min_p))
        done = complete(Decoder(model, ids, mask, origin), sampling, ends, max_new_tokens, steps)
    if not bool(done.sampling_logprobs.isfinite().all()):
        row = int((~done.sampling_logprobs.isfinite()).any(1).int().argmax())
        raise FloatingPointError(f"the model's logits must be finite; those of row {row} are not")
    return Rollout(
        prompt_ids=ids[origin],
        prompt_mask=mask[origin],
        temperature=torch.zeros(len(rows), device=device) if tau is None else tau,
        log_kept=torch.full_like(done.sampling_logprobs, 0.0 if (top_k, top_p, min_p) == (0, 1.0, 0.0) else torch.nan),
        **vars(done),
    )


def decode(rollout: Rollout, tokenizer: Any, skip_special_tokens: bool = True) -> list[str]:
    """The completions as text."""
    return tokenizer.batch_decode(rollout.rows, skip_special_tokens=skip_special_tokens)
