"""Tasks of lm-eval on the embedded seed policy, from task files and data of our own: nothing is fetched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mdpgrpo_fast import evaluate
from mdpgrpo_fast.evaluation.suite import _metrics
from mdpgrpo_fast.evaluation.tables import table
from mdpgrpo_fast.models.load import load

QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "wooden", "loud"], "answer": 0},
    {"question": "The grass is", "choices": ["round", "green", "late"], "answer": 1},
    {"question": "The snow is", "choices": ["hot", "square", "white"], "answer": 2},
    {"question": "People like the", "choices": ["of", "summer", "x"], "answer": 1},
]


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch, peer: Any) -> None:
    """lm-eval, which knows the tasks of a folder of ours alone: it reads its own for half a minute."""
    for name in ("requests", "sacrebleu", "datasets", "lm_eval"):
        peer(name)
    real = peer("lm_eval.tasks").TaskManager
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, **_: real(None, include_path, False))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with tasks of choices, of free text, one whose data is on the hub, and a group of two in another."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    (tmp_path / "questions.jsonl").write_text(lines)
    files = {"data_files": {"test": str(tmp_path / "questions.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    local = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "metadata": {"version": 1.0}}
    mean = {"aggregation": "mean", "higher_is_better": True}
    choices = {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc", **mean}],
    }  # fmt: skip
    free = {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 600}, "metric_list": [{"metric": "exact_match", **mean}],
    }  # fmt: skip
    hub = {**choices, "dataset_path": "nobody/nothing", "test_split": "test"}
    found = [{"task": "first", **local, **choices}, {"task": "second", **local, **choices}]
    found += [{"task": "free", **local, **free}, {"task": "hub", **hub}]
    weighted = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    found.append({"group": "both", "task": ["first", "second"], "aggregate_metric_list": weighted})
    found.append({"group": "outer", "task": ["both"], "aggregate_metric_list": weighted})
    for i, row in enumerate(found):
        (folder / f"{i}.yaml").write_text(yaml.safe_dump(row))
    return folder


def right() -> list[bool]:
    """Whether the seed policy finds the right choice most likely, question by question."""
    model, tokenizer = load(None)
    found = []
    for row in QUESTIONS:
        begin = len(tokenizer(row["question"]).input_ids)
        likely = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}").input_ids])
            with torch.no_grad():
                logprobs = model(ids[:, :-1]).logits.log_softmax(-1)
            likely.append(logprobs[0].gather(1, ids[0, 1:, None])[begin - 1 :].sum().item())
        found.append(likely.index(max(likely)) == row["answer"])
    return found


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_local_tasks(lm_eval: None, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, expected = tmp_path / "s.json", sum(right()) / 4
    argv = ["--suite", "outer", "--suite-tasks", str(tasks), "--output", str(saved), "--cpu"]
    assert evaluate.main(argv) == 0
    found = json.loads(saved.read_text())["suite"]
    assert found["max_length"] == 512, "the model's positions, fewer than 2048"
    assert set(found["tasks"]) == {"first", "second", "both", "outer"}
    for name in found["tasks"]:
        assert found["tasks"][name]["metrics"] == {"acc": expected}
    half = 1.959964 * (expected * (1 - expected) / 3) ** 0.5
    assert found["tasks"]["first"]["intervals"]["acc"] == pytest.approx(half)
    assert found["tasks"]["first"]["count"] == 4 and found["tasks"]["first"]["fewshot"] == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"lm-eval {found['lm_eval']}, at most 512 tokens; ±: 1.96 standard errors of lm-eval"
    assert "first (4 documents, 0-shot)" in out and f"  acc{' ' * 50}{expected:.3f} ± {half:.3f}" in out


def test_a_standard_error_of_nothing_gives_no_interval() -> None:
    found = {"n-samples": {"first": {"effective": 1}}, "n-shot": {}}
    row = _metrics("first", {"acc,none": 1.0, "acc_stderr,none": 0.0}, found)
    assert row["intervals"] == {"acc": None}
    text = table({"suite": {"tasks": {"first": row}, "lm_eval": "0", "max_length": 512}})
    assert text.splitlines()[:2] == ["lm-eval 0, at most 512 tokens", "first (1 document)"] and "±" not in text


def test_limit_and_several_names(lm_eval: None, tasks: Path, tmp_path: Path) -> None:
    saved = tmp_path / "s.json"
    argv = ["--suite", "first,second", "--suite-tasks", str(tasks), "--limit", "3", "--output", str(saved), "--cpu"]
    assert evaluate.main(argv) == 0
    found = json.loads(saved.read_text())["suite"]["tasks"]
    assert list(found) == ["first", "second"] and found["first"]["count"] == 3
    assert found["first"]["metrics"]["acc"] == pytest.approx(sum(right()[:3]) / 3)


def test_answers_are_as_long_as_the_task_says(
    lm_eval: None, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as the model's generation settings say, whose 64 tokens would win over them."""
    from transformers import GenerationMixin

    lengths: list[int | None] = []
    real = GenerationMixin.generate

    def generate(self: Any, *args: Any, **how: Any) -> Any:
        lengths.append(self.generation_config.max_new_tokens)
        return real(self, *args, **how)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    task = tasks / "2.yaml"
    task.write_text(task.read_text().replace("600", "12"))
    saved = tmp_path / "s.json"
    argv = ["--suite", "free", "--suite-tasks", str(tasks), "--output", str(saved), "--cpu"]
    assert evaluate.main(argv) == 0
    assert json.loads(saved.read_text())["suite"]["tasks"]["free"]["metrics"]["exact_match"] is not None
    assert lengths == [None]


def test_a_suite_that_stops_keeps_the_other_scores(
    lm_eval: None, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its answers of 600 tokens are more than the model has positions."""
    saved = tmp_path / "s.json"
    followed = ["--file", str(Path(evaluate.__file__).parent / "demo" / "heldout.jsonl"), "--limit", "2"]
    argv = [*followed, "--suite", "free", "--suite-tasks", str(tasks), "--output", str(saved), "--cpu"]
    assert evaluate.main(argv) == 1
    result = json.loads(saved.read_text())
    err = capsys.readouterr().err.splitlines()[-1]
    assert err == f"error: the suite stopped: {result['suite']['error']}" and "(600) must be less than" in err
    assert result["prompts"] == 2 and result["hsr"] is not None


def test_what_cannot_be_had_is_said_before_the_model_is_loaded(
    lm_eval: None, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdpgrpo_fast.models.load.load", lambda *_, **__: pytest.fail("a model was loaded"))
    where = ["--suite-tasks", str(tasks), "--cpu"]
    said = refused(["--suite", "firts", *where], capsys)
    assert said == f"error: suite: lm-eval has no task 'firts' and {str(tasks)!r} none; did you mean 'first'?"
    said = refused(["--suite", "hub", *where], capsys)
    assert said.startswith("error: suite: task 'hub' or its data set cannot be loaded: ") and "nobody" in said
    said = refused(["--suite", "second,both", "--suite-fewshot", "5", *where], capsys)
    assert said == "error: suite: 5 examples before each question of task 'second' need 5 documents; it has 4"
    said = refused(["--suite", "first", "--suite-tasks", "no_folder"], capsys)
    assert said == "error: suite_tasks 'no_folder' is no folder"


def test_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdpgrpo_fast.models.load.load", lambda *_, **__: pytest.fail("a model was loaded"))
    for name in ("lm_eval", "lm_eval.evaluator"):
        monkeypatch.setitem(sys.modules, name, None)
    said = refused(["--suite", "ifeval"], capsys)
    assert said.startswith("error: suite needs the package lm-eval: pip install 'mdpgrpo-fast[eval]' (")
