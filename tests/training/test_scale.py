"""Rewards on the scale of the goal anchor."""

from __future__ import annotations

import dataclasses
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import make_trainer, rows, run_small

from mdpgrpo_fast import advantages, token_loss
from mdpgrpo_fast.config import ConfigError, MDPGRPOConfig, TrainConfig, preset
from mdpgrpo_fast.training.scale import SEEN, RunningGoal, mapped, scale_note

METHOD = preset("exact", num_generations=4)


def test_the_range_is_mapped_to_zero_and_one() -> None:
    assert [mapped(r, [-20.0, 0.0]) for r in (-20.0, -5.0, 0.0)] == [0.0, 0.75, 1.0]
    assert mapped(-5.0, None) == -5.0


@pytest.mark.parametrize(
    ("low", "high", "knobs", "method", "said"),
    [
        (0.0, 1.0, {}, {}, None),
        (0.0, 1.0 + 1e-9, {}, {}, None),
        (None, None, {}, {}, None),
        (-212.0, -3.0, {}, {}, "from -212 to -3.*--reward-range LOW HIGH.*--goal-mean running.*--dual-anchor false"),
        (0.0, 1.4, {"reward": ["constraints", "m:f"], "reward_weights": [1.0, 0.5]}, {}, "--reward-range 0 1.5 maps"),
        (-0.5, 1.0, {"reward": ["constraints", "m:f"], "reward_weights": [1.0, -1.0]}, {}, "--reward-range -1 1 maps"),
        (-0.2, 1.0, {"reward_range": [0.0, 2.0]}, {}, "as reward_range maps them, go from -0.1 to 0.5,.*LOW HIGH"),
        (-200.0, -3.0, {"reward_range": [-200.0, 0.0]}, {}, None),
        (-212.0, -3.0, {}, {"dual_anchor": False}, None),
        (-212.0, -3.0, {}, {"goal_mean": "running"}, None),
        (-212.0, -3.0, {}, {"goal_mean": "mean"}, None),
    ],
)
def test_rewards_off_the_scale_are_said_with_what_helps(
    low: Any, high: Any, knobs: dict[str, Any], method: dict[str, Any], said: str | None
) -> None:
    note = scale_note(low, high, -0.65, TrainConfig(**knobs), dataclasses.replace(METHOD, **method))
    if said is None:
        assert note is None
    else:
        assert note is not None and re.search(said, note) and "-0.65" in note, note


def test_a_running_goal_is_of_the_rewards_before() -> None:
    goal = RunningGoal()
    assert goal.of([1.0, 2.0, 6.0]) == (2.0, statistics.pstdev([1, 2, 6])), "those of the step, where none were before"
    assert goal.of([]) == (0.5, 1.0) and goal.of([3.0, 3.0]) == (3.0, 1.0), "no spread is no reason for a huge δ"
    goal.add([0.0, 4.0])
    assert goal.of([100.0]) == (2.0, 2.0)
    again = RunningGoal()
    again.load_state_dict(goal.state_dict())
    assert again.of([]) == goal.of([])
    again.add([7.0] * SEEN)
    assert again.of([]) == (7.0, 1.0), "the oldest are forgotten"


@pytest.mark.parametrize("backend", ["torch", "cpu", "auto"])
def test_advantages_with_a_running_goal(backend: str) -> None:
    """δ = (r - m) / s with the given median and deviation; z and the mixing as ever."""
    config = MDPGRPOConfig(num_generations=4, temperatures=[1.0], goal_mean="running", goal_std="running")
    rewards, k = torch.tensor([[-20.0, -10.0, 0.0, -10.0]]), torch.tensor([3])
    out = advantages(rewards, k, config, running=(-10.0, 5.0), backend=backend)
    torch.testing.assert_close(out.delta, (rewards + 10) / 5)
    plain = dataclasses.replace(config, goal_mean="half", goal_std="released")
    torch.testing.assert_close(out.z, advantages(rewards, k, plain, backend=backend).z, atol=1e-6, rtol=1e-6)
    shaped = torch.where(out.delta >= 0, 1.25, 2.0) * torch.tanh(0.8 * out.delta)
    relative = torch.where(out.z >= 0, 1.25, 2.0) * torch.tanh(0.8 * out.z)
    torch.testing.assert_close(out.advantage, 0.8 * relative + 0.2 * shaped)
    equal = advantages(torch.full((1, 4), 3.0), k, config, running=(3.0, 0.0))
    assert (equal.advantage == 0).all(), "no spread at all is no reason to divide by it"


def test_a_running_goal_is_refused_where_nothing_was_seen() -> None:
    config = MDPGRPOConfig(num_generations=4, temperatures=[1.0], goal_std="running")
    rewards, k = torch.rand(1, 4), torch.tensor([3])
    with pytest.raises(ValueError, match=r"running must be \(median, deviation\)"):
        advantages(rewards, k, config)
    logits, tokens = torch.randn(4, 2, 8), torch.zeros(4, 2, dtype=torch.long)
    mask = torch.ones(4, 2, dtype=torch.bool)
    with pytest.raises(ConfigError, match="need the rewards seen before"):
        token_loss(logits, tokens, mask, config, rewards=rewards, num_constraints=k)
    given = token_loss(logits, tokens, mask, config, advantage=torch.ones(4), kl_beta=torch.zeros(4))
    assert given.loss.isfinite()


def test_a_reward_in_tens_trains_on_the_scale_that_one_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL's quickstart reward: one line says that it leaves the scale; none does with a range."""
    knobs: dict[str, Any] = {"reward": ["helpers.rewards:minus_length"], "steps": 2}
    off = run_small(tmp_path, METHOD, "off", **knobs)
    said = capsys.readouterr().err
    assert said.count("the goal anchor takes them for shares in [0, 1]") == 1 and "--reward-range" in said
    ranged = run_small(tmp_path, METHOD, "ranged", reward_range=[-200.0, 0.0], **knobs)
    assert "shares in [0, 1]" not in capsys.readouterr().err
    assert rows(off)[0]["reward"] == pytest.approx(rows(ranged)[0]["reward"]) and rows(off)[0]["reward"] < -1
    assert rows(ranged)[0]["reward_min"] == rows(off)[0]["reward_min"] < 0, "as the rewards gave it"
    assert rows(off)[0]["advantage_mean"] < rows(ranged)[0]["advantage_mean"]


def test_a_running_goal_trains_and_is_kept_in_checkpoints(tmp_path: Path) -> None:
    method = dataclasses.replace(METHOD, goal_mean="running", goal_std="running")
    knobs: dict[str, Any] = {"reward": ["helpers.rewards:minus_length"], "steps": 3}
    whole = run_small(tmp_path, method, "whole", **knobs)
    assert len(whole.collector.goal.state_dict()["seen"]) == 3 * 8
    assert abs(rows(whole)[2]["advantage_mean"]) < 0.5
    run_small(tmp_path, method, "parts", save_every=2, **knobs)
    again = make_trainer(tmp_path, method, "parts", resume=True, save_every=2, **knobs)
    assert len(again.collector.goal.state_dict()["seen"]) == 2 * 8
    again.train()
    assert rows(again)[2]["advantage_mean"] == rows(whole)[2]["advantage_mean"]


def test_all_or_nothing_has_one_level(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, METHOD, constraint_reward="all")
    example = next(e for e in trainer.task.train if len(e.instruction_ids) > 2)
    assert trainer.collector.num_constraints(example) == 1
    share = make_trainer(tmp_path, METHOD, "share")
    assert share.collector.num_constraints(example) == len(example.instruction_ids)
