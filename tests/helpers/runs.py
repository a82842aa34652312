"""Short runs of the trainer, and what they leave."""

from __future__ import annotations

import atexit
import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from mdpgrpo_fast.config import MDPGRPOConfig, TrainConfig, preset
from mdpgrpo_fast.models.load import load
from mdpgrpo_fast.rewards import Scorer
from mdpgrpo_fast.training.loop import TrainingLoop
from mdpgrpo_fast.training.run_dir import RunDir
from mdpgrpo_fast.training.task import Task, prepare

sys.path.insert(0, str(Path(__file__).parents[1]))  # spawned scoring processes inherit it

SMALL: dict[str, Any] = {
    "prompts_per_step": 2, "max_completion_length": 12, "steps": 2, "eval_samples": 2, "learning_rate": 1e-3,
}  # fmt: skip
PLAIN = preset("grpo", num_generations=4, kl_beta_pos=0.0)


@functools.cache
def _scorer(
    reward: tuple[str, ...], weights: tuple[float, ...] | None, timeout: float | None, on_bad_reward: str, kind: str,
    isolation: str,
) -> Scorer:  # fmt: skip
    """One for all runs with these rewards: starting its process takes longer than a short run."""
    scorer = Scorer(
        list(reward), weights and list(weights), timeout=timeout, on_bad_reward=on_bad_reward, constraint_reward=kind,
        isolation=isolation, workers=1,
    )  # fmt: skip
    atexit.register(scorer.__exit__)
    return scorer


@functools.cache
def _embedded() -> Task:
    return prepare(TrainConfig(max_completion_length=SMALL["max_completion_length"]))


def make_task(run: TrainConfig) -> Task:
    """`prepare(run)`, but that the embedded prompts are read and tokenised once for all runs."""
    if run.model or run.train_file or run.eval_file or run.lora or run.report_to:
        return prepare(run)
    known, limit = _embedded(), run.eval_samples or None
    model, _ = load(None, run.dtype, run.attention)
    return replace(known, model=model, held_out=known.held_out[:limit], held_out_ids=known.held_out_ids[:limit])


def make_trainer(tmp_path: Path, method: MDPGRPOConfig | None = None, name: str = "run", **knobs: Any) -> TrainingLoop:
    """A trainer of the embedded seed policy that would run for two short steps."""
    AcceleratorState._reset_state(True)  # one per process; a test may want another precision than the last
    run = TrainConfig(**{**SMALL, "log_completions": 2, "output_dir": str(tmp_path / name), **knobs})
    out = RunDir(run.output_dir, create=not run.resume)
    out.release()  # a trainer that is not needed any more may still be there
    weights = run.reward_weights and tuple(run.reward_weights)
    scorer = _scorer(
        tuple(run.reward), weights, run.reward_timeout, run.on_bad_reward, run.constraint_reward, run.reward_isolation
    )
    scorer.take_metrics()
    return TrainingLoop(make_task(run), run, method or preset("exact", num_generations=4), out, scorer)


def run_small(tmp_path: Path, method: MDPGRPOConfig | None = None, name: str = "run", **knobs: Any) -> TrainingLoop:
    """The trainer of `make_trainer` after its run; the trained model is saved where save_model is asked for."""
    trainer = make_trainer(tmp_path, method, name, **{"save_model": False, **knobs})
    trainer.train()
    return trainer


def rows(trainer: TrainingLoop, evals: bool = False) -> list[dict[str, Any]]:
    lines = (trainer.out.path / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if ("eval" in r) == evals]


def parameters(trainer: TrainingLoop) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
