"""Short runs of the trainer, and what they leave."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from mdpgrpo_fast.config import MDPGRPOConfig, TrainConfig, preset
from mdpgrpo_fast.rewards import Scorer
from mdpgrpo_fast.training.run_dir import RunDir
from mdpgrpo_fast.training.task import prepare
from mdpgrpo_fast.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))  # spawned scoring processes inherit it

SMALL = {"prompts_per_step": 2, "max_completion_length": 12, "steps": 2, "eval_samples": 4, "learning_rate": 1e-3}


def run_small(tmp_path: Path, method: MDPGRPOConfig | None = None, name: str = "run", **knobs: Any) -> Trainer:
    """Trains the embedded seed policy for two short steps; returns the trainer with its model."""
    AcceleratorState._reset_state(True)  # one per process; a test may want another precision than the last
    run = TrainConfig(**{**SMALL, "log_completions": 2, "output_dir": str(tmp_path / name), **knobs})
    method = method or preset("exact", num_generations=4)
    out = RunDir(run.output_dir)
    with Scorer(run.reward, run.reward_weights, timeout=run.reward_timeout, on_bad_reward=run.on_bad_reward) as scorer:
        trainer = Trainer(prepare(run), run, method, out, scorer)
        trainer.train()
    return trainer


def rows(trainer: Trainer, evals: bool = False) -> list[dict[str, Any]]:
    lines = (trainer.out.path / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if ("eval" in r) == evals]


def parameters(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
