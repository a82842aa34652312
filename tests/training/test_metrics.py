"""Metrics: rows of several ranks joined, and why a gradient is zero."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from helpers.runs import PLAIN, rows, run_small

from mdpgrpo_fast.config import TrainConfig, preset
from mdpgrpo_fast.rewards.scorer import CALL_TIMEOUT
from mdpgrpo_fast.training.distributed import waiting_time
from mdpgrpo_fast.training.metrics import over_ranks


def test_metrics_over_ranks() -> None:
    one = {"loss": 1.0, "dropped": 1, "ratio_max": 3.0, "note": None, "mfu": None, "seconds": {"score": 1.0}}
    two = {"loss": 2.0, "dropped": 2, "ratio_max": 2.0, "note": "why", "mfu": None, "seconds": {"score": 2.0}}
    slots = [[{"temperature": 0.5, "reward": None}], [{"temperature": 0.5, "reward": 1.0}]]
    found = over_ranks([{**one, "slots": slots[0]}, {**two, "slots": slots[1]}])
    assert found == {
        "loss": 1.5, "dropped": 3, "ratio_max": 3.0, "note": "why", "mfu": None, "seconds": {"score": 1.5},
        "slots": [{"temperature": 0.5, "reward": 1.0}],
    }  # fmt: skip
    assert over_ranks([one]) == one


def test_zero_gradient_says_why(tmp_path: Path) -> None:
    """A constant reward under plain GRPO without KL moves nothing; with the goal anchor it does."""
    knobs = {"reward": ["helpers.rewards:none"], "steps": 1}
    still = run_small(tmp_path, PLAIN, **knobs)
    (row,) = rows(still)
    assert row["grad_norm"] == 0 and row["zero_variance_groups"] == row["zero_gradient_groups"] == 1
    assert "all equal" in row["note"] and "goal anchor is off" in row["note"] and "no KL" in row["note"]
    knobs["reward"] = ["helpers.rewards:length"]
    (row,) = rows(run_small(tmp_path, preset("exact", num_generations=4), "moved", **knobs))
    assert row["grad_norm"] > 0 and row["zero_gradient_groups"] < 1


def test_weights_that_are_all_out_of_bounds_are_named(tmp_path: Path) -> None:
    method = replace(
        PLAIN, temperature_objective="corrected", importance_weight_kind="mask", importance_weight_floor=1.9
    )
    (row,) = rows(run_small(tmp_path, method, steps=1, reward=["helpers.rewards:length"], backend="torch"))
    assert row["out_of_bounds"] == 1 and "every importance weight is 0: all out of" in row["note"]


def test_truncated_completions_leave_loss_and_normaliser_by_choice(tmp_path: Path) -> None:
    knobs = {"max_completion_length": 2, "steps": 1}
    (kept,) = rows(run_small(tmp_path, preset("exact", num_generations=4), "kept", **knobs))
    assert kept["truncated"] == 1 and kept["grad_norm"] > 0
    for objective in ("paper", "per_row", "corrected"):
        method = preset("exact", num_generations=4, mask_truncated=True, temperature_objective=objective)
        (row,) = rows(run_small(tmp_path, method, objective, **knobs))
        assert row["truncated"] == 1 and row["loss"] == 0 and row["grad_norm"] == 0
        assert "no token counts" in row["note"] and kept["note"] != row["note"]


def test_metrics_that_one_rank_alone_has_are_kept() -> None:
    one, two = {"reward_min": 0.5, "reward_max": 0.5}, {"reward_min": 0.25, "reward_max": None}
    assert over_ranks([{"logged": {}, **one}, {"logged": {"a": 1.0}, **two}]) == {
        "logged": {"a": 1.0},
        "reward_min": 0.25,
        "reward_max": 0.5,
    }


def test_ranks_wait_longer_than_rewards_may_take() -> None:
    assert waiting_time(TrainConfig(), 16) > CALL_TIMEOUT
    assert waiting_time(TrainConfig(reward_timeout=3600.0, reward=["a:b", "c:d"], refill=1), 8) > 4 * 3600
    assert waiting_time(TrainConfig(reward_isolation="process", reward_timeout=600.0), 64) > 600 * 64 / 2
