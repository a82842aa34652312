"""Rewards of lengths: TRL's numbers and arguments, by name on a command line, and what a wrong argument is told."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from mdpgrpo_fast import cli
from mdpgrpo_fast.config import ConfigError, TrainConfig
from mdpgrpo_fast.data import Example
from mdpgrpo_fast.rewards import (
    Scorer,
    TrainerState,
    get_cosine_scaled_reward,
    get_soft_overlong_punishment,
    named_spec,
)

LENGTHS = [0, 1, 40, 79, 80, 81, 90, 99, 100, 101, 150, 500]
IDS = [[1] * n for n in LENGTHS]
STRICT = Example("Say hi.", ["punctuation:no_comma", "startend:quotation"], [{}, {}], {"prompt": "Say hi."})
FREE = Example("Say hi.", columns={"prompt": "Say hi."})


# ---- TRL's numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [0, 1, 20, 33, 100])
def test_soft_overlong_punishment_is_trl_s(peer: Callable[[str], Any], cache: int) -> None:
    theirs, ours = (
        module.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=cache)
        for module in (peer("trl.rewards"), __import__("mdpgrpo_fast.rewards", fromlist=["rewards"]))
    )
    assert ours(completion_ids=IDS, prompts=[], trainer_state=TrainerState()) == theirs(completion_ids=IDS)
    assert ours.__name__ == theirs.__name__


def test_soft_overlong_punishment_by_hand() -> None:
    punish = get_soft_overlong_punishment(100, 20)
    assert punish([[1] * n for n in (80, 85, 90, 100, 101)]) == [0.0, -0.25, -0.5, -1.0, -1.0]


@pytest.mark.parametrize("bounds", [(), (-2.0, -0.25, 0.1, 3.0)])
def test_cosine_is_trl_s(
    peer: Callable[[str], Any], bounds: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's own class, but for the mathematics that says what is correct."""
    module = peer("trl.rewards.accuracy_rewards")
    verdicts = [i % 2 == 0 for i in range(len(IDS))]
    monkeypatch.setattr(module, "accuracy_reward", lambda completions, solution: [*map(float, verdicts)])
    theirs = module.get_cosine_scaled_reward(100, *bounds)
    ours = get_cosine_scaled_reward(100, *bounds, correct=lambda **_: verdicts)
    expected = theirs(completions=["x"] * len(IDS), solution=["x"] * len(IDS), completion_ids=IDS)
    assert ours(completions=["x"] * len(IDS), completion_ids=IDS) == expected
    assert ours.__name__ == theirs.__name__


def test_cosine_by_hand() -> None:
    """Half way is half way between the ends; shorter is better where it is correct, and worse where it is not."""
    reward = get_cosine_scaled_reward(100)
    for correct, values in ((True, [1.0, 0.75, 0.5, 0.5]), (False, [-1.0, -0.75, -0.5, -0.5])):
        assert [reward.of(n, correct) for n in (0, 50, 100, 1000)] == pytest.approx(values)
    assert reward.of(25, True) == pytest.approx(0.5 + 0.25 * (1 + math.sqrt(0.5)))


def test_they_can_be_pickled() -> None:
    for reward in (get_soft_overlong_punishment(100, 20), get_cosine_scaled_reward(100)):
        again = pickle.loads(pickle.dumps(reward))
        assert again.spec == reward.spec and again.of(90, True) if reward.of_constraints else again.of(90) == -0.5


# ---- what is correct ------------------------------------------------------------------------------------------------


def test_correct_is_what_satisfies_all_constraints() -> None:
    texts, ids = ['"Hi."', "Hi.", '"Hi, you."'], [[1] * 50] * 3
    with Scorer([get_cosine_scaled_reward(100)]) as scorer:
        assert scorer.names == ["cosine_scaled_reward"]
        scores = scorer([STRICT] * 3 + [FREE], [*texts, "Hi."], completion_ids=[*ids, [1] * 50])
    assert [s.total for s in scores] == [pytest.approx(0.75), pytest.approx(-0.75), pytest.approx(-0.75), None]
    assert "no reward applies" in (scores[3].problem or ""), "a prompt without constraints"


def test_correct_by_the_columns_of_a_row() -> None:
    """As TRL's trainer calls it: without workers, from the columns of IFEval."""
    reward = get_cosine_scaled_reward(100)
    columns = {
        "prompts": ["Say hi."] * 3,
        "instruction_id_list": [STRICT.instruction_ids] * 2 + [None],
        "kwargs": [[{"num_words": None}, None], [{}, {}], None],
        "trainer_state": TrainerState(),
    }
    chat = [[{"role": "assistant", "content": '"Hi."'}]]
    found = reward(completions=[*chat, "Hi.", "Hi."], completion_ids=[[1] * 50] * 3, **columns)
    assert found == [pytest.approx(0.75), pytest.approx(-0.75), None]
    assert reward(completions=["Hi."], completion_ids=[[1]]) == [None]


def test_another_rule_of_what_is_correct() -> None:
    def answers(completions: list[str], answer: list[Any], **_: Any) -> list[float | None]:
        return [None if a is None else float(a == c) for a, c in zip(answer, completions, strict=True)]

    rows = [Example("?", columns={"answer": a}) for a in ("4", "5", None)]
    with Scorer([get_cosine_scaled_reward(100, correct=answers)]) as scorer:
        scores = scorer(rows, ["4", "4", "4"], completion_ids=[[1] * 100] * 3)
    assert [s.total for s in scores] == [0.5, -0.5, None]


def test_constraints_that_cannot_be_checked_lose_the_sample() -> None:
    broken = Example("Say hi.", ["keywords:frequency"], [{"keyword": "a", "relation": "at least", "frequency": "x"}])
    with Scorer(["cosine_scaled(max_len=9)", "constraints"]) as scorer:
        (row,) = scorer([broken], ["a"], completion_ids=[[1]])
    assert row.total is None and row.cause and set(row.parts.values()) == {None}


# ---- by name --------------------------------------------------------------------------------------------------------


def test_names_beside_constraints() -> None:
    specs = ["constraints", "soft_overlong_punishment", "cosine_scaled(max_len=10, min_value_wrong=-2)"]
    with Scorer(specs, [1.0, 0.5, 2.0], max_completion_length=100) as scorer:
        assert scorer.names == ["constraints", "soft_overlong_punishment_reward", "cosine_scaled_reward"]
        assert [r.spec for r in scorer.rewards][1] == (
            "soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)"
        )
        right, wrong = scorer([STRICT] * 2, ['"Hi."', "Hi."], completion_ids=[[1] * 90, []])
    assert list(right.parts.values()) == [1.0, -0.5, 0.5] and right.total == pytest.approx(1 - 0.25 + 1)
    assert list(wrong.parts.values()) == [0.5, 0.0, -2.0] and wrong.total == pytest.approx(0.5 - 4)


@pytest.mark.parametrize(
    ("spec", "whole"),
    [
        ("soft_overlong_punishment", "max_completion_len=64, soft_punish_cache=12"),
        (" soft_overlong_punishment () ", "max_completion_len=64, soft_punish_cache=12"),
        ("soft_overlong_punishment(soft_punish_cache=50)", "max_completion_len=64, soft_punish_cache=50"),
        ("soft_overlong_punishment(max_completion_len=20480)", "max_completion_len=20480, soft_punish_cache=4096"),
        ("soft_overlong_punishment(100, 20)", "max_completion_len=100, soft_punish_cache=20"),
        ("cosine_scaled", "max_len=64, min_value_wrong=-1.0, max_value_wrong=-0.5, min_value_correct=0.5, "
         "max_value_correct=1.0"),
        ("cosine_scaled(max_len=9)", "max_len=9, min_value_wrong=-1.0, max_value_wrong=-0.5, min_value_correct=0.5, "
         "max_value_correct=1.0"),
    ],
)  # fmt: skip
def test_what_is_left_out_is_the_run_s(spec: str, whole: str) -> None:
    """DAPO's cache is 4096 of 20480 tokens: a fifth."""
    for isolation in ("none", "process"):
        run = TrainConfig(reward=[spec], max_completion_length=64, reward_isolation=isolation)  # type: ignore[arg-type]
        with Scorer.of(run) as scorer:
            assert [r.spec for r in scorer.rewards] == [f"{spec.partition('(')[0].strip()}({whole})"]
            # The same by its own words, as a run's settings have it.
            assert named_spec(scorer.rewards[0].function or scorer.rewards[0].scaled) == scorer.rewards[0].spec  # type: ignore[arg-type]
            with Scorer([scorer.rewards[0].spec]) as again:
                assert again.rewards[0].spec == scorer.rewards[0].spec


def test_from_a_command_line() -> None:
    argv = [
        "--reward",
        "constraints",
        "soft_overlong_punishment(soft_punish_cache=50)",
        "--max-completion-length",
        "80",
    ]
    (run,) = cli.parse(argv, TrainConfig, prog="test", description="")
    with Scorer.of(run) as scorer:
        assert scorer.rewards[1].spec == "soft_overlong_punishment(max_completion_len=80, soft_punish_cache=50)"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("soft_overlong", "reward must be 'constraints', 'soft_overlong_punishment', 'cosine_scaled', module:function"),
        ("soft_overlong_punishmnt", "unknown reward .*; did you mean 'soft_overlong_punishment'?"),
        ("get_soft_overlong_punishment(1, 1)", "did you mean 'soft_overlong_punishment'?"),
        ("cosine_scaled_reward", "did you mean 'cosine_scaled'?"),
        ("constraint", "did you mean 'constraints'?"),
        ("cosine", "reward must be 'constraints', .*module:function, or the directory .*; got 'cosine'"),
        ("cosine_scaled(max_length=9)", "unknown argument of cosine_scaled 'max_length'; did you mean 'max_len'?"),
        ("cosine_scaled(correct=1)", "unknown argument of cosine_scaled 'correct'"),
        ("cosine_scaled(max_len=0)", r"max_len must be a whole number of at least 1; got 0"),
        ("cosine_scaled(max_len=9.5)", "max_len must be a whole number"),
        ("cosine_scaled(max_len='9')", "max_len must be a whole number"),
        ("cosine_scaled(max_len=9, min_value_wrong='a')", "min_value_wrong must be a finite number; got 'a'"),
        ("cosine_scaled(max_len=9, min_value_wrong=1e999)", "min_value_wrong must be a finite number; got inf"),
        ("soft_overlong_punishment(soft_punish_cache=-1)", "soft_punish_cache must be a whole number of at least 0"),
        ("soft_overlong_punishment(soft_punish_cache=None)", "soft_punish_cache must be a whole number"),
        ("soft_overlong_punishment(soft_punish_cache=101)", "at most max_completion_len = 100; got 101"),
        ("soft_overlong_punishment(1, 2, 3)", "has 3 arguments; .* takes max_completion_len, soft_punish_cache"),
        ("soft_overlong_punishment(1, max_completion_len=2)", "gives max_completion_len twice"),
        ("soft_overlong_punishment(", r"must be soft_overlong_punishment\(argument=value, ...\)"),
        ("soft_overlong_punishment(soft_punish_cache=abc)", "with numbers as values"),
        ("soft_overlong_punishment(**{})", "unknown argument|numbers as values"),
        ("soft_overlong_punishment(1)(2)", "numbers as values"),
    ],
)
def test_a_wrong_name_or_argument_is_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scorer([spec], max_completion_length=100)


def test_a_length_is_needed_from_somewhere() -> None:
    with pytest.raises(ConfigError, match="max_len must be given: there is no max_completion_length to take"):
        Scorer(["cosine_scaled"])
    with Scorer(["soft_overlong_punishment(9)"]) as scorer, pytest.raises(ValueError, match=r"^completion_ids must"):
        scorer([FREE], ["x"])


def test_prompts_without_constraints_are_said_where_nothing_else_scores_them() -> None:
    with Scorer(["cosine_scaled(9)"]) as scorer:
        with pytest.raises(
            ConfigError, match=r"prompt 1 has no instruction_id_list, which the reward 'cosine_scaled\("
        ):
            scorer.check([FREE])
        scorer.check([STRICT])
        scorer.try_out([STRICT])
    with Scorer(["cosine_scaled(9)", "soft_overlong_punishment(9)"]) as scorer:
        scorer.check([FREE])
        scorer.try_out([FREE])
