"""Short runs of the trainer that sample with a real vLLM, in both modes."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.inputs import ROOT
from helpers.runs import rows, run_small
from helpers.vllm_real import Server

from mdpgrpo_fast.config import preset
from mdpgrpo_fast.rollout.vllm.local import VLLMEngine

STEPS, SEEDS = 10, (0, 1)
LAST = 5  # steps that the mean reward is taken of


@pytest.fixture(params=["local", "server"])
def knobs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What makes a run sample with either mode; in this process with the float32 engine that is there."""
    if request.param == "server":
        server: Server = request.getfixturevalue("server")
        return {"rollout": "vllm", "vllm_url": server.url}
    engine: VLLMEngine = request.getfixturevalue("local")
    monkeypatch.setattr(
        "mdpgrpo_fast.training.loop.make_engine", lambda run, *_: engine if run.rollout == "vllm" else None
    )
    return {"rollout": "vllm", "vllm_sleep": False}


def test_corrected_weights_are_one_where_temperatures_agree(tmp_path: Path, knobs: dict[str, Any]) -> None:
    """The weight of `corrected` is exp(policy at 1 - sampling at the row's): its effective sample size is all tokens at
    temperature 1 and fewer elsewhere. That of `per_row`, with both at the row's, is all tokens at each."""
    method = preset("exact", num_generations=4, temperatures=[0.5, 1.0, 1.0, 1.5])
    shape = {"steps": 3, "prompts_per_step": 8, "max_completion_length": 32, "eval_samples": 2}
    corrected = run_small(tmp_path, replace(method, temperature_objective="corrected"), "corrected", **shape, **knobs)
    for row in rows(corrected):
        ess = {slot["temperature"]: slot["ess"] for slot in row["slots"]}
        assert ess[1.0] == pytest.approx(1, abs=1e-4)
        assert ess[0.5] < 0.995 and ess[1.5] < 0.995
    per_row = replace(method, temperature_objective="per_row", sampler_correction=True)
    for row in rows(run_small(tmp_path, per_row, "per_row", **shape, **knobs)):
        assert all(slot["ess"] == pytest.approx(1, abs=1e-4) for slot in row["slots"])


def test_lora_runs_sample_from_merged_weights(tmp_path: Path, knobs: dict[str, Any]) -> None:
    """With a per-row correction, whose weight is 1 only where the sampler has the trainer's merged weights."""
    method = preset("exact", num_generations=4, temperature_objective="per_row", sampler_correction=True)
    more = {"steps": 3, "lora": True, "lora_r": 8, "learning_rate": 3e-3, "max_completion_length": 32}
    trainer = run_small(tmp_path, method, **more, **knobs)
    assert len(rows(trainer)) == 3
    for row in rows(trainer):
        assert all(slot["ess"] == pytest.approx(1, abs=1e-4) for slot in row["slots"]) and row["grad_norm"] > 0


def learned(folder: Path, **knobs: Any) -> tuple[float, float, float]:
    """Ten steps of the demonstration by seed: mean reward of the first two, mean reward and spread of the last."""
    demo = {
        "steps": STEPS, "prompts_per_step": 16, "max_completion_length": 64, "learning_rate": 5e-4, "warmup_steps": 2,
        "eval_samples": 2,
    }  # fmt: skip
    method = preset("paper", num_generations=4)
    runs = [rows(run_small(folder, method, f"run{seed}", seed=seed, **demo, **knobs)) for seed in SEEDS]
    assert [len(run) for run in runs] == [STEPS] * len(SEEDS)
    first, last = [r for run in runs for r in run[:2]], [r for run in runs for r in run[-LAST:]]
    return _mean(first, "reward"), _mean(last, "reward"), _mean(last, "reward_std")


def _mean(found: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(r[name] for r in found)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float, float]:
    return learned(tmp_path_factory.mktemp("own"))


def test_ten_steps_of_the_demonstration_learn_as_with_our_own_sampler(
    tmp_path: Path, own: tuple[float, float, float], knobs: dict[str, Any]
) -> None:
    """Mean reward of the last steps, by seed against our own sampler on the same prompts. Noise: the standard error of
    the difference of two means of that many completions, taken as independent, with the spread that they have."""
    theirs = learned(tmp_path, **knobs)
    noise = math.hypot(own[2], theirs[2]) / math.sqrt(len(SEEDS) * LAST * 64)
    said = f"first, last, spread: {theirs}, of our own sampler {own}, noise {noise:.3f}"
    assert abs(theirs[1] - own[1]) < 4 * noise, said
    assert theirs[1] > theirs[0] + 2 * noise, said


def test_the_command_runs_as_a_user_starts_it(tmp_path: Path) -> None:
    """An engine of the run's own, with vLLM's defaults: compiled, in the dtype that it takes by itself. In a process of
    its own: what an engine ends with is shared by all engines of a process."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mdpgrpo_fast.train", "--cpu", "--rollout", "vllm", "--no-vllm-sleep"]
    command += ["--steps", "2", "--eval-samples", "20", "--output-dir", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["hsr_after"] is not None
