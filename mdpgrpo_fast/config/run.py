"""The run's knobs: model, prompts, rewards, optimiser, logging."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from .knobs import Backend, ConfigError, check_values, knob, require
from .presets import PRESETS


@dataclass(frozen=True)
class PromptConfig:
    """What training and evaluation share: the model, how prompts are read and rendered, what is scored. Lengths in
    tokens."""

    model: str | None = knob(None, "model or LoRA adapter: directory or hub id; unset: the embedded seed policy")
    tokenizer: str | None = knob(None, "tokenizer: directory or hub id; unset: the model's")
    trust_remote_code: bool = knob(False, "run the Python code that a model or a data set brings along")
    text_only: bool = knob(
        False,
        "of a model with vision or audio take and save the text part alone; without it one is refused whose other "
        "parts a save would lose",
    )

    split: str | None = knob(None, "split of a data set; unset: the one named train, or the only one there is")
    prompt_column: str = knob("prompt", "column that holds the prompt, text or chat messages")
    columns: list[str] = knob([], "columns by other names, as new=old: answer=solution")
    on_bad_row: Literal["error", "drop"] = knob(
        "error", "a row that cannot be used stops the run, or is left out, counted and listed in the run directory"
    )
    max_prompt_length: int = knob(1024, "longest prompt; a longer one is a bad row")
    max_completion_length: int = knob(1024, "most new tokens of a completion")

    chat_template: str = knob(
        "auto",
        "auto: the tokenizer's, for chat messages always, for plain text where the model is a chat model; on: for "
        "plain text too; off: never; or a file that holds one",
    )
    system_prompt: str | None = knob(None, "system message before each prompt that has none")
    template_args: list[str] = knob([], "variables of the chat template, as enable_thinking=false")
    strip_thinking: Literal["auto", "on", "off"] = knob(
        "auto",
        "rewards and evaluation score what follows the last closing think tag; auto: where the tokenizer's template "
        "knows such a tag",
    )
    rules: Literal["ifeval", "mdpgrpo", "iftrain", "ifbench", "m-ifeval"] = knob(
        "ifeval", "verifier rules: Google's IFEval, the MDP-GRPO authors', IF-Train, IFBench or M-IFEval"
    )
    instructions: list[str] = knob(
        [], "modules or .py files that register instruction types of one's own (mdpgrpo_fast.verifiers.instruction)"
    )
    cpu: bool = knob(False, "stay on the CPU even where a GPU is present")

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("max_prompt_length", "max_completion_length"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("columns", "template_args"):
            for item in getattr(self, name):
                require("=" in item.strip("="), name, item, "name=value")


@dataclass(frozen=True)
class TrainConfig(PromptConfig):
    """The run: model, data, rewards, optimiser, logging. Counts are per process; lengths are in tokens."""

    preset: str = knob(
        "paper",
        f"method settings to start from: {', '.join(PRESETS)} (of grpo z is TRL's and all else the paper's; trl has "
        "TRL's defaults)",
    )
    train_file: str | None = knob(
        None, "prompts: JSON lines, a JSON array, parquet or CSV, plain or .gz, or a data set; unset: the embedded ones"
    )
    eval_file: str | None = knob(None, "held-out prompts, answered greedily before and after; unset: none")
    eval_split: str | None = knob(None, "split of eval_file, where it is a data set; unset: as --split")
    output_dir: str = knob("runs/train", "run directory; an earlier one of that name is moved aside")
    allow_random_weights: bool = knob(
        False, "train a model whose files lack some of its weights, which are drawn at random then"
    )
    merge_adapter: bool = knob(
        False, "model is a LoRA adapter: add it to the weights first; otherwise its training goes on"
    )

    reward: list[str] = knob(
        ["constraints"],
        "rewards: 'constraints', 'soft_overlong_punishment' (DAPO) and 'cosine_scaled' (both with arguments in "
        "parentheses), module:function with TRL's signature, a reward model's directory or hub id; several",
    )
    reward_weights: list[float] | None = knob(None, "one weight per reward; unset: all 1")
    constraint_reward: Literal["share", "all", "loose"] = knob(
        "share",
        "'constraints' is the share of constraints satisfied, 1 where all are and else 0 (with K = 1), or the share "
        "under IFEval's loose rule",
    )
    reward_range: list[float] | None = knob(
        None, "lowest and highest weighted sum of the rewards, mapped to 0 and 1 for the advantages; unset: as it is"
    )
    reward_isolation: Literal["none", "process"] = knob(
        "none",
        "a reward function is called with all completions of a step in the trainer's process, or with one at a time in "
        "processes of its own, which may hang or die",
    )
    reward_timeout: float | None = knob(
        None, "seconds that a call of a reward may take; unset: 600 for those of a step, 10 for one in its own process"
    )
    reward_workers: int = knob(2, "processes that score responses")
    reward_memory: int = knob(
        4096, "MB that each of them may take beyond what it holds once rewards are loaded; 0: no limit"
    )
    reward_check: bool = knob(True, "call every reward with two sample rows before the model is loaded")
    on_bad_reward: Literal["error", "drop"] = knob(
        "error", "a reward that is NaN or beyond ±1e6 stops the run, or drops the sample"
    )
    max_dropped: float = knob(
        0.25, "stop where more than this share of the samples of ten steps in a row is dropped; 1: never"
    )
    keep_special_tokens: bool = knob(False, "reward functions see special tokens in the completions")
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
    updates_per_rollout: int = knob(1, "how often each batch of completions is gone through")
    mini_batches: int = knob(
        1, "parts of a batch of completions, whole groups in a random order, each with an optimiser update of its own"
    )
    sync_reference: int = knob(
        0, "move the reference of the KL towards the policy after every so many steps; 0: it stays the starting model"
    )
    reference_mix: float = knob(
        0.6, "sync_reference: share of the policy in the new reference, the rest is the old one's (1: a copy)"
    )
    refill: int = knob(
        0,
        "dynamic sampling: how often a step may replace groups without a gradient (A = 0, no KL) by other prompts",
    )

    learning_rate: float = knob(1e-5, "peak learning rate of AdamW")
    lr_schedule: Literal["constant", "linear", "cosine"] = knob("linear", "schedule after the warmup")
    warmup_steps: int = knob(0, "optimiser updates of linear warmup")
    weight_decay: float = knob(0.0, "weight decay of AdamW")
    adam_beta2: float = knob(0.999, "second moment decay of AdamW")
    fused_adamw: bool = knob(True, "torch's fused AdamW, one kernel over all parameters")
    max_grad_norm: float = knob(1.0, "gradient norm clip; 0: none")
    max_bad_steps: int = knob(
        5,
        "stop after so many steps in a row with an update that is skipped: its loss or the norm of its gradient is no "
        "finite number",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = knob(
        "no", "autocast precision of the passes of training; sampling and evaluation are in the dtype of the weights"
    )
    dtype: Literal["float32", "bfloat16", "auto"] = knob(
        "float32",
        "dtype of the trained weights; in bfloat16 small updates round away (mixed_precision saves memory); "
        "LoRA adapters stay in float32",
    )
    backend: Backend = knob(
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
    repetition_penalty: float = knob(
        1.0,
        "divide the logits of tokens that the prompt or the completion has by it, multiply those below 0; 1: none. "
        "Held-out answers are greedy without it",
    )
    generation_kwargs: list[str] = knob(
        [],
        "what transformers' logits processors do, as no_repeat_ngram_size=3 (names of its GenerationConfig); held-out "
        "answers are greedy without them",
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
    vllm_lora: Literal["merged", "adapter"] = knob(
        "merged",
        "rollout vllm with lora: merged weights go to vLLM, or the adapter alone, which vLLM adds as it samples: some "
        "megabytes a step, at a slower forward pass",
    )
    async_rollout: int = knob(
        0,
        "1: a server (vllm_url) samples the next step's completions while a step trains, by weights that are one step "
        "older; turns sampler_correction on. What is under way at a checkpoint is sampled anew on resume; 0: off",
    )
    cpu_linear: Literal["auto", "torch"] = knob(
        "auto", "linear layers on the CPU: auto takes oneDNN's where they were measured to be faster (AMD with AVX-512)"
    )
    rank_timeout: float = knob(
        1800.0, "several processes: seconds that one waits for another, beside what the rewards of a step may take"
    )
    seed: int = knob(42, "seed of data order and sampling")

    eval_samples: int = knob(0, "held-out prompts to use; 0: all")
    eval_every: int = knob(0, "evaluate every so many steps too; 0: only before and after")
    keep_best: bool = knob(
        False, "keep the model with the best held-out score (HSR, else reward) in the run directory too, as best/"
    )
    report_to: list[str] = knob([], "trackers through accelerate: tensorboard, trackio, wandb, mlflow; or none")
    log_completions: int = knob(8, "completions written to completions.jsonl each step")
    save_model: bool = knob(True, "write the trained model to the run directory")
    save_every: int | None = knob(
        None, "write a checkpoint every so many steps, the newest two are kept; unset: every 15 minutes; 0: none"
    )
    resume: bool | Literal["auto"] = knob(
        False,
        "go on from the newest whole checkpoint in output_dir, to more or fewer steps if asked; auto: where there is "
        "one, else start",
    )
    push_to_hub: bool = knob(False, "upload the model, its card and report at the end")
    hub_model_id: str | None = knob(None, "repository on the hub, as user/name; unset: the name of output_dir")
    hub_private_repo: bool = knob(
        False, "make that repository private; one that is there has to be (the report shows prompts and answers)"
    )
    profile: bool = knob(False, "write a torch profiler trace of two steps to the run directory")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.report_to == ["none"]:  # as other trainers have it
            object.__setattr__(self, "report_to", [])
        for name in (
            "prompts_per_step",
            "micro_batch_size",
            "eval_batch_size",
            "updates_per_rollout",
            "mini_batches",
            "num_constraints",
            "lora_r",
            "max_bad_steps",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        most = self.prompts_per_step
        require(self.mini_batches <= most, "mini_batches", self.mini_batches, f"at most prompts_per_step = {most}")
        if self.lora and self.sync_reference and self.reference_mix < 1:
            raise ConfigError(
                "reference_mix must be 1 with lora, where the reference is adapters beside the model: a mix of two "
                f"adapters' matrices is not the mix of the weights that they add up to; got {self.reference_mix!r}"
            )
        if self.dtype == "bfloat16" and self.sync_reference and self.reference_mix < 1:
            raise ConfigError(
                "reference_mix must be 1 with dtype = bfloat16, in which small shares of the policy round away "
                f"(--reference-mix 1, or --dtype float32); got {self.reference_mix!r}"
            )
        if self.push_to_hub and not self.save_model:
            raise ConfigError("push_to_hub needs save_model; got False")
        if self.packing == "off" and self.tokens_per_micro_batch is not None:
            raise ConfigError("tokens_per_micro_batch needs packing; without it, micro_batch_size counts completions")
        for name in ("tokens_per_micro_batch", "workspace_mb"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        for name in (
            "eval_samples",
            "eval_every",
            "refill",
            "sync_reference",
            "vllm_retries",
            "log_completions",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or above")
        for item in self.generation_kwargs:
            require("=" in item.strip("="), "generation_kwargs", item, "name=value")
        for name in ("learning_rate", "epochs", "lora_alpha", "vllm_timeout", "repetition_penalty", "rank_timeout"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(len(self.lora_target_modules) >= 1, "lora_target_modules", self.lora_target_modules, "at least one")
        require(0 < self.reference_mix <= 1, "reference_mix", self.reference_mix, "in (0, 1]")
        require(0 < self.vllm_memory < 1, "vllm_memory", self.vllm_memory, "in (0, 1)")
        require(0 <= self.adam_beta2 < 1, "adam_beta2", self.adam_beta2, "in [0, 1)")
        require(self.async_rollout in (0, 1), "async_rollout", self.async_rollout, "0 or 1")
        require(self.steps is None or self.steps >= 1, "steps", self.steps, "at least 1")
        require(self.save_every is None or self.save_every >= 0, "save_every", self.save_every, "0 or above")
        require(0 <= self.max_dropped <= 1, "max_dropped", self.max_dropped, "in [0, 1]")
        check_rewards(self)
        bounds = self.reward_range
        if bounds is not None:
            ok = len(bounds) == 2 and all(map(math.isfinite, bounds)) and bounds[0] < bounds[1]
            require(ok, "reward_range", bounds, "two finite numbers, the lower one first")


def check_rewards(config: Any) -> None:
    """Raises ConfigError for settings of rewards, which training and evaluation have by the same names, that cannot be
    used."""
    timeout, weights = config.reward_timeout, config.reward_weights
    require(timeout is None or timeout > 0, "reward_timeout", timeout, "above 0")
    require(config.reward_workers >= 1, "reward_workers", config.reward_workers, "at least 1")
    require(config.reward_memory >= 0, "reward_memory", config.reward_memory, "0 or above")
    require(len(config.reward) >= 1, "reward", config.reward, "at least one reward")
    if weights is not None and len(weights) != len(config.reward):
        raise ConfigError(f"reward_weights must have one weight per reward ({len(config.reward)}); got {weights}")
    for weight in weights or []:
        require(math.isfinite(weight), "reward_weights", weight, "finite")
