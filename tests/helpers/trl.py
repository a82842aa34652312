"""Trainers of TRL on a small model, with and without our kernels, and what they log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from helpers.inputs import needed

trl = needed("trl")
ours = needed("mdpgrpo_fast.integrations.trl")  # of which an older TRL is refused, as Python 3.10 has

PROMPTS = ["write about the sea", "the wind", "a short list", "one two three four"]
# Wall-clock times, and what no trainer of ours logs.
TIMES = ("step_time", "train_runtime", "epoch")


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Of the text alone, with few levels, so that groups differ."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [min(1.0, len(set(text.split())) / 8 + len(text) % 3 / 7) for text in texts]


def arguments(tmp: Path, **given: Any) -> dict[str, Any]:
    """Of a GRPOConfig for a short run on the CPU."""
    return {
        "output_dir": str(tmp), "use_cpu": True, "bf16": False, "report_to": [], "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "num_generations": 4, "max_completion_length": 8, "max_steps": 4,
        "logging_steps": 1, "learning_rate": 2e-3, "save_strategy": "no", "disable_tqdm": True, **given,
    }  # fmt: skip


def make_trainer(kind: Any, config: Any, path: str, tmp: Path, rows: Any = None, lora: Any = None, **given: Any) -> Any:
    """kind, config: classes of a trainer and its config; path: of the model; lora: a LoraConfig."""
    from datasets import Dataset

    more = {} if lora is None else {"peft_config": lora}
    rows = [{"prompt": p} for p in PROMPTS] if rows is None else rows
    return kind(path, reward, config(**arguments(tmp, **given)), Dataset.from_list(rows), **more)


def plain(path: str, tmp: Path, **given: Any) -> Any:
    """A GRPOTrainer of TRL, with a KL term and two updates of each generation."""
    return make_trainer(trl.GRPOTrainer, trl.GRPOConfig, path, tmp, **{"beta": 0.1, "num_iterations": 2, **given})


def logged(trainer: Any) -> list[dict[str, Any]]:
    """The rows that a run logs, of its steps."""
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def assert_same_log(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], tolerance: float = 1e-5) -> None:
    """Every metric that TRL logs, to a tolerance relative to 1 or to itself where it is larger; gradient norms, which
    grow apart first, to ten times that."""
    assert len(ours) == len(theirs) > 0
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert other.keys() <= mine.keys(), other.keys() - mine.keys()
        for name, value in other.items():
            if name not in TIMES and isinstance(value, (int, float)) and not math.isnan(value):
                gap = abs(mine[name] - value) / max(1.0, abs(value))
                allowed = tolerance * (10 if name == "grad_norm" else 1)
                assert gap <= allowed, f"{name} at step {step}: {mine[name]} for {value}"
