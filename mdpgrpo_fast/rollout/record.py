"""What a call of `generate` draws: noise and tokens of all rows and steps, in buffers that stay where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .processors import Processors
from .sampling import NOISE, logprobs, sample


@dataclass(frozen=True)
class Completions:
    """Of B rows, L the longest: fields as in Rollout."""

    tokens: Tensor
    lengths: Tensor
    finished: Tensor
    sampling_logprobs: Tensor
    policy_logprobs: Tensor
    log_kept: Tensor
    logit_floor: Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature (B,) float32 above 0, None: greedy; truncation: top_k, top_p and min_p; processors: of logits, before
    the temperature."""

    temperature: Tensor | None
    truncation: tuple[int, float, float] = (0, 1.0, 0.0)
    processors: Processors | None = None


class Record:
    """Draws for num_rows rows and num_steps steps. The noise of a row's step is drawn before the first of them.

    So what a row draws depends on neither when other rows leave the batch nor on how its steps are run.
    """

    def __init__(self, num_rows: int, num_steps: int, sampling: Sampling, device: torch.device) -> None:
        self.truncation, self.processors = sampling.truncation, sampling.processors
        self.tokens = torch.zeros(num_rows, num_steps, dtype=torch.int64, device=device)
        self.sampling, self.policy, self.log_kept, self.logit_floor = torch.zeros(4, num_rows, num_steps, device=device)
        self.temperature: Any = None
        self.noise: Any = None
        if sampling.temperature is not None:
            self.temperature = torch.ones(num_rows, device=device)
            self.noise = torch.zeros(num_steps, num_rows, dtype=torch.int64, device=device)

    def start(self, sampling: Sampling) -> None:
        """Of a call with the same choices: its temperatures, and new noise from torch's generator of the device."""
        if sampling.temperature is not None:
            self.temperature.copy_(sampling.temperature)
            self.noise.random_(NOISE)

    def draw(self, logits: Tensor, rows: Tensor, step: int | Tensor) -> Tensor:
        """Tokens (R,) of rows (R,) from the model's logits (R, V), recorded. step: a number, or, where there are no
        processors, (1,) on the device."""
        tau = None if self.temperature is None else self.temperature[rows]
        noise = None if self.noise is None else self.noise[step, rows]
        if self.processors is None:
            drawn, sampling, policy, log_kept, floor = sample(logits, tau, *self.truncation, noise=noise)
        else:
            processed = self.processors(logits, rows, self.tokens[rows, :step])
            drawn, sampling, _, log_kept, floor = sample(processed, tau, *self.truncation, noise=noise)
            policy = logprobs(logits, drawn, 1.0)
            # Processed logits have another order than the model's own.
            floor = floor.where(floor == -torch.inf, torch.nan)
        self.tokens[rows, step], self.log_kept[rows, step], self.logit_floor[rows, step] = drawn, log_kept, floor
        self.sampling[rows, step], self.policy[rows, step] = sampling, policy
        return drawn

    def ended(self, rows: Tensor, steps: slice, eos: Tensor) -> Tensor:
        """(R,) bool: which rows drew an end in these steps."""
        return (self.tokens[rows, steps, None] == eos).flatten(1).any(1)

    def completions(self, num_steps: int, eos: Tensor) -> Completions:
        """Of the first num_steps; what a row drew after its end does not count."""
        ends = (self.tokens[:, :num_steps, None] == eos).any(2)
        finished = ends.any(1)
        lengths = torch.where(finished, ends.int().argmax(1) + 1, num_steps)
        width = int(lengths.max())
        own = torch.arange(width, device=eos.device) < lengths[:, None]
        recorded = (self.sampling, self.policy, self.log_kept, self.logit_floor)
        recorded = tuple(x[:, :width].where(own, 0.0) for x in recorded)
        return Completions(self.tokens[:, :width].where(own, eos[0]), lengths, finished, *recorded)
