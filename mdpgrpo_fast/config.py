"""Every knob of the library: one default, one check, one sentence of help. Presets name the published settings."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

PAPER_TEMPERATURES = (0.1, 0.4, 0.7, 1.0)


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the knob, what came and what is expected."""


def knob(default: Any, help: str) -> Any:
    """A dataclass field with the help text of its command-line flag."""
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def unknown_name(kind: str, name: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
    return ConfigError(f"unknown {kind} {name!r}{hint}")


def check_choices(config: Any) -> None:
    """Raises ConfigError for a choice that is none and for a number that is not finite."""
    hints = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        choices = get_args(hints[f.name])
        value = getattr(config, f.name)
        if choices and all(isinstance(c, str) for c in choices) and value not in choices:
            raise ConfigError(f"{f.name} must be one of {', '.join(choices)}; got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{f.name} must be finite; got {value!r}")


def require(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {expected}; got {value!r}")


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
    goal_mean: Literal["half", "max_half_mean", "mean"] = knob(
        "half", "m of the goal anchor: 0.5 (paper), max(0.5, group mean) (released code) or the group mean"
    )
    goal_std: Literal["released", "binomial"] = knob(
        "released", "s of the goal anchor: sqrt(G/(4K)) (released code) or sqrt(1/(4K))"
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
        check_choices(self)
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


@dataclass(frozen=True)
class TrainConfig:
    """The run: model, data, rewards, optimiser, logging. Counts are per process; lengths are in tokens."""

    preset: str = knob("paper", f"method settings to start from: {', '.join(PRESETS)}")
    model: str | None = knob(None, "model directory or hub id; unset: the embedded seed policy")
    train_file: str | None = knob(None, "JSON lines of prompts; unset: the embedded ones")
    eval_file: str | None = knob(None, "JSON lines of held-out prompts, scored greedily before and after; unset: none")
    output_dir: str = knob("runs/train", "run directory; an earlier one of that name is moved aside")

    reward: list[str] = knob(["constraints"], "rewards: 'constraints' (share satisfied) or module:function, several")
    reward_weights: list[float] | None = knob(None, "one weight per reward; unset: all 1")
    reward_timeout: float = knob(10.0, "seconds a scorer may take for one response before that sample is dropped")
    reward_workers: int = knob(2, "processes that score responses")
    on_bad_reward: Literal["error", "drop"] = knob("error", "a None or NaN reward stops the run, or drops the sample")
    rules: Literal["ifeval", "mdpgrpo"] = knob("ifeval", "verifier rules: Google's IFEval or the MDP-GRPO authors'")
    num_constraints: int = knob(1, "K for prompts that have no instruction_id_list and no num_constraints column")

    prompts_per_step: int = knob(4, "P, prompts per optimiser batch and process")
    packing: Literal["auto", "on", "off"] = knob(
        "auto",
        "run each prompt once for all completions of its group; auto pads, and says so, where that is not exact",
    )
    tokens_per_micro_batch: int | None = knob(
        None, "packing: most tokens of a forward pass, whole groups; unset: 8192, or what the largest group may need"
    )
    micro_batch_size: int = knob(8, "without packing: completions per forward and backward pass")
    eval_batch_size: int = knob(64, "held-out prompts answered at once")
    steps: int | None = knob(None, "optimiser batches; unset: as many as one epoch has")
    epochs: float = knob(1.0, "passes over the prompts when steps is unset")
    updates_per_rollout: int = knob(1, "optimiser updates on each batch of completions")
    refill: int = knob(
        0,
        "dynamic sampling: how often a step may replace groups without a gradient (A = 0, no KL) by other prompts",
    )
    max_prompt_length: int = knob(1024, "longest prompt in tokens; a longer one is an error")
    max_completion_length: int = knob(1024, "most new tokens of a completion")

    learning_rate: float = knob(1e-5, "peak learning rate of AdamW")
    lr_schedule: Literal["constant", "linear", "cosine"] = knob("linear", "schedule after the warmup")
    warmup_steps: int = knob(0, "steps of linear warmup")
    weight_decay: float = knob(0.0, "weight decay of AdamW")
    adam_beta2: float = knob(0.999, "second moment decay of AdamW")
    fused_adamw: bool = knob(True, "torch's fused AdamW, one kernel over all parameters")
    max_grad_norm: float = knob(1.0, "gradient norm clip; 0: none")
    mixed_precision: Literal["no", "bf16", "fp16"] = knob(
        "no", "autocast precision of the passes of training; sampling and evaluation are in the dtype of the weights"
    )
    dtype: Literal["float32", "bfloat16", "auto"] = knob(
        "float32",
        "dtype of the trained weights; in bfloat16 small updates round away (mixed_precision saves memory); "
        "LoRA adapters stay in float32",
    )
    backend: Literal["auto", "torch", "triton", "cpu", "cuda"] = knob(
        "auto",
        "of the loss: triton, cpu and cuda are fused kernels, torch is the reference; auto: triton on a GPU, else cpu",
    )
    lm_head: Literal["auto", "fused", "logits"] = knob(
        "auto",
        "loss straight from hidden states (fused), or from logits; auto takes logits where the head is not linear",
    )
    workspace_mb: int | None = knob(
        None,
        "lm_head fused: MiB that the logits of a chunk of tokens may take; unset: 256 on the CPU, on a GPU 1024, or a "
        "64th of its memory where that is less",
    )
    fp32_logits: bool = knob(False, "lm_head fused: keep a chunk's logits in float32 under bf16 and fp16")
    skip_idle: bool = knob(
        False,
        "lm_head fused: leave completions with A = 0 and no KL term out of the loss; entropy, ratios and clip shares "
        "are then logged over the others alone",
    )
    attention: Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"] = knob(
        "auto",
        "the model's attention; auto: what transformers chooses; flash_attention_2 needs flash-attn ≥ 2.7",
    )
    gradient_checkpointing: bool = knob(
        False, "keep one state per layer and compute the rest again in the backward pass"
    )
    compile: bool = knob(False, "torch.compile for the model's blocks in the passes of training")
    lora: bool = knob(False, "train LoRA adapters (package peft) and leave the model's own weights as they are")
    lora_r: int = knob(32, "LoRA rank")
    lora_alpha: float = knob(64.0, "LoRA alpha; the adapters' product is scaled by alpha / r")
    lora_target_modules: list[str] = knob(
        ["auto"],
        "linear layers under LoRA, by the last part of their names; auto: all of the blocks (q, k, v, o, gate, up, "
        "down on Llama, Qwen, Gemma)",
    )
    rollout: Literal["transformers", "vllm"] = knob("transformers", "what samples: the model itself, or vLLM")
    vllm_url: str | None = knob(None, "rollout vllm: address of a server; unset: vLLM in this process")
    vllm_memory: float = knob(0.3, "rollout vllm: share of the GPU's memory for vLLM in this process")
    vllm_sleep: bool = knob(True, "rollout vllm: free vLLM's memory in this process while training")
    vllm_timeout: float = knob(600.0, "rollout vllm: seconds that a server's answer may take")
    vllm_retries: int = knob(5, "rollout vllm: attempts after the first, with growing pauses")
    vllm_sync_dir: str | None = knob(
        None, "rollout vllm: directory for weights on their way to a server (/dev/shm, a shared disk)"
    )
    cpu_linear: Literal["auto", "torch"] = knob(
        "auto", "linear layers on the CPU: auto takes oneDNN's where they were measured to be faster (AMD with AVX-512)"
    )
    cpu: bool = knob(False, "stay on the CPU even where a GPU is present")
    seed: int = knob(42, "seed of data order and sampling")

    eval_samples: int = knob(0, "held-out prompts to use; 0: all")
    eval_every: int = knob(0, "evaluate every so many steps too; 0: only before and after")
    report_to: list[str] = knob([], "trackers through accelerate: tensorboard, trackio, wandb, mlflow")
    log_completions: int = knob(8, "completions written to completions.jsonl each step")
    save_model: bool = knob(True, "write the trained model to the run directory")
    save_every: int = knob(0, "write a checkpoint every so many steps, the newest two are kept; 0: none")
    resume: bool = knob(False, "go on from the newest checkpoint in output_dir, with the same settings")
    profile: bool = knob(False, "write a torch profiler trace of two steps to the run directory")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in (
            "prompts_per_step",
            "micro_batch_size",
            "eval_batch_size",
            "updates_per_rollout",
            "max_prompt_length",
            "max_completion_length",
            "reward_workers",
            "num_constraints",
            "lora_r",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        if self.packing == "off" and self.tokens_per_micro_batch is not None:
            raise ConfigError("tokens_per_micro_batch needs packing; without it, micro_batch_size counts completions")
        for name in ("tokens_per_micro_batch", "workspace_mb"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        for name in (
            "eval_samples",
            "eval_every",
            "save_every",
            "refill",
            "vllm_retries",
            "log_completions",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or above")
        for name in ("learning_rate", "reward_timeout", "epochs", "lora_alpha", "vllm_timeout"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(len(self.lora_target_modules) >= 1, "lora_target_modules", self.lora_target_modules, "at least one")
        require(0 < self.vllm_memory < 1, "vllm_memory", self.vllm_memory, "in (0, 1)")
        require(0 <= self.adam_beta2 < 1, "adam_beta2", self.adam_beta2, "in [0, 1)")
        require(self.steps is None or self.steps >= 1, "steps", self.steps, "at least 1")
        require(len(self.reward) >= 1, "reward", self.reward, "at least one reward")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward):
            raise ConfigError(
                f"reward_weights must have one weight per reward ({len(self.reward)}); got {self.reward_weights}"
            )
        for weight in self.reward_weights or []:
            require(math.isfinite(weight), "reward_weights", weight, "finite")
