"""Settings that follow from others, and those that are given and have no effect, each with the reason in one line."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from .knobs import ConfigError
from .method import MDPGRPOConfig
from .run import TrainConfig

Rule = tuple[str, Callable[[TrainConfig, MDPGRPOConfig], bool], str]

ONE_UPDATE = "the ratio is 1 where a batch gets one update (--updates-per-rollout, --mini-batches)"


def _on_policy(run: TrainConfig) -> bool:
    return run.updates_per_rollout == run.mini_batches == 1


def _tokens_are_alike(m: MDPGRPOConfig) -> bool:
    """Whether on-policy all tokens of a completion have the same part in the gradient, which a mean of them leaves."""
    through_kl = m.kl_in_loss and m.kl_gradient == "unbiased"
    return not (through_kl or m.weighs_sampling or m.top_entropy_quantile < 1)


# Knobs, when they have no effect, and why.
_RULES: list[Rule] = [
    (
        "temperature",
        lambda run, m: m.multi_temperature,
        "the group is sampled at --temperatures (--no-multi-temperature)",
    ),
    (
        "temperatures",
        lambda run, m: not m.multi_temperature,
        "the group is sampled at one --temperature (--multi-temperature)",
    ),
    (
        "dual_anchor_alpha goal_mean goal_std",
        lambda run, m: not m.dual_anchor,
        "the goal anchor is off (--dual-anchor)",
    ),
    (
        "goal_mean goal_std",
        lambda run, m: m.dual_anchor and m.dual_anchor_alpha == 0,
        "the goal anchor has no weight (--dual-anchor-alpha)",
    ),
    (
        "prospect_beta prospect_gain prospect_loss prospect_on_goal",
        lambda run, m: not m.prospect,
        "the shaping is off (--prospect)",
    ),
    (
        "prospect_on_goal",
        lambda run, m: m.prospect and m.alpha == 0,
        "the goal anchor has no weight (--dual-anchor, --dual-anchor-alpha)",
    ),
    ("kl_beta_neg", lambda run, m: not m.asymmetric_kl, "--kl-beta-pos is for all (--asymmetric-kl)"),
    (
        "kl_estimator kl_temperature kl_gradient kl_in",
        lambda run, m: not m.needs_reference,
        "there is no KL term (--kl-beta-pos, --kl-beta-neg)",
    ),
    (
        "sync_reference",
        lambda run, m: run.sync_reference > 0 and not m.needs_reference,
        "without a KL term there is no reference (--kl-beta-pos, --kl-beta-neg)",
    ),
    (
        "sync_reference",
        lambda run, m: m.needs_reference and run.steps is not None and run.sync_reference >= run.steps,
        "the run is over before (--steps)",
    ),
    ("reference_mix", lambda run, m: run.sync_reference == 0, "the reference stays as it is (--sync-reference)"),
    (
        "scale_rewards baseline group_std multi_objective_aggregation",
        lambda run, m: m.alpha == 1,
        "the relative anchor has no weight (--dual-anchor-alpha)",
    ),
    (
        "baseline",
        lambda run, m: (
            m.alpha < 1 and m.baseline == "leave_one_out" and m.multi_objective_aggregation == "normalize_then_sum"
        ),
        "its factor n / (n - 1) cancels in the deviation of the step, but for rewards that do not apply to all",
    ),
    (
        "group_std",
        lambda run, m: m.alpha < 1 and m.scale_rewards == "none",
        "rewards are divided by no deviation (--scale-rewards)",
    ),
    (
        "importance_weight_cap importance_weight_floor importance_weight_level importance_weight_kind",
        lambda run, m: not m.weighs_sampling,
        "there is no importance weight (--temperature-objective corrected, --sampler-correction)",
    ),
    (
        "truncated_logprobs",
        lambda run, m: m.truncated_logprobs and not m.truncates,
        "no token is cut (--top-p, --top-k, --min-p)",
    ),
    (
        "sampler_correction",
        lambda run, m: m.sampler_correction and m.temperature_objective == "corrected",
        "--temperature-objective corrected weighs by itself",
    ),
    (
        "importance_level aggregation",
        lambda run, m: m.loss == "luspo",
        "--loss luspo has a completion's ratio and the sum of its tokens",
    ),
    ("epsilon_low epsilon_high", lambda run, m: m.loss in ("sapo", "vespo"), "this --loss has no clip"),
    (
        "sapo_temperature_pos sapo_temperature_neg",
        lambda run, m: m.loss != "sapo",
        "--loss is not sapo",
    ),
    (
        "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
        lambda run, m: m.loss != "vespo",
        "--loss is not vespo",
    ),
    (
        "epsilon_low epsilon_high delta",
        lambda run, m: _on_policy(run) and m.loss not in ("sapo", "vespo"),
        ONE_UPDATE,
    ),
    (
        "importance_level",
        lambda run, m: _on_policy(run) and m.loss != "luspo" and _tokens_are_alike(m),
        ONE_UPDATE,
    ),
    (
        "sapo_temperature_pos sapo_temperature_neg",
        lambda run, m: _on_policy(run) and m.loss == "sapo",
        ONE_UPDATE,
    ),
    (
        "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
        lambda run, m: _on_policy(run) and m.loss == "vespo" and not m.weighs_sampling,
        ONE_UPDATE,
    ),
    (
        "off_policy_threshold",
        lambda run, m: _on_policy(run) and run.rollout != "vllm",
        "the policy is the one that sampled where a batch gets one update (--updates-per-rollout, --mini-batches)",
    ),
    (
        "off_policy_threshold",
        lambda run, m: _on_policy(run) and run.rollout == "vllm" and not m.samples_as_trained,
        "vLLM samples from another distribution than the loss's (--temperature-objective per_row, --top-p, --top-k)",
    ),
    (
        "entropy_coef_delta entropy_coef_min entropy_coef_max",
        lambda run, m: m.entropy_target is None,
        "the coefficient of the entropy bonus is constant (--entropy-target)",
    ),
    (
        "refill",
        lambda run, m: run.refill > 0 and all(b > 0 for b in m.betas),
        "with a KL term every group has a gradient",
    ),
    (
        "skip_idle",
        lambda run, m: run.skip_idle and all(b > 0 for b in m.betas),
        "with a KL term every completion counts",
    ),
    (
        "skip_idle",
        lambda run, m: run.skip_idle and m.top_entropy_quantile < 1,
        "the quantile is of the entropies of all tokens (--top-entropy-quantile)",
    ),
    (
        "refill skip_idle",
        lambda run, m: m.has_entropy_bonus and not all(b > 0 for b in m.betas),
        "with an entropy bonus every completion has a gradient",
    ),
    ("lora_r lora_alpha lora_target_modules", lambda run, m: not run.lora, "all weights are trained (--lora)"),
    ("epochs", lambda run, m: run.steps is not None, "--steps says how many"),
    (
        "eval_every eval_samples eval_split eval_batch_size",
        lambda run, m: run.eval_file is None and not (run.model is None and run.train_file is None),
        "there are no held-out prompts (--eval-file)",
    ),
    (
        "eval_every",
        lambda run, m: run.steps is not None and run.eval_every >= run.steps and run.eval_file is not None,
        "the run is over before (--steps)",
    ),
    ("constraint_reward", lambda run, m: "constraints" not in run.reward, "--reward has no 'constraints'"),
    (
        "reward_isolation keep_special_tokens",
        lambda run, m: run.reward == ["constraints"],
        "--reward has 'constraints' alone",
    ),
    ("workspace_mb fp32_logits skip_idle", lambda run, m: run.lm_head == "logits", "--lm-head is logits"),
    (
        "fp32_logits",
        lambda run, m: run.mixed_precision == "no" and run.dtype == "float32",
        "logits are float32 already (--mixed-precision)",
    ),
    ("tokens_per_micro_batch", lambda run, m: run.packing == "off", "--packing is off"),
    (
        "vllm_url vllm_memory vllm_sleep vllm_timeout vllm_retries vllm_sync_dir vllm_lora",
        lambda run, m: run.rollout != "vllm",
        "the model samples by itself (--rollout vllm)",
    ),
    (
        "vllm_memory vllm_sleep",
        lambda run, m: run.rollout == "vllm" and run.vllm_url is not None,
        "a server samples (--vllm-url)",
    ),
    (
        "vllm_timeout vllm_retries vllm_sync_dir",
        lambda run, m: run.rollout == "vllm" and run.vllm_url is None,
        "vLLM runs in this process (--vllm-url)",
    ),
    ("vllm_lora", lambda run, m: run.rollout == "vllm" and not run.lora, "all weights are trained (--lora)"),
    ("async_rollout", lambda run, m: run.async_rollout > 0 and run.steps == 1, "there is no next step (--steps)"),
    ("hub_model_id hub_private_repo", lambda run, m: not run.push_to_hub, "nothing is uploaded (--push-to-hub)"),
    (
        "split",
        lambda run, m: all(file is None or Path(file).is_file() for file in (run.train_file, run.eval_file)),
        "--train-file is no data set",
    ),
]


def with_correction(run: TrainConfig, method: MDPGRPOConfig, given: Collection[str] = ()) -> MDPGRPOConfig:
    """The method, with sampler_correction on where async_rollout needs it: older weights sample than are trained.

    given: knobs that were set. Raises: ConfigError where the objective has no importance weight, or it was set off.
    """
    if not run.async_rollout or method.weighs_sampling:
        return method
    if method.temperature_objective == "paper":
        raise ConfigError(
            "async_rollout needs temperature_objective = corrected or per_row, which weigh tokens by what the policy "
            "says of them over what older weights said when they sampled; `paper` is uncorrected"
        )
    if "sampler_correction" in given:
        raise ConfigError(
            "sampler_correction must be on with async_rollout: older weights sample than are trained; got False"
        )
    return replace(method, sampler_correction=True)


def without_effect(run: TrainConfig, method: MDPGRPOConfig, given: Collection[str]) -> list[str]:
    """One line for each given knob that changes nothing under these settings."""
    lines = []
    for names, applies, reason in _RULES:
        found = [name for name in names.split() if name in given]
        if found and applies(run, method):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in found)
            lines.append(f"{flags} {'has' if len(found) == 1 else 'have'} no effect: {reason}")
    return lines
