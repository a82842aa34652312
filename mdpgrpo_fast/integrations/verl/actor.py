"""verl's actor config with the method's knobs, checked before Ray starts anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import FSDPActorConfig

from ...config import ConfigError, MDPGRPOConfig
from .method import NAME, VENDOR, check_sampling, fuses_head, method_of, options_in
from .policy_loss import check_actor, refuse_entropy_bonus


@dataclass
class MDPGRPOActorConfig(FSDPActorConfig):
    """FSDPActorConfig with `mdp_grpo`, the options of `method_of`; `_target_` of the actor in our configs.

    beside: settings of verl that are not the actor's, as our configs give them. What verl would get wrong in silence,
    or after minutes, is looked at here: it goes on without the completions whose agent loop raised.

    Raises: ConfigError for options or settings that do not go together.
    """

    mdp_grpo: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_actor(self)
        if self.beside:
            check_beside(method_of(options_in(self)), self.beside, self.mdp_grpo.get("num_constraints"))

    def validate(self, n_gpus: int, train_batch_size: int, model_config: Any = None) -> None:
        """As verl's, and that the head that is asked for has what the loss needs."""
        super().validate(n_gpus, train_batch_size, model_config)
        if model_config is not None and fuses_head(model_config):
            refuse_entropy_bonus(self.entropy_coeff)


def check_beside(method: MDPGRPOConfig, beside: Mapping[str, Any], num_constraints: int | None) -> None:
    """Settings of verl outside of the actor's against the method. Raises: ConfigError naming the setting."""
    check_sampling(method, beside, beside["val_kwargs"])
    if not beside["use_v1"] and (method.multi_temperature or (method.alpha > 0 and num_constraints is None)):
        raise ConfigError(
            "trainer.use_v1 must be True: verl's older trainer neither numbers the completions of a prompt nor keeps "
            "its constraints; there multi_temperature=False and num_constraints have to be set"
        )
    if method.multi_temperature and beside["default_agent_loop"] != NAME:
        raise ConfigError(
            f"actor_rollout_ref.rollout.agent.default_agent_loop must be {NAME} with multi_temperature: another draws "
            f"all completions at one temperature; got {beside['default_agent_loop']}"
        )
    if method.kl_in_loss and beside["use_kl_in_reward"]:
        raise ConfigError(
            "algorithm.use_kl_in_reward must be False: the KL is in the loss; or set kl_beta_pos = kl_beta_neg = 0"
        )
    truncates = beside["top_p"] < 1 or beside["top_k"] > 0
    if beside["bypass_mode"] and (method.multi_temperature or truncates):
        raise ConfigError(
            "algorithm.rollout_correction.bypass_mode must be False with multi_temperature, top_p or top_k: it takes "
            "the sampler's log-probs, which are at other temperatures and of fewer tokens, for those of the old policy"
        )
    vendor = beside["engine_vendor"] or os.environ.get("VERL_ENGINE_VENDOR")
    if method.kl_in_loss and vendor != VENDOR:
        raise ConfigError(
            "ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR must be mdpgrpo_fast, the engine that knows "
            f"the reference's log-probs; got {vendor}"
        )
