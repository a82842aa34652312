"""Completions of prompts: all rows in one batch, each at its own temperature, with the log-probs of what was drawn."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..kernels import onednn
from ..log import say_once
from .decoding import Decoder
from .loop import Steps, complete
from .processors import Processors
from .record import Sampling

# Model types whose answers depend on the padding whatever the mask says. A pad id with a zero embedding does not help:
# RecurrentGemma's layers have biases, and its convolution reaches back over what they made of it. RWKV takes no mask;
# MiniMax's linear attention applies it to its state at each step.
RUN_THROUGH_PADDING = {"recurrent_gemma", "rwkv", "minimax"}


@dataclass(frozen=True)
class Rollout:
    """B completions. prompt_ids (B, S) left-padded, tokens (B, L) right-padded, L the longest completion.

    log_kept tells what truncation did to the distribution: with ℓ the policy's log-prob of a token at the row's
    temperature, the truncated policy's is ℓ - log_kept, which is what the token was drawn from. The weight of
    `temperature_objective = corrected`, exp(policy - sampling), is exact for the tokens inside the truncation's
    support, and those are the ones that were drawn; what lies outside of it no weight brings back. With logits
    processors ℓ is of the logits that they made, and policy_logprobs are still of the model's own.

    logit_floor tells which tokens truncation kept, for `token_loss` and its like: those whose logit is not under it,
    before the temperature. It lies halfway to the largest that was not kept. With logits processors it is not known
    where something was cut: it would be of the logits that they made.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor  # (B, S) bool
    tokens: Tensor
    lengths: Tensor  # (B,) tokens up to and including eos
    finished: Tensor  # (B,) bool: an eos was sampled; False: cut at the length limit
    temperature: Tensor  # (B,) float, 0 for greedy
    sampling_logprobs: Tensor  # (B, L) float under what was drawn from: processors, temperature, truncation
    policy_logprobs: Tensor  # (B, L) float under the policy at temperature 1, untruncated
    log_kept: Tensor  # (B, L) float, log of the probability that top-k, top-p and min-p kept, 0: all; NaN: not known
    logit_floor: Tensor  # (B, L) float, -inf: they kept all; NaN: not known

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


def pad_id(model: Any, tokenizer: Any = None) -> int | None:
    """What to pad prompts with: the tokenizer's pad id, else the model's; one that the model cannot embed is none."""
    text = model.config.get_text_config()
    for pad in (getattr(tokenizer, "pad_token_id", None), getattr(text, "pad_token_id", None)):
        if pad is not None and 0 <= pad < text.vocab_size:
            return int(pad)
    return None


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
    generation_kwargs: dict[str, Any] | None = None,
    pad: int | None = None,
) -> Rollout:
    """Draw num_generations completions of each of P prompts in one batch: B = P * num_generations rows.

    model: a causal language model of transformers, or a PeftModel around one; called as it is, so that hooks of wrapped
        modules run, and without its generation settings.
    prompts: token ids; each different one is prefilled once, also where it is given several times.
    steps: "auto": on a GPU captured in CUDA graphs, where the model's can be, else as "eager", the model as it is.
    temperature: of each row, the rows of a prompt next to each other; None: all rows greedily.
    generation_kwargs: what transformers' logits processors do to the logits first, by their names in its
        GenerationConfig (`processors.PROCESSORS`).
    pad: id that prompts are padded with; default: the model's pad id, else eos[0].

    Raises: ValueError where a prompt is empty, num_generations or max_new_tokens is below 1, temperature is not one
        number above 0 for each row, the model cannot be used, or a processor cannot be had; FloatingPointError where a
        log-prob is not finite.
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
    if pad is None:
        pad = pad_id(model)
    pad = eos[0] if pad is None else pad
    if len(set(map(len, prompts))) > 1 and model.config.model_type in RUN_THROUGH_PADDING:
        say_once(logging.INFO, f"{type(model).__name__} reads padding: prompts are decoded in groups of one length")
        draw = partial(
            generate, model, eos=eos, max_new_tokens=max_new_tokens, top_k=top_k, top_p=top_p, min_p=min_p,
            num_generations=num_generations, steps=steps, generation_kwargs=generation_kwargs, pad=pad,
        )  # fmt: skip
        return _by_length(draw, prompts, temperature, num_generations, {"prompt_ids": pad, "tokens": eos[0]})
    device = model.device
    place = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, rows)))}
    origin = torch.tensor([place[tuple(p)] for p in rows], device=device)
    ids, mask = left_pad([list(p) for p in place], pad, device)
    tau = None if temperature is None else torch.tensor(temperature, dtype=torch.float32, device=device)
    ends = torch.tensor(eos, device=device)
    with onednn.packed(model):
        process = None
        if generation_kwargs:
            process = Processors(generation_kwargs, ids, mask, origin, eos, max_new_tokens)
        sampling = Sampling(tau, (top_k, top_p, min_p), process)
        done = complete(Decoder(model, ids, mask, origin), sampling, ends, max_new_tokens, steps)
    if not bool(done.sampling_logprobs.isfinite().all()):
        row = int((~done.sampling_logprobs.isfinite()).any(1).int().argmax())
        if generation_kwargs and bool(done.policy_logprobs.isfinite().all()):
            raise FloatingPointError(f"generation_kwargs must leave a token to draw; none is left in row {row}")
        raise FloatingPointError(f"the model's logits must be finite; those of row {row} are not")
    return Rollout(
        prompt_ids=ids[origin],
        prompt_mask=mask[origin],
        temperature=torch.zeros(len(rows), device=device) if tau is None else tau,
        **vars(done),
    )


def _by_length(
    draw: Any, prompts: list[list[int]], temperature: list[float] | None, size: int, fills: dict[str, int]
) -> Rollout:
    """One rollout of several: draw, `generate` of some prompts, for those of each length; size: completions of one.

    fills: what fields are padded with, others with 0.
    """
    parts, order = [], []
    for length in sorted(set(map(len, prompts))):
        own = [i for i, p in enumerate(prompts) if len(p) == length]
        rows = [i * size + j for i in own for j in range(size)]
        taus = None if temperature is None else [temperature[r] for r in rows]
        parts.append(draw([prompts[i] for i in own], temperature=taus))
        order += rows
    place = torch.tensor(order).argsort().to(parts[0].tokens.device)

    def whole(name: str) -> Tensor:
        found = [getattr(part, name) for part in parts]
        if found[0].ndim == 2:
            width = max(x.shape[1] for x in found)
            gaps = [width - x.shape[1] for x in found]
            sides = [(gap, 0) if name.startswith("prompt") else (0, gap) for gap in gaps]
            fill = fills.get(name, 0)
            found = [torch.nn.functional.pad(x, side, value=fill) for x, side in zip(found, sides, strict=True)]
        return torch.cat(found)[place]

    return Rollout(**{f.name: whole(f.name) for f in fields(Rollout)})


def decode(rollout: Rollout, tokenizer: Any, skip_special_tokens: bool = True) -> list[str]:
    """The completions as text."""
    texts: list[str] = tokenizer.batch_decode(rollout.rows, skip_special_tokens=skip_special_tokens)
    return texts
