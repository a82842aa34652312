"""A run directory like the trainer's, and what a browser sees on its page."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from mdpgrpo_fast.config import TrainConfig, preset

TYPES = [
    "keywords:existence",
    "keywords:frequency",
    "keywords:forbidden_words",
    "length_constraints:number_words",
    "length_constraints:number_sentences",
    "detectable_format:number_bullet_lists",
    "detectable_format:title",
    "punctuation:no_comma",
    "startend:end_checker",
    "change_case:english_lowercase",
]
ATTACK = "<script>alert('pwned')</script><img src=x onerror=alert(1)> & so on {{ 7 * 7 }}"


def training_row(step: int, steps: int, rng: random.Random) -> dict:
    t = step / steps
    ssr = 0.45 + 0.4 * (1 - math.exp(-3 * t)) + rng.gauss(0, 0.05)
    return {
        "step": step,
        "loss": rng.gauss(0, 0.02),
        "reward": ssr,
        "reward_std": 0.3 - 0.1 * t,
        "hsr": min(1.0, max(0.0, ssr - 0.35 + rng.gauss(0, 0.06))),
        "ssr": ssr,
        "kl": 0.03 * t + abs(rng.gauss(0, 0.003)),
        "entropy": 2.6 - 0.9 * t + rng.gauss(0, 0.05),
        "clip_low": abs(rng.gauss(0, 0.004)),
        "clip_high": abs(rng.gauss(0, 0.008)),
        "ratio_mean": 1.0,
        "ratio_max": 1.4,
        "kl_clamped": 0,
        "grad_norm": abs(rng.gauss(0.8, 0.2)),
        "learning_rate": 1e-4 * (1 - t),
        "tokens_per_second": rng.gauss(900, 40),
        "completion_length": 58 - 14 * t + rng.gauss(0, 3),
        "truncated": max(0.0, 0.2 - 0.25 * t + rng.gauss(0, 0.02)),
        "dropped": 0,
        "advantage_mean": -0.1 + 0.1 * t,
        "zero_variance_groups": min(1.0, max(0.0, 0.25 + 0.3 * t + rng.gauss(0, 0.1))),
        "large_z_groups": max(0.0, 0.2 - 0.1 * t + rng.gauss(0, 0.05)),
        "gain_below_goal_groups": max(0.0, 0.3 - 0.35 * t + rng.gauss(0, 0.05)),
        "zero_gradient_groups": 0.0,
        "slots": [
            {"temperature": tau, "reward": ssr + 0.06 - 0.12 * tau, "reward_std": 0.1 + 0.15 * tau, "ess": None}
            for tau in (0.1, 0.4, 0.7, 1.0)
        ],
        "seconds": {
            "generate": rng.gauss(1.4, 0.1),
            "score": 0.1,
            "reference": 0.2,
            "forward": rng.gauss(0.8, 0.05),
            "backward": 0.5,
            "optimizer": 0.1,
            "other": 0.03,
        },
        "memory_mb": 812.0,
        "note": "the gradient is 0: the rewards of every group are all equal" if step % 23 == 0 else None,
    }


def evaluation_row(step: int, hsr: float, ssr: float, rates: dict[str, float]) -> dict:
    types = {name: {"rate": rate, "count": 6 + i} for i, (name, rate) in enumerate(rates.items())}
    intervals = {"hsr": 0.125, "ssr": 0.0625, "reward": 0.0625}
    return {
        "step": step,
        "eval": {"hsr": hsr, "ssr": ssr, "reward": ssr, "count": 32, "types": types, "intervals": intervals},
    }


def fake_run(path: Path, steps: int = 60) -> Path:
    """A run directory as the trainer writes it."""
    rng = random.Random(0)
    path.mkdir(parents=True)
    run = TrainConfig(preset="paper", steps=steps, learning_rate=1e-4)
    config = {"run": vars(run), "method": vars(preset("paper", num_generations=4))}
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    before = {name: rng.uniform(0.1, 0.9) for name in TYPES}
    after = {name: min(1.0, max(0.0, rate + rng.uniform(-0.1, 0.4))) for name, rate in before.items()}
    rows = [evaluation_row(0, 0.15625, 0.5139, before)]
    for step in range(1, steps + 1):
        rows.append(training_row(step, steps, rng))
        if step % 20 == 0:
            share = step / steps
            rows.append(evaluation_row(step, 0.15625 + 0.3125 * share, 0.5139 + 0.2708 * share, after))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "hsr_before": 0.15625,
        "hsr_after": 0.46875,
        "ssr_before": 0.5139,
        "ssr_after": 0.7847,
        "steps": steps,
        "train_seconds": 143.21,
        "total_seconds": 171.9,
        "method": "paper",
        "device": "cpu",
        "versions": {"mdpgrpo_fast": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
        "peak_memory_mb": 1234.5,
        "dropped_samples": 3,
        "types": {n: {"before": before[n], "after": after[n], "count": 6 + i} for i, n in enumerate(TYPES)},
        "model": "embedded seed policy",
        "train_file": "embedded",
        "eval_file": "embedded",
        "seed": 42,
        "intervals": {side: {"hsr": 0.125, "ssr": 0.0625, "reward": None} for side in ("before", "after")},
        "started": "2026-01-02T03:04:05+00:00",
        "command": "mdpgrpo train --steps 60 --learning-rate 1e-4",
        "commit": "0123456789abcdef",
        "backend": {"loss": "cpu", "log-probs": "cpu", "advantages": "torch", "sampling": "transformers"},
        "parameters": 700000,
        "trained_parameters": 12000,
    }
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in completions(rng)))
    return path


def completions(rng: random.Random) -> list[dict]:
    rows = []
    for phase in ("before", "train", "after"):
        for i in range(16):
            ids = [TYPES[i % 10], TYPES[(i + 3) % 10], TYPES[(i + 6) % 10]]
            satisfied = [rng.random() < (0.75 if phase == "after" else 0.4) for _ in ids]
            satisfied = [phase == "before"] * 3 if i == 15 else satisfied  # one that gets worse
            prompt = f"Write about subject {i} in two or three sentences, without a comma, and name the <b>river</b>."
            text = " ".join(
                rng.choice(["the river", "runs", "slowly", "past", "old", "mills", "and"]) for _ in range(30)
            )
            rows.append(
                {
                    "step": 60 if phase == "after" else 0,
                    "phase": phase,
                    "prompt": [{"role": "user", "content": prompt}] if i % 2 else prompt,
                    "response": ATTACK if i == 1 and phase == "after" else f"{phase.title()} {i}: {text}.",
                    "temperature": 0.0,
                    "reward": sum(satisfied) / 3,
                    "advantage": None if phase != "train" else 0.4,
                    "instruction_ids": ids,
                    "satisfied": satisfied,
                    "finished": i % 5 > 0,
                }
            )
    return rows


class Page(HTMLParser):
    """Element names, attributes and text as a browser would see them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.hidden = False
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())
        self.bars = [v.removeprefix("width:") for k, v in self.attributes if k == "style" and v.startswith("width:")]

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.hidden = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words.append(data)


def change_summary(run: Path, **changes: Any) -> None:
    """None takes a key out."""
    file = run / "summary.json"
    summary = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in summary.items() if value is not None}))


def change_config(run: Path, **changes: Any) -> None:
    """Changed where the knob is, in `run` or `method`."""
    file = run / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for knob, value in changes.items():
        config["method" if knob in config["method"] else "run"][knob] = value
    file.write_text(yaml.safe_dump(config))


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in (change(row) for row in rows) if row is not None))


def odd_run(path: Path) -> Path:
    """A run directory in which every file holds what the trainer never writes."""
    rows = [
        {
            "step": 1,
            "loss": math.nan,
            "reward": "much",
            "kl": 10**400,
            "slots": [None, {"temperature": "hot"}],
            "hsr": [],
        },
        {"step": 2, "loss": 0.5, "slots": 7, "seconds": {"generate": 1.0, "train": None}, "note": {"a": 1}},
        {"step": None, "loss": 1.0, "slots": None, "seconds": 3},
        {"step": 2, "eval": {"hsr": 0.5, "ssr": 0.5, "types": {"a$b$_\ud800": {"rate": 0.5}, "c": None}}},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\nnot json\n")
    odd = {"phase": "after", "prompt": None, "response": "\ud800 \x00", "instruction_ids": 3, "satisfied": True}
    (path / "completions.jsonl").write_text(json.dumps(odd) + "\n")
    (path / "config.yaml").write_text("run: [1, 2\n")
    (path / "summary.json").write_text("[]")
    return path
