"""What a run that goes on may have other than before, and what it needs to find."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ...config import ConfigError, MDPGRPOConfig, TrainConfig
from . import manifest

if TYPE_CHECKING:
    from ..task import Task

# Each knob is in exactly one of these classes. What is written, what is looked at beside the training, and how long
# something may take:
FREE_KNOBS = (
    "output_dir", "resume", "save_every", "eval_every", "log_completions", "report_to", "profile", "save_model",
    "reward_timeout", "reward_workers", "reward_memory", "reward_isolation", "reward_check", "on_bad_reward",
    "max_dropped", "keep_best", "push_to_hub", "hub_model_id", "hub_private_repo", "vllm_url", "vllm_memory",
    "vllm_sleep", "vllm_timeout", "vllm_retries", "vllm_sync_dir", "vllm_lora", "rank_timeout", "trust_remote_code",
    "preset", "max_bad_steps", "allow_random_weights",
)  # fmt: skip
# Where the prompts come from, whose fingerprint decides.
DATA_KNOBS = ("train_file", "eval_file", "split", "eval_split", "prompt_column", "on_bad_row", "eval_samples")
# How long the run is: its prompts are drawn in the same order, its learning rates follow the new schedule.
SCHEDULE_KNOBS = ("steps", "epochs", "warmup_steps")
# In which order the same sums are taken, or whether something is computed again: the last bits.
ROUNDING_KNOBS = (
    "eval_batch_size", "micro_batch_size", "tokens_per_micro_batch", "workspace_mb", "gradient_checkpointing",
    "compile", "backend", "packing", "attention", "cpu_linear",
)  # fmt: skip
# What decides learning.
FIXED_KNOBS = (
    "model", "tokenizer", "text_only", "merge_adapter", "columns", "max_prompt_length", "max_completion_length",
    "chat_template", "system_prompt", "template_args", "strip_thinking", "rules", "instructions", "cpu", "seed",
    "reward", "reward_weights", "constraint_reward", "reward_range", "keep_special_tokens", "num_constraints",
    "prompts_per_step", "updates_per_rollout", "mini_batches", "sync_reference", "reference_mix", "refill",
    "learning_rate", "lr_schedule", "weight_decay", "adam_beta2", "fused_adamw", "max_grad_norm",
    "mixed_precision", "dtype", "lm_head", "fp32_logits", "skip_idle", "lora", "lora_r", "lora_alpha",
    "lora_target_modules", "repetition_penalty", "generation_kwargs", "rollout", "async_rollout",
)  # fmt: skip
# Every knob of MDPGRPOConfig is fixed too. bnpo divides by the tokens of a micro-batch.
BNPO_KNOBS = ("micro_batch_size", "tokens_per_micro_batch", "packing")


class FinishedError(ConfigError):
    """With resume "auto": output_dir holds this very run, and nothing of it is left to do. The command line says so and
    ends with status 0."""


def resolve_resume(run: TrainConfig) -> TrainConfig:
    """The run with resume True or False where it is "auto": False while output_dir has no checkpoint of any kind."""
    if run.resume != "auto":
        return run
    path = Path(run.output_dir)
    return replace(run, resume=bool(manifest.folders(path)) or _has_earlier(path))


def check_unfinished(run: TrainConfig, method: MDPGRPOConfig, task: Task) -> None:
    """Raises: FinishedError where output_dir holds the run of these settings, prompts and weights, whole with its
    report. What is uploaded at its end is not: nothing says that it has been."""
    path = Path(run.output_dir)
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        same = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) == yaml.safe_load(
            config_text(run, method)
        )
        whole = same and summary["interrupted"] is False and (path / "report.html").exists() and not run.push_to_hub
        finished = whole and summary["fingerprints"] == task.fingerprints(run, method)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        return
    if finished:
        raise FinishedError(f"output_dir {run.output_dir!r} holds this run, which is finished: nothing is left to do")


def config_text(run: TrainConfig, method: MDPGRPOConfig) -> str:
    """What config.yaml holds: with --config it goes on with the run, or repeats it, as the command line says."""
    return yaml.safe_dump({"run": {**asdict(run), "resume": False}, "method": asdict(method)}, sort_keys=False)


def _has_earlier(path: Path) -> bool:
    """Whether there are checkpoints of versions of this library that named them otherwise."""
    return any(p.name[5:].isdigit() for p in (path / "checkpoints").glob("step-*"))


def none_whole(path: Path, damaged: Sequence[str]) -> ConfigError:
    """Why no checkpoint of a run directory can be resumed. damaged: what is wrong with each, the newest first."""
    where = str(path / "checkpoints")
    found = manifest.folders(path)
    old = [p for p in found if (p / "progress.json").exists() and not (p / manifest.NAME).exists()]
    if _has_earlier(path) or old:
        return ConfigError(
            f"resume needs a checkpoint of this version of the library; those in {where!r} are of an earlier one, "
            "which can resume them (they hold pickles, which this one does not load)"
        )
    if found:
        said = damaged[0] if damaged else f"{found[0].name} is damaged: {manifest.damage(found[0])}"
        return ConfigError(f"resume needs a whole checkpoint in {where!r}, and there is none: {said}")
    return ConfigError(f"resume needs a checkpoint in {where!r}, and there is none (save_every)")


def check_resume(run: TrainConfig, method: MDPGRPOConfig) -> None:
    """Raises ConfigError where output_dir holds no checkpoint that can be read, or one of a run with other settings.

    The contents of its files are looked at when they are loaded.
    """
    path = Path(run.output_dir)
    folder = manifest.newest(path)
    if folder is None:
        raise none_whole(path, ())
    fixed = BNPO_KNOBS if method.aggregation == "bnpo" else ()
    free = {*FREE_KNOBS, *DATA_KNOBS, *SCHEDULE_KNOBS, *ROUNDING_KNOBS} - {*fixed}
    for name, (was, value) in changed(folder, run, method).items():
        if name not in free:
            raise ConfigError(f"resume needs the settings of the run before: {name} was {was!r}; got {value!r}")
    if run.steps is not None:
        check_steps(run.steps, manifest.step_of(folder))


def check_steps(total: int, done: int) -> None:
    """Raises ConfigError where a run has more steps behind it than it is to have."""
    if total < done:
        raise ConfigError(f"resume needs steps of at least the {done} that are done; got {total}")


def changed(folder: Path, run: TrainConfig, method: MDPGRPOConfig) -> dict[str, tuple[Any, Any]]:
    """Knobs whose value is another than that of the run that wrote a checkpoint, with what it was and is."""
    before = manifest.read(folder)
    # A knob that the library did not have then was at its default.
    defaults = {"run": asdict(TrainConfig()), "method": asdict(MDPGRPOConfig())}
    return {
        name: (was, value)
        for part, values in {"run": asdict(run), "method": asdict(method)}.items()
        for name, value in values.items()
        if (was := before[part].get(name, defaults[part][name])) != value
    }


def setting_notes(folder: Path, run: TrainConfig, method: MDPGRPOConfig) -> list[str]:
    """What is to be said of the settings of a run that goes on from a checkpoint."""
    before, said = manifest.read(folder), []
    now = {"run": asdict(run), "method": asdict(method)}
    missing = {k: v for part, values in now.items() for k, v in values.items() if k not in before[part]}
    gone = [k for part, values in now.items() for k in before[part] if k not in values]
    if missing:
        named = ", ".join(f"{k} = {v!r}" for k, v in missing.items())
        said.append(f"the run before, of version {before['version']}, had no {named}: what it did is taken to be that")
    if gone:
        said.append(f"settings of the run before that this version has not: {', '.join(gone)}")
    rounding = [name for name in changed(folder, run, method) if name in ROUNDING_KNOBS]
    if rounding:
        said.append(f"resumed with another {', '.join(rounding)}: numbers differ in their last bits from one run's")
    return said


def follow_schedule(scheduler: Any) -> float:
    """The learning rate of the next step, set as the scheduler has it now: what was read back is of an earlier one."""
    rates = [base * f(scheduler.last_epoch) for base, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    return float(rates[0])
