"""The settings of `evaluate`, checked."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from ..config import ConfigError, PromptConfig, TrainConfig, check_rewards, knob, knob_of, require
from ..log import counted
from .answers import Draw

# How settings begin that concern prompts alone, which neither a suite nor FollowBench has.
OF_PROMPTS = (
    "reward", "constraint_reward", "on_bad_reward", "keep_special_tokens", "rules", "instructions", "split", "columns",
    "prompt_column", "samples", "temperature", "top_", "min_p", "seed",
)  # fmt: skip
OF_MODEL = {"model", "tokenizer", "trust_remote_code", "text_only", "cpu"}  # of PromptConfig, what a suite needs too


@dataclass(frozen=True)
class EvaluateConfig(PromptConfig):
    """What to evaluate. Raises ConfigError for a value out of range and for a setting without effect."""

    file: str | None = knob(
        None,
        "prompts, as for training; unset: the embedded held-out prompts, or none beside --suite and --followbench",
    )
    limit: int = knob(0, "use the first so many prompts, groups of FollowBench and documents of a task; 0: all")
    output: str | None = knob(None, "write the result as JSON here")
    completions: str | None = knob(None, "write prompts, responses and verdicts as JSON lines here")
    overwrite: bool = knob(False, "replace output and completions where they exist")
    batch_size: int = knob(64, "completions drawn at once")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob("auto", "dtype the weights are loaded in")

    reward: list[str] = knob_of(TrainConfig, "reward")
    reward_weights: list[float] | None = knob_of(TrainConfig, "reward_weights")
    constraint_reward: Literal["share", "all", "loose"] = knob_of(TrainConfig, "constraint_reward")
    reward_isolation: Literal["none", "process"] = knob_of(TrainConfig, "reward_isolation")
    reward_timeout: float | None = knob_of(TrainConfig, "reward_timeout")
    reward_workers: int = knob_of(TrainConfig, "reward_workers")
    reward_memory: int = knob_of(TrainConfig, "reward_memory")
    reward_check: bool = knob_of(TrainConfig, "reward_check")
    on_bad_reward: Literal["error", "drop"] = knob_of(TrainConfig, "on_bad_reward")
    keep_special_tokens: bool = knob_of(TrainConfig, "keep_special_tokens")

    samples: int = knob(1, "G, completions per prompt; several give pass@k, best of G, and scores by temperature")
    temperature: float | None = knob(
        None, "one sampling temperature for all; 0: greedy; unset: 0 for one sample, 1 for several"
    )
    temperatures: list[float] = knob([], "sampling temperatures of the samples; the list is repeated to fill them")
    top_p: float = knob(1.0, "nucleus sampling: keep the smallest token set of this probability")
    top_k: int = knob(0, "keep only the k most likely tokens; 0 keeps all")
    min_p: float = knob(0.0, "drop tokens less likely than this share of the most likely one; 0 keeps all")
    seed: int = knob(42, "seed of sampling")

    suite: list[str] = knob(
        [], "tasks of lm-eval, with commas or spaces between them: ifeval,mmlu,ai2_arc (extra eval)"
    )
    suite_tasks: str | None = knob(None, "folder with task files of your own, in lm-eval's form")
    suite_fewshot: int | None = knob(None, "examples before each question; unset: as each task says")
    suite_chat_template: bool = knob(False, "put the questions of a suite through the tokenizer's chat template")
    suite_max_length: int = knob(2048, "tokens of a question and its answer in a suite, at most")
    followbench: str | None = knob(None, "folder with FollowBench's *_constraints.json: its rule-checkable part")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rewards(self)
        for name in ("batch_size", "samples", "suite_max_length"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.limit >= 0, "limit", self.limit, "0 (all) or positive")
        require(self.suite_fewshot is None or self.suite_fewshot >= 0, "suite_fewshot", self.suite_fewshot, "0 or more")
        self._check_sampling()
        names = {f.name for f in dataclasses.fields(self)}
        if not self.suite:
            self._without_effect("suite", {n for n in names if n.startswith("suite_")})
        if self.scores_prompts and "constraints" not in self.reward:
            self._without_effect("'constraints' among the rewards", {"constraint_reward"})
        if not self.scores_prompts:
            self._without_effect("file", {n for n in names if n.startswith(OF_PROMPTS)})
            if not self.followbench:
                shared = {f.name for f in dataclasses.fields(PromptConfig)}
                self._without_effect("file or followbench", (shared - OF_MODEL) | {"completions"})

    def _check_sampling(self) -> None:
        taus, one, g = self.temperatures, self.temperature, self.samples
        if taus and one is not None:
            raise ConfigError(f"temperature and temperatures exclude each other; got {one} and {taus}")
        for tau in taus:
            require(math.isfinite(tau) and tau > 0, "temperatures", tau, "all above 0")
        if taus and g % len(taus):
            shared = f"{counted(g, 'sample')} cannot be shared evenly among {counted(len(taus), 'temperature')}"
            raise ConfigError(f"{shared}: samples must be a multiple of how many temperatures there are")
        require(one is None or one >= 0, "temperature", one, "0 (greedy) or above")
        if one == 0 and g > 1:
            raise ConfigError(f"temperature must be above 0 for samples = {g}, which would all be alike; got {one}")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or positive")
        require(0 <= self.min_p < 1, "min_p", self.min_p, "in [0, 1)")
        if self.draw.temperatures == (0.0,):
            for name in ("top_p", "top_k", "min_p", "seed"):
                if getattr(self, name) != getattr(EvaluateConfig, name):
                    raise ConfigError(f"{name} has no effect on a greedy answer: it needs samples or a temperature")

    def _without_effect(self, needed: str, names: set[str]) -> None:
        for field in dataclasses.fields(self):
            default = field.default_factory() if callable(field.default_factory) else field.default
            if field.name in names and getattr(self, field.name) != default:
                raise ConfigError(f"{field.name} has no effect without {needed}")

    @property
    def draw(self) -> Draw:
        """How completions of prompts are drawn."""
        taus = self.temperatures
        if not taus:
            taus = [self.temperature if self.temperature is not None else float(self.samples > 1)]
        return Draw(tuple(map(float, taus)) * (self.samples // len(taus)), self.top_p, self.top_k, self.min_p)

    @property
    def tasks(self) -> list[str]:
        """Names of the suite's tasks."""
        return [name for item in self.suite for name in item.split(",") if name]

    @property
    def scores_prompts(self) -> bool:
        """Whether a file of prompts, or the embedded one, is answered."""
        return self.file is not None or not (self.suite or self.followbench)
