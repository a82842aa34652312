"""Held-out scores: IFEval's four accuracies, SSR and HSR from verdicts, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdpgrpo_fast import evaluate
from mdpgrpo_fast.config import PromptConfig
from mdpgrpo_fast.data import Example
from mdpgrpo_fast.evaluation import scores
from mdpgrpo_fast.evaluation.answers import answer
from mdpgrpo_fast.evaluation.intervals import half_width
from mdpgrpo_fast.rewards import Score, Scorer

NO_COMMA, QUOTED = "punctuation:no_comma", "startend:quotation"
EXAMPLES = [Example("a", [NO_COMMA, QUOTED], [{}, {}]), Example("b", [NO_COMMA], [{}]), Example("free")]


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


def test_strict_and_loose_and_their_table() -> None:
    responses = ['Sure:\n"Hi."', "No, no", "x"]
    with Scorer(["constraints"]) as scorer:
        result, verdicts = scores.strict_and_loose(scorer, EXAMPLES, responses)
    assert verdicts == [[True, False], [False], []]
    assert (result["prompt_strict"], result["prompt_loose"]) == (0.0, 0.5)
    assert result["instruction_strict"] == pytest.approx(1 / 3) and result["instruction_loose"] == pytest.approx(2 / 3)
    text = scores.table(result)
    assert "prompt level (all constraints, HSR)          0.000   0.500" in text and NO_COMMA in text


def test_command_line_writes_scores_and_completions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, lines = tmp_path / "s.json", tmp_path / "c.jsonl"
    argv = ["--samples", "5", "--max-completion-length", "64", "--output", str(saved), "--completions", str(lines)]
    assert evaluate.main(argv) == 0
    result = json.loads(saved.read_text())
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert result["count"] == len(rows) == 5
    assert result["hsr"] == sum(all(r["strict"]) for r in rows) / 5
    assert result["ssr"] == pytest.approx(sum(sum(r["strict"]) / len(r["strict"]) for r in rows) / 5)
    assert result["prompt_loose"] >= result["prompt_strict"]
    assert capsys.readouterr().out.startswith("5 prompts")


def test_batches_do_not_change_greedy_answers() -> None:
    from mdpgrpo_fast.data import read_prompts, tokenize
    from mdpgrpo_fast.demo import DEMO_DIR
    from mdpgrpo_fast.models.load import load
    from mdpgrpo_fast.rollout.generate import eos_ids
    from mdpgrpo_fast.rollout.thinking import Thinking

    model, tokenizer = load(None)
    _, ids = tokenize(read_prompts(DEMO_DIR / "heldout.jsonl"), tokenizer, PromptConfig())
    eos = eos_ids(model, tokenizer)
    one, together = (answer(model, Thinking(tokenizer, "off"), ids[:6], eos, 64, size) for size in (1, 6))
    assert one == together


def test_interval_is_that_of_the_mean() -> None:
    """Against the normal interval of a large sample; the same values give the same number."""
    values = [float(i % 4 == 0) for i in range(400)]
    wide = half_width(values)
    assert wide is not None and wide == half_width(values)
    assert wide == pytest.approx(1.96 * (0.25 * 0.75 / 400) ** 0.5, rel=0.05)
    assert half_width([1.0]) is None and half_width([1.0, 1.0]) == 0.0
