"""verl's policy loss `mdp_grpo`: the method's token objective with the KL inside, by the sign of the advantage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ...config import ConfigError
from ...reference.groups import kl_coefficient
from ...reference.objective import token_objective
from ...reference.rows import Layout
from .method import NAME, method_of, options_in

_reference: ContextVar[Tensor | None] = ContextVar("reference log-probs of the micro-batch", default=None)


@contextmanager
def reference_logprobs(ref_logprobs: Tensor | None) -> Iterator[None]:
    """Within it the policy loss knows the micro-batch's log-probs under the reference policy, (B, L) or nested: verl
    gives a policy loss no such argument. Our engine does it."""
    token = _reference.set(ref_logprobs)
    try:
        yield
    finally:
        _reference.reset(token)


def mdp_grpo_loss(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean", config: Any = None, rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """-w·J + β_i·KL of every token, aggregated as verl has it; called as `verl.trainer.ppo.core_algos` does.

    old_log_prob, log_prob, advantages, response_mask, rollout_is_weights: (B, L). β_i is kl_beta_pos where a token's
    advantage is 0 or more, kl_beta_neg below. config: an actor config with `mdp_grpo`, whose clip_ratio_low and
    clip_ratio_high are ε, and global_batch_info the sizes over all ranks. Log-probs count in float32.

    Returns: the loss, a scalar, and verl's metrics: actor/pg_clipfrac, actor/pg_clipfrac_lower, actor/ppo_kl, and
    where there is a reference actor/ref_kl and actor/ref_kl_beta, means over the tokens.
    Raises: ConfigError where the KL needs the reference and our engine does not give it.
    """
    from verl.trainer.ppo.core_algos import agg_loss

    method, keep = method_of(options_in(config)), response_mask != 0
    ref = _reference.get()
    if method.kl_in_loss and ref is None:
        raise ConfigError(
            "the KL of mdp_grpo needs our engine, by VERL_ENGINE_VENDOR=mdpgrpo_fast in the workers' environment "
            "(runtime_env of our configs), and actor.use_kl_loss=True; or kl_beta_pos = kl_beta_neg = 0"
        )
    logprobs = log_prob.float()
    if ref is not None:
        ref = ref.to_padded_tensor(0.0) if ref.is_nested else ref
        ref = ref.to(logprobs)
    advantage = advantages.detach().to(logprobs)
    beta = kl_coefficient(advantage, *method.betas)
    low, high = config.clip_ratio_low, config.clip_ratio_high
    found = token_objective(
        logprobs, logprobs, torch.zeros_like(logprobs), keep, Layout(len(logprobs)), method, advantage=advantage,
        kl_beta=beta, old_logprobs=old_log_prob, ref_logprobs=ref, sampling_logprobs=None,
        importance_weight=rollout_is_weights, temperature=1.0,
        epsilon_low=config.clip_ratio if low is None else low, epsilon_high=config.clip_ratio if high is None else high,
        delta=method.delta or 0.0, entropy_coef=0.0, entropy_floor=0.0,
    )  # fmt: skip
    loss = agg_loss(found.per_token, keep, loss_agg_mode, **config.global_batch_info)

    told = {
        "actor/pg_clipfrac": found.clipped_low | found.clipped_high,
        "actor/pg_clipfrac_lower": found.clipped_low,
        "actor/ppo_kl": (old_log_prob - logprobs).detach(),
    }
    if ref is not None:
        told |= {"actor/ref_kl": found.kl, "actor/ref_kl_beta": beta}
    sums = torch.stack([x.to(logprobs.dtype).masked_fill(~keep, 0).sum() for x in told.values()])
    # One wait for the device.
    metrics = dict(zip(told, (sums / keep.sum().clamp(min=1)).tolist(), strict=True))
    return loss, metrics


def refuse_entropy_bonus(coefficient: float) -> None:
    """With our head. Raises: ConfigError."""
    if coefficient != 0:
        raise ConfigError(
            "actor_rollout_ref.actor.entropy_coeff must be 0 with impl_backend = mdpgrpo_fast: its entropy has no "
            f"gradient; got {coefficient}"
        )


def check_actor(config: Any) -> None:
    """What an actor config must agree with for the loss `mdp_grpo`. Raises: ConfigError naming the setting."""
    method, place = method_of(options_in(config)), "actor_rollout_ref.actor"
    if config.policy_loss.loss_mode != NAME:
        raise ConfigError(f"{place}.policy_loss.loss_mode must be {NAME}; got {config.policy_loss.loss_mode}")
    if method.num_generations != config.rollout_n:
        raise ConfigError(
            f"algorithm.mdp_grpo.num_generations must be rollout.n = {config.rollout_n}; got {method.num_generations}"
        )
    if method.kl_in_loss and not config.use_kl_loss:
        raise ConfigError(f"{place}.use_kl_loss must be True: without it verl has no reference policy for the KL")
    if config.use_kl_loss and config.kl_loss_coef != 0:
        raise ConfigError(
            f"{place}.kl_loss_coef must be 0: the KL of {NAME} is inside its loss, and verl would add its own; got "
            f"{config.kl_loss_coef}"
        )
    if method.loss == "luspo" and config.loss_agg_mode != "seq-mean-token-sum":
        raise ConfigError(
            f"{place}.loss_agg_mode must be seq-mean-token-sum for loss = luspo; got {config.loss_agg_mode}"
        )
