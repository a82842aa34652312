"""Scoring: shares of constraints, functions of TRL's signature, and samples that cost only themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.data import Example
from mdpgrpo_fast.rewards import ConstraintReward, RewardError, Scorer, load_reward

sys.path.insert(0, str(Path(__file__).parent))  # spawned scoring processes inherit it

EXAMPLE = Example(
    "Say hi.",
    ["punctuation:no_comma", "startend:quotation", "punctuation:no_comma"],
    [{}, {}, {}],
    {"prompt": "Say hi.", "bonus": 3},
)


def score(spec: list[str], responses: list[str], example: Example = EXAMPLE, **kwargs):
    with Scorer(spec, workers=2, **kwargs) as scorer:
        return scorer([example] * len(responses), responses), scorer.dropped


def test_constraint_reward_is_the_share_satisfied_by_position() -> None:
    assert ConstraintReward()(EXAMPLE, "Hi, you.") == (0.0, [False, False, False])
    assert ConstraintReward()(EXAMPLE, '"Hi."') == (1.0, [True, True, True])
    share, flags = ConstraintReward()(EXAMPLE, "Hi.")
    assert flags == [True, False, True] and share == pytest.approx(2 / 3)


def test_several_rewards_with_weights_and_columns() -> None:
    (row,), dropped = score(
        ["constraints", "helpers.rewards:length", "helpers.rewards:column"], ['"Hi."'], weights=[1.0, 0.5, 10.0]
    )
    assert row.parts == [1.0, 5.0, 3.0] and row.total == pytest.approx(1 + 2.5 + 30)
    assert row.satisfied == [True, True, True] and dropped == 0


def test_chat_prompts_give_chat_completions() -> None:
    example = Example([{"role": "user", "content": "Hi"}], columns={"prompt": []})
    (row,), _ = score(["helpers.rewards:chat"], ["four"], example)
    assert row.total == 4.0 and row.satisfied is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [("hang", "no answer within 1 s"), ("die", "exit code 7"), ("boom", "KeyError: 'no such thing'")],
)
def test_a_broken_scorer_costs_its_own_sample(name: str, reason: str) -> None:
    rows, dropped = score([f"helpers.rewards:{name}"], ["a", name, "b", "c"], timeout=1.0)
    assert [r.total for r in rows] == [1.0, None, 1.0, 1.0] and dropped == 1
    assert reason in (rows[1].problem or "")


def test_a_reward_that_is_no_number_costs_its_sample() -> None:
    (row,), dropped = score(["helpers.rewards:text"], ["a"])
    assert row.total is None and dropped == 1 and "ValueError" in (row.problem or "")


def test_a_dropped_sample_keeps_its_verdicts() -> None:
    (row,), _ = score(["constraints", "helpers.rewards:none_for_bad"], ['"Hi."'], on_bad_reward="drop")
    assert row.total is None and row.satisfied == [True, True, True]


@pytest.mark.parametrize("name", ["none", "nan"])
def test_none_and_nan_are_errors_unless_dropped(name: str) -> None:
    spec = [f"helpers.rewards:{name}"]
    with pytest.raises(RewardError, match=r"gave (None|nan) for prompt 'Say hi\.', response 'bad'"):
        score(spec, ["fine", "bad"])
    rows, dropped = score(spec, ["fine", "bad"], on_bad_reward="drop")
    assert [r.total for r in rows] == [0.5, None] and dropped == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lengths", "must be 'constraints' or module:function; got 'lengths'"),
        ("no_such_module_here:f", "cannot be loaded: No module named"),
        ("helpers.rewards:missing", "cannot be loaded: .*missing"),
        ("helpers.rewards:NOT_A_FUNCTION", "is not a function"),
    ],
)
def test_bad_reward_names(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward(spec)


def test_constraints_reward_needs_constraints() -> None:
    with (
        Scorer(["constraints"]) as scorer,
        pytest.raises(ConfigError, match="prompt 2 has no instruction_id_list"),
    ):
        scorer.check([EXAMPLE, Example("free")])


def test_verify_strict_and_loose() -> None:
    with Scorer(["constraints"]) as scorer:
        text = 'Sure:\n"Hi."'
        assert scorer.verify([EXAMPLE], [text], "strict") == [[True, False, True]]
        assert scorer.verify([EXAMPLE], [text], "loose") == [[True, True, True]]
