"""The reference policy of the KL: a copy of the starting model, or under LoRA the model with other adapters."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from ...config import ConfigError, MDPGRPOConfig, TrainConfig
from ...models.adapters import adapter_values, adds_something, as_reference
from ...models.policy import Policy
from .. import distributed
from ..batch import MicroBatch


class Reference:
    """Log-probs of the reference, which `follow` moves towards the policy. Where it moves it is kept in checkpoints.

    model: the copy; None under LoRA, and where the method has no KL. adapters: those that the reference has under LoRA;
    None: none. policy: not wrapped, its weights whole; `begin` is called once it is.
    """

    def __init__(self, run: TrainConfig, method: MDPGRPOConfig, accelerator: Accelerator, policy: Policy) -> None:
        self.run, self.method, self.accelerator, self.policy = run, method, accelerator, policy
        self.moves = run.sync_reference > 0 and method.needs_reference
        _check_moves(accelerator, self.moves)
        if self.moves and run.reference_mix < 1 and any(p.dtype == torch.bfloat16 for p in policy.parameters()):
            raise ConfigError(
                "reference_mix must be 1 for weights in bfloat16, in which small shares of the policy round away "
                f"(--reference-mix 1, or --dtype float32); got {run.reference_mix!r}"
            )
        # Under LoRA it is the model without its adapters, or with those that it came with.
        self._starts_adapted = method.needs_reference and run.lora and adds_something(policy.model)
        distributed.check_adapted_start(accelerator, self._starts_adapted)
        self.model: Policy | None = None
        if method.needs_reference and not run.lora:
            self.model = copy.deepcopy(policy).requires_grad_(False)
        self.adapters: dict[str, Tensor] | None = None
        self._wrapped: Any = None

    def begin(self, wrapped: Any) -> None:
        """wrapped: the policy as it is wrapped for training."""
        self._wrapped = wrapped
        if self._starts_adapted:
            self.adapters = adapter_values(wrapped)

    def logprobs(self, micro_batches: list[MicroBatch], into: Tensor) -> None:
        """Those of the micro-batches' tokens at the KL's temperature, at their places in (B, L)."""
        of = self.policy if self.model is None else self.model
        # In the policy's own precision, or the KL of two equal models would not be 0.
        own = as_reference(self.policy.model, self._wrapped, self.adapters) if self.run.lora else nullcontext()
        with self.accelerator.autocast(), own:
            for m in micro_batches:
                m.put(of.logprobs(m.inputs, m.mask, m.lengths, self.method.kl_temperature, self.run.backend), into)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After so many steps: every sync_reference of them it becomes α policy + (1 - α) reference, α reference_mix.

        Under LoRA α is 1: a mix of adapters would not be that of the weights that they add up to.
        """
        if not self.moves or step % self.run.sync_reference:
            return
        if self.model is None:
            self.adapters = adapter_values(self._wrapped)
            return
        for ours, theirs in zip(self.model.parameters(), self.policy.parameters(), strict=True):
            ours.lerp_(theirs, self.run.reference_mix)

    def state_dict(self) -> dict[str, Any]:
        return {"adapters": self.adapters, "model": None if self.model is None else self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.accelerator.device
        if state["adapters"] is not None:
            self.adapters = {n: x.to(device) for n, x in state["adapters"].items()}
        if self.model is not None:
            self.model.load_state_dict(state["model"])


def _check_moves(accelerator: Accelerator, moves: bool) -> None:
    """Raises ConfigError where the weights of policy and reference are not whole on every rank."""
    if moves and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ConfigError(
            "sync_reference needs one process or DDP, where each rank has the policy's weights whole: under FSDP and "
            "DeepSpeed they are in shards, or a copy of the optimiser's"
        )
