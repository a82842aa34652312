"""verl's own trainer on two ranks: it trains, samples with the weights that it trained, and learns."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from helpers.verl_runs import RANKS, json_lines, overrides, run

STEPS, PROMPTS, PER_PROMPT, HELD_OUT = 8, 16, 4, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verl")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of the run: of step 0, the evaluation before it, and of each step."""
    settings = overrides(folder, steps=STEPS, prompts=PROMPTS, per_prompt=PER_PROMPT, held_out=HELD_OUT)
    return run(folder, settings)


@pytest.fixture(scope="module")
def steps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    return rows[1:]


def test_both_ranks_train_their_shards(folder: Path, steps: list[dict[str, Any]]) -> None:
    ranks = [json_lines(folder / "record" / f"rank{rank}.jsonl") for rank in range(RANKS)]
    assert {len(rank) for rank in ranks} == {STEPS}
    for step, records in zip(steps, zip(*ranks, strict=True), strict=True):
        assert {r["world"] for r in records} == {RANKS}
        assert {r["grad_norm"] for r in records} == {step["actor/grad_norm"]}
        assert sum(r["numbers"] for r in records) == records[0]["whole"]
        assert all(0.4 < r["numbers"] / r["whole"] < 0.6 for r in records)


def test_sampling_follows_the_weights(folder: Path, steps: list[dict[str, Any]]) -> None:
    """What the server says a token's probability was is what the actor's weights say, step after step, while these
    leave the reference policy's."""
    for step in steps:
        assert step["training/rollout_probs_diff_max"] < 1e-4
        assert step["training/off_policy/trajectory_staleness/max"] == 0
    sampled: dict[tuple[int, float], int] = {}
    for batch in json_lines(folder / "record" / "server.jsonl"):
        (temperature,) = batch["temperatures"]
        key = batch["steps"], temperature
        sampled[key] = sampled.get(key, 0) + batch["prompts"]
    trained = {(step, 1.0): PROMPTS * PER_PROMPT for step in range(STEPS)}
    assert sampled == trained | {(0, 0.0): HELD_OUT, (STEPS, 0.0): HELD_OUT}


def test_the_reference_policy_stays(steps: list[dict[str, Any]]) -> None:
    kl = [step["actor/kl_loss"] for step in steps]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert all(value > 1e-4 for value in kl[1:])
    assert kl[-1] > 2 * kl[1]


def test_it_learns(rows: list[dict[str, Any]], steps: list[dict[str, Any]]) -> None:
    shares = [step["critic/score/mean"] for step in steps]
    assert statistics.mean(shares[-3:]) > statistics.mean(shares[:2]) + 0.05
    held_out = [rows[at]["val-core/embedded/reward/mean@1"] for at in (0, -1)]
    assert held_out[1] > held_out[0] + 0.05
