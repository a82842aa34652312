"""`mdpgrpo evaluate`: what it prints, what it writes, and what it refuses before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.inputs import ROOT

from mdpgrpo_fast import evaluate
from mdpgrpo_fast.config import PromptConfig, TrainConfig
from mdpgrpo_fast.data import read_prompts, tokenize
from mdpgrpo_fast.demo import DEMO_DIR
from mdpgrpo_fast.evaluation.answers import Draw, answer, answers
from mdpgrpo_fast.evaluation.settings import EvaluateConfig
from mdpgrpo_fast.models.load import load
from mdpgrpo_fast.rollout import generate
from mdpgrpo_fast.rollout.thinking import Thinking

QUICK = ["--cpu", "--reward-workers", "1", "--limit", "4"]


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any, list[list[int]], list[int]]:
    """The seed policy, how it thinks, six prompts, and where it ends."""
    model, tokenizer = load(None)
    _, ids = tokenize(read_prompts(DEMO_DIR / "heldout.jsonl"), tokenizer, PromptConfig())
    return model, Thinking(tokenizer, "off"), ids[:6], generate.eos_ids(model, tokenizer)


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a failure of the test."""
    monkeypatch.setattr("mdpgrpo_fast.models.load.load", lambda *_, **__: pytest.fail("a model was loaded"))


def test_writes_scores_and_completions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, lines = tmp_path / "s.json", tmp_path / "c.jsonl"
    assert evaluate.main(["--limit", "5", "--output", str(saved), "--completions", str(lines)]) == 0
    result = json.loads(saved.read_text())
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert result["count"] == result["prompts"] == len(rows) == 5
    assert result["max_completion_length"] == 64, "the embedded demonstration's own"
    assert result["hsr"] == sum(all(r["strict"]) for r in rows) / 5
    assert result["ssr"] == pytest.approx(sum(sum(r["strict"]) / len(r["strict"]) for r in rows) / 5)
    assert result["reward"] == pytest.approx(result["ssr"]) and result["prompt_loose"] >= result["prompt_strict"]
    assert all(isinstance(result["intervals"][name], float) for name in ("ssr", "reward"))
    assert all(row["temperature"] == 0 and row["reward"] == row["rewards"]["constraints"] for row in rows)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "5 prompts, answered greedily; ±: half of the 95 % interval, bootstrap over prompts"
    ssr = f"{result['ssr']:.3f} ± {result['intervals']['ssr']:.3f}"
    assert any(line.startswith("share per prompt (SSR)") and ssr in line for line in out)
    assert "± 0.000" not in "\n".join(out)


def test_several_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, lines = tmp_path / "s.json", tmp_path / "c.jsonl"
    argv = [*QUICK, "--samples", "4", "--temperatures", "0.5", "1", "--top-p", "0.9", "--output", str(saved)]
    assert evaluate.main([*argv, "--completions", str(lines)]) == 0
    result = json.loads(saved.read_text())
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["temperature"] for row in rows] == [0.5, 1.0] * 8 and len({row["prompt"] for row in rows}) == 4
    assert (result["samples"], result["temperatures"], result["top_p"], result["seed"]) == (
        4,
        [0.5, 1, 0.5, 1],
        0.9,
        42,
    )
    found = result["sampled"]["pass_at_k"]
    assert list(found) == ["1", "2", "4"] and found["1"] == pytest.approx(result["hsr"])
    passed = [[all(r["strict"]) for r in rows[i : i + 4]] for i in range(0, 16, 4)]
    assert found["4"] == sum(map(any, passed)) / 4
    best = result["sampled"]["best_of"]["reward"]
    assert best["best"] == pytest.approx(sum(max(r["reward"] for r in rows[i : i + 4]) for i in range(0, 16, 4)) / 4)
    cold = [r for r in rows if r["temperature"] == 0.5]
    assert result["sampled"]["by_temperature"]["0.5"]["ssr"] == pytest.approx(sum(r["reward"] for r in cold) / 8)
    out = capsys.readouterr().out
    assert out.startswith("4 prompts, 4 sampled each at temperature 0.5, 1, top_p 0.9; ±: ")
    assert "pass: all constraints hold (strict); for a prompt without any, reward ≥ 1\npass@1 " in out
    for start in ("pass@4", " " * 59 + "best of 4", "  0.5, 2 a prompt", "    1, 2 a prompt"):
        assert any(line.startswith(start) for line in out.splitlines()), start


def test_prompts_without_constraints_and_a_reward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "Say hi."}\n{"prompt": "Say no."}\n')
    argv = [*QUICK, "--file", str(prompts)]
    assert refused(argv, capsys) == (
        f"no prompt of {str(prompts)!r} has an instruction_id_list: there is nothing to check; --reward names another "
        "reward than constraints"
    )


def test_a_reward_function_scores_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, saved = tmp_path / "p.jsonl", tmp_path / "s.json"
    prompts.write_text('{"prompt": "Say hi."}\n{"prompt": "Say no."}\n')
    argv = [*QUICK, "--file", str(prompts), "--output", str(saved), "--max-completion-length", "8"]
    assert evaluate.main([*argv, "--reward", "helpers.rewards:length", "helpers.rewards:vowels"]) == 0
    result = json.loads(saved.read_text())
    rewards = result["rewards"]
    assert list(rewards) == ["length", "vowels"] and rewards["length"]["mean"] > 0
    assert result["reward"] == pytest.approx(rewards["length"]["mean"] + rewards["vowels"]["mean"])
    assert result["intervals"]["rewards"]["length"] is not None and result["hsr"] is None
    out = capsys.readouterr().out
    assert "HSR" not in out and "\n  length " in out and "with constraints" not in out


def test_a_reward_that_fails_is_found_before_the_model(
    capsys: pytest.CaptureFixture[str], no_model: None, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("def broken(completions, **columns):\n    raise KeyError('no such column')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert evaluate.main([*QUICK, "--reward", "broken:broken"]) == 1
    err = capsys.readouterr().err
    assert "KeyError" in err and "it was tried on two sample rows (--no-reward-check)" in err


def test_existing_files_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text("precious")
    for name in ("output", "completions"):
        said = refused([*QUICK, f"--{name}", str(mine)], capsys)
        assert said == f"{name} {str(mine)!r} exists already; --overwrite replaces it"
    assert refused(["--output", str(tmp_path)], capsys) == f"output {str(tmp_path)!r} is a folder; a file is expected"
    both = ["--output", str(mine), "--completions", str(mine), "--overwrite"]
    assert refused(both, capsys) == f"output and completions must be two files; got {str(mine)!r} twice"
    assert mine.read_text() == "precious"


def test_overwrite_replaces(tmp_path: Path) -> None:
    old = tmp_path / "s.json"
    old.write_text("old")
    assert evaluate.main([*QUICK, "--output", str(old), "--overwrite"]) == 0
    assert json.loads(old.read_text())["prompts"] == 4


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--top-p 0.9", "top_p has no effect on a greedy answer: it needs samples or a temperature"),
        ("--temperature 0 --min-p 0.1", "min_p has no effect on a greedy answer: it needs samples or a temperature"),
        (
            "--samples 4 --temperature 0",
            "temperature must be above 0 for samples = 4, which would all be alike; got 0.0",
        ),
        (
            "--samples 4 --temperatures 1 2 3",
            "4 samples cannot be shared evenly among 3 temperatures: samples must be a multiple of how many "
            "temperatures there are",
        ),
        ("--temperature 0 --seed 1", "seed has no effect on a greedy answer: it needs samples or a temperature"),
        (
            "--reward helpers.rewards:length --constraint-reward all",
            "constraint_reward has no effect without 'constraints' among the rewards",
        ),
        ("--temperature 1 --temperatures 1", "temperature and temperatures exclude each other; got 1.0 and [1.0]"),
        ("--temperatures 0", "temperatures must be all above 0; got 0.0"),
        ("--samples 0", "samples must be at least 1; got 0"),
        ("--limit -1", "limit must be 0 (all) or positive; got -1"),
        ("--reward-weights 1 2", "reward_weights must have one weight per reward (1); got [1.0, 2.0]"),
        ("--reward no_such:f", "reward 'no_such:f' cannot be loaded: ModuleNotFoundError: No module named 'no_such'"),
        ("--suite-fewshot 1", "suite_fewshot has no effect without suite"),
        ("--suite x --samples 2", "samples has no effect without file"),
        ("--followbench . --reward a:b", "reward has no effect without file"),
        ("--suite x --completions c", "completions has no effect without file or followbench"),
        ("--suite x --max-prompt-length 9", "max_prompt_length has no effect without file or followbench"),
        ("--max-completion-length 600", "max_completion_length must be below the model's 512 positions; got 600"),
    ],
)
def test_refused_before_the_model_is_loaded(
    argv: str, said: str, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    assert refused(argv.split(), capsys) == said


def test_rewards_are_set_as_in_training() -> None:
    shared = EvaluateConfig.__dataclass_fields__.keys() & TrainConfig.__dataclass_fields__.keys()
    rewards = {name for name in shared if "reward" in name}
    assert rewards == {n for n in TrainConfig.__dataclass_fields__ if "reward" in n} - {"reward_range"}
    ours, theirs = EvaluateConfig(), TrainConfig()
    for name in {*rewards, "keep_special_tokens"}:
        assert getattr(ours, name) == getattr(theirs, name)
        of = (c.__dataclass_fields__[name].metadata for c in (EvaluateConfig, TrainConfig))
        assert len({m["help"] for m in of}) == 1, name


def test_how_samples_are_drawn() -> None:
    assert EvaluateConfig().draw == Draw((0.0,))
    assert EvaluateConfig(temperature=0.7).draw == Draw((0.7,))
    assert EvaluateConfig(samples=2).draw == Draw((1.0, 1.0))
    assert EvaluateConfig(samples=4, temperatures=[0.1, 1], top_k=5).draw == Draw((0.1, 1.0, 0.1, 1.0), top_k=5)


def test_the_commands_of_the_page_are_accepted() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("mdpgrpo evaluate ")]
    assert len(lines) == 5
    for line in lines:
        assert isinstance(evaluate._settings(line.split()[2:]), EvaluateConfig)


def test_batches_do_not_change_greedy_answers(policy: Any) -> None:
    model, thinking, ids, eos = policy
    one, together = (answer(model, thinking, ids, eos, 64, size) for size in (1, 6))
    assert one == together


def test_all_samples_of_a_prompt_come_from_one_call_of_the_sampler(
    policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training: G rows a prompt, slot g at its own temperature; the texts are those of its rows."""
    model, thinking, ids, eos = policy
    calls: list[dict[str, Any]] = []

    def recorded(model: Any, prompts: list[list[int]], **how: Any) -> Any:
        torch.manual_seed(len(calls))
        calls.append({"prompts": prompts, **how, "out": real(model, prompts, **how)})
        return calls[-1]["out"]

    real = generate.generate
    monkeypatch.setattr(generate, "generate", recorded)
    draw = Draw((0.5, 1.0, 0.5, 1.0), top_p=0.9, top_k=7, min_p=0.01)
    found = answers(model, thinking, ids, eos, 16, 8, draw=draw)
    assert [len(group) for group in found] == [4] * 6 and len(calls) == 3, "8 completions a call: 2 prompts"
    for call in calls:
        assert call["num_generations"] == 4 and call["temperature"] == [0.5, 1.0, 0.5, 1.0] * 2
        assert (call["top_p"], call["top_k"], call["min_p"]) == (0.9, 7, 0.01)
        rows = [a.token_ids for prompt in call["prompts"] for a in found[ids.index(prompt)]]
        assert rows == call["out"].rows
