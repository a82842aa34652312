"""verl's FSDP engine with the reference's log-probs in reach of the loss, and our head where it is asked for."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from .head import install
from .method import fuses_head
from .policy_loss import reference_logprobs, refuse_entropy_bonus


class MDPGRPOEngine(FSDPEngineWithLMHead):
    """verl's engine for fsdp and fsdp2, unchanged but for two things; chosen by VERL_ENGINE_VENDOR=mdpgrpo_fast.

    A micro-batch's ref_log_prob is known to the policy loss `mdp_grpo`. With model.use_fused_kernels=True and
    model.fused_kernel_options.impl_backend=mdpgrpo_fast, log-probs and entropy come from hidden states and lm_head by
    `linear_token_logprobs`, with the soft-cap and scale of the model's logits.
    """

    def _build_module(self) -> Any:
        module = super()._build_module()
        if self.fuses_head:
            install(module)
        return module

    @property
    def fuses_head(self) -> bool:
        return fuses_head(self.model_config)

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        ref = micro_batch.get("ref_log_prob", None) if loss_function is not None else None
        actor = getattr(loss_function, "keywords", {}).get("config")
        if actor is not None and self.fuses_head:
            refuse_entropy_bonus(actor.get("entropy_coeff", 0))
        with reference_logprobs(ref):
            return super().forward_step(micro_batch, loss_function, forward_only)
