"""How a run ended: its summary, and the lines that say it and how to go on."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from ...config import PromptConfig, TrainConfig
from ...log import counted
from ...version import __version__
from ..checkpoint import newest
from ..run_dir import peak_memory_mb
from .start import Facts

SCORES = {"HSR": "hsr", "SSR": "ssr", "reward": "reward"}
# Settings of rewards that decide a score, which `mdpgrpo evaluate` has by the same names.
OF_SCORES = (
    "reward", "reward_weights", "constraint_reward", "reward_isolation", "reward_timeout", "reward_memory",
    "on_bad_reward", "keep_special_tokens",
)  # fmt: skip
NO_INTERVALS = dict.fromkeys(SCORES.values())


def now() -> str:
    """The time in ISO 8601, with its zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def command_line() -> str:
    """What this process was started with."""
    program, *words = sys.orig_argv
    if words and Path(words[0]).name == "mdpgrpo":
        program, *words = words
    return shlex.join([Path(program).name, *words])


def commit() -> str | None:
    """The git commit of the package's checkout; None where it is installed, or git is not there."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def summarize(
    run: TrainConfig, facts: Facts, device: torch.device, before: dict[str, Any] | None,
    after: dict[str, Any] | None, **how_it_went: Any,
) -> dict[str, Any]:  # fmt: skip
    """summary.json: settings, held-out results before and after (None: there is none), and how the run went."""
    first, last = before or {}, after or {}
    types = {
        t: {"before": row["rate"], "after": last["types"][t]["rate"] if last else None, "count": row["count"]}
        for t, row in first.get("types", {}).items()
    }
    return {
        **{f"{n}_{when}": x.get(n) for n in SCORES.values() for when, x in (("before", first), ("after", last))},
        "intervals": {when: x.get("intervals", NO_INTERVALS) for when, x in (("before", first), ("after", last))},
        "held_out": facts.held_out,
        "rewards": {
            name: {"before": x["mean"], "after": last["rewards"][name]["mean"] if last else None}
            for name, x in first.get("rewards", {}).items()
        },
        "method": run.preset,
        "seed": run.seed,
        **facts.sources,
        "types": types,
        "command": command_line(),
        "commit": commit(),
        "backend": facts.backend,
        "parameters": facts.parameters,
        "trained_parameters": facts.trained,
        "versions": {
            "mdpgrpo_fast": __version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "total_steps": facts.steps,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": facts.processes,
        "peak_memory_mb": peak_memory_mb(),
        **how_it_went,
    }


def last_line(summary: dict[str, Any]) -> str:
    """What a run ends with: its held-out scores before and after, steps and time."""
    scores = {}
    for label, n in SCORES.items():
        pair = [(summary[f"{n}_{when}"], summary["intervals"][when][n]) for when in ("before", "after")]
        if pair[0][0] is not None and pair[1][0] is not None:
            scores[label] = " → ".join(with_interval(*x) for x in pair)
    over = counted(summary["held_out"], "prompt")
    if any("±" in text for text in scores.values()):
        over = f"95 %, {over}"
    held_out = f"held-out {_listed(scores)} ({over}) " if scores else ""
    steps = f"in {summary['steps']} steps"
    if summary["resumed_after"]:
        steps += f", {summary['steps'] - summary['resumed_after']} of them now"
    if summary["interrupted"]:
        steps = f"interrupted after {summary['steps']} of {summary['total_steps']} steps"
    return f"{held_out}{steps}, {_duration(summary['train_seconds'])}"


def _listed(scores: dict[str, str]) -> str:
    if scores.get("reward") == scores.get("SSR"):  # the reward is the share of constraints, and would be said twice
        scores = {label: score for label, score in scores.items() if label != "reward"}
    return ", ".join(f"{label} {score}" for label, score in scores.items())


def with_interval(value: float, half_width: float | None) -> str:
    return f"{value:.3f}" if half_width is None else f"{value:.3f} ± {half_width:.3f}"


def evaluation_line(step: int, result: dict[str, Any]) -> str:
    """A held-out evaluation of a run: its scores, each with half of its 95 % interval."""
    scores = {
        label: with_interval(result[n], result["intervals"][n]) for label, n in SCORES.items() if result[n] is not None
    }
    cut = f", {result['truncated']:.0%} cut" if result["truncated"] else ""
    return (
        f"step {step}: held-out {_listed(scores) or 'without a reward'} over {counted(result['count'], 'prompt')}{cut}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.0f} s"


def end_lines(summary: dict[str, Any], run: TrainConfig, report: Path, hub: str | None = None) -> list[str]:
    """Scores, where the model and the report are, and the command that goes on. hub: where the model is on the hub."""
    out = Path(run.output_dir)
    saved = (out / "model").is_dir()
    why_not = "not saved: no step was done" if run.save_model else "not saved (save_model)"
    rows = {"model": str(out / "model") if saved else why_not, "report": str(report)}
    if hub is not None:
        rows["hub"] = hub
    if summary["interrupted"]:
        rows["go on"] = how_to_resume(run, summary["processes"])
    elif saved:
        rows["go on"] = how_to_evaluate(run, summary["eval_file"])
    return [last_line(summary), *(f"{name:<6}  {text}" for name, text in rows.items())]


def how_to_evaluate(run: TrainConfig, eval_file: str | None) -> str:
    """The command that scores the trained model."""
    words = [*_program(), "evaluate", "--model", str(Path(run.output_dir) / "model")]
    if eval_file != "embedded":
        words += ["--file", run.eval_file or "FILE"]
    default = TrainConfig()
    settings = {name: getattr(run, name) for name in OF_SCORES if getattr(run, name) != getattr(default, name)}
    if "constraints" not in run.reward:
        settings.pop("constraint_reward", None)
    settings |= _prompt_settings(run)
    if run.eval_samples:
        settings["limit"] = run.eval_samples
    for name, value in settings.items():
        words += _flag(f"--{name.replace('_', '-')}", value)
    return shlex.join(words)


def _program() -> list[str]:
    """How a shell here finds the console script, or this package without it."""
    return ["mdpgrpo"] if shutil.which("mdpgrpo") else [_short_path(sys.executable), "-m", "mdpgrpo_fast"]


def _short_path(path: str) -> str:
    inside = Path(path).is_relative_to(Path.cwd())
    return str(Path(path).relative_to(Path.cwd())) if inside else path


def _flag(flag: str, value: Any) -> list[str]:
    """A setting as words of a command line."""
    if isinstance(value, list):
        return [flag, *map(str, value)]
    if value is True:
        return [flag]
    return [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]


def _prompt_settings(run: TrainConfig) -> dict[str, Any]:
    """How held-out prompts are read, rendered and answered, where that is not the default; the model has the rest."""
    found = {f.name: getattr(run, f.name) for f in fields(PromptConfig) if f.name not in ("model", "tokenizer")}
    found |= {"split": run.eval_split or run.split, "text_only": False}
    return {name: value for name, value in found.items() if value != getattr(PromptConfig(), name)}


def how_to_resume(run: TrainConfig, processes: int = 1) -> str:
    """The command that goes on from the newest checkpoint, or how there would be one."""
    out = Path(run.output_dir)
    found = newest(out)
    if found is None:
        every = "every 15 minutes" if run.save_every is None else f"every {counted(run.save_every, 'step')}"
        why = f"yet, one is written {every}" if run.save_every != 0 else "with --save-every 0"
        return f"there is no checkpoint to go on from {why}"
    launch = [*_program(), "train"]
    if processes > 1:
        launch = ["torchrun", "--nproc-per-node", str(processes), "-m", "mdpgrpo_fast.train"]
    split = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    if split or int(os.environ.get("LOCAL_WORLD_SIZE", processes)) < processes:
        launch = ["-m", "mdpgrpo_fast.train"]
    command = shlex.join([*launch, "--config", str(out / "config.yaml"), "--resume"])
    command = f"{'the same launcher, on every node: ' * (launch[0] == '-m')}{command}"
    return f"{command} (from step {found.name.rpartition('_')[2]})"
