"""What a call of `generate` draws: noise and tokens of all rows and steps, in buffers that stay where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .sampling import NOISE, sample


@dataclass(frozen=True)
class Completions:
    """Of B rows, L the longest: fields as in Rollout."""

    tokens: Tensor
    lengths: Tensor
    finished: Tensor
    sampling_logprobs: Tensor
    policy_logprobs: Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature (B,) float32 above 0, None: greedy; truncation: top_k, top_p and min_p."""

    temperature: Tensor | None
    truncation: tuple[int, float, float] = (0, 1.0, 0.0)


class Record:
    """Draws for num_rows rows and num_steps steps. The noise of a row's step is drawn before the first of them.

    So what a row draws depends on neither when other rows leave the batch nor on how its steps are run.
    """

    def __init__(self, num_rows: int, num_steps: int, sampling: Sampling, device: torch.device) -> None:
        self.truncation = sampling.truncation
        self.tokens = torch.zeros(num_rows, num_steps, dtype=torch.int64, device=device)
        self.sampling, self.policy = torch.zeros(2, num_rows, num_steps, device=device)
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
        """Tokens (R,) of rows (R,) from logits (R, V), recorded. step: a number, or (1,) on the device."""
        tau = None if self.temperature is None else self.temperature[rows]
        noise = None if self.noise is None else self.noise[step, rows]
        drawn, sampling, policy = sample(logits, tau, *self.truncation, noise=noise)
        self.tokens[rows, step], self.sampling[rows, step], self.policy[rows, step] = drawn, sampling, policy
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
        sampling, policy = (x[:, :width].where(own, 0.0) for x in (self.sampling, self.policy))
        return Completions(self.tokens[:, :width].where(own, eos[0]), lengths, finished, sampling, policy)
