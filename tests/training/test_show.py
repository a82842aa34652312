"""What a run tells: the block at its start, its evaluations, how it ended and how to go on; and nothing else."""

from __future__ import annotations

import json
import logging
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.utils as hub
import pytest
import transformers
from helpers.runs import SMALL, make_trainer

import mdpgrpo_fast.train as train
from mdpgrpo_fast.config import TrainConfig, preset
from mdpgrpo_fast.training.loop import TrainingLoop
from mdpgrpo_fast.training.show import end
from mdpgrpo_fast.training.show.quiet import quiet
from mdpgrpo_fast.training.show.start import Facts, start_lines

FACTS = Facts(
    sources={"model": "org/model-1b", "train_file": "train.jsonl", "eval_file": "held.jsonl"},
    parameters=1_235_814_400, trained=1_235_814_400, dtype="float32", prompts=2000, held_out=300, longest_prompt=100,
    steps=1500, processes=1, device="CPU, 2 threads", attention="sdpa", tokens_per_pass=8192,
    backend={"loss": "cpu", "log-probs": "cpu", "advantages": "torch", "sampling": "cpu"},
    memory={"weights": 4.94e9, "gradients": 4.94e9, "AdamW": 9.89e9, "logits": 2.6e8, "activations": 5.5e7},
    notes=["plain text prompts stay as they are: the tokenizer has no chat template"],
)  # fmt: skip


def test_the_block_at_the_start() -> None:
    run = TrainConfig(
        model="org/model-1b",
        learning_rate=2e-6,
        reward=["a:f", "b:g"],
        max_completion_length=200,
        system_prompt="x" * 99,
    )
    assert start_lines(FACTS, run, preset("paper", num_generations=4, temperatures=[0.5, 1.0])) == [
        "model      org/model-1b: 1,235,814,400 parameters, all trained, float32",
        "prompts    2,000 of train.jsonl, 300 held out of held.jsonl",
        "run        4 prompts × 4 completions × 1,500 steps, at most 4,800 tokens a step",
        "method     preset paper, num_generations 4, temperatures 0.5 1.0",
        f"settings   max_completion_length 200, system_prompt {'x' * 59}…, reward a:f b:g, learning_rate 2e-06",
        "backend    loss cpu, log-probs cpu, advantages torch, sampling cpu",
        "attention  sdpa; groups packed, up to 8,192 tokens a pass",
        "device     CPU, 2 threads",
        "memory     about 20.1 GB of tensors: weights 4.9 GB, gradients 4.9 GB, AdamW 9.9 GB, logits 0.3 GB, "
        "activations 55.0 MB",
        "note       plain text prompts stay as they are: the tokenizer has no chat template",
    ]
    facts = replace(FACTS, trained=500, processes=2, held_out=0, tokens_per_pass=0, notes=[])
    lines = start_lines(facts, TrainConfig(), preset("paper"))
    assert lines[0].endswith("1,235,814,400 parameters, 500 trained, float32") and lines[1].endswith("none held out")
    assert lines[2] == "run        4 prompts × 8 completions × 2 processes × 1,500 steps, at most 71,936 tokens a step"
    assert lines[3:5] == ["method     preset paper, nothing changed", "settings   defaults"]
    assert lines[6] == "attention  sdpa; padded, 8 completions a pass" and len(lines) == 9


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_facts_of_a_run(tmp_path: Path, backend: str) -> None:
    facts = make_trainer(tmp_path, backend=backend, save_model=False).facts
    assert facts.parameters == facts.trained > 100_000 and facts.dtype == "float32" and facts.steps == SMALL["steps"]
    size = 4.0 * facts.parameters
    assert [facts.memory[n] for n in ("weights", "gradients", "AdamW", "reference")] == [size, size, 2 * size, size]
    assert facts.backend["loss"] == facts.backend["advantages"] and (facts.backend["loss"] == "torch") >= (
        backend == "torch"
    )
    adapted = make_trainer(tmp_path, name="lora", lora=True, lora_r=2).facts
    assert 0 < adapted.trained < adapted.parameters / 10 and "reference" not in adapted.memory


def test_the_facts_name_what_runs_elsewhere_and_what_is_not_weighed(tmp_path: Path) -> None:
    def facts(objective: str = "paper", aggregation: str = "sum_then_normalize", **knobs: Any) -> Any:
        method = preset(
            "exact", num_generations=4, temperature_objective=objective, multi_objective_aggregation=aggregation
        )
        return make_trainer(tmp_path, method, **knobs).facts

    assert facts(aggregation="normalize_then_sum").backend["advantages"] == "torch"
    said = "log-probs of training are not those of sampling"
    for knobs in ({"repetition_penalty": 1.1}, {"generation_kwargs": ["min_length=3"]}):
        assert sum(said in note for note in facts("per_row", **knobs).notes) == 1
        assert not any(said in note for note in facts("corrected", **knobs).notes)
    assert not any(said in note for note in facts("per_row").notes)


# ---- the end --------------------------------------------------------------------------------------------------------

SCORES = {"hsr": 0.5, "ssr": 0.75, "reward": 0.75}
WIDTHS = {"hsr": 0.06, "ssr": 0.04, "reward": 0.04}


def summary(**more: Any) -> dict[str, Any]:
    scores = {f"{n}_{when}": x for n, x in SCORES.items() for when in ("before", "after")}
    how = {
        "steps": 140,
        "resumed_after": 0,
        "total_steps": 140,
        "train_seconds": 83.4,
        "interrupted": False,
        "processes": 1,
    }
    return {**scores, "intervals": dict.fromkeys(("before", "after"), WIDTHS), "held_out": 300, **how, **more}


@pytest.fixture(autouse=True)
def console_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end.shutil, "which", lambda name: f"/venv/bin/{name}")


def test_a_command_is_one_that_the_shell_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    run = TrainConfig(output_dir="r")
    for python, shown in ((tmp_path / ".venv/bin/python", ".venv/bin/python"), (Path("/usr/bin/python3"), None)):
        monkeypatch.setattr("sys.executable", str(python))
        command = end.how_to_evaluate(run, "embedded")
        assert command == f"{shown or python} -m mdpgrpo_fast evaluate --model r/model"


def test_the_lines_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):  # others leave them behind
        monkeypatch.delenv(name, raising=False)
    out, report = tmp_path / "my run", tmp_path / "my run" / "report.html"
    scores = "held-out HSR 0.500 ± 0.060 → 0.500 ± 0.060, SSR 0.750 ± 0.040 → 0.750 ± 0.040 (95 %, 300 prompts) in "
    run = TrainConfig(output_dir=str(out), model="m", train_file="t.jsonl", eval_file="held out.jsonl")
    unsaved = end.end_lines(summary(eval_file="embedded"), replace(run, save_model=False), report)
    assert unsaved[1:] == ["model   not saved (save_model)", f"report  {report}"]
    early = end.end_lines(summary(eval_file="embedded", interrupted=True, steps=0), run, report)
    assert early[1] == "model   not saved: no step was done"
    (out / "model").mkdir(parents=True)
    assert end.end_lines(summary(eval_file="held out.jsonl"), run, report) == [
        scores + "140 steps, 1 min 23 s",
        f"model   {out}/model",
        f"report  {report}",
        f"go on   mdpgrpo evaluate --model '{out}/model' --file 'held out.jsonl'",
    ]
    other = replace(run, eval_file=None, reward=["r:f"], rules="iftrain", columns=["a=b", "c=d"], eval_split="test")
    other = replace(other, max_completion_length=64, cpu=True, learning_rate=1.0, eval_samples=4, system_prompt="-x")
    assert end.end_lines(summary(eval_file=None), other, report)[-1] == (
        f"go on   mdpgrpo evaluate --model '{out}/model' --file FILE --reward r:f --split test --columns a=b c=d "
        "--max-completion-length 64 --system-prompt=-x --rules iftrain --cpu --limit 4"
    )
    alike = summary(intervals=dict.fromkeys(("before", "after"), end.NO_INTERVALS), held_out=1, reward_after=None)
    assert end.last_line(alike).startswith("held-out HSR 0.500 → 0.500, SSR 0.750 → 0.750 (1 prompt) in ")
    stopped = summary(eval_file="embedded", interrupted=True, steps=31, hsr_after=None, ssr_after=None)
    stopped |= {"reward_after": None}
    assert end.end_lines(stopped, run, report) == [
        "interrupted after 31 of 140 steps, 1 min 23 s",
        f"model   {out}/model",
        f"report  {report}",
        "go on   there is no checkpoint to go on from yet, one is written every 15 minutes",
    ]
    went_on = summary(eval_file="embedded", resumed_after=100)
    assert end.last_line(went_on).endswith(" in 140 steps, 40 of them now, 1 min 23 s")
    monkeypatch.setattr(end, "newest", lambda path: path / "checkpoints" / "checkpoint_30")
    command = f"train --config '{out}/config.yaml' --resume (from step 30)"
    assert end.end_lines(stopped, run, report)[-1] == f"go on   mdpgrpo {command}"
    several = f"torchrun --nproc-per-node 2 -m mdpgrpo_fast.{command}"
    assert end.end_lines({**stopped, "processes": 2}, run, report)[-1] == f"go on   {several}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # a node with one of two
    elsewhere = f"the same launcher, on every node: -m mdpgrpo_fast.{command}"
    assert end.end_lines({**stopped, "processes": 2}, run, report)[-1] == f"go on   {elsewhere}"


def test_an_evaluation_is_one_line() -> None:
    result = {**SCORES, "intervals": WIDTHS, "truncated": 0.25, "count": 300}
    assert end.evaluation_line(20, result) == (
        "step 20: held-out HSR 0.500 ± 0.060, SSR 0.750 ± 0.040 over 300 prompts, 25% cut"
    )
    rewards = {"hsr": None, "ssr": None, "reward": -3.0, "intervals": {**WIDTHS, "reward": None}}
    assert end.evaluation_line(0, {**rewards, "truncated": 0, "count": 1}) == (
        "step 0: held-out reward -3.000 over 1 prompt"
    )


def test_a_run_tells_this_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All lines of a run with evaluations and checkpoints: no bar and no note of another library."""
    monkeypatch.setattr("sys.orig_argv", ["/bin/python", "/venv/bin/mdpgrpo", "train", "--system-prompt", "a b"])
    out = tmp_path / "run"
    argv = ["--steps", "2", "--prompts-per-step", "1", "--eval-samples", "3", "--eval-every", "1", "--save-every", "1"]
    argv += ["--max-completion-length", "12", "--log-completions", "0", "--output-dir", str(out), "--seed", "1"]
    assert train.main([*argv, "--model", str(_seed_policy()), *_prompts()]) == 0
    printed, said = capfd.readouterr()
    lines = [x.strip() for x in re.split(r"[\r\n]+", said) if x.strip()]
    names = "model prompts run method settings backend attention device memory note note".split()
    assert [x.split()[0] for x in lines[: len(names)]] == names
    rest = [x for x in lines[len(names) :] if not x.startswith("NLTK's punkt_tab")]
    bars = [x for x in rest if re.search(r"\d/2 \[", x)]
    evaluations = [x for x in rest if x not in bars]
    assert [x.split(":")[0] for x in evaluations] in (["step 0", "step 1"], ["step 0", "step 1", "step 1"]), said
    assert not any("± 0.000" in x for x in evaluations) and bars
    scores, *where = printed.splitlines()
    assert scores.startswith("held-out HSR") and [x.split()[0] for x in where] == ["model", "report", "go"]
    written = json.loads((out / "summary.json").read_text())
    assert written["command"] == "mdpgrpo train --system-prompt 'a b'" and re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", written["started"]
    )
    assert written["intervals"].keys() == {"before", "after"}
    assert written["intervals"]["after"].keys() == {"hsr", "ssr", "reward"}
    assert written["parameters"] == written["trained_parameters"] > 0 and written["backend"].keys() == {
        "loss", "log-probs", "advantages", "sampling"
    }  # fmt: skip
    assert written["commit"] is None or re.fullmatch(r"[0-9a-f]{40}", written["commit"])


def _seed_policy() -> Path:
    from mdpgrpo_fast.demo import SEED_POLICY

    return Path(SEED_POLICY)


def _prompts() -> list[str]:
    from mdpgrpo_fast.demo import DEMO_DIR

    return ["--train-file", str(DEMO_DIR / "train.jsonl"), "--eval-file", str(DEMO_DIR / "heldout.jsonl")]


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainingLoop.step

    def interrupted(self: TrainingLoop, number: int, *indices: list[int]) -> dict[str, Any]:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number, *indices)

    out = tmp_path / "run"
    argv = ["--steps", "3", "--prompts-per-step", "1", "--eval-samples", "2", "--save-every", "1", "--save-model"]
    argv += ["false", "--max-completion-length", "8", "--output-dir", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "step", interrupted)
        assert train.main(argv) == 130
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "interrupted after step 1; --resume goes on from checkpoint_1"
    assert said.out.splitlines()[-1] == f"go on   mdpgrpo train --config {out}/config.yaml --resume (from step 1)"
    assert train.main(["--config", f"{out}/config.yaml", "--resume", "--steps", "2"]) == 0, "the command works"
    assert "resumed after 1 of 3 steps; now 2: the learning rate goes on from 0.0001" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        train.main(["--config", f"{out}/config.yaml", "--resume", "--steps", "1"])
    assert stopped.value.code == 2
    said = "error: resume needs steps of at least the 2 that are done; got 1\n"
    assert capsys.readouterr().err == said


# ---- other libraries ------------------------------------------------------------------------------------------------


def test_known_notes_are_quiet_and_everything_else_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    theirs, ours = logging.getLogger("accelerate.utils.other"), logging.getLogger("mdpgrpo_fast")
    note = "Removed shared tensor {'lm_head.weight'} while saving."
    with quiet(), warnings.catch_warnings(record=True) as warned:
        theirs.warning(note)
        theirs.warning("the weights are wrong")
        theirs.error(note)
        ours.warning(note)
        warnings.warn("Detected call of `lr_scheduler.step()` before `optimizer.step()`.", stacklevel=1)
        warnings.warn("something is wrong", stacklevel=1)
        assert not transformers.utils.logging.is_progress_bar_enabled()
    assert [(r.name, r.message) for r in caplog.records] == [
        (theirs.name, "the weights are wrong"), (theirs.name, note), (ours.name, note)
    ]  # fmt: skip
    assert [str(w.message) for w in warned] == ["something is wrong"]
    theirs.warning(note)
    assert caplog.records[-1].message == note and transformers.utils.logging.is_progress_bar_enabled()


def test_bars_are_as_they_were_afterwards() -> None:
    logger = transformers.utils.logging
    downloads = not hub.are_progress_bars_disabled()
    with pytest.raises(KeyboardInterrupt), quiet():
        assert hub.are_progress_bars_disabled() != downloads, "downloads take their time"
        raise KeyboardInterrupt
    assert logger.is_progress_bar_enabled() and hub.are_progress_bars_disabled() != downloads
    logger.disable_progress_bar()
    try:
        with quiet():
            pass
        assert not logger.is_progress_bar_enabled()
    finally:
        logger.enable_progress_bar()
