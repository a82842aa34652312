"""The method's knobs inside verl: which are ours there, and which verl has itself."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from ...config import ConfigError, MDPGRPOConfig, preset
from ...config.knobs import unknown_name
from ...config.presets import PRESETS

NAME = "mdp_grpo"  # of the advantage estimator, the policy loss and the agent loop
OURS = {
    "multi_temperature", "temperatures", "group_std", "scale_rewards", "baseline", "advantage_clip", "dual_anchor",
    "dual_anchor_alpha", "goal_mean", "goal_std", "prospect", "prospect_beta", "prospect_gain", "prospect_loss",
    "prospect_on_goal", "asymmetric_kl", "kl_beta_pos", "kl_beta_neg", "kl_estimator", "kl_gradient", "loss",
    "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
    "vespo_lambda_neg", "importance_level", "delta", "off_policy_threshold",
}  # fmt: skip
VENDOR = "mdpgrpo_fast"  # of VERL_ENGINE_VENDOR, and of model.fused_kernel_options.impl_backend
# What verl decides, by its own names.
VERLS = {
    "temperature": "actor_rollout_ref.rollout.temperature",
    "top_p": "actor_rollout_ref.rollout.top_p",
    "top_k": "actor_rollout_ref.rollout.top_k",
    "epsilon_low": "actor_rollout_ref.actor.clip_ratio_low",
    "epsilon_high": "actor_rollout_ref.actor.clip_ratio_high",
    "aggregation": "actor_rollout_ref.actor.loss_agg_mode",
    "horizon": "actor_rollout_ref.actor.loss_scale_factor",
    "entropy_coef": "actor_rollout_ref.actor.entropy_coeff",
    "kl_in": "algorithm.use_kl_in_reward",
    "temperature_objective": "algorithm.rollout_correction",
    "sampler_correction": "algorithm.rollout_correction",
    "importance_weight_cap": "algorithm.rollout_correction",
    "importance_weight_level": "algorithm.rollout_correction",
    "importance_weight_kind": "algorithm.rollout_correction",
}
OTHERS = ("preset", "num_generations", "num_constraints")  # of `algorithm.mdp_grpo`, beside OURS
SAMPLING = ("temperature", "top_p", "top_k")  # of verl's rollout and val_kwargs
_OF_PRESETS = {"top_p", "top_k"}  # which verl's settings decide, as our configs have them


def method_of(options: Mapping[str, Any] | None) -> MDPGRPOConfig:
    """The method of verl's `algorithm.mdp_grpo`: a preset and knobs of MDPGRPOConfig over it.

    options: preset (default paper), num_generations, which must be verl's rollout.n, num_constraints (see
    `advantages`), and any of OURS. Its epsilon_low, aggregation and the like are not verl's and not to be used.

    Raises: ConfigError for a knob that verl has itself, naming verl's; a preset whose meaning is in such knobs; one
    that is not known; a value out of range.
    """
    given = dict(options or {})
    return _method(json.dumps(given, sort_keys=True, default=list))


@functools.lru_cache  # an agent loop asks once for each completion
def _method(text: str) -> MDPGRPOConfig:
    given: dict[str, Any] = json.loads(text)
    name, constraints = given.pop("preset", "paper"), given.pop("num_constraints", None)
    if constraints is not None and (
        not isinstance(constraints, int) or isinstance(constraints, bool) or constraints < 1
    ):
        raise ConfigError(
            f"algorithm.mdp_grpo.num_constraints must be a whole number of at least 1; got {constraints!r}"
        )
    if "num_generations" not in given:
        raise ConfigError("algorithm.mdp_grpo.num_generations must be set: ${actor_rollout_ref.rollout.n}")
    for knob in sorted(set(given) - OURS - set(OTHERS)):
        _refuse(knob)
    config = preset(name, **given)
    foreign = sorted(set(PRESETS[name]) - OURS - _OF_PRESETS)
    if foreign:
        raise ConfigError(
            f"algorithm.mdp_grpo.preset must be one that leaves to verl what is verl's; {name} sets "
            + ", ".join(f"{knob} ({VERLS.get(knob, 'not available in verl')})" for knob in foreign)
        )
    if config.running_goal:
        raise ConfigError("algorithm.mdp_grpo: goal_mean and goal_std must not be running: verl keeps no such state")
    return config


def _refuse(knob: str) -> None:
    place = f"algorithm.mdp_grpo.{knob}"
    if knob in VERLS:
        raise ConfigError(f"{place} is verl's own setting: {VERLS[knob]}")
    if knob in MDPGRPOConfig.__dataclass_fields__:
        raise ConfigError(f"{place} has no place in verl's loop; the knobs there are {', '.join(sorted(OURS))}")
    raise unknown_name("algorithm.mdp_grpo knob", knob, sorted(OURS | set(OTHERS)))


def fuses_head(model: Any) -> bool:
    """Whether verl's model config asks for our head."""
    options = model.get("fused_kernel_options") or {}
    return bool(model.get("use_fused_kernels")) and options.get("impl_backend") == VENDOR


def check_sampling(method: MDPGRPOConfig, rollout: Mapping[str, Any], validation: Mapping[str, Any]) -> None:
    """What verl's rollout settings must be for each completion to have its own temperature. Raises: ConfigError."""
    if not method.multi_temperature:
        return
    if rollout["temperature"] != 1:
        raise ConfigError(
            "actor_rollout_ref.rollout.temperature must be 1 with multi_temperature: the loss's log-probs are at it, "
            f"and completions are drawn at algorithm.mdp_grpo.temperatures; got {rollout['temperature']}"
        )
    if all(rollout[name] == validation[name] for name in SAMPLING):
        raise ConfigError(
            "actor_rollout_ref.rollout.val_kwargs must differ from rollout in temperature, top_p or top_k: verl tells "
            "an agent loop of a validation by nothing else"
        )


def options_in(config: Any) -> dict[str, Any]:
    """`mdp_grpo` of verl's `algorithm` or actor config, as plain values. Raises: ConfigError where it is missing."""
    from omegaconf import OmegaConf

    found = config.get("mdp_grpo") if config is not None else None
    if found is None:
        raise ConfigError("algorithm.mdp_grpo is missing: use our configs (python -m mdpgrpo_fast.integrations.verl)")
    return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else dict(found)
