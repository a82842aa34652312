"""Inputs in the one form that everything below the public functions takes, and schemas of the fused ops.

That form is `(logits | hidden, weight; rows, groups, settings)`. The ops are `mdpgrpo_fast::<backend>_<op>`; a backend
brings launchers of one form, so that each op exists once per backend and is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..config import MDPGRPOConfig

GOAL_MEAN = ("half", "max_half_mean", "mean")
AGGREGATION = ("grpo", "dapo", "dr_grpo", "bnpo", "seq_mean_token_sum")
GRPO, DAPO, DR_GRPO, BNPO, SEQ_MEAN_TOKEN_SUM = range(5)
# luspo is ppo_clip with a completion's ratio and an aggregation of its own, which the config has set.
LOSSES = ("ppo_clip", "cispo", "sapo", "gmpo", "vespo")
PPO_CLIP, CISPO, SAPO, GMPO, VESPO = range(5)
ESTIMATORS = ("k1", "k2", "k3", "abs")  # from 1 on
SCALES = ("group", "batch", "none")

# Rows of the (5, N) float32 output and of the (3, N) bool one.
ROWS = ("logprobs", "entropy", "kl", "ratio", "loss")
MARKS = ("clipped_low", "clipped_high", "kl_clamped")
NUM_TOTALS = 8  # members of `reference.TOTALS`
# Rows of the (5, N) statistics: maximum, log Σ exp, entropy, log Σ exp at the KL temperature, z of the token.
NUM_STATISTICS = 5

# Members of Rows with a value per completion or per row; the others have one per row.
KNOBS = (
    "advantage", "kl_beta", "temperature", "epsilon_low", "epsilon_high", "delta", "entropy_coef", "entropy_floor",
)  # fmt: skip


def on_16_bytes(x: Tensor) -> Tensor:
    """x, copied where it begins elsewhere: kernels are compiled for what begins there."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


class Rows(NamedTuple):
    """What N rows bring beside their logits. None: not given, or one number for all, which is in Settings.

    Below the public functions all are flat and contiguous: (N,), or, of KNOBS, (B,) with one value per completion.
    """

    tokens: Any  # integers in [0, V); with a vocabulary split over ranks, relative to this rank's part
    mask: Any = None  # uint8, non-zero where a row counts
    completion: Any = None  # integers in [0, B); None: rows lie in order, as many of each completion
    advantage: Any = None
    kl_beta: Any = None
    old_logprobs: Any = None
    ref_logprobs: Any = None
    importance_weight: Any = None
    temperature: Any = None
    epsilon_low: Any = None
    epsilon_high: Any = None
    delta: Any = None
    sampling_logprobs: Any = None  # read where Settings.masks_off_policy is on
    # z under which a logit is in no softmax but that of the KL, if it is under the token's own too
    logit_floor: Any = None
    entropy_coef: Any = None
    entropy_floor: Any = None  # entropy under which a row is in neither the policy term nor the bonus

    def for_logprobs(self) -> Rows:
        """What log-probs and entropy take."""
        return Rows(self.tokens, self.mask, self.completion, temperature=self.temperature, logit_floor=self.logit_floor)

    def part(self, start: int, stop: int) -> Rows:
        """Some of the rows, where every member has one value per row; each begins on 16 bytes, as kernels want it."""
        return Rows(*(None if x is None else on_16_bytes(x[start:stop]) for x in self))

    def per_row(self, num_completions: int) -> Rows:
        """Whether each of KNOBS has one value per row and not one per completion; None for the others."""
        found: list[bool | None] = [None] * len(self)
        for i in _KNOB_PLACES:
            found[i] = self[i] is not None and self[i].numel() != num_completions
        return Rows(*found)


_KNOB_PLACES = tuple(map(Rows._fields.index, KNOBS))


class Groups(NamedTuple):
    """Rewards by group of G completions, which advantages are made of. All None: advantages are given.

    Of `ops.advantages.grouped` rewards (P, G) and valid (P, G) bool; below, as Rows, flat:
    """

    rewards: Any = None  # (P * G,) float
    num_constraints: Any = None  # (P,)
    valid: Any = None  # (P * G,) uint8: completions whose reward counts; None: all
    slots: Any = None  # (B,) place of each completion in the rewards; None: in order
    batch_std: Any = None  # () float32, wanted where Settings.scale is batch


class Settings(NamedTuple):
    """The numbers and choices that all rows share. 0 is "off" for delta and softcap."""

    temperature: float = 1.0
    epsilon_low: float = 0.0
    epsilon_high: float = 0.0
    delta: float = 0.0
    softcap: float = 0.0
    kl_temperature: float = 1.0
    alpha: float = 0.0
    prospect_beta: float = 1.0
    prospect_gain: float = 1.0
    prospect_loss: float = 1.0
    kl_beta_pos: float = 0.0
    kl_beta_neg: float = 0.0
    entropy_coef: float = 0.0
    entropy_floor: float = 0.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.0
    vespo_k_pos: float = 0.0
    vespo_lambda_pos: float = 1.0
    vespo_k_neg: float = 0.0
    vespo_lambda_neg: float = 1.0
    off_policy_threshold: float = 0.0
    advantage_clip: float = 0.0
    top_entropy_quantile: float = 1.0  # for `linear_token_loss`; kernels are given the entropy_floor
    sequence: int = 0  # importance ratio per completion
    estimator: int = 3  # place in ESTIMATORS, from 1 on
    aggregation: int = DAPO  # place in AGGREGATION
    rescale: int = 0  # multiply the policy term by τ
    two_temperatures: int = 0  # the KL's log-probs are at another temperature than the policy's, or of all tokens
    group_size: int = 1  # G
    sample_std: int = 0
    goal_mean: int = 0  # place in GOAL_MEAN
    binomial: int = 0
    prospect: int = 0
    prospect_on_goal: int = 0
    loss: int = PPO_CLIP  # place in LOSSES
    unbiased_kl: int = 0  # the KL term times ρ
    masks_off_policy: int = 0  # completions with A < 0 are left out by off_policy_threshold
    scale: int = 0  # place in SCALES
    leave_one_out: int = 0

    @classmethod
    def of(cls, config: MDPGRPOConfig, rows: Rows, softcap: float | None = None) -> Settings:
        """Those of a config, for rows as a public function was given them: its numbers are taken from there."""
        c = config

        def number(x: Any, default: float) -> float:
            return default if x is None or isinstance(x, Tensor) else float(x)

        own_kl = isinstance(rows.temperature, Tensor) or rows.temperature != c.kl_temperature
        own_kl = own_kl or rows.logit_floor is not None
        beta_pos, beta_neg = c.betas
        return cls(
            temperature=number(rows.temperature, 1.0),
            epsilon_low=number(rows.epsilon_low, c.epsilon_low),
            epsilon_high=number(rows.epsilon_high, c.epsilon_high),
            delta=number(rows.delta, c.delta or 0.0),
            softcap=softcap or 0.0,
            kl_temperature=c.kl_temperature,
            alpha=c.alpha,
            prospect_beta=c.prospect_beta,
            prospect_gain=c.prospect_gain,
            prospect_loss=c.prospect_loss,
            kl_beta_pos=beta_pos,
            kl_beta_neg=beta_neg,
            entropy_coef=number(rows.entropy_coef, c.entropy_coef),
            entropy_floor=number(rows.entropy_floor, 0.0),
            sapo_temperature_pos=c.sapo_temperature_pos,
            sapo_temperature_neg=c.sapo_temperature_neg,
            vespo_k_pos=c.vespo_k_pos,
            vespo_lambda_pos=c.vespo_lambda_pos,
            vespo_k_neg=c.vespo_k_neg,
            vespo_lambda_neg=c.vespo_lambda_neg,
            off_policy_threshold=c.off_policy_threshold or 0.0,
            advantage_clip=c.advantage_clip,
            top_entropy_quantile=c.top_entropy_quantile,
            sequence=int(c.importance_level == "sequence"),
            estimator=1 + ESTIMATORS.index(c.kl_estimator),
            aggregation=AGGREGATION.index(c.aggregation),
            rescale=int(c.rescale_per_row),
            two_temperatures=int(rows.ref_logprobs is not None and own_kl),
            group_size=c.num_generations,
            sample_std=int(c.group_std == "sample"),
            goal_mean=GOAL_MEAN.index(c.goal_mean) if c.goal_mean in GOAL_MEAN else 0,  # "running" stays above
            binomial=int(c.goal_std == "binomial"),
            prospect=int(c.prospect),
            prospect_on_goal=int(c.prospect_on_goal),
            loss=0 if c.loss == "luspo" else LOSSES.index(c.loss),
            unbiased_kl=int(c.kl_gradient == "unbiased"),
            masks_off_policy=int(c.off_policy_threshold is not None),
            scale=SCALES.index(c.scale_rewards),
            leave_one_out=int(c.baseline == "leave_one_out"),
        )

    @classmethod
    def read(cls, numbers: Sequence[float], flags: Sequence[int]) -> Settings:
        """From the two vectors that ops take."""
        return cls(*numbers, *flags)  # type: ignore[arg-type]

    def without_groups(self) -> Settings:
        """Where advantages are given, how they would be made is nothing to compile a kernel for."""
        return self._replace(
            group_size=1, sample_std=0, goal_mean=0, binomial=0, prospect=0, prospect_on_goal=0, scale=0,
            leave_one_out=0, advantage_clip=0.0,
        )  # fmt: skip

    def settled(self, rows: Rows) -> Settings:
        """Without the mask by how far off-policy a completion is, where there is nothing that says so."""
        has = rows.old_logprobs is not None or rows.sampling_logprobs is not None
        return self if has else self._replace(masks_off_policy=0)

    def has_bonus(self, rows: Rows) -> bool:
        """Whether there is an entropy bonus, whose gradient is a term of its own."""
        return rows.entropy_coef is not None or self.entropy_coef != 0

    @property
    def couples(self) -> bool:
        """Whether tokens of a completion share something beside its length: ρ, a weight, or a gate."""
        return bool(self.sequence or self.loss in (GMPO, VESPO) or self.masks_off_policy)

    def first_pass(self, rows: Rows) -> bool:
        """Whether what they share needs ℓ of all of them, or its entropy, before the objective of any."""
        off_policy = rows.old_logprobs is not None
        floor = rows.entropy_floor is not None or self.entropy_floor != 0
        sums_slopes = (self.sequence and self.loss in (PPO_CLIP, SAPO)) or self.loss == GMPO
        return bool(
            (off_policy and self.couples)
            or (self.masks_off_policy and rows.sampling_logprobs is not None)
            or (sums_slopes and floor)
            or (self.sequence and self.unbiased_kl and rows.ref_logprobs is not None)
        )

    @property
    def numbers(self) -> tuple[float, ...]:
        """The real-valued ones, as the ops take them; the discrete ones are `flags`."""
        return self[:NUM_NUMBERS]

    @property
    def flags(self) -> tuple[int, ...]:
        return self[NUM_NUMBERS:]  # type: ignore[return-value]


NUM_NUMBERS = Settings._fields.index("sequence")


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient until the loss scale has reached it: float16 has no room for one before."""
    return torch.float32 if dtype == torch.float16 else dtype


# ---- ops ------------------------------------------------------------------------------------------------------------

SETTINGS = "float[] numbers, int[] flags"
OBJECTIVE = (
    "Tensor?[] rows, Tensor?[] groups, Tensor? denominator, SymInt num_completions, SymInt max_completion_length, "
    + SETTINGS
)
OUTPUTS = "Tensor loss, Tensor per_row, Tensor marks, Tensor completion_kl, Tensor totals"
SCHEMAS = {
    # With a new gradient; without one; with the gradient over the logits.
    "token_loss": f"(Tensor logits, {OBJECTIVE}) -> (Tensor gradient, {OUTPUTS})",
    "token_loss_value": f"(Tensor logits, {OBJECTIVE}) -> ({OUTPUTS})",
    "token_loss_": f"(Tensor(a!) logits, {OBJECTIVE}) -> ({OUTPUTS})",
    "token_logprobs": f"(Tensor logits, Tensor?[] rows, SymInt num_completions, {SETTINGS}) -> "
    "(Tensor logprobs, Tensor statistics)",
    "token_logprobs_backward": "(Tensor logits, Tensor grad_logprobs, Tensor?[] rows, SymInt num_completions, "
    f"{SETTINGS}, Tensor statistics) -> Tensor",
    "advantages": f"(Tensor?[] groups, {SETTINGS}) -> (Tensor per_group, Tensor per_completion)",
    "scale_": "(Tensor(a!) gradient, Tensor scale) -> ()",
}


class Launchers(NamedTuple):
    """What a backend's ops run, and the chunks of `linear_token_loss`. Arguments and results as
    `kernels.triton.token_loss.launch_token_loss` and its like say."""

    # What launchers of logits take beside their inputs: Triton's tile, measured when it is first asked for.
    options: Callable[[Tensor], dict[str, Any]]

    token_loss: Callable[..., tuple[Tensor, ...]]
    logprobs: Callable[..., tuple[Tensor, Tensor]]
    logprobs_backward: Callable[..., Tensor]
    objective: Callable[..., tuple[Tensor, Tensor, Tensor]]
    totals: Callable[..., tuple[Tensor, Tensor, Tensor]]
    advantages: Callable[..., tuple[Tensor, Tensor]]
    scale: Callable[..., None]


def new_outputs(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for what is said of N rows: (5, N) as in ROWS and (3, N) as in MARKS."""
    per_row = torch.empty(len(ROWS), n, dtype=torch.float32, device=device)
    return per_row, torch.empty(len(MARKS), n, dtype=torch.bool, device=device)


def new_totals(num_completions: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the loss (), KL per completion (B,) and totals (8,)."""
    return tuple(torch.empty(s, dtype=torch.float32, device=device) for s in ((), (num_completions,), (NUM_TOTALS,)))  # type: ignore[return-value]


# ---- fake implementations -------------------------------------------------------------------------------------------


def _fake_token_loss_value(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    per_row, marks = new_outputs(logits.shape[0] * logits.shape[1], logits.device)
    loss, completion_kl, totals = new_totals(args[3], logits.device)
    return loss, per_row, marks, completion_kl, totals


def _fake_token_loss(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return logits.new_empty(logits.shape, dtype=gradient_dtype(logits.dtype)), *_fake_token_loss_value(logits, *args)


def _fake_logprobs(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    n = logits.shape[0] * logits.shape[1]
    return logits.new_empty((n,), dtype=torch.float32), logits.new_empty((NUM_STATISTICS, n), dtype=torch.float32)


def _fake_advantages(groups: list[Tensor], numbers: list[float], flags: list[int]) -> tuple[Tensor, Tensor]:
    rewards, p, g = groups[0], groups[1].shape[0], Settings.read(numbers, flags).group_size
    return rewards.new_empty((2, p), dtype=torch.float32), rewards.new_empty((4, p, g), dtype=torch.float32)


# ---- registration ---------------------------------------------------------------------------------------------------


def register(backend: str, launch: Launchers, keys: tuple[str, ...]) -> torch.library.Library:
    """Defines the ops of a backend for these dispatch keys; no autograd here: `ops.fused` wraps them."""

    def objective(gradient: Literal["new", "none", "in place"]) -> Callable[..., tuple[Tensor, ...]]:
        """gradient: written to new memory and returned too, not written, or written over the logits."""

        def run(
            logits: Tensor, rows: Any, groups: Any, denominator: Tensor | None, num_completions: int,
            max_completion_length: int, numbers: Any, flags: Any,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            out = None if gradient == "none" else logits
            if gradient == "new":
                out = torch.empty(logits.shape, dtype=gradient_dtype(logits.dtype), device=logits.device)
            found = launch.token_loss(
                logits, out, Rows(*rows), Groups(*groups), Settings.read(numbers, flags), denominator, num_completions,
                max_completion_length, **launch.options(logits),
            )  # fmt: skip
            return (out, *found) if gradient == "new" else found  # type: ignore[arg-type]

        return run

    def logprobs(logits: Tensor, rows: Any, num_completions: int, numbers: Any, flags: Any) -> tuple[Tensor, Tensor]:
        settings = Settings.read(numbers, flags)
        return launch.logprobs(logits, Rows(*rows), settings, num_completions, **launch.options(logits))

    def logprobs_backward(
        logits: Tensor, grad: Tensor, rows: Any, num_completions: int, numbers: Any, flags: Any, statistics: Tensor
    ) -> Tensor:
        settings = Settings.read(numbers, flags)
        return launch.logprobs_backward(
            logits, grad, Rows(*rows), settings, num_completions, statistics, **launch.options(logits)
        )

    def advantages(groups: Any, numbers: Any, flags: Any) -> tuple[Tensor, Tensor]:
        return launch.advantages(Groups(*groups), Settings.read(numbers, flags))

    def scale(gradient: Tensor, factor: Tensor) -> None:
        launch.scale(gradient, factor, **launch.options(gradient))

    implementations: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "token_loss": (objective("new"), _fake_token_loss),
        "token_loss_value": (objective("none"), _fake_token_loss_value),
        "token_loss_": (objective("in place"), _fake_token_loss_value),
        "token_logprobs": (logprobs, _fake_logprobs),
        "token_logprobs_backward": (logprobs_backward, lambda logits, *args: logits.new_empty(logits.shape)),
        "advantages": (advantages, _fake_advantages),
        "scale_": (scale, lambda gradient, scale: None),
    }
    library = torch.library.Library("mdpgrpo_fast", "FRAGMENT")
    for name, (function, fake) in implementations.items():
        library.define(f"{backend}_{name}{SCHEMAS[name]}")
        for key in keys:
            library.impl(f"{backend}_{name}", function, key)
        torch.library.register_fake(f"mdpgrpo_fast::{backend}_{name}", fake, lib=library)
    return library
