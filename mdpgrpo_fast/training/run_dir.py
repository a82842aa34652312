"""The run directory: its files, their lines, and the same numbers for trackers."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor

from .. import durable
from ..config import ConfigError, MDPGRPOConfig, TrainConfig
from ..data import Example
from ..models.lora import save_adapters, save_merged
from ..rewards import Score
from ..rollout.vllm.completion import RolloutError
from .batch import Batch


def check_output_dir(path: Path) -> bool:
    """Whether there is an earlier run, to be moved aside.

    Raises: ConfigError where the path holds something else, or nothing can be made there.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output_dir {str(path)!r} is a file")
    try:
        found = list(path.iterdir()) if path.exists() else []
    except OSError as e:
        raise ConfigError(f"output_dir {str(path)!r} cannot be read: {e.strerror or e}") from None
    if found and not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "summary.json")):
        raise ConfigError(f"output_dir {str(path)!r} exists and is no earlier run")
    # An earlier run is renamed in its parent.
    parent = next(p for p in path.absolute().parents if p.exists()) if found or not path.exists() else path
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "cannot be written to" if parent.is_dir() else "is a file"
        raise ConfigError(f"output_dir {str(path)!r} cannot be made: {str(parent)!r} {why}")
    return bool(found)


def move_aside(path: Path) -> Path | None:
    """Rename an earlier run of this name to the first free `name.1`, `name.2` …; returns where it went.

    Raises: ConfigError where the path holds something else than a run, which is left alone.
    """
    if not check_output_dir(path):
        return None
    number = 1
    while (old := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(old)
    return old


class RunDir:
    """Files of one run; JSON lines are flushed at each call, so that a killed run keeps what it had.

    The first rank alone makes the directory (at once with `create`) and writes to it.
    """

    def __init__(self, path: str | Path, create: bool = True) -> None:
        self.path = Path(path)
        self.moved: Path | None = None
        if create:
            self.make()

    def make(self) -> None:
        """The directory, empty; an earlier run in it is moved aside. Raises ConfigError."""
        try:
            self.moved = move_aside(self.path.absolute())
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"output_dir {str(self.path)!r} cannot be made: {e.strerror or e}") from None

    def write_config(self, run: TrainConfig, method: MDPGRPOConfig) -> None:
        # With --config this file goes on with the run, or repeats it, as the command line says.
        text = yaml.safe_dump({"run": {**asdict(run), "resume": False}, "method": asdict(method)}, sort_keys=False)
        durable.write_text(self.path / "config.yaml", text)

    def append(self, name: str, *rows: dict[str, Any]) -> None:
        durable.append_text(self.path / name, "".join(json.dumps(row, default=str) + "\n" for row in rows))

    def write_model(
        self, model: Any, tokenizer: Any, state: dict[str, Tensor] | None, lora: bool, best: bool = False
    ) -> None:
        """The model in from_pretrained form, as model/ or best/; with lora merged, its last adapters beside it.

        state: of the model, gathered, where its own is sharded.
        """
        whole = self.path / ("best" if best else "model")
        # Under another name until it is whole: an earlier best one stays until then.
        folder = whole.with_name(f"{whole.name}.new")
        shutil.rmtree(folder, ignore_errors=True)
        weights = model.parameters() if state is None else state.values()
        durable.need_space(self.path, sum(x.numel() * x.element_size() for x in weights), f"{whole.name}/")
        with durable.storing(folder, SafetensorError):
            if lora:
                save_merged(model, tokenizer, folder, state)
            else:
                model.save_pretrained(folder, state_dict=state)
                tokenizer.save_pretrained(folder)
        durable.replace_folder(folder, whole)
        if lora and not best:
            adapters = self.path / "adapters"
            folder = adapters.with_name("adapters.new")
            shutil.rmtree(folder, ignore_errors=True)
            with durable.storing(folder, SafetensorError):
                save_adapters(model, folder, state)
                tokenizer.save_pretrained(folder)
            durable.replace_folder(folder, adapters)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        durable.write_text(self.path / name, json.dumps(value, indent=2) + "\n")


def tracker_values(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """A metrics row flattened to numbers with slash-separated names."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if key == "logged":  # names that a reward function chose
            flat.update(tracker_values(value, prefix))
        elif isinstance(value, dict):
            flat.update(tracker_values(value, f"{prefix}{key}/"))
        elif key == "slots":
            for slot in value:
                numbers = {k: v for k, v in slot.items() if k != "temperature"}
                flat.update(tracker_values(numbers, f"{prefix}slot_{slot['temperature']:g}/"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            flat[prefix + key] = value
    return flat


def evenly_spaced(total: int, limit: int) -> list[int]:
    """At most `limit` indices below `total`, evenly spaced: rows of like prompts stand next to each other."""
    limit = min(total, limit)
    return [i * total // limit for i in range(limit)]


def completion_row(
    step: int,
    phase: str,
    example: Example,
    response: str,
    temperature: float,
    score: Score,
    advantage: float | None,
    finished: bool,
) -> dict[str, Any]:
    """A line of completions.jsonl."""
    return {
        "step": step,
        "phase": phase,
        "prompt": example.prompt,
        "response": response,
        "temperature": round(temperature, 6),
        "reward": score.total,
        "rewards": score.parts,
        "advantage": advantage,
        "instruction_ids": example.instruction_ids,
        "satisfied": score.satisfied,
        "finished": finished,
        **({"problem": score.problem} if score.problem else {}),
        **({"extra": score.extra} if score.extra else {}),
    }


def training_rows(step: int, batch: Batch, limit: int) -> list[dict[str, Any]]:
    """Lines of completions.jsonl for at most `limit` completions of a training step."""
    advantage = batch.adv.advantage.flatten().tolist()
    return [
        completion_row(
            step,
            "train",
            batch.examples[i],
            batch.responses[i],
            batch.rollout.temperature[i].item(),
            batch.scores[i],
            advantage[i],
            bool(batch.rollout.finished[i]),
        )
        for i in evenly_spaced(len(batch.responses), limit)
    ]


def flat_config(run: TrainConfig, method: MDPGRPOConfig) -> dict[str, Any]:
    """All knobs as tracker hyperparameters, which take numbers and text alone."""
    values = {**asdict(run), **asdict(method)}
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}


def peak_memory_mb() -> float:
    """Peak of this process: the GPU allocator's where one is used, else resident memory, in MB of 10⁶ bytes."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def keep_partial(out: RunDir, accelerator: Accelerator, error: RolloutError, step: int, tokenizer: Any) -> str:
    """Completions that came before an engine failed, of all ranks, as partial_rollout.jsonl; says so."""
    rank = accelerator.process_index
    kept = gather_object([(rank, i, c) for i, c in enumerate(error.partial) if c is not None])
    for rank, i, c in kept if accelerator.is_main_process else []:
        text = tokenizer.decode(c.tokens)
        row = {"step": step, "rank": rank, "row": i, "tokens": c.tokens, "response": text, "finished": c.finished}
        out.append("partial_rollout.jsonl", row)
    return f"{len(kept)} completions of step {step} are kept in {out.path / 'partial_rollout.jsonl'}"
