"""Scores by hand: IFEval's four accuracies, SSR and HSR, rewards, several samples, and their intervals."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from mdpgrpo_fast.data import Example
from mdpgrpo_fast.evaluation import scores, tables
from mdpgrpo_fast.evaluation.answers import Answer
from mdpgrpo_fast.evaluation.intervals import half_width
from mdpgrpo_fast.evaluation.run import _split
from mdpgrpo_fast.evaluation.sampled import ks, over_samples, pass_at_k
from mdpgrpo_fast.rewards import Score, Scorer

NO_COMMA, QUOTED = "punctuation:no_comma", "startend:quotation"
EXAMPLES = [Example("a", [NO_COMMA, QUOTED], [{}, {}]), Example("b", [NO_COMMA], [{}]), Example("free")]


def answered(text: str, finished: bool = True) -> Answer:
    return Answer(text, text, text, [1], finished)


def test_accuracy_counts_by_prompt_constraint_and_type() -> None:
    result = scores.accuracy(EXAMPLES, [[True, False], [True], []])
    assert result["hsr"] == 1 / 2 and result["ssr"] == (0.5 + 1) / 2 and result["instruction"] == 2 / 3
    assert result["count"] == 2, "a prompt without constraints is left out"
    assert result["types"] == {NO_COMMA: {"rate": 1.0, "count": 2}, QUOTED: {"rate": 0.0, "count": 1}}
    assert scores.accuracy(EXAMPLES[2:], [[]])["hsr"] is None


def test_a_dropped_sample_counts_as_nothing_satisfied() -> None:
    scored = [Score(1.0, {"constraints": 1.0}, [True, True]), Score(None, {"constraints": None}, None, "hung")]
    result = scores.from_scores(EXAMPLES[:2], scored)
    assert result["hsr"] == 0.5 and result["ssr"] == 0.5 and result["reward"] == 1.0


def test_summary_of_one_answer_each() -> None:
    answers = [[answered('Sure:\n"Hi."')], [answered("No, no", finished=False)], [answered("x")]]
    with Scorer(["constraints", "helpers.rewards:length"], [1, 0.5], workers=1) as scorer:
        found = scores.score(scorer, EXAMPLES, answers, (0.0,))
    assert found.strict == [[True, False], [False], []]
    result = scores.summary(found)
    assert (result["prompt_strict"], result["prompt_loose"]) == (0.0, 0.5)
    assert result["instruction_strict"] == pytest.approx(1 / 3) and result["instruction_loose"] == pytest.approx(2 / 3)
    assert (result["hsr"], result["ssr"]) == (0.0, 0.25) and (result["prompts"], result["count"]) == (3, 2)
    assert result["truncated"] == pytest.approx(1 / 3)
    assert result["types"][QUOTED] == {"count": 1, "strict": 0.0, "loose": 1.0}
    assert result["types"][NO_COMMA] == {"count": 2, "strict": 0.5, "loose": 0.5}
    assert result["rewards"]["length"]["mean"] == pytest.approx((11 + 6 + 1) / 3)
    assert result["reward"] == pytest.approx((0.5 + 5.5 + 0 + 3 + 0.5) / 3)
    assert result["rewards"]["constraints"]["mean"] == 0.25, "over the prompts that have constraints"
    halves = result["intervals"]
    assert halves["reward"] == half_width([6.0, 3.0, 0.5]) and halves["hsr"] is None and halves["ssr"] == 0.25
    assert halves["instruction_strict"] == half_width([0.5, 0.0], weights=[2, 1])
    assert halves["types"][QUOTED]["strict"] is None and halves["types"][NO_COMMA]["strict"] == 0.5


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_pass() -> None:
    for n, passed in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if passed <= n:
                subsets = list(itertools.combinations([i < passed for i in range(n)], k))
                assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(2000, 3, 1000) == pytest.approx(1 - 0.5**3, abs=1e-3)
    assert [ks(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_several_samples_by_hand() -> None:
    """Two prompts of two samples, at two temperatures: the first with a constraint, the second with a reward alone."""
    examples = [Example("a", [NO_COMMA], [{}]), Example("free")]
    flags = [[True], [False], [], []]
    given = [
        Score(2.0, {"f": 2.0}, [True]),
        Score(None, {"f": None}, [False]),
        *(Score(x, {"f": x}, None) for x in (0.9, 1.0)),
    ]
    answers = [answered(t, t != "d") for t in "abcd"]
    found = scores.Scored(examples, (0.5, 1.0), answers, flags, flags, given)
    result = over_samples(found)
    assert result["pass_at_k"]["1"][0] == 0.5 and result["pass_at_k"]["2"][0] == 1.0
    assert result["best_of"]["f"]["best"][0] == 1.0, "the best of fewer than G is none of G"
    assert result["best_of"]["reward"]["mean"][0] == 0.95 and result["incomplete"] == 1
    low, high = result["by_temperature"]["0.5"], result["by_temperature"]["1"]
    assert low["hsr"] == (1.0, None) and high["hsr"] == (0.0, None) and low["samples"] == 1
    assert low["reward"][0] == pytest.approx(1.45) and high["reward"] == (1.0, None)
    assert (low["truncated"][0], high["truncated"][0]) == (0.0, 0.5)
    lost = replace(found, scores=[given[2], given[3], given[0], given[1]])  # of the prompt that only rewards judge
    assert over_samples(lost)["pass_at_k"]["2"] == (1.0, None), "who lacks a reward neither passes nor fails"
    whole = scores.summary(found)
    assert whole["hsr"] == 0.5 and whole["dropped"] == 1 and whole["truncated"] == 0.25


def test_the_table_says_what_was_left_out_and_explains_only_what_it_has() -> None:
    """One prompt of two samples, one of them without a reward: no score has a ±."""
    given = [Score(1.0, {"f": 1.0}, None), Score(None, {"f": None}, None, "hung")]
    found = scores.Scored([Example("free")], (0.5, 1.0), [answered("a")] * 2, [[], []], [[], []], given)
    part = scores.summary(found)
    part["sampled"], part["intervals"]["sampled"] = _split(over_samples(found))
    part |= {"samples": 2, "temperatures": (0.5, 1.0), "top_p": 1, "top_k": 0, "min_p": 0, "max_completion_length": 9}
    lines = tables.table({**part, "dropped_reason": "it hung", "unchecked": 0}).splitlines()
    assert lines[0] == "1 prompt, 2 sampled each at temperature 0.5, 1"
    said = "1 prompt with a completion that has no reward: left out of best of 2 and, without constraints, of pass@k"
    assert said in lines and lines[-1] == "1 completion without a reward, the first because it hung"
    assert [line.split()[-1] for line in lines if line.startswith(("pass@", "reward "))] == ["1.000", "-", "-", "-"]


def test_interval_is_that_of_the_mean() -> None:
    """Against the normal interval of a large sample; the same values give the same number."""
    values = [float(i % 4 == 0) for i in range(400)]
    wide = half_width(values)
    assert wide is not None and wide == half_width(values)
    assert wide == pytest.approx(1.96 * (0.25 * 0.75 / 400) ** 0.5, rel=0.05)
    assert half_width([1.0]) is None and half_width([1.0, 1.0]) is None
    assert half_width(values, weights=[3.0] * 400) == pytest.approx(wide)


def test_a_weighted_interval_is_that_of_the_ratio() -> None:
    """Against the delta method: rows of weight 3 all right, rows of weight 1 all wrong."""
    values, weights = [1.0, 0.0] * 200, [3.0, 1.0] * 200
    ratio, mean = 0.75, 2.0
    spread = sum((w * (v - ratio)) ** 2 for v, w in zip(values, weights, strict=True)) / 400
    found = half_width(values, weights=weights)
    assert found == pytest.approx(1.96 * (spread / 400) ** 0.5 / mean, rel=0.05)
