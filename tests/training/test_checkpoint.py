"""Checkpoints: resumed to the bit, whole ones alone, of the settings and processes that wrote them."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import SMALL, make_trainer, parameters, rows, run_small
from transformers import AutoModelForCausalLM, AutoTokenizer

import mdpgrpo_fast.train as train
from mdpgrpo_fast import api, evaluate
from mdpgrpo_fast.config import ConfigError, MDPGRPOConfig, TrainConfig, preset
from mdpgrpo_fast.demo import DEMO_DIR
from mdpgrpo_fast.models.load import load
from mdpgrpo_fast.training import checkpoint
from mdpgrpo_fast.training.checkpoint import manifest, resume


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in (path / "checkpoints").iterdir())


def rewrite(folder: Path, **values: Any) -> None:
    """A checkpoint's manifest with other values, as if it had been written with them."""
    found = manifest.read(folder)
    hashes = {name: f["sha256"] for name, f in found.pop("files").items()}
    manifest.write(folder, {**found, **values}, hashes)


def empty_checkpoint(path: Path, step: int, run: dict[str, Any], method: MDPGRPOConfig, version: str = "") -> Path:
    """One without files."""
    folder = path / "checkpoints" / f"checkpoint_{step}"
    folder.mkdir(parents=True, exist_ok=True)
    manifest.write(folder, {"step": step, "total": 9, "run": run, "method": vars(method), "version": version}, {})
    return folder


def test_a_killed_save_leaves_the_checkpoint_before_and_the_run_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = {"steps": 4, "save_every": 1, "warmup_steps": 1, "updates_per_rollout": 2}
    whole = run_small(tmp_path, name="whole", **knobs)
    assert folders(whole.out.path) == ["checkpoint_3", "checkpoint_4"], "the newest two are kept"
    saved, write = [0], checkpoint.State.write

    def killed(self: checkpoint.State, folder: Path) -> None:
        saved[0] += 1
        if saved[0] == 3:
            (folder / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt
        write(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.State, "write", killed)
        run_small(tmp_path, name="parts", **knobs)
    path = tmp_path / "parts"
    assert folders(path) == ["checkpoint_1", "checkpoint_2"] and len(rows(whole)) == 4
    foreign = {"step-8.bak", "checkpoint_8.bak", "checkpoint_07", "checkpoint_x", "notes"}
    for name in (*foreign, "checkpoint_3.partial", "checkpoint_1.old"):
        (path / "checkpoints" / name).mkdir()
    newest = checkpoint.newest(path)
    assert newest is not None and newest.name == "checkpoint_2"
    with (path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 3, "lo')  # a line that was cut off
    resumed = run_small(tmp_path, name="parts", resume=True, **knobs)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert [(r["step"], r["loss"], r["learning_rate"]) for r in rows(resumed)] == [
        (r["step"], r["loss"], r["learning_rate"]) for r in rows(whole)
    ]
    assert {*folders(path)} == {"checkpoint_3", "checkpoint_4", *foreign}, "leftovers are removed, and nothing else"
    summary = json.loads((path / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["hsr_before"] is not None

    rewrite(path / "checkpoints" / "checkpoint_4", processes=2)
    with pytest.raises(ConfigError, match=r"resume needs the 2 processes that wrote .*checkpoint_4; got 1"):
        make_trainer(tmp_path, name="parts", resume=True, **knobs)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("step-2/model", "checkpoint of this version .* those in .* are of an earlier one.* pickles, .* not load"),
        ("checkpoint_2/progress.json", "checkpoint of this version .* those in .* are of an earlier one.* pickles"),
        ("checkpoint_2/model", "resume needs a whole checkpoint .* none: checkpoint_2 is damaged: manifest.json is mi"),
        ("step-8.bak/model", r"resume needs a checkpoint in .*checkpoints., and there is none \(save_every\)"),
    ],
)
def test_checkpoints_of_another_kind_or_not_whole_are_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=said):
        checkpoint.check_resume(TrainConfig(output_dir=str(tmp_path)), preset("exact"))
    asked = checkpoint.resolve_resume(TrainConfig(output_dir=str(tmp_path), resume="auto"))
    assert asked.resume is not name.endswith(".bak/model"), "auto begins anew only where nothing would be lost"


def test_a_resumed_run_knows_what_was_before(tmp_path: Path) -> None:
    """What reward functions see of it, what was dropped, and how near it is to too much of that."""
    knobs: dict[str, Any] = {
        "steps": 4, "save_every": 2, "max_dropped": 1.0, "reward": ["helpers.rewards:flaky"],
        "reward_isolation": "process", "eval_samples": 24,
    }  # fmt: skip
    whole = run_small(tmp_path, name="parts", **knobs)
    dropped = sum(r["dropped"] for r in rows(whole))
    shutil.rmtree(whole.out.path / "checkpoints" / "checkpoint_4")
    again = make_trainer(tmp_path, name="parts", resume=True, save_model=False, **knobs)
    assert [r["step"] for r in again.history] == [1, 2]
    assert again.dropped == sum(r["dropped"] for r in again.history) + rows(again, evals=True)[0]["eval"]["dropped"]
    assert rows(again, evals=True)[0]["eval"]["dropped"] > 0 and len(again.lost._steps) == 2
    again.train()
    summary = json.loads((again.out.path / "summary.json").read_text())
    evals = sum(r["eval"]["dropped"] for r in rows(again, evals=True))
    assert summary["dropped_samples"] == dropped + evals and dropped > 0


def test_a_refused_resume_changes_nothing_on_the_disk(tmp_path: Path) -> None:
    whole = run_small(tmp_path, name="kept", steps=4, save_every=2)
    shutil.rmtree(whole.out.path / "checkpoints" / "checkpoint_4")
    (whole.out.path / "checkpoints" / "checkpoint_3").mkdir()  # one that was not finished
    files = {p: p.read_bytes() for p in whole.out.path.rglob("*") if p.is_file()}
    knobs: dict[str, Any] = {"name": "kept", "resume": True, "save_every": 2}
    with pytest.raises(ConfigError, match="resume needs steps of at least the 2 that are done; got 1"):
        make_trainer(tmp_path, **knobs, steps=None, epochs=1e-6)
    again = make_trainer(tmp_path, **knobs, steps=4)
    assert files == {p: p.read_bytes() for p in whole.out.path.rglob("*") if p.is_file()}, "it has not trained yet"
    again.train()
    assert folders(whole.out.path) == ["checkpoint_2", "checkpoint_3.damaged", "checkpoint_4"]
    assert len(rows(again)) == 4


def test_a_resumed_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    method, run = preset("exact"), TrainConfig(**SMALL, output_dir=str(tmp_path))
    folder = empty_checkpoint(tmp_path, 1, vars(run), method)
    checkpoint.check_resume(run, method)
    remedies = {"reward_timeout": 60.0, "max_dropped": 0.5, "on_bad_reward": "drop", "reward_check": False}
    checkpoint.check_resume(TrainConfig(**SMALL, output_dir=str(tmp_path), eval_every=1, **remedies), method)
    rounding = {"backend": "torch", "micro_batch_size": 3, "workspace_mb": 9, "eval_batch_size": 5}
    free = TrainConfig(**{**SMALL, "steps": 9}, output_dir=str(tmp_path), warmup_steps=3, vllm_timeout=9.0, **rounding)
    checkpoint.check_resume(free, method)
    (said,) = resume.setting_notes(folder, free, method)
    assert all(name in said for name in rounding)
    bnpo = preset("exact", aggregation="bnpo")
    empty_checkpoint(tmp_path, 1, vars(run), bnpo)
    with pytest.raises(ConfigError, match="micro_batch_size was 8; got 3"):
        checkpoint.check_resume(free, bnpo)
    # A run of an older version, which lacks knobs, and had one that is gone.
    older = {k: v for k, v in vars(run).items() if k not in ("skip_idle", "adam_beta2")}
    empty_checkpoint(tmp_path, 1, {**older, "gone": 1}, method, "0.1")
    checkpoint.check_resume(run, method)
    assert resume.setting_notes(folder, run, method) == [
        "the run before, of version 0.1, had no adam_beta2 = 0.999, skip_idle = False: what it did is taken to be that",
        "settings of the run before that this version has not: gone",
    ]
    with pytest.raises(ConfigError, match="skip_idle was False; got True"):
        checkpoint.check_resume(TrainConfig(**SMALL, output_dir=str(tmp_path), skip_idle=True), method)
    empty_checkpoint(tmp_path, 1, vars(run), method)
    with pytest.raises(ConfigError, match="dtype was 'float32'; got 'bfloat16'"):
        checkpoint.check_resume(TrainConfig(**SMALL, output_dir=str(tmp_path), dtype="bfloat16"), method)
    folder.rename(folder.with_name("checkpoint_5"))
    with pytest.raises(ConfigError, match=r"^resume needs steps of at least the 5 that are done; got 2$"):
        checkpoint.check_resume(run, method)
    with pytest.raises(ConfigError, match=r"settings of the run before: learning_rate was 0.001; got 0.0005"):
        checkpoint.check_resume(TrainConfig(**{**SMALL, "learning_rate": 5e-4}, output_dir=str(tmp_path)), method)
    with pytest.raises(ConfigError, match="settings of the run before: top_k was 0; got 5"):
        checkpoint.check_resume(run, preset("exact", top_k=5))


@pytest.mark.parametrize(
    ("total", "warmup"), [(6, 0), (3, 0), (4, 0), (4, 3)], ids=["longer", "shorter", "same", "warmup"]
)
def test_a_resumed_run_may_be_longer_or_shorter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], total: int, warmup: int
) -> None:
    """Its prompts are those of a run that was so long from the start, and so are its learning rates from there on."""
    knobs: dict[str, Any] = {"save_every": 2, "updates_per_rollout": 2, "max_completion_length": 6}
    first = run_small(tmp_path, name="parts", steps=4, **knobs)
    rates = [r["learning_rate"] for r in rows(first)]
    shutil.rmtree(first.out.path / "checkpoints" / "checkpoint_4")
    whole = make_trainer(tmp_path, name="whole", steps=total, warmup_steps=warmup, **knobs)
    schedule = [whole.scheduler.base_lrs[0] * whole.scheduler.lr_lambdas[0](2 * i + 1) for i in range(total)]
    drawn = list(whole.order)
    capsys.readouterr()
    resumed = make_trainer(tmp_path, name="parts", resume=True, steps=total, warmup_steps=warmup, **knobs)
    next_rate = whole.scheduler.base_lrs[0] * whole.scheduler.lr_lambdas[0](4)
    said = "resumed after 2 of 4 steps"
    if (total, warmup) != (4, 0):
        said += f"; now {total}: the learning rate goes on from {next_rate:.3g}"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert [g["lr"] for g in resumed.optimizer.param_groups] == resumed.scheduler.get_last_lr() == [next_rate]
    order, resumed.order = list(resumed.order), iter(drawn[2:])  # type: ignore[assignment]
    assert order == drawn[2:] and drawn[:2] == list(make_trainer(tmp_path, name="first", steps=4).order)[:2]
    resumed.train()
    assert [r["learning_rate"] for r in rows(resumed)] == pytest.approx([*rates[:2], *schedule[2:]])


@pytest.mark.parametrize("kind", ["full", "bfloat16", "lora", "tied"])
def test_a_checkpoint_is_a_model_and_is_read_back_to_the_bit(
    kind: str, tmp_path: Path, model_dirs: dict[str, str], peer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "lora":
        peer("peft")
    # torch's linear layers, which a model has that is loaded without the trainer.
    knobs: dict[str, Any] = {"steps": 3, "save_every": 2, "learning_rate": 1e-2, "cpu_linear": "torch"}
    knobs |= {"bfloat16": {"dtype": "bfloat16"}, "lora": {"lora": True, "lora_r": 2}}.get(kind, {})
    if kind == "tied":
        data = tmp_path / "p.jsonl"
        data.write_text("\n".join(json.dumps({"prompt": f"number {i}"}) for i in range(4)) + "\n")
        knobs |= {"model": model_dirs["gemma2"], "train_file": str(data), "reward": ["helpers.rewards:vowels"]}
        knobs |= {"max_prompt_length": 64}
    whole = run_small(tmp_path, **knobs)
    expected = rows(whole)
    folder = whole.out.path / "checkpoints" / "checkpoint_2"
    weights = [p.name for p in folder.glob("*.safetensors")]
    assert weights == ["adapter_model.safetensors" if kind == "lora" else "model.safetensors"], "they are stored once"
    resumed = run_small(tmp_path, resume=True, **knobs)
    assert torch.equal(parameters(resumed), parameters(whole)) and resumed.done == 3
    assert [r["loss"] for r in rows(resumed)] == [r["loss"] for r in expected]
    # The last checkpoint that a run of three steps with save_every = 3 leaves is the model that it ends with.
    resumed.checkpoints.save(3, 3)
    folder = folder.with_name("checkpoint_3")
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == resumed.task.tokenizer.get_vocab()
    plain, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), load(str(folder))[0].eval()
    assert plain.generation_config.to_dict() == resumed.lm.generation_config.to_dict()
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        wanted = resumed.lm(ids).logits
        assert torch.equal(plain(ids).logits, wanted)
        torch.testing.assert_close(ours(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    if kind != "tied":
        assert evaluate.main(["--model", str(folder), "--samples", "1", "--max-completion-length", "4"]) == 0
        assert "prompt level" in capsys.readouterr().out


def test_each_knob_is_in_one_class() -> None:
    classes = [
        resume.FREE_KNOBS, resume.DATA_KNOBS, resume.SCHEDULE_KNOBS, resume.ROUNDING_KNOBS, resume.FIXED_KNOBS
    ]  # fmt: skip
    named = [name for names in classes for name in names]
    assert sorted(named) == sorted(f.name for f in fields(TrainConfig))
    assert {*resume.BNPO_KNOBS} <= {*resume.ROUNDING_KNOBS}


# ---- the best model -------------------------------------------------------------------------------------------------


def scored(monkeypatch: pytest.MonkeyPatch, scores: list[float | None], name: str = "hsr") -> None:
    """Held-out results as if they were these, one after another."""
    keep, remaining = checkpoint.Best.keep, iter(scores)

    def fake(self: checkpoint.Best, step: int, result: dict[str, Any], save: Any) -> None:
        keep(self, step, {**result, "hsr": None, name: next(remaining)}, save)

    monkeypatch.setattr(checkpoint.Best, "keep", fake)


@pytest.mark.parametrize(
    ("name", "scores", "best"),
    [
        ("hsr", [0.2, 0.1, 0.5, 0.5, 0.4], (2, 0.5)),
        ("reward", [0.2, 0.1, 0.15, 0.0, 0.6], (4, 0.6)),
        ("hsr", [0.7, 0.1, 0.7, 0.2, 0.3], (0, 0.7)),
        ("reward", [None, None, 0.1, None, None], (2, 0.1)),
        ("reward", [None] * 5, None),
    ],
)
def test_the_best_model_is_kept(
    name: str, scores: list[float | None], best: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch, scores, name)
    trainer = make_trainer(tmp_path, keep_best=True, steps=4, eval_every=1, save_model=False, learning_rate=1e-2)
    after: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(trainer, "log", lambda row: after.update({row["step"]: trainer.lm.lm_head.weight.clone()}))
    summary = trainer.train()
    assert summary["best"] == (None if best is None else {"step": best[0], "score": best[1]})
    assert json.loads((trainer.out.path / "summary.json").read_text())["best"] == summary["best"]
    assert (trainer.out.path / "best").exists() == bool(best and best[0]) and not (trainer.out.path / "model").exists()
    assert not list(trainer.out.path.glob("*.new"))
    if best and best[0]:
        model, tokenizer = load(str(trainer.out.path / "best"))
        assert torch.equal(model.lm_head.weight, after[best[0]]) and len(tokenizer) == len(trainer.task.tokenizer)
        assert not torch.equal(after[best[0]], after[best[0] - 1])


def test_a_resumed_run_goes_on_comparing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: Any) -> None:
    """From its best so far, or, asked for it only now, from the untrained model; under LoRA it is a merged model."""
    peer("peft")
    knobs: dict[str, Any] = {"steps": 3, "eval_every": 1, "save_every": 2, "lora": True, "lora_r": 2, "keep_best": True}
    scored(monkeypatch, [0.1, 0.3, 0.2, 0.25, 0.28])  # before, after steps 1, 2 and 3; after step 3 again
    path = run_small(tmp_path, **knobs).out.path
    assert json.loads((path / "best.json").read_text()) == {"step": 1, "score": 0.3}
    before = (path / "best" / "model.safetensors").read_bytes()
    resumed = run_small(tmp_path, resume=True, **knobs)
    assert resumed.best.found == {"step": 1, "score": 0.3} and resumed.done == 3
    assert (path / "best" / "model.safetensors").read_bytes() == before
    (path / "best.json").unlink()
    first = checkpoint.first_evaluation(path)
    assert first is not None
    for score, best in ((-1.0, {"step": 0, "score": first["hsr"]}), (2.0, {"step": 3, "score": 2.0})):
        monkeypatch.undo()
        scored(monkeypatch, [score])
        assert run_small(tmp_path, resume=True, **knobs).best.found == best
    assert not (path / "best" / "adapter_config.json").exists()


def test_the_best_needs_something_to_be_compared_by(tmp_path: Path) -> None:
    file = str(DEMO_DIR / "train.jsonl")
    with pytest.raises(ConfigError, match=r"keep_best needs held-out prompts \(eval_file\)"):
        make_trainer(tmp_path, keep_best=True, train_file=file)


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where settings, prompts and weights are its own, with checkpoints and without."""
    flags = ["--output-dir", str(tmp_path / "run"), "--steps", "1", "--max-completion-length", "8", "--save-every", "1",
             "--prompts-per-step", "1", "--eval-samples", "1", "--resume", "auto"]  # fmt: skip
    assert train.main(flags) == 0, "there is none yet"
    written = (tmp_path / "run" / "summary.json").read_bytes()
    capsys.readouterr()
    for _ in range(2):
        assert train.main(flags) == 0
        said = f"output_dir {str(tmp_path / 'run')!r} holds this run, which is finished: nothing is left to do\n"
        assert capsys.readouterr().err.endswith(said) and not (tmp_path / "run.1").exists()
        assert (tmp_path / "run" / "summary.json").read_bytes() == written
        shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
    run, method, _ = train.read(flags)
    with pytest.raises(checkpoint.FinishedError):
        api.Trainer(run=run, config=method)
    own = json.loads(written)["fingerprints"]
    task: Any = SimpleNamespace(fingerprints=lambda run, method: own)
    with pytest.raises(checkpoint.FinishedError):
        checkpoint.check_unfinished(run, method, task)
    for unlike in ({"steps": 2}, {"push_to_hub": True}):
        checkpoint.check_unfinished(replace(run, **unlike), method, task)
    other: Any = SimpleNamespace(fingerprints=lambda run, method: {**own, "training prompts": "others"})
    checkpoint.check_unfinished(run, method, other)
    for name, text in (("summary.json", "[]"), ("summary.json", '{"interrupted": true}'), ("config.yaml", "[")):
        whole = (tmp_path / "run" / name).read_text()
        (tmp_path / "run" / name).write_text(text)
        checkpoint.check_unfinished(run, method, task)
        (tmp_path / "run" / name).write_text(whole)
    (tmp_path / "run" / "report.html").unlink()
    checkpoint.check_unfinished(run, method, task)
