"""Checkpoints of a run: everything that the next step depends on, used only where written whole, and read back.

accelerate writes, names (checkpoints/checkpoint_N after N steps) and prunes them; `progress.json`, which comes last,
marks a whole one. The weights in it are in from_pretrained form, under LoRA an adapter folder; but under FSDP and
DeepSpeed they are in accelerate's own, sharded form, which only a resumed run reads.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from safetensors.torch import load_model

from ..config import ConfigError, MDPGRPOConfig, TrainConfig
from ..log import reason_of
from ..models.lora import load_adapters, save_adapters

# accelerate deletes the oldest before it writes a new one. With two the newest whole one stays until that is whole too;
# with one a killed save would leave none.
TOTAL_LIMIT = 2
WEIGHTS = "model.safetensors"
# Knobs that a resumed run may be given anew. What is written, and how long something may take:
FREE_KNOBS = (
    "output_dir", "resume", "save_every", "eval_every", "log_completions", "report_to", "profile", "save_model",
    "reward_timeout", "reward_workers", "reward_isolation", "reward_check", "on_bad_reward", "max_dropped",
    "reward_memory", "keep_best", "push_to_hub", "hub_model_id", "hub_private_repo", "vllm_url", "vllm_memory",
    "vllm_sleep", "vllm_timeout", "vllm_retries", "vllm_sync_dir", "vllm_lora", "rank_timeout",
)  # fmt: skip
# How long the run is: its prompts are drawn in the same order, its learning rates follow the new schedule.
SCHEDULE_KNOBS = ("steps", "epochs", "warmup_steps")
# In which order the same sums are taken, or whether something is computed again: the last bits.
ROUNDING_KNOBS = (
    "eval_batch_size", "micro_batch_size", "tokens_per_micro_batch", "workspace_mb", "gradient_checkpointing",
    "compile", "backend",
)  # fmt: skip
# bnpo divides by the tokens of a micro-batch.
BNPO_KNOBS = ("micro_batch_size", "tokens_per_micro_batch")


def configuration(path: Path) -> ProjectConfiguration:
    """What accelerate has to know of the run directory to name and prune checkpoints in it."""
    return ProjectConfiguration(project_dir=str(path), automatic_checkpoint_naming=True, total_limit=TOTAL_LIMIT)


def keep_loadable(accelerator: Accelerator, model: Any, tokenizer: Any) -> None:
    """From now on checkpoints hold the weights of the language model as `from_pretrained` takes them, and only so.

    Sharded weights go accelerate's own way.
    """

    def write(models: list[Any], weights: list[Any], folder: str) -> None:
        if not weights:
            return
        weights.clear()  # or accelerate would write them too
        if not accelerator.is_main_process:
            return
        if hasattr(model, "peft_config"):
            save_adapters(model, folder)
        else:
            # In one file and under the names of the model, so that reading it back is exact and needs no second model.
            model.save_pretrained(folder, max_shard_size="1000TB", save_original_format=False)
        tokenizer.save_pretrained(folder)

    def read(models: list[Any], folder: str) -> None:
        if not models:
            return
        models.clear()
        if hasattr(model, "peft_config"):
            load_adapters(model, folder)
        else:
            load_model(model, Path(folder) / WEIGHTS)

    accelerator.register_save_state_pre_hook(write)
    accelerator.register_load_state_pre_hook(read)


def save(accelerator: Accelerator, path: Path, step: int, total: int, prompts: str) -> None:
    """Model, optimiser, schedule and every rank's random state after `step` of `total` steps; called by all ranks.

    prompts: Task.fingerprint.
    """
    accelerator.project_configuration.iteration = step
    accelerator.save_state()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder = path / "checkpoints" / f"checkpoint_{step}"
        progress = {"step": step, "total": total, "processes": accelerator.num_processes, "prompts": prompts}
        (folder / "progress.tmp").write_text(json.dumps(progress) + "\n", encoding="utf-8")
        (folder / "progress.tmp").rename(folder / "progress.json")
    accelerator.wait_for_everyone()


def newest(path: Path) -> Path | None:
    """The checkpoint of the most steps in a run directory; None where there is none that was finished."""
    return max((p for p in _folders(path) if _is_whole(p)), key=lambda p: int(p.name.rpartition("_")[2]), default=None)


def _folders(path: Path) -> list[Path]:
    return [p for p in (path / "checkpoints").glob("checkpoint_*") if re.fullmatch(r"checkpoint_\d+", p.name)]


def _is_whole(folder: Path) -> bool:
    return (folder / "progress.json").exists()


def check_resume(run: TrainConfig, method: MDPGRPOConfig) -> None:
    """Raises ConfigError where output_dir holds no checkpoint that can be read, or one of a run with other settings."""
    path = Path(run.output_dir)
    folder = newest(path)
    if folder is None:
        where = str(path / "checkpoints")
        if any((path / "checkpoints").glob("step-*")):
            raise ConfigError(
                f"resume needs checkpoints named checkpoint_N; those in {where!r} are of an earlier version of this "
                "library (step-N), which can resume them"
            )
        raise ConfigError(f"resume needs a checkpoint in {where!r}, and there is none (save_every)")
    if (folder / WEIGHTS).exists() and not (folder / "config.json").exists():
        raise ConfigError(
            f"resume needs a checkpoint of this version of the library; {str(folder)!r} is of an earlier one"
        )
    fixed = BNPO_KNOBS if method.aggregation == "bnpo" else ()
    for name, (was, value) in _changed(run, method).items():
        if name in fixed or name not in (*FREE_KNOBS, *SCHEDULE_KNOBS, *ROUNDING_KNOBS):
            raise ConfigError(f"resume needs the settings of the run before: {name} was {was!r}; got {value!r}")
    if run.steps is not None:
        check_steps(run.steps, int(folder.name.rpartition("_")[2]))


def check_steps(total: int, done: int) -> None:
    """Raises ConfigError where a run has more steps behind it than it is to have."""
    if total < done:
        raise ConfigError(f"resume needs steps of at least the {done} that are done; got {total}")


def _changed(run: TrainConfig, method: MDPGRPOConfig) -> dict[str, tuple[Any, Any]]:
    """Knobs whose value is another than in the run's config.yaml, with what it was and is."""
    file = Path(run.output_dir) / "config.yaml"
    try:
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
        before = {"run": dict(before["run"]), "method": dict(before["method"])}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, ValueError) as e:
        raise ConfigError(f"resume needs the settings of the run before, {str(file)!r}: {reason_of(e)}") from None
    # A knob that the library did not have then was at its default.
    defaults = {"run": asdict(TrainConfig()), "method": asdict(MDPGRPOConfig())}
    return {
        name: (was, value)
        for part, values in {"run": asdict(run), "method": asdict(method)}.items()
        for name, value in values.items()
        if (was := before[part].get(name, defaults[part][name])) != value
    }


def changed_rounding(run: TrainConfig, method: MDPGRPOConfig) -> list[str]:
    """Knobs of a resumed run that change the last bits of its numbers."""
    return [name for name in _changed(run, method) if name in ROUNDING_KNOBS]


def load(accelerator: Accelerator, path: Path, total: int, prompts: str) -> tuple[int, int | None]:
    """Reads the newest checkpoint back; returns its step, and how many steps the run was to have (None: not known).

    total, prompts: steps that the run is to have now, and its Task.fingerprint. Nothing is changed on the disk.
    Raises: ConfigError for a checkpoint of another number of processes, of other prompts, or of more steps.
    """
    folder = newest(path)
    assert folder is not None, "check_resume has found one"
    progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    if progress["processes"] != accelerator.num_processes:
        raise ConfigError(
            f"resume needs the {progress['processes']} processes that wrote {folder}; got {accelerator.num_processes}"
        )
    check_steps(total, progress["step"])
    was = progress.get("prompts", prompts)
    if was != prompts:
        raise ConfigError(f"resume needs the training prompts of the run before: they were {was}; got {prompts}")
    accelerator.load_state(str(folder))
    return int(progress["step"]), progress.get("total")


def follow_schedule(scheduler: Any) -> float:
    """The learning rate of the next step, set as the scheduler has it now: what was read back is of an earlier one."""
    rates = [base * f(scheduler.last_epoch) for base, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    return float(rates[0])


def drop_what_came_later(path: Path, step: int) -> None:
    """Take lines of later steps, and of the evaluation at the end, out of the run's JSON lines."""
    # Checkpoints that were not finished would be counted by the limit in place of whole ones.
    for unfinished in (p for p in _folders(path) if not _is_whole(p)):
        shutil.rmtree(unfinished)
    for name in ("metrics.jsonl", "completions.jsonl"):
        file = path / name
        if not file.exists():
            continue
        kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _is_of_steps_to(step, line)]
        file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _is_of_steps_to(step: int, line: str) -> bool:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # a line cut off by what ended the run
        return False
    return bool(row["step"] <= step and row.get("phase") != "after")


def logged_rows(accelerator: Accelerator, path: Path, step: int) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl up to a step, on every rank."""
    found: list[list[dict[str, Any]]] = [[]]
    if accelerator.is_main_process:
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = [[json.loads(line) for line in lines if _is_of_steps_to(step, line)]]
    broadcast_object_list(found)
    return found[0]


def first_evaluation(path: Path) -> dict[str, Any] | None:
    """The held-out result of step 0, from metrics.jsonl."""
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return next((r["eval"] for r in map(json.loads, lines) if r["step"] == 0 and "eval" in r), None)


class Best:
    """The best held-out score of a run, resumed or not, and the step that it came after; on all ranks."""

    def __init__(self, accelerator: Accelerator, path: Path, resume: bool) -> None:
        self.accelerator, self.file = accelerator, path / "best.json"
        self.found: dict[str, Any] | None = None
        if not resume:
            return
        found: list[dict[str, Any] | None] = [None]
        if accelerator.is_main_process:
            first = first_evaluation(path)
            if self.file.exists():
                found = [json.loads(self.file.read_text(encoding="utf-8"))]
            elif first is not None and self.score(first) is not None:
                found = [{"step": 0, "score": self.score(first)}]
        broadcast_object_list(found)
        self.found = found[0]

    @staticmethod
    def score(result: dict[str, Any]) -> float | None:
        """HSR, or the reward where no prompt has constraints."""
        score: float | None = result["reward"] if result["hsr"] is None else result["hsr"]
        return score

    def keep(self, step: int, result: dict[str, Any], save: Callable[[], None]) -> None:
        """Calls save() where the score is above all before; of the untrained model (step 0) only the score counts."""
        score = self.score(result)
        if score is None or (self.found is not None and score <= self.found["score"]):
            return
        self.found = {"step": step, "score": score}
        if step:
            save()
            # Only now: a run that is resumed would not save it again.
            if self.accelerator.is_main_process:
                self.file.write_text(json.dumps(self.found) + "\n", encoding="utf-8")
