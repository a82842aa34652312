"""The run directory: its files, their lines, and the same numbers for trackers."""

from __future__ import annotations

import math
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor

from .. import durable
from ..config import ConfigError, MDPGRPOConfig, TrainConfig
from ..data import Example
from ..log import to_json
from ..models.lora import save_adapters, save_merged
from ..rewards import Score
from ..rollout.vllm.completion import RolloutError
from .batch import Batch
from .checkpoint.resume import config_text
from .guard.claim import Claim, claim_new

T = TypeVar("T")


class RunDir:
    """Files of one run, each whole or not there; JSON lines are written at each call, so that a killed run keeps them.

    The first rank alone makes the directory (at once with `create`) and writes to it.
    """

    def __init__(self, path: str | Path, create: bool = True) -> None:
        self.path = Path(path)
        self.moved: Path | None = None
        self._claim: Claim | None = None
        if create:
            self.make()

    def make(self) -> None:
        """The directory, empty and this run's until `release`; an earlier run in it is moved aside.

        Raises: ConfigError where it cannot be made, holds something else, or another run is in it.
        """
        self._claim, self.moved = self._claimed(claim_new)

    def resume(self) -> None:
        """The directory as it is, this run's until `release`. Raises: ConfigError where another run is in it."""
        self._claim = self._claimed(Claim)

    def _claimed(self, claim: Callable[[Path], T]) -> T:
        try:
            return claim(self.path)
        except OSError as e:
            raise ConfigError(f"output_dir {str(self.path)!r} cannot be made: {e.strerror or e}") from None

    def release(self) -> None:
        """Lets other runs have the directory."""
        if self._claim is not None:
            self._claim.release()

    @property
    def unlocked(self) -> str | None:
        """Why another run in the directory would not be noticed; None where it would."""
        return None if self._claim is None else self._claim.problem

    def write_config(self, run: TrainConfig, method: MDPGRPOConfig) -> None:
        durable.write_text(self.path / "config.yaml", config_text(run, method))

    def append(self, name: str, *rows: dict[str, Any]) -> None:
        durable.append_text(self.path / name, "".join(f"{to_json(row)}\n" for row in rows))

    def write_model(
        self, model: Any, tokenizer: Any, state: dict[str, Tensor] | None, lora: bool, best: bool = False
    ) -> None:
        """The model in from_pretrained form, as model/ or best/; with lora merged, its last adapters beside it.

        state: of the model, gathered, where its own is sharded.
        """

        def write_adapters(folder: Path) -> None:
            save_adapters(model, folder, state)
            tokenizer.save_pretrained(folder)

        whole = self.path / ("best" if best else "model")
        weights = model.parameters() if state is None else state.values()
        durable.need_space(self.path, sum(x.numel() * x.element_size() for x in weights), f"{whole.name}/")
        _write_folder(whole, lambda folder: write_pretrained(folder, model, tokenizer, state, lora))
        if lora and not best:
            _write_folder(self.path / "adapters", write_adapters)

    def write_summary(self, value: dict[str, Any]) -> None:
        """summary.json, which tells a finished run: the rows that it is of are on the disk before it."""
        for path in self.path.glob("*.jsonl"):
            with durable.storing(path):
                durable.sync_file(path)
        durable.write_text(self.path / "summary.json", to_json(value, indent=2) + "\n")


def write_pretrained(path: Path, model: Any, tokenizer: Any, state: dict[str, Tensor] | None, lora: bool) -> None:
    """The model, adapters merged, and its tokenizer in from_pretrained form."""
    if lora:
        save_merged(model, tokenizer, path, state)
    else:
        model.save_pretrained(path, state_dict=state)
        tokenizer.save_pretrained(path)


def write_new_folder(path: Path, write: Callable[[Path], None]) -> None:
    """The folder that write(path) makes, where there is none of that name: whole, or not there. What stands beside it
    is not touched. Raises: StorageError."""
    with durable.storing(path, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as aside:
            new = Path(aside) / path.name
            write(new)
            durable.sync_tree(new)
            new.rename(path)
        durable.sync_folder(path.parent)


def _write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """The folder that write(path) makes, under its name once it is whole. Raises: StorageError."""
    new = path.with_name(path.name + durable.NEW)
    shutil.rmtree(new, ignore_errors=True)
    try:
        with durable.storing(path, SafetensorError):
            write(new)
        durable.replace_folder(new, path)
    except durable.StorageError:
        shutil.rmtree(new, ignore_errors=True)
        with suppress(durable.StorageError):
            durable.put_back_folder(path)
        raise


def tracker_values(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """A metrics row flattened to finite numbers with slash-separated names."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if key == "logged":  # names that a reward function chose
            flat.update(tracker_values(value, prefix))
        elif isinstance(value, dict) and key != "lost":
            flat.update(tracker_values(value, f"{prefix}{key}/"))
        elif key == "slots":
            for slot in value:
                numbers = {k: v for k, v in slot.items() if k != "temperature"}
                flat.update(tracker_values(numbers, f"{prefix}slot_{slot['temperature']:g}/"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step" and math.isfinite(value):
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
    """Lines of completions.jsonl for at most `limit` completions of a training step, and all others that are lost."""
    shown = evenly_spaced(len(batch.responses), limit)
    lost = [i for i, s in enumerate(batch.scores) if s.total is None and i not in shown]
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
        for i in [*shown, *lost]
    ]


def bad_rows(
    step: int, batch: Batch, updates: list[dict[str, Any]], seed: int, rank: int
) -> list[dict[str, Any]]:  # fmt: skip
    """Lines of bad_steps.jsonl: one for the updates that were skipped, and one for each completion of the step."""
    where = {"step": step, "rank": rank}
    rows = training_rows(step, batch, len(batch.responses))
    return [{**where, "seed": seed, "updates": updates}, *({**where, "row": i, **x} for i, x in enumerate(rows))]


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
