"""Sampling as a server of verl's answers: each row with settings of its own, and the log-probs of what was drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def processed(logits: Tensor, sampling: list[dict[str, Any]]) -> Tensor:
    """Log-probs of logits (B, V) by each row's temperature, top_k and top_p, as vLLM's `processed_logprobs`; a
    temperature of 0 leaves the most likely token."""
    temperature = torch.tensor([[params["temperature"]] for params in sampling])
    top_p = torch.tensor([[params.get("top_p", 1.0)] for params in sampling])
    top_k = torch.tensor([[params.get("top_k", -1)] for params in sampling]).masked_fill(temperature == 0, 1)
    ordered, order = (logits.float() / temperature.masked_fill(temperature == 0, 1)).sort(-1, descending=True)
    probs = ordered.softmax(-1)
    cut = (top_p < 1) & (probs.cumsum(-1) - probs >= top_p)
    cut |= (top_k > 0) & (torch.arange(logits.shape[-1]) >= top_k)
    return torch.empty_like(ordered).scatter(-1, order, ordered.masked_fill(cut, -torch.inf)).log_softmax(-1)


@torch.no_grad()
def sample(
    model: Any, prompts: list[list[int]], sampling: list[dict[str, Any]], generator: torch.Generator, most: int
) -> list[tuple[list[int], list[float]]]:
    """A completion of each prompt, at most `most` tokens with its end, and the log-probs of its tokens."""
    eos, width = model.config.eos_token_id, max(map(len, prompts))
    ids = torch.tensor([[eos] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    cache, done = None, torch.zeros(len(prompts), dtype=torch.bool)
    answers: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    for _ in range(most):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        cache, logps = out.past_key_values, processed(out.logits[:, -1], sampling)
        ids = torch.multinomial(logps.exp(), 1, generator=generator)
        for (tokens, scores), token, score, over in zip(answers, ids, logps.gather(1, ids), done, strict=True):
            if not over:
                tokens.append(int(token))
                scores.append(float(score))
        done |= ids[:, 0] == eos
        if done.all():
            break
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return answers
