"""The method's knobs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .knobs import ConfigError, check_values, knob, require

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
    scale_rewards: Literal["group", "batch", "none"] = knob(
        "group", "divide r - mean by the deviation of the group, of all rewards of the step, or by nothing (Dr. GRPO)"
    )
    baseline: Literal["mean", "leave_one_out"] = knob(
        "mean", "what z subtracts: the group's mean, or that of the other completions (RLOO)"
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = knob(
        "sum_then_normalize",
        "several rewards: z of their weighted sum, or each normalised in its group, then summed and divided by the "
        "deviation of the step (GDPO)",
    )
    advantage_clip: float = knob(0.0, "bound of |A|; 0: none")
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
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = knob("k3", "estimator of the KL to the reference policy")
    kl_gradient: Literal["plain", "unbiased"] = knob(
        "plain", "the estimator as it is, or times the ratio, whose gradient is that of the KL itself (DeepSeek-V3.2)"
    )
    kl_in: Literal["loss", "reward"] = knob(
        "loss", "the KL is a term of the loss, or kl_beta_pos times its sum over the tokens is taken off the reward"
    )
    kl_temperature: float = knob(1.0, "temperature of the reference KL's log-probabilities")

    temperature_objective: Literal["paper", "per_row", "corrected"] = knob(
        "paper",
        "log-probs at temperature 1 uncorrected (paper), at each completion's own temperature (per_row), or at 1 with "
        "a truncated importance weight (corrected)",
    )
    rescale_per_row: bool = knob(False, "per_row only: multiply the policy term by the temperature, undoing 1/tau")
    truncated_logprobs: bool = knob(
        False, "per_row: log-probs of training are over the tokens that top-p, top-k and min-p kept"
    )
    sampler_correction: bool = knob(
        False,
        "per_row: weigh by what the trainer's policy says of a token over what the sampler said, as corrected does",
    )
    importance_weight_cap: float = knob(2.0, "w_max, the upper bound of the importance weight")
    importance_weight_floor: float = knob(0.0, "the lower bound of the importance weight; 0: none")
    importance_weight_level: Literal["token", "sequence"] = knob(
        "token", "one importance weight per token, or the product of a completion's for all of its tokens"
    )
    importance_weight_kind: Literal["truncate", "mask"] = knob(
        "truncate", "an importance weight out of bounds becomes the bound (TIS), or 0 (IcePop, sequence mask)"
    )
    off_policy_threshold: float | None = knob(
        None,
        "leave completions with A < 0 out of the policy term whose mean log-ratio of sampling to present policy is "
        "above it (DeepSeek-V3.2); unset: none",
    )
    loss: Literal["ppo_clip", "cispo", "sapo", "gmpo", "luspo", "vespo"] = knob(
        "ppo_clip",
        "policy term: clipped ratio (PPO, GRPO, GSPO), clipped detached weight, soft gate, geometric mean of ratios, "
        "GSPO's summed over tokens, gamma weight of the completion",
    )
    sapo_temperature_pos: float = knob(1.0, "sapo: temperature of the gate where A > 0")
    sapo_temperature_neg: float = knob(1.05, "sapo: temperature of the gate elsewhere")
    vespo_k_pos: float = knob(2.0, "vespo: power of the weight where A >= 0")
    vespo_lambda_pos: float = knob(3.0, "vespo: decay of the weight where A >= 0")
    vespo_k_neg: float = knob(3.0, "vespo: power of the weight where A < 0")
    vespo_lambda_neg: float = knob(2.0, "vespo: decay of the weight where A < 0")
    importance_level: Literal["token", "sequence"] = knob("token", "ratio per token, or per completion (GSPO)")
    epsilon_low: float = knob(0.2, "lower clip range of the ratio; 1: none")
    epsilon_high: float = knob(0.2, "upper clip range of the ratio")
    delta: float | None = knob(None, "two-sided clipping: cap of the ratio before the clip; unset: none")
    aggregation: Literal["grpo", "dapo", "dr_grpo", "bnpo", "seq_mean_token_sum"] = knob(
        "grpo",
        "mean of completion means; token sums over global tokens, B * horizon or local tokens; mean of completion sums",
    )
    horizon: int | None = knob(None, "dr_grpo: tokens that a completion counts for; unset: max_completion_length")
    entropy_coef: float = knob(0.0, "coefficient of the entropy bonus, aggregated as the loss is")
    entropy_target: float | None = knob(
        None,
        "entropy in nats under which the bonus acts; its coefficient grows below and shrinks above (Skywork-OR1); "
        "unset: the bonus is constant",
    )
    entropy_coef_delta: float = knob(0.005, "entropy_target: change of the coefficient after each update")
    entropy_coef_min: float = knob(0.0, "entropy_target: least coefficient")
    entropy_coef_max: float = knob(1.0, "entropy_target: largest coefficient")
    top_entropy_quantile: float = knob(
        1.0,
        "share of a pass's tokens, those of the most entropy, that the policy term and the bonus are of (80/20 rule)",
    )
    mask_truncated: bool = knob(False, "leave completions that hit the length limit out of the loss and its normaliser")

    def __post_init__(self) -> None:
        check_values(self)
        if self.loss == "luspo":
            allowed = ("grpo", "seq_mean_token_sum")  # the default, and what it means
            require(self.aggregation in allowed, "aggregation", self.aggregation, "seq_mean_token_sum for loss = luspo")
            object.__setattr__(self, "importance_level", "sequence")
            object.__setattr__(self, "aggregation", "seq_mean_token_sum")
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
        for name in (
            "prospect_beta", "prospect_gain", "prospect_loss", "kl_temperature", "importance_weight_cap",
            "sapo_temperature_pos", "sapo_temperature_neg", "vespo_lambda_pos", "vespo_lambda_neg",
            "top_entropy_quantile",
        ):  # fmt: skip
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in (
            "kl_beta_pos", "kl_beta_neg", "epsilon_low", "epsilon_high", "vespo_k_pos", "vespo_k_neg", "advantage_clip",
            "entropy_coef_delta", "entropy_coef_min", "importance_weight_floor",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or above")
        require(self.epsilon_low <= 1, "epsilon_low", self.epsilon_low, "1 or below")
        require(self.top_entropy_quantile <= 1, "top_entropy_quantile", self.top_entropy_quantile, "in (0, 1]")
        for name in ("horizon", "entropy_target", "off_policy_threshold"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "above 0, or unset")
        floor, cap = self.importance_weight_floor, self.importance_weight_cap
        require(floor <= cap, "importance_weight_floor", floor, f"at most importance_weight_cap = {cap}")
        least, most = self.entropy_coef_min, self.entropy_coef_max
        require(least <= most, "entropy_coef_min", least, f"at most entropy_coef_max = {most}")
        coef = self.entropy_coef
        if self.entropy_target is not None:
            within = f"within [entropy_coef_min, entropy_coef_max] = [{least}, {most}] with entropy_target"
            require(least <= coef <= most, "entropy_coef", coef, within)
        self._check_together()

    def _check_together(self) -> None:
        """Raises ConfigError for knobs that contradict each other."""
        if self.delta is not None:
            require(self.loss in ("ppo_clip", "luspo"), "delta", self.delta, f"unset for loss = {self.loss}")
            require(self.delta > 1 + self.epsilon_high, "delta", self.delta, "above 1 + epsilon_high")
        if self.loss in ("gmpo", "vespo") and self.importance_level == "sequence":
            raise ConfigError(f"importance_level must be token for loss = {self.loss}, which couples tokens by itself")
        if self.horizon is not None:
            require(self.aggregation == "dr_grpo", "horizon", self.horizon, "unset but for aggregation = dr_grpo")
        if self.kl_in == "reward":
            for name, only in (("asymmetric_kl", False), ("kl_temperature", 1.0), ("kl_gradient", "plain")):
                value = getattr(self, name)
                reason = {
                    "asymmetric_kl": "the sign of A, which picks the coefficient, follows from the reward",
                    "kl_temperature": "the reward lacks the KL between the policies themselves",
                    "kl_gradient": "the reward has no gradient",
                }[name]
                require(value == only, name, value, f"{only} for kl_in = reward: {reason}")
        if self.multi_objective_aggregation == "normalize_then_sum" and self.kl_in == "reward":
            raise ConfigError(
                "kl_in must be loss for multi_objective_aggregation = normalize_then_sum: a KL that is normalised as "
                "the rewards are would lose its coefficient; got 'reward'"
            )
        if self.multi_objective_aggregation == "normalize_then_sum" and self.scale_rewards != "group":
            raise ConfigError(
                "scale_rewards must be group for multi_objective_aggregation = normalize_then_sum, which divides by "
                f"the deviation of each reward's group and of the step; got {self.scale_rewards}"
            )
        if self.sampler_correction and self.temperature_objective == "paper":
            raise ConfigError(
                "sampler_correction needs temperature_objective = per_row or corrected: `paper` is uncorrected"
            )
        if self.rescale_per_row and self.temperature_objective != "per_row":
            raise ConfigError("rescale_per_row needs temperature_objective = per_row")
        if self.truncated_logprobs and self.temperature_objective != "per_row":
            raise ConfigError(
                "truncated_logprobs needs temperature_objective = per_row: the tokens are those that were kept at the "
                "row's temperature"
            )

    @property
    def slot_temperatures(self) -> list[float]:
        """Sampling temperature of each of the G slots of a group."""
        taus = self.temperatures if self.multi_temperature else [self.temperature]
        return list(taus) * (self.num_generations // len(taus))

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from less than the whole vocabulary."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def samples_as_trained(self) -> bool:
        """Whether tokens are drawn from the distribution that the loss's log-probs are of."""
        at_own = self.temperature_objective == "per_row" or all(tau == 1 for tau in self.slot_temperatures)
        return at_own and not self.truncates

    @property
    def running_goal(self) -> bool:
        """Whether the goal anchor takes its mean or deviation from the rewards seen so far."""
        return "running" in (self.goal_mean, self.goal_std)

    @property
    def alpha(self) -> float:
        return self.dual_anchor_alpha if self.dual_anchor else 0.0

    @property
    def betas(self) -> tuple[float, float]:
        """(β₊, β₋) of the loss; equal where the asymmetric KL is switched off, 0 where the KL is in the reward."""
        if self.kl_in == "reward":
            return 0.0, 0.0
        return self.kl_beta_pos, self.kl_beta_neg if self.asymmetric_kl else self.kl_beta_pos

    @property
    def kl_in_loss(self) -> bool:
        return any(beta > 0 for beta in self.betas)

    @property
    def needs_reference(self) -> bool:
        return self.kl_in_loss or (self.kl_in == "reward" and self.kl_beta_pos > 0)

    @property
    def weighs_sampling(self) -> bool:
        """Whether the policy term has an importance weight of the trainer's policy over the sampler's."""
        return self.sampler_correction or self.temperature_objective == "corrected"

    @property
    def has_entropy_bonus(self) -> bool:
        return self.entropy_coef != 0 or self.entropy_target is not None
