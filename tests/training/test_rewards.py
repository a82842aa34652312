"""Rewards in a run: what is logged of each, and which losses of samples end it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import make_trainer, rows, run_small

import mdpgrpo_fast.train as train
from mdpgrpo_fast.rewards import RewardError
from mdpgrpo_fast.training.metrics import over_ranks
from mdpgrpo_fast.training.run_dir import tracker_values
from mdpgrpo_fast.training.show.end import last_line
from mdpgrpo_fast.training.show.progress import progress_values
from mdpgrpo_fast.training.timing import StageClock

SHORT = ["--steps", "2", "--prompts-per-step", "2", "--max-completion-length", "8", "--eval-samples", "2"]


def summary_of(path: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return summary


def test_each_reward_is_logged_by_its_name(tmp_path: Path) -> None:
    specs = ["constraints", "helpers.rewards:vowels", "helpers.rewards:logs"]
    trainer = run_small(tmp_path, reward=specs, reward_weights=[1.0, 0.5, 0.0])
    first, second = rows(trainer)
    assert list(first["rewards"]) == ["constraints", "vowels", "logs"]
    means = {name: x["mean"] for name, x in first["rewards"].items()}
    assert first["reward"] == pytest.approx(means["constraints"] + 0.5 * means["vowels"])
    assert means["constraints"] == pytest.approx(first["ssr"]) and first["rewards"]["vowels"]["std"] > 0
    assert second["rewards"]["logs"]["mean"] > means["logs"] + 0.5, "trainer_state.global_step is that of the run"
    assert first["logged"]["mean_length"] > 0
    flat = tracker_values(first)
    assert flat["rewards/vowels/mean"] == means["vowels"] and flat["mean_length"] == first["logged"]["mean_length"]
    assert f"vowels {means['vowels']:.2f}±" in progress_values(first)
    (row,) = [json.loads(x) for x in (trainer.out.path / "completions.jsonl").read_text().splitlines()][:1]
    assert set(row["rewards"]) == set(means) and row["extra"]["first"] == row["response"][:1]
    summary = summary_of(trainer.out.path)
    assert summary["reward_before"] is not None and summary["reward_after"] is not None
    assert summary["rewards"]["vowels"]["before"] > 0
    assert [h["step"] for h in trainer.history] == [1, 2], "log_history"


def test_one_reward_is_said_once_in_the_bar(tmp_path: Path) -> None:
    (row,) = rows(run_small(tmp_path, steps=1))
    bar = progress_values(row)
    assert "constraints" not in bar and f"r {row['reward']:.2f}±{row['reward_std']:.2f}" in bar
    assert f"cut {row['truncated']:.0%}" in bar
    assert "r – " in progress_values({**row, "reward": None, "reward_std": None})


def test_a_failing_scorer_costs_samples_not_the_run(tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"reward": ["helpers.rewards:flaky"], "reward_isolation": "process", "reward_timeout": 2.0}
    trainer = run_small(tmp_path, **knobs)
    dropped = sum(r["dropped"] for r in rows(trainer))
    assert 0 < dropped <= summary_of(trainer.out.path)["dropped_samples"], "which counts the held-out samples too"
    causes = [(cause, count) for r in rows(trainer) for cause, count in r["lost"].items()]
    assert sum(count for _, count in causes) == dropped and all("flaky KeyError" in cause for cause, _ in causes)
    written = [json.loads(x) for x in (trainer.out.path / "completions.jsonl").read_text().splitlines()]
    reasons = [row["problem"] for row in written if row["phase"] == "train" and row["reward"] is None]
    assert len(reasons) == dropped and all("raised KeyError: 'flaky'" in reason for reason in reasons)
    assert over_ranks([{"lost": {"a": 1}}, {"lost": {"a": 2, "b": 1}}]) == {"lost": {"a": 3, "b": 1}}


def test_a_step_without_a_reward_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line: status 1, the traceback in the user's file, the row, how many; what was learned stays."""
    out = tmp_path / "run"
    argv = [*SHORT, "--reward", "helpers.rewards:boom_later", "--output-dir", str(out), "--save-every", "1"]
    assert train.main([*argv, "--num-generations", "4"]) == 1
    said = capsys.readouterr().err
    last = said.strip().splitlines()[-1]
    assert (
        last.startswith("error: reward 'helpers.rewards:boom_later' raised KeyError: 'later' (")
        and "rewards.py:" in last
    )
    assert "for prompt '" in last and "all 8 samples of step 2 were lost like this; what was learned" in last
    assert 'raise KeyError("later")' in said and "mdpgrpo_fast/rewards" not in said
    assert (out / "model" / "model.safetensors").exists() and (out / "checkpoints" / "checkpoint_1").exists()
    assert "The run stopped after step 1: reward &#39;helpers" in (out / "report.html").read_text()
    summary = summary_of(out)
    assert summary["steps"] == 1 and summary["interrupted"] and "KeyError: 'later'" in summary["failure"]


def test_a_reward_that_fails_from_the_first_ends_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"all 2 samples of the held-out evaluation were lost like this"):
        run_small(tmp_path, reward=["helpers.rewards:always_boom"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("always_boom", r"raised KeyError: 'always' \(.*rewards\.py:\d+ in always_boom\)"),
        ("returns_three", "returned 3 values for 2 completions"),
        ("returns_text", r"returned str '0\.9' in place of a list"),
    ],
)
def test_rewards_are_tried_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr("mdpgrpo_fast.training.task.load", lambda *a, **k: loaded.append("model"))
    assert train.main([*SHORT, "--reward", f"helpers.rewards:{name}", "--output-dir", str(tmp_path / "run")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(said, last) and last.endswith("(--no-reward-check)"), last
    assert not loaded and not (tmp_path / "run").exists()


def test_rewards_that_never_apply_end_the_run_after_ten_steps(tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"reward": ["helpers.rewards:only_short"], "steps": 12, "prompts_per_step": 1}
    with pytest.raises(RewardError, match=r"samples of steps 1 to 10 were dropped.*because no reward applies"):
        run_small(tmp_path, eval_samples=1, **knobs)
    assert summary_of(tmp_path / "run")["steps"] == 10
    patient = run_small(tmp_path, name="patient", eval_samples=1, max_dropped=1.0, **knobs)
    assert len(rows(patient)) == 12 and "no token counts" in rows(patient)[0]["note"]
    assert rows(patient)[0]["reward"] is None


def test_an_unusable_reward_ends_the_run_and_keeps_the_model(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="gave nan for prompt"):
        run_small(tmp_path, reward=["helpers.rewards:sometimes_nan"], steps=50, save_model=True)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert summary_of(tmp_path / "run")["interrupted"]


def test_functions_see_special_tokens_where_they_are_kept(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, keep_special_tokens=True, max_completion_length=64)
    seen: list[str] = []

    def spy(examples: Any, responses: Any, *, answers: Any, completion_ids: Any) -> list[Any]:
        seen.extend([*zip(responses, answers, completion_ids, strict=True)])
        return []

    trainer.collector.scorer = spy  # type: ignore[assignment]
    _, responses, _ = trainer.collector.sample_and_score([0, 1], StageClock(trainer.accelerator.device))
    end = trainer.task.tokenizer.eos_token
    assert any(end in text for text, *_ in seen) and not any(end in answer for _, answer, _ in seen)
    assert [answer for _, answer, _ in seen] == responses
    assert all(ids[-1] in trainer.task.eos for text, _, ids in seen if text.endswith(end))


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (
            (0.5, 0.75, 0.75 + 1e-15),
            (0.9, 0.95, 0.95),
            "held-out HSR 0.500 ± 0.100 → 0.900, SSR 0.750 ± 0.100 → 0.950 (95 %, 7 prompts) in 3 steps, 2 s",
        ),
        (
            (0.5, 0.75, 0.5),
            (0.9, 0.95, 0.9),
            "held-out HSR 0.500 ± 0.100 → 0.900, SSR 0.750 ± 0.100 → 0.950, reward 0.500 ± 0.100 → 0.900 (95 %, 7 "
            "prompts) in 3 steps, 2 s",
        ),
        (
            (None, None, -4.0),
            (None, None, -2.5),
            "held-out reward -4.000 ± 0.100 → -2.500 (95 %, 7 prompts) in 3 steps, 2 s",
        ),
        ((None, None, None), (None, None, None), "in 3 steps, 2 s"),
    ],
)
def test_the_last_line_has_the_held_out_scores(before: Any, after: Any, line: str) -> None:
    intervals = {w: dict.fromkeys(("hsr", "ssr", "reward"), x) for w, x in (("before", 0.1), ("after", None))}
    summary: dict[str, Any] = {
        "steps": 3,
        "resumed_after": 0,
        "train_seconds": 2.0,
        "interrupted": False,
        "held_out": 7,
        "intervals": intervals,
    }
    for name, *pair in zip(("hsr", "ssr", "reward"), before, after, strict=True):
        summary |= dict(zip((f"{name}_before", f"{name}_after"), pair, strict=True))
    assert last_line(summary) == line


def test_much_truncation_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = run_small(tmp_path, max_completion_length=4, steps=2)
    said = capsys.readouterr().err
    assert rows(trainer)[0]["truncated"] == 1.0
    assert said.count("of the completions were cut at 4 tokens") == 1 and "100% cut" in said
