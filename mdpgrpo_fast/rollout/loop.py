"""The decode loop: by steps of fixed shapes where they can be captured, else by the model as it is."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from ..log import say_once
from .captured import graphs
from .captured.fixed import FixedSteps
from .decoding import Decoder
from .record import Completions, Record, Sampling

# Steps between checks for finished rows: on a GPU a check waits for the device, on the CPU it costs nothing.
CHECK_EVERY = {"cpu": 1}
CHECK_EVERY_ELSEWHERE = 8
WINDOW = 16  # the same for fixed steps, which a wait leaves without work for longer
# Finished rows are dropped when they are this share of the batch: dropping copies the cache of those that stay.
FINISHED_SHARE = 0.125
Steps = Literal["auto", "eager", "fixed"]  # fixed: of fixed shapes but not captured, for tests


def complete(
    decoder: Decoder, sampling: Sampling, eos: Tensor, max_new_tokens: int, steps: Steps = "auto"
) -> Completions:
    """Draws tokens until every row met one of eos (E,) or has max_new_tokens."""
    logits = decoder.prefill()
    if sampling.processors is not None and steps != "eager":
        # They look at which tokens there are so far, on shapes that grow.
        if eos.device.type == "cuda":
            say_once(logging.INFO, "decode steps with logits processors run as they are, not as CUDA graphs")
        steps = "eager"
    fixed = graphs.prepare(decoder, sampling, max_new_tokens, capture=steps == "auto") if steps != "eager" else None
    record = Record(len(decoder.origin), max_new_tokens, sampling, eos.device) if fixed is None else fixed.record
    record.start(sampling)
    drawn = record.draw(logits, torch.arange(len(decoder.origin), device=eos.device), 0)
    del logits
    if fixed is None:
        num_steps = _eager(decoder, record, drawn, eos, max_new_tokens)
    else:
        fixed.start(decoder.cache, decoder.origin, decoder.prompt_mask, drawn)
        decoder.cache = None
        num_steps = _fixed(decoder, fixed, eos, max_new_tokens)
    return record.completions(num_steps, eos)


def _eager(decoder: Decoder, record: Record, drawn: Tensor, eos: Tensor, max_new_tokens: int) -> int:
    """Steps taken, the first included, whose tokens (B,) are given."""
    decoder.share()
    rows = torch.arange(len(drawn), device=eos.device)
    alive = torch.ones_like(rows, dtype=torch.bool)
    check_every = CHECK_EVERY.get(eos.device.type, CHECK_EVERY_ELSEWHERE)
    for t in range(1, max_new_tokens):
        alive &= ~(drawn[:, None] == eos).any(1)
        if (t - 1) % check_every == 0:
            num_alive = int(alive.sum())
            if num_alive == 0:
                return t
            if decoder.can_drop_rows and num_alive <= (1 - FINISHED_SHARE) * len(rows):
                index = alive.nonzero()[:, 0]
                decoder.keep(index)
                rows, alive, drawn = rows[index], alive[index], drawn[index]
        drawn = record.draw(decoder.step(drawn), rows, t)
    return max_new_tokens


def _fixed(decoder: Decoder, fixed: FixedSteps, eos: Tensor, max_new_tokens: int) -> int:
    """As `_eager`, from what `FixedSteps.start` was given."""
    prompt_width = decoder.prompt_mask.shape[1]
    size, t, seen = len(fixed.rows), 1, 0
    alive = torch.ones(size, dtype=torch.bool, device=eos.device)
    while t < max_new_tokens:
        end = min(t + WINDOW, max_new_tokens)
        for _ in range(t, end):
            fixed.run(decoder.model, size)
        alive &= ~fixed.record.ended(fixed.rows[:size], slice(seen, end), eos)
        t = seen = end
        num_alive = int(alive.sum())
        if num_alive == 0:
            break
        smaller = fixed.size_for(num_alive, size)
        if smaller < size:
            # Those that go on come first; finished ones fill up.
            index = (~alive).long().argsort(stable=True)[:smaller]
            fixed.keep(index, prompt_width + t - 1)
            alive, size = alive[index], smaller
    return t
