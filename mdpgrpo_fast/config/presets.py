"""Presets that name the published settings of the method's knobs."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

from .knobs import unknown_name
from .method import MDPGRPOConfig

# Without what MDP-GRPO adds, and z as TRL has it.
PLAIN: dict[str, Any] = {
    "multi_temperature": False,
    "dual_anchor": False,
    "prospect": False,
    "asymmetric_kl": False,
    "group_std": "sample",
}
NO_KL: dict[str, Any] = {**PLAIN, "kl_beta_pos": 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    # MDP-GRPO as the paper's text and runs have it.
    "paper": {"top_p": 0.9, "top_k": 50},
    # What the authors' released pipeline runs: METHOD differences are listed in the README.
    "released_code": {
        "top_p": 0.9,
        "top_k": 50,
        "goal_mean": "max_half_mean",
        "prospect_gain": 2.0,
        "prospect_loss": 1.25,
        "prospect_on_goal": False,
    },
    # Full-vocabulary sampling near temperature 1, with the exact log-probs of each row's own temperature.
    "exact": {"temperatures": [0.7, 0.9, 1.0, 1.2], "temperature_objective": "per_row"},
    # Plain z-score GRPO: its z is TRL's, its other defaults the paper's.
    "grpo": PLAIN,
    # TRL 1.16's defaults, its correction of the sampler's log-probs among them.
    "trl": {
        **NO_KL,
        "aggregation": "dapo",
        "kl_gradient": "unbiased",
        "temperature_objective": "corrected",
        "importance_weight_level": "sequence",
        "importance_weight_kind": "mask",
        "importance_weight_cap": 3.0,
    },
    # Clip-higher and the token mean of DAPO, without its dynamic sampling (--refill) and its length penalty (a reward).
    "dapo": {**NO_KL, "aggregation": "dapo", "epsilon_high": 0.28},
    # Neither the group's deviation nor a completion's length divides.
    "dr_grpo": {**NO_KL, "aggregation": "dr_grpo", "scale_rewards": "none"},
    # One ratio per completion, with the clip range of its authors.
    "gspo": {**NO_KL, "importance_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    # No lower bound of the weight, and the upper one of ScaleRL (5).
    "cispo": {**NO_KL, "loss": "cispo", "aggregation": "dapo", "epsilon_low": 1.0, "epsilon_high": 4.0},
    # REINFORCE over whole completions with the mean of the others as baseline, the KL in the reward.
    "rloo": {
        **PLAIN,
        "baseline": "leave_one_out",
        "scale_rewards": "none",
        "aggregation": "seq_mean_token_sum",
        "kl_in": "reward",
        "kl_estimator": "k1",
        "kl_beta_pos": 0.05,
    },
}


def preset(name: str, **overrides: Any) -> MDPGRPOConfig:
    """The named settings as an MDPGRPOConfig, with overrides. Raises ConfigError for an unknown preset."""
    if name not in PRESETS:
        raise unknown_name("preset", name, list(PRESETS))
    return MDPGRPOConfig(**copy.deepcopy({**PRESETS[name], **overrides}))


def nearest_preset(config: MDPGRPOConfig, first: str = "paper") -> str:
    """The preset from which the fewest knobs differ, the number of generations apart; `first` where several are."""

    def differing(name: str) -> int:
        start = preset(name)
        names = (f.name for f in fields(config) if f.name != "num_generations")
        return sum(getattr(config, n) != getattr(start, n) for n in names)

    return min([first, *PRESETS], key=differing)
