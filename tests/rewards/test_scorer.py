"""Scoring a step: shares of constraints, functions and models, what is summed, what is lost, and why."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mdpgrpo_fast.config import ConfigError, TrainConfig
from mdpgrpo_fast.data import Example
from mdpgrpo_fast.rewards import ConstraintReward, RewardError, Score, Scorer, TrainerState
from mdpgrpo_fast.rewards.lost import LostSamples, raise_where_all_failed, why_all_failed

sys.path.insert(0, str(Path(__file__).parents[1]))  # spawned scoring processes inherit it

EXAMPLE = Example(
    "Say hi.",
    ["punctuation:no_comma", "startend:quotation", "punctuation:no_comma"],
    [{}, {}, {}],
    {"prompt": "Say hi.", "bonus": 3},
)
FREE = Example("Say hi.", columns={"prompt": "Say hi."})


def score(spec: list[Any], responses: list[str], example: Example = EXAMPLE, **kwargs: Any) -> tuple[list[Score], int]:
    with Scorer(spec, workers=2, **kwargs) as scorer:
        rows = scorer([example] * len(responses), responses)
    return rows, sum(row.total is None for row in rows)


def helper(name: str) -> str:
    return f"helpers.rewards:{name}"


def test_constraint_reward_is_the_share_satisfied_by_position() -> None:
    assert ConstraintReward()(EXAMPLE, "Hi, you.") == (0.0, [False, False, False])
    assert ConstraintReward()(EXAMPLE, '"Hi."') == (1.0, [True, True, True])
    share, flags = ConstraintReward()(EXAMPLE, "Hi.")
    assert flags == [True, False, True] and share == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("kind", "response", "reward"),
    [("all", '"Hi."', 1.0), ("all", "Hi.", 0.0), ("loose", 'Sure:\n"Hi."', 1.0), ("share", 'Sure:\n"Hi."', 2 / 3)],
)
def test_kinds_of_constraint_reward(kind: str, response: str, reward: float) -> None:
    found, flags = ConstraintReward(kind=kind)(EXAMPLE, response)
    assert found == pytest.approx(reward) and flags == ConstraintReward().satisfied(EXAMPLE, response)
    (row,), _ = score(["constraints"], [response], constraint_reward=kind)
    assert row.total == pytest.approx(reward) and row.satisfied == flags


def test_several_rewards_with_weights_and_columns() -> None:
    specs = ["constraints", helper("length"), helper("column"), helper("vowels")]
    (row,), dropped = score(specs, ['"Hi."'], weights=[1.0, 0.5, 10.0, 0.0])
    assert row.parts == {"constraints": 1.0, "length": 5.0, "column": 3.0, "vowels": 0.2}, "with weight 0 too"
    assert row.total == pytest.approx(1 + 2.5 + 30)
    assert row.satisfied == [True, True, True] and dropped == 0


def test_chat_prompts_give_chat_completions() -> None:
    example = Example([{"role": "user", "content": "Hi"}], columns={"prompt": []})
    (row,), _ = score([helper("chat")], ["four"], example)
    assert row.total == 4.0 and row.satisfied is None


def test_a_function_sees_the_whole_step_at_once() -> None:
    rows, _ = score([helper("rank"), helper("Counter")], ["aaa", "a", "aa"])
    assert [r.parts["rank"] for r in rows] == [1.0, 0.0, 0.5]
    assert [r.parts["Counter"] for r in rows] == [1.0] * 3, "a class is made once, and called once"


def test_a_function_logs_and_knows_the_step() -> None:
    with Scorer([helper("logs")]) as scorer:
        scorer.state = TrainerState(global_step=3)
        rows = scorer([FREE] * 2, ["ab", "cdef"], completion_ids=[[1, 2], [3]])
        assert [r.total for r in rows] == [pytest.approx(3.2), pytest.approx(3.1)]
        assert [r.extra for r in rows] == [{"first": "a"}, {"first": "c"}]
        assert scorer.take_metrics() == {"mean_length": 3.0} and scorer.take_metrics() == {}


def test_an_isolated_function_logs_and_knows_the_step() -> None:
    with Scorer([helper("logs")], isolation="process") as scorer:
        scorer.state = TrainerState(global_step=3)
        rows = scorer([FREE] * 2, ["ab", "cdef"], completion_ids=[[1, 2], [3]])
        assert [r.total for r in rows] == [pytest.approx(3.2), pytest.approx(3.1)]
        assert [r.extra for r in rows] == [{"first": "a"}, {"first": "c"}]
        assert scorer.take_metrics() == {"mean_length": 3.0}


def test_none_means_not_mine() -> None:
    rows, dropped = score([helper("only_short"), helper("only_long")], ["abc", "abcd"], FREE, weights=[2.0, 1.0])
    assert [r.total for r in rows] == [2.0, 0.25] and dropped == 0
    rows, dropped = score([helper("only_short")], ["abc", "abcd"], FREE)
    assert [r.total for r in rows] == [1.0, None] and dropped == 1 and not rows[1].cause
    assert "no reward applies" in (rows[1].problem or "")
    # A prompt without constraints is none of that reward's.
    rows, dropped = score(["constraints", helper("half")], ["x"], FREE)
    assert rows[0].parts == {"constraints": None, "half": 0.5} and rows[0].total == 0.5


def test_names_are_those_that_trl_logs_and_told_apart() -> None:
    with Scorer([helper("length"), helper("Counter"), helper("scaled"), "constraints"]) as scorer:
        assert scorer.names == ["length", "Counter", "<lambda>", "constraints"]
    with Scorer([helper("counter"), helper("Counter"), helper("counter")]) as scorer:
        assert scorer.names == [helper("counter"), helper("Counter"), f"{helper('counter')} 2"]
        (row,) = scorer([FREE], ["x"])
        assert list(row.parts) == scorer.names and row.total == sum(v or 0 for v in row.parts.values())

    def constraints(completions: list[str], **_: Any) -> list[float]:
        return [0.5] * len(completions)

    with Scorer([constraints]) as scorer:
        assert scorer.names != ["constraints"], "that name is of the share"
        scorer.check([FREE])
        assert scorer([FREE], ["x"])[0].total == 0.5
    with Scorer([constraints, constraints, "constraints"]) as scorer:
        assert len(set(scorer.names)) == 3
        (row,) = scorer([EXAMPLE], ['"Hi."'])
        assert sorted(v or 0 for v in row.parts.values()) == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("hang", "no answer within 1 s"), ("die", "exit code 7"), ("boom", "KeyError: 'no such thing'")],
)
def test_an_isolated_scorer_costs_its_own_sample(name: str, reason: str) -> None:
    rows, dropped = score([helper(name)], ["a", name, "b", "c"], timeout=1.0, isolation="process")
    assert [r.total for r in rows] == [1.0, None, 1.0, 1.0] and dropped == 1
    assert reason in (rows[1].problem or "") and rows[1].cause and why_all_failed(rows) is None


def test_a_scorer_that_was_stopped_scores_again() -> None:
    with Scorer(["constraints"], workers=1) as scorer:
        for _ in range(2):
            assert scorer([EXAMPLE], ['"Hi."'])[0].total == 1.0
            scorer._workers.stop()


def test_processes_that_cannot_start_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends.py").write_text(
        "import os\nif os.environ.get('HERE') != str(os.getpid()):\n    os._exit(3)\n"
        "def f(completions, **k):\n    return [1.0]\n"
    )
    monkeypatch.setenv("HERE", str(os.getpid()))
    monkeypatch.syspath_prepend(str(tmp_path))
    rows, dropped = score(["ends:f"], ["a"] * 8, FREE, isolation="process")
    assert dropped == 8 and (rows[0].problem or "").startswith(
        "the scoring processes died 4 times, the last with exit code 3, for prompt 'Say hi.', response 'a'"
    )


def test_a_module_that_workers_cannot_import_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here_alone.py").write_text(
        "import os\nif os.environ.get('HERE') != str(os.getpid()):\n    raise ImportError('not in a worker')\n"
        "def f(completions, **k):\n    return [1.0]\n"
    )
    monkeypatch.setenv("HERE", str(os.getpid()))
    monkeypatch.syspath_prepend(str(tmp_path))
    (row,), _ = score(["here_alone:f"], ["a"], FREE, isolation="process")
    assert "cannot be loaded: ImportError: not in a worker" in (row.problem or "")


def test_a_decorated_function_is_isolated_by_itself() -> None:
    import helpers.rewards

    for reward in (helper("boom_alone"), helpers.rewards.boom_alone):
        rows, _ = score([reward], ["a", "boom"])
        assert [r.total for r in rows] == [1.0, None]
        assert "rewards.py" in rows[1].trace and "KeyError" in rows[1].trace


def test_an_isolated_class_keeps_its_state() -> None:
    with Scorer([helper("Counter")], isolation="process", workers=1) as scorer:
        rows = scorer([FREE] * 3, ["a", "b", "c"])
    assert sorted(r.total or 0 for r in rows) == [1, 2, 3]


def test_a_callable_that_workers_cannot_import_is_refused() -> None:
    def local(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    from helpers.rewards import Counter, boom

    for reward in (local, Counter()):
        with pytest.raises(ConfigError, match="is called in worker processes, which need a function at the top"):
            Scorer([reward], isolation="process")
    rows, _ = score([boom], ["a", "boom"], isolation="process")
    assert [r.total for r in rows] == [1.0, None]


def test_the_place_of_an_error_is_in_the_users_code() -> None:
    (row,), _ = score([helper("reads_json")], ["no json"], FREE)
    assert re.search(r"JSONDecodeError: .* \(.*rewards\.py:\d+ in .*\)", row.problem or ""), row.problem
    assert "decoder.py" in row.trace, "the traceback has it all"


@pytest.mark.parametrize(("name", "said"), [("cancels", "CancelledError"), ("leaves_async", "SystemExit")])
def test_an_async_function_may_end_as_it_likes(name: str, said: str) -> None:
    rows, _ = score([helper(name), helper("slow_length")], ["abc"], FREE)
    assert said in (rows[0].problem or "") and rows[0].parts["slow_length"] == 3.0


def test_what_is_logged_of_completions_is_plain_and_of_their_number() -> None:
    def logs(completions: list[str], log_extra: Any, **_: Any) -> list[float]:
        log_extra("short", ["x"])
        log_extra("object", [lambda: 0] * len(completions))
        return [0.0] * len(completions)

    rows, _ = score([logs], ["a", "b"], FREE)
    assert [list(r.extra) for r in rows] == [["object"]] * 2 and "lambda" in rows[0].extra["object"]


def test_an_exception_that_cannot_be_unpickled_is_text() -> None:
    (row,), _ = score([helper("unpicklable")], ["a"], isolation="process", timeout=20)
    assert "raised Unpicklable: cannot be rebuilt" in (row.problem or "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("always_boom", r"raised KeyError: 'always' \(.*rewards\.py:\d+ in always_boom\)"),
        ("leaves", "raised SystemExit: out of the loop"),
        ("hang_and_swallow", "gave no answer within 0.3 s"),
        ("hang_async", "gave no answer within 0.3 s"),
        ("text", "returned str 'high' as value 1, which is no number"),
        ("numbers_as_text", r"returned str '0\.9' as value 1, which is no number"),
        ("returns_text", r"returned str '0\.9' in place of a list with a number or None for each completion \(2\)"),
        ("returns_number", r"returned float 0\.9 in place of a list"),
        ("returns_nothing", "returned None in place of a list"),
        ("returns_dict", "returned dict .* in place of a list"),
        ("returns_empty", "returned 0 values for 2 completions"),
        ("returns_three", "returned 3 values for 2 completions"),
    ],
)
def test_a_call_that_fails_loses_its_completions_and_says_why(name: str, reason: str) -> None:
    rows, dropped = score([helper("half"), helper(name)], ["hang", "b"], FREE, timeout=0.3)
    assert dropped == 2 and all(r.total is None and r.cause for r in rows)
    assert re.search(reason, rows[0].problem or ""), rows[0].problem
    assert rows[0].parts["half"] == 0.5 and "prompt 'Say hi.', response 'hang'" in (rows[0].problem or "")
    first = why_all_failed(rows)
    with pytest.raises(RewardError, match=r"all 2 samples of step 4 were lost like this") as caught:
        raise_where_all_failed([first], "step 4", 2)
    if name == "always_boom":
        assert 'raise KeyError("always")' in caught.value.trace and "scorer.py" not in caught.value.trace


def test_a_coroutine_that_blocks_its_loop_costs_one_call() -> None:
    specs = [helper("block_async")]
    with Scorer(specs, timeout=0.1) as scorer:
        (row,) = scorer([FREE], ["x"])
        assert row.cause
    (row,), _ = score([helper("slow_length")], ["abc"], FREE, timeout=1.0)
    assert row.total == 3.0, "the next call has a loop of its own"


def test_one_value_too_many_in_isolation() -> None:
    (row,), _ = score([helper("returns_three")], ["a"], isolation="process")
    assert "returned 3 values for 1 completion" in (row.problem or "")


def test_numbers_of_numpy_and_torch_and_generators_are_numbers() -> None:
    def tensor(completions: list[str], **_: Any) -> torch.Tensor:
        return torch.tensor([0.5] * len(completions), dtype=torch.bfloat16)

    def generator(completions: list[str], **_: Any) -> Any:
        return (True for _ in completions)

    (row,), _ = score([tensor, generator], ["a"], FREE)
    assert row.parts == {"tensor": 0.5, "generator": 1.0}


def test_a_dropped_sample_keeps_its_verdicts() -> None:
    (row,), _ = score(["constraints", helper("always_boom")], ['"Hi."'])
    assert row.total is None and row.satisfied == [True, True, True] and row.parts["constraints"] == 1.0


def test_nan_is_an_error_unless_dropped() -> None:
    with pytest.raises(RewardError, match=r"gave nan for prompt 'Say hi\.', response 'bad'"):
        score([helper("nan")], ["fine", "bad"])
    rows, dropped = score([helper("nan")], ["fine", "bad"], on_bad_reward="drop")
    assert [r.total for r in rows] == [0.5, None] and dropped == 1 and rows[1].parts == {"nan": None}


def huge(completions: list[str], **columns: Any) -> list[float]:
    return [1e39 if c == "bad" else -1e6 for c in completions]


def test_a_reward_beyond_float32_is_an_error_unless_dropped() -> None:
    message = (
        r"huge' gave 1e\+39 for prompt 'Say hi\.', response 'bad', beyond the ±1,000,000 that advantages are made of; "
    )
    with pytest.raises(RewardError, match=rf"{message}scale it, or on_bad_reward = drop leaves it out"):
        score([huge], ["fine", "bad"], FREE)
    rows, dropped = score([huge], ["fine", "bad"], FREE, on_bad_reward="drop")
    assert [r.total for r in rows] == [-1e6, None] and dropped == 1 and rows[1].parts == {"huge": None}
    assert rows[1].problem is not None and re.search(message[:-2], rows[1].problem)
    with pytest.raises(
        RewardError, match=r"rewards \[-1000000\.0\] with weights \[2\.0\] sum up to -2000000\.0 for prompt"
    ):
        score([huge], ["fine"], FREE, weights=[2.0])


def test_what_a_worker_logs_is_plain() -> None:
    with Scorer([helper("logs_what_hangs")], workers=1) as scorer:
        (row,) = scorer([FREE], ["a"])
        assert row.total == 1.0 and row.extra == {"said": "so"} and scorer.take_metrics() == {"number": 2.0}


def test_an_error_that_cannot_be_shown_loses_its_samples() -> None:
    with Scorer([helper("unshowable")]) as scorer:
        (row,) = scorer([FREE], ["a"])
    assert row.total is None and row.problem is not None
    assert "unshowable' raised Unshowable: that cannot be shown (" in row.problem


def test_a_reward_that_takes_too_much_memory_loses_its_sample() -> None:
    with Scorer([helper("takes_memory")], workers=1, memory=100) as scorer:
        lost, fine = scorer([FREE] * 2, ["200", "0"])
    assert fine.total == 0 and lost.total is None and lost.problem is not None
    assert re.match(
        r"the scoring process took more than reward_memory = 100 MB: MemoryError \(.*takes_memory", lost.problem
    )


def test_constraints_reward_needs_constraints_where_it_is_alone() -> None:
    free = Example("free")
    with Scorer(["constraints"]) as scorer, pytest.raises(ConfigError, match="prompt 2 has no instruction_id_list"):
        scorer.check([EXAMPLE, free])
    with Scorer(["constraints", helper("half")]) as scorer:
        scorer.check([EXAMPLE, free])


def test_verify_strict_and_loose() -> None:
    with Scorer(["constraints"]) as scorer:
        text = 'Sure:\n"Hi."'
        assert scorer.verify([EXAMPLE], [text], "strict") == [[True, False, True]]
        assert scorer.verify([EXAMPLE], [text], "loose") == [[True, True, True]]


def test_constraints_look_at_answers_and_functions_at_responses() -> None:
    with Scorer(["constraints", helper("length")]) as scorer:
        (row,) = scorer([EXAMPLE], ['a, b "Hi."'], answers=['"Hi."'])
    assert row.parts == {"constraints": 1.0, "length": 10.0}


def test_the_trial_call_finds_what_a_run_would_lose() -> None:
    with Scorer(["constraints", helper("half")]) as scorer:
        scorer.try_out([EXAMPLE, FREE])
    with (
        Scorer([helper("returns_three")]) as scorer,
        pytest.raises(RewardError, match=r"returned 3 values for 2 completions.*two sample rows \(--no-reward-check\)"),
    ):
        scorer.try_out([FREE])
    with Scorer(["constraints"]) as scorer:
        scorer.try_out([EXAMPLE])
        assert not scorer._workers.pool.processes, "and no worker was started for it"


def test_the_settings_of_a_run_reach_the_scorer() -> None:
    run = TrainConfig(
        reward=["constraints", helper("boom")], reward_weights=[2.0, 1.0], reward_isolation="process", rules="mdpgrpo",
        constraint_reward="all", reward_timeout=3.0, on_bad_reward="drop", reward_workers=1,
    )  # fmt: skip
    with Scorer.of(run) as scorer:
        assert scorer.specs == [helper("boom")] and scorer.weights == [2.0, 1.0] and scorer.drop_bad
        workers = scorer._workers
        assert (workers.constraints.rules, workers.constraints.kind) == ("mdpgrpo", "all")
        assert (workers.timeout, workers.count, scorer.call_timeout) == (3.0, 1, 3.0)


def test_many_lost_samples_end_a_run_after_ten_steps() -> None:
    lost = LostSamples(0.25)
    for step in range(1, 30):
        lost.check(step, 2, 8, "x", None)
    with pytest.raises(
        RewardError, match=r"21 of the 80 samples of steps 21 to 30 .* max_dropped = 0\.25 .* because x"
    ) as caught:
        lost.check(30, 3, 8, "x", "its traceback")
    assert caught.value.trace == "its traceback"
    short = LostSamples(0.25)
    for step in range(1, 10):
        short.check(step, 8, 8, "x", None)
    with pytest.raises(RewardError, match="all 72 samples of the run were dropped; the last because x"):
        short.check_end()
    lost.check_end()
    resumed = LostSamples(0.25)
    for _ in range(9):
        resumed.record(8, 8)
    with pytest.raises(RewardError, match="72 of the 80 samples of steps 21 to 30"):
        resumed.check(30, 0, 8, None, None)
    never = LostSamples(1.0)
    for step in range(1, 30):
        never.check(step, 8, 8, "x", None)
    never.check_end()


def test_all_ranks_have_to_fail() -> None:
    failed = Score(None, {}, None, "why", cause="f KeyError")
    raise_where_all_failed([failed, None], "step 1", 8)
    raise_where_all_failed([None, failed], "step 1", 8)
    with pytest.raises(RewardError, match="why; all 8 samples of step 1"):
        raise_where_all_failed([failed, failed], "step 1", 8)
    assert why_all_failed([]) is None and why_all_failed([failed, Score(1.0, {}, None)]) is None
    assert why_all_failed([Score(None, {}, None, "none applies")]) is None, "to abstain is not to fail"
    other = Score(None, {}, None, "why not", cause="g ValueError")
    assert why_all_failed([failed, other]) is None, "two causes may be two hard completions"
    raise_where_all_failed([failed, other], "step 1", 8)


def test_workers_do_not_run_a_script_without_a_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from mdpgrpo_fast.data import Example\nfrom mdpgrpo_fast.rewards import Scorer\nprint('ran')\n"
        "with Scorer(['constraints'], workers=1) as scorer:\n"
        "    print(scorer([Example('a', ['punctuation:no_comma'], [{}])], ['b'])[0].total)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["ran", "1.0"] and done.returncode == 0, done.stderr
