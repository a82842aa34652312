"""Each preset's objective, knob by knob, and the one that is TRL's beside TRL's own defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from mdpgrpo_fast.config import PRESETS, MDPGRPOConfig, preset

# What of each preset makes the objective. What is not named is as MDPGRPOConfig has it, which a test below holds.
PLAIN: dict[str, Any] = {"dual_anchor": False, "prospect": False, "asymmetric_kl": False, "multi_temperature": False,
                         "group_std": "sample"}  # fmt: skip
NO_KL = {**PLAIN, "betas": (0.0, 0.0), "needs_reference": False}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "paper": {"top_p": 0.9, "top_k": 50, "betas": (0.01, 0.025), "aggregation": "grpo", "alpha": 0.2},
    "released_code": {"top_p": 0.9, "top_k": 50, "goal_mean": "max_half_mean", "prospect_gain": 2.0,
                      "prospect_loss": 1.25, "prospect_on_goal": False},
    "exact": {"temperatures": [0.7, 0.9, 1.0, 1.2], "temperature_objective": "per_row", "dual_anchor": True},
    "grpo": {**PLAIN, "betas": (0.01, 0.01), "loss": "ppo_clip", "aggregation": "grpo", "kl_estimator": "k3"},
    "trl": {**NO_KL, "aggregation": "dapo", "kl_gradient": "unbiased", "temperature_objective": "corrected",
            "importance_weight_level": "sequence", "importance_weight_kind": "mask", "importance_weight_cap": 3.0},
    "dapo": {**NO_KL, "aggregation": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.28},
    "dr_grpo": {**NO_KL, "aggregation": "dr_grpo", "scale_rewards": "none", "horizon": None},
    "gspo": {**NO_KL, "importance_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4, "aggregation": "grpo"},
    "cispo": {**NO_KL, "loss": "cispo", "aggregation": "dapo", "epsilon_low": 1.0, "epsilon_high": 4.0},
    "rloo": {**PLAIN, "baseline": "leave_one_out", "scale_rewards": "none", "aggregation": "seq_mean_token_sum",
             "kl_in": "reward", "kl_estimator": "k1", "kl_beta_pos": 0.05, "betas": (0.0, 0.0),
             "needs_reference": True},
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_the_objective_of_a_preset(name: str) -> None:
    config, expected = preset(name), OBJECTIVES[name]
    for knob, value in expected.items():
        assert getattr(config, knob) == value, knob


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_changes_what_is_named_and_nothing_else(name: str) -> None:
    config, default = preset(name), MDPGRPOConfig()
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(default, f.name)}
    named = set(OBJECTIVES[name]) | ({"kl_beta_pos"} if "betas" in OBJECTIVES[name] else set())
    assert changed <= named, changed - named
    assert not set(PRESETS[name]) - {f.name for f in dataclasses.fields(config)}


def test_presets_differ() -> None:
    assert len({str(preset(name)) for name in PRESETS}) == len(PRESETS) == len(OBJECTIVES)


# ---- TRL ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def defaults(peer: Callable[[str], Any]) -> dict[str, Any]:
    """Those of the installed TRL's GRPOConfig, as its fields have them."""
    return {f.name: f.default for f in dataclasses.fields(peer("trl").GRPOConfig)}


SAME: dict[str, str] = {  # TRL's name: ours
    "num_generations": "num_generations",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "beta": "kl_beta_pos",
    "epsilon": "epsilon_low",
    "delta": "delta",
    "importance_sampling_level": "importance_level",
    "scale_rewards": "scale_rewards",
    "multi_objective_aggregation": "multi_objective_aggregation",
    "loss_type": "aggregation",
    "mask_truncated_completions": "mask_truncated",
    "top_entropy_quantile": "top_entropy_quantile",
    "off_policy_mask_threshold": "off_policy_threshold",
    "entropy_coef": "entropy_coef",
    "entropy_coef_min": "entropy_coef_min",
    "entropy_coef_max": "entropy_coef_max",
    "entropy_coef_delta": "entropy_coef_delta",
    "vllm_importance_sampling_clip_max": "importance_weight_cap",
    "sapo_temperature_pos": "sapo_temperature_pos",
    "sapo_temperature_neg": "sapo_temperature_neg",
    "vespo_k_pos": "vespo_k_pos",
    "vespo_lambda_pos": "vespo_lambda_pos",
    "vespo_k_neg": "vespo_k_neg",
    "vespo_lambda_neg": "vespo_lambda_neg",
}


@pytest.mark.parametrize(("theirs", "ours"), SAME.items())
def test_the_preset_trl_is_trl_s_default(defaults: dict[str, Any], theirs: str, ours: str) -> None:
    assert getattr(preset("trl"), ours) == defaults[theirs]


def test_the_preset_trl_where_names_or_forms_differ(defaults: dict[str, Any]) -> None:
    config = preset("trl")
    assert defaults["epsilon_high"] is None and config.epsilon_high == config.epsilon_low == 0.2
    assert defaults["use_bias_correction_kl"] is True and config.kl_gradient == "unbiased"
    assert defaults["vllm_importance_sampling_correction"] is True and config.weighs_sampling
    level, kind = defaults["vllm_importance_sampling_mode"].split("_")
    assert (config.importance_weight_level, config.importance_weight_kind) == (level, kind) == ("sequence", "mask")
    assert defaults["vllm_importance_sampling_clip_min"] is None and config.importance_weight_floor == 0
    assert not defaults["min_p"] and config.min_p == 0
    assert defaults["use_adaptive_entropy"] is False and config.entropy_target is None
    # What TRL has no knob for: its k3, its z, one temperature for all.
    assert (config.kl_estimator, config.group_std, config.loss) == ("k3", "sample", "ppo_clip")
    assert config.slot_temperatures == [1.0] * 8 and config.alpha == 0 and config.advantage_clip == 0
