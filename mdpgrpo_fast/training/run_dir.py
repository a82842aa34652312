"""The run directory and all that is shown of a run: JSON lines, trackers, progress bar, sample tables, summary."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..config import ConfigError, MDPGRPOConfig, TrainConfig
from ..data import Example
from ..models.lora import save_adapters, save_merged
from ..rewards import Score
from ..rollout.vllm.sampler import RolloutError
from ..version import __version__
from .batch import Batch


def move_aside(path: Path) -> Path | None:
    """Rename an earlier run of this name to the first free `name.1`, `name.2` …; returns where it went.

    Raises: ConfigError where the path holds something else than a run, which is left alone.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "summary.json")):
        raise ConfigError(f"output_dir {str(path)!r} exists and is no earlier run")
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
        text = yaml.safe_dump({"run": asdict(run), "method": asdict(method)}, sort_keys=False)
        (self.path / "config.yaml").write_text(text, encoding="utf-8")

    def append(self, name: str, *rows: dict[str, Any]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as f:
            for row in rows:
                f.write(json.dumps(row, default=str) + "\n")

    def write_model(
        self, model: Any, tokenizer: Any, state: dict[str, Tensor] | None, lora: bool, best: bool = False
    ) -> None:
        """The model in from_pretrained form, as model/ or best/; with lora merged, its last adapters beside it.

        state: of the model, gathered, where its own is sharded.
        """
        whole = self.path / ("best" if best else "model")
        # Under another name until it is whole: an earlier best one stays until then.
        folder = whole.with_name(f"{whole.name}.new")
        if lora:
            save_merged(model, tokenizer, folder, state)
        else:
            model.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)
        shutil.rmtree(whole, ignore_errors=True)
        folder.rename(whole)
        if lora and not best:
            save_adapters(model, self.path / "adapters", state)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        (self.path / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_trackers(names: list[str]) -> None:
    """Raises ConfigError for a tracker that accelerate does not know or whose package is missing."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, available = [str(n) for n in LOGGER_TYPE_TO_CLASS], [str(n) for n in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(f"report_to must be among {', '.join(known)}; got {name!r}")
        if name not in available:
            raise ConfigError(f"report_to {name!r} needs the package {name}, which is not installed")


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


def summarize(
    run: TrainConfig,
    sources: dict[str, str | None],
    accelerator: Accelerator,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    *,
    steps: int,
    train_seconds: float,
    total_seconds: float,
    dropped_samples: int,
    dropped_rows: int,
    interrupted: bool,
    failure: str | None,
) -> dict[str, Any]:
    """summary.json: settings, held-out results before and after (None: there is none), and how the run went."""
    device = accelerator.device
    first, last = before or {}, after or {}
    types = {
        t: {"before": row["rate"], "after": last["types"][t]["rate"] if last else None, "count": row["count"]}
        for t, row in first.get("types", {}).items()
    }
    return {
        "hsr_before": first.get("hsr"),
        "hsr_after": last.get("hsr"),
        "ssr_before": first.get("ssr"),
        "ssr_after": last.get("ssr"),
        "reward_before": first.get("reward"),
        "reward_after": last.get("reward"),
        "rewards": {
            name: {"before": x["mean"], "after": last["rewards"][name]["mean"] if last else None}
            for name, x in first.get("rewards", {}).items()
        },
        "method": run.preset,
        "seed": run.seed,
        **sources,
        "types": types,
        "versions": {
            "mdpgrpo_fast": __version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "steps": steps,
        "train_seconds": round(train_seconds, 2),
        "total_seconds": round(total_seconds, 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
        "peak_memory_mb": peak_memory_mb(),
        "dropped_samples": dropped_samples,
        "dropped_rows": dropped_rows,
        "interrupted": interrupted,
        **({"failure": failure} if failure else {}),
    }


def last_line(summary: dict[str, Any]) -> str:
    """What a run ends with: its held-out scores before and after, steps and time."""
    names = {"HSR": "hsr", "SSR": "ssr", "reward": "reward"}
    pairs = [(label, summary[f"{n}_before"], summary[f"{n}_after"]) for label, n in names.items()]
    scores = {label: f"{before:.3f} -> {after:.3f}" for label, before, after in pairs if None not in (before, after)}
    if scores.get("reward") == scores.get("SSR"):  # the reward is the share of constraints, and would be said twice
        scores.pop("reward", None)
    held_out = f"held-out {', '.join(f'{label} {score}' for label, score in scores.items())} " if scores else ""
    return f"{held_out}in {summary['steps']} steps, {summary['train_seconds']:.0f} s"


def keep_partial(out: RunDir, accelerator: Accelerator, error: RolloutError, step: int, tokenizer: Any) -> int:
    """Completions that came before an engine failed, of all ranks, as partial_rollout.jsonl; how many."""
    rank = accelerator.process_index
    kept = gather_object([(rank, i, c) for i, c in enumerate(error.partial) if c is not None])
    for rank, i, c in kept if accelerator.is_main_process else []:
        text = tokenizer.decode(c.tokens)
        row = {"step": step, "rank": rank, "row": i, "tokens": c.tokens, "response": text, "finished": c.finished}
        out.append("partial_rollout.jsonl", row)
    return len(kept)
