"""The method's knobs, and presets that name the published settings."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from .knobs import ConfigError, check_values, knob, require, unknown_name

PAPER_TEMPERATURES = (0.1, 0.4, 0.7, 1.0)


@dataclass(frozen=True)
class MDPGRPOConfig:
    """The method: sampling, advantages, shaping, KL and token objective (names as in the paper, see README).

    The four components each have a switch: `multi_temperature`, `dual_anchor`, `prospect`, `asymmetric_kl`.
    Defaults are the paper's (Salmani-Zarchi et al., ACL 2026) without the top-p and top-k of its runs, which the preset
    `paper` adds. Raises ConfigError for a value out of range.
    """

    num_generations: int = knob(8, "G, completions per prompt (the group)")
    multi_temperature: bool = knob(True, "draw the G completions of a group at the temperatures of --temperatures")
    temperatures: list[float] = knob(
        PAPER_TEMPERATURES, "sampling temperatures of the group's slots; the list is repeated to fill G"
    )
    temperature: float = knob(1.0, "the one sampling temperature when multi_temperature is off")
    top_p: float = knob(1.0, "nucleus sampling: keep the smallest token set of this probability (paper runs: 0.9)")
    top_k: int = knob(0, "keep only the k most likely tokens; 0 keeps all (paper runs: 50)")
    min_p: float = knob(0.0, "drop tokens less likely than this share of the most likely one; 0 keeps all")

    group_std: Literal["population", "sample"] = knob(
        "population", "z = (r-mean)/max(std, 1e-8) with divisor G, or TRL's (r-mean)/(std + 1e-4) with divisor G-1"
    )
    dual_anchor: bool = knob(True, "mix the goal anchor into the advantage")
    dual_anchor_alpha: float = knob(0.2, "alpha, weight of the goal anchor against the relative anchor")
    goal_mean: Literal["half", "max_half_mean", "mean", "running"] = knob(
        "half",
        "m of the goal anchor: 0.5 (paper), max(0.5, group mean) (released code), the group mean, or in training the "
        "running median of the last 4096 rewards",
    )
    goal_std: Literal["released", "binomial", "running"] = knob(
        "released",
        "s of the goal anchor: sqrt(G/(4K)) (released code), sqrt(1/(4K)), or in training the running standard "
        "deviation of the last 4096 rewards",
    )
    prospect: bool = knob(True, "shape each anchor with lambda * tanh(beta * v) before mixing")
    prospect_beta: float = knob(0.8, "beta of the prospect shaping, its slope at zero")
    prospect_gain: float = knob(1.25, "lambda+ of the prospect shaping, the bound for gains")
    prospect_loss: float = knob(2.0, "lambda- of the prospect shaping, the bound for losses")
    prospect_on_goal: bool = knob(True, "shape the goal anchor too (paper); off in the released trainer script")

    asymmetric_kl: bool = knob(True, "KL coefficient by the sign of the advantage; off: kl_beta_pos for all")
    kl_beta_pos: float = knob(0.01, "KL coefficient of completions with A >= 0")
    kl_beta_neg: float = knob(0.025, "KL coefficient of completions with A < 0")
    kl_estimator: Literal["k1", "k2", "k3"] = knob("k3", "estimator of the KL to the reference policy")
    kl_temperature: float = knob(1.0, "temperature of the reference KL's log-probabilities")

    temperature_objective: Literal["paper", "per_row", "corrected"] = knob(
        "paper",
        "log-probs at temperature 1 uncorrected (paper), at each completion's own temperature (per_row), or at 1 with "
        "a truncated importance weight (corrected)",
    )
    rescale_per_row: bool = knob(False, "per_row only: multiply the policy term by the temperature, undoing 1/tau")
    importance_weight_cap: float = knob(2.0, "corrected only: w_max, the bound of the importance weight")
    importance_level: Literal["token", "sequence"] = knob("token", "ratio per token, or per completion (GSPO)")
    epsilon_low: float = knob(0.2, "lower clip range of the ratio")
    epsilon_high: float = knob(0.2, "upper clip range of the ratio")
    delta: float | None = knob(None, "two-sided clipping: cap of the ratio before the clip; unset: none")
    aggregation: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = knob(
        "grpo", "mean of completion means, or token sums over global tokens, B * max length, local tokens"
    )
    mask_truncated: bool = knob(False, "leave completions that hit the length limit out of the loss and its normaliser")

    def __post_init__(self) -> None:
        check_values(self)
        g, taus = self.num_generations, self.temperatures
        require(g >= 2, "num_generations", g, "at least 2: a group of one has no relative anchor")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        for tau in taus:
            require(math.isfinite(tau) and tau > 0, "temperatures", tau, "all above 0")
        if self.multi_temperature:
            require(
                0 < len(taus) <= g and g % len(taus) == 0,
                "temperatures",
                taus,
                f"a list whose length divides num_generations = {g}",
            )
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or positive")
        require(0 <= self.min_p < 1, "min_p", self.min_p, "in [0, 1)")
        require(0 <= self.dual_anchor_alpha <= 1, "dual_anchor_alpha", self.dual_anchor_alpha, "in [0, 1]")
        for name in ("prospect_beta", "prospect_gain", "prospect_loss", "kl_temperature", "importance_weight_cap"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("kl_beta_pos", "kl_beta_neg", "epsilon_low", "epsilon_high"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or above")
        require(self.epsilon_low < 1, "epsilon_low", self.epsilon_low, "below 1")
        if self.delta is not None:
            require(self.delta > 1 + self.epsilon_high, "delta", self.delta, "above 1 + epsilon_high")
        if self.rescale_per_row and self.temperature_objective != "per_row":
            raise ConfigError("rescale_per_row needs temperature_objective = per_row")
        if self.temperature_objective == "corrected" and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0):
            raise ConfigError(
                "temperature_objective = corrected needs full-vocabulary sampling (top_p = 1, top_k = 0, min_p = 0): "
                "truncated sampling has another behaviour policy than the recorded log-probs describe; got "
                f"top_p = {self.top_p}, top_k = {self.top_k}, min_p = {self.min_p}"
            )

    @property
    def slot_temperatures(self) -> list[float]:
        """Sampling temperature of each of the G slots of a group."""
        taus = self.temperatures if self.multi_temperature else [self.temperature]
        return list(taus) * (self.num_generations // len(taus))

    @property
    def running_goal(self) -> bool:
        """Whether the goal anchor takes its mean or deviation from the rewards seen so far."""
        return "running" in (self.goal_mean, self.goal_std)

    @property
    def alpha(self) -> float:
        return self.dual_anchor_alpha if self.dual_anchor else 0.0

    @property
    def betas(self) -> tuple[float, float]:
        """(β₊, β₋); equal where the asymmetric KL is switched off."""
        return self.kl_beta_pos, self.kl_beta_neg if self.asymmetric_kl else self.kl_beta_pos

    @property
    def needs_reference(self) -> bool:
        return any(beta > 0 for beta in self.betas)


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
    # Plain z-score GRPO as TRL computes it.
    "grpo": {
        "multi_temperature": False,
        "dual_anchor": False,
        "prospect": False,
        "asymmetric_kl": False,
        "group_std": "sample",
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
