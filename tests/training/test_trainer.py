"""The loop: exact normalisation, the three temperature objectives, old log-probs, the run directory, learning."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.losses import ALL_BACKENDS, BACKENDS
from helpers.runs import SMALL, parameters, rows, run_small
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from mdpgrpo_fast import evaluate, train
from mdpgrpo_fast.config import ConfigError, TrainConfig, preset
from mdpgrpo_fast.rewards import RewardError, Scorer
from mdpgrpo_fast.training.run_dir import RunDir, move_aside, sample_table, tracker_values
from mdpgrpo_fast.training.task import prepare
from mdpgrpo_fast.training.timing import StageClock
from mdpgrpo_fast.training.trainer import Trainer

PADDED = {"packing": "off", "micro_batch_size": 8}
LARGEST = 176  # tokens that a group of `SMALL` may need at most


@pytest.mark.parametrize("parts", [{**PADDED, "micro_batch_size": 3}, {}, {"tokens_per_micro_batch": LARGEST}], ids=str)
@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_accumulation_is_exact(tmp_path: Path, aggregation: str, parts: dict[str, Any]) -> None:
    """Micro-batches of 3 rows (which split a group), packed groups and one group at a time give the update of one
    padded batch: normalisers are the whole batch's."""
    method = preset("exact", num_generations=4, aggregation=aggregation)
    whole = run_small(tmp_path, method, "whole", **PADDED, steps=1)
    split = run_small(tmp_path, method, "parts", **parts, steps=1)
    for name in ("loss", "kl", "entropy", "ratio_max", "clip_low"):
        assert rows(whole)[0][name] == pytest.approx(rows(split)[0][name], abs=1e-6), name
    assert rows(whole)[0]["grad_norm"] == pytest.approx(rows(split)[0]["grad_norm"], rel=1e-4)


def test_bnpo_is_the_mean_over_local_batches(tmp_path: Path) -> None:
    method = preset("exact", num_generations=4, aggregation="bnpo")
    knobs = {"steps": 1, "max_completion_length": 48, "packing": "off"}
    (whole,) = rows(run_small(tmp_path, method, "whole", micro_batch_size=8, **knobs))
    (parts,) = rows(run_small(tmp_path, method, "parts", micro_batch_size=4, **knobs))
    assert whole["completion_length"] == parts["completion_length"] and whole["truncated"] < 1
    assert whole["loss"] != pytest.approx(parts["loss"], abs=1e-5), "ragged halves weigh their tokens differently"


def test_same_seed_same_run_other_seed_other_run(tmp_path: Path) -> None:
    a, b = run_small(tmp_path, name="a"), run_small(tmp_path, name="b")
    c = run_small(tmp_path, name="c", seed=1)
    assert torch.equal(parameters(a), parameters(b)) and not torch.equal(parameters(a), parameters(c))
    for x, y in zip(rows(a), rows(b), strict=True):
        timing = ("seconds", "tokens_per_second", "stage_tokens_per_second", "memory_mb")
        assert {k: v for k, v in x.items() if k not in timing} == {k: v for k, v in y.items() if k not in timing}


def test_on_policy_ratio_is_one_and_later_updates_move_it(tmp_path: Path) -> None:
    once = run_small(tmp_path, name="once")
    twice = run_small(tmp_path, name="twice", updates_per_rollout=3, learning_rate=5e-3)
    assert all(r["ratio_mean"] == 1 and r["clip_low"] == r["clip_high"] == 0 for r in rows(once))
    assert all(r["ratio_max"] > 1.01 for r in rows(twice)), "the third update is off-policy against the rollout"


def test_fused_kernels_train_as_the_reference_does(tmp_path: Path) -> None:
    """Ten steps of the embedded default (fewer prompts a step): every logged metric agrees to 1e-4."""
    small = ["--steps", "10", "--prompts-per-step", "1", "--max-completion-length", "24", "--eval-samples", "4"]
    logged = {}
    for backend in ALL_BACKENDS:
        AcceleratorState._reset_state(True)
        assert train.main(["--output-dir", str(tmp_path / backend), "--backend", backend, *small]) == 0
        lines = (tmp_path / backend / "metrics.jsonl").read_text().splitlines()
        logged[backend] = [r for r in map(json.loads, lines) if "eval" not in r]
    assert len(logged["torch"]) == 10
    for backend in BACKENDS:
        for ours, theirs in zip(logged[backend], logged["torch"], strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                if isinstance(value, (int, float)) and name not in ("tokens_per_second", "memory_mb"):
                    assert ours[name] == pytest.approx(value, abs=1e-4), (backend, theirs["step"], name)


@pytest.mark.parametrize("knobs", [{}, {"lm_head": "fused", "workspace_mb": 1}, {"skip_idle": True}], ids=str)
def test_the_loss_from_hidden_states_trains_as_that_from_logits(tmp_path: Path, knobs: dict[str, Any]) -> None:
    """Plain GRPO without KL, where some groups have no signal; all but what is left out of the statistics agrees."""
    method = preset("grpo", num_generations=4, kl_beta_pos=0.0)
    small = {"steps": 4, "prompts_per_step": 3, "max_completion_length": 24, "seed": 3}
    logits = run_small(tmp_path, method, "logits", lm_head="logits", **small)
    fused = run_small(tmp_path, method, "fused", **small, **knobs)
    assert any(r["zero_gradient_groups"] > 0 for r in rows(logits)), "a run without an idle group shows nothing"
    free = {"tokens_per_second", "memory_mb"} | (
        {"entropy", "kl", "clip_low", "clip_high", "ratio_mean", "ratio_max"} if knobs.get("skip_idle") else set()
    )
    for a, b in zip(rows(logits), rows(fused), strict=True):
        for name, value in a.items():
            if isinstance(value, (int, float)) and name not in free:
                assert b[name] == pytest.approx(value, abs=1e-5), (a["step"], name)
    # Adam makes whole steps of gradients that are rounding alone: four of them are 4e-3.
    torch.testing.assert_close(parameters(fused), parameters(logits), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("objective", ["paper", "per_row", "corrected"])
def test_temperature_objectives_train(tmp_path: Path, objective: str) -> None:
    method = preset("exact", num_generations=4, temperatures=[0.4, 1.0], temperature_objective=objective)
    trainer = run_small(tmp_path, method)
    cool, plain = rows(trainer)[0]["slots"]
    assert (cool["temperature"], plain["temperature"]) == (0.4, 1.0)
    if objective == "corrected":
        assert cool["ess"] < 1 and plain["ess"] == pytest.approx(1, abs=1e-5)
    else:
        assert cool["ess"] is plain["ess"] is None


@pytest.mark.parametrize("packing", ["on", "off"])
def test_recorded_and_trained_log_probs_agree(tmp_path: Path, packing: str) -> None:
    """`per_row`: the loss's own log-probs at each row's temperature are those recorded when sampling."""
    run = TrainConfig(**SMALL, packing=packing)
    with Scorer(run.reward) as scorer:
        method = preset("exact", num_generations=4, temperatures=[0.5, 1.0])
        trainer = Trainer(prepare(run), run, method, RunDir(tmp_path / "run"), scorer)
        batch = trainer.collector.collect([0, 1], 1, StageClock(torch.device("cpu")))
    (piece,) = trainer.pieces(batch)
    recorded, mask = batch.rollout.sampling_logprobs, batch.rollout.mask
    ours = trainer.model.logprobs(piece.inputs, piece.mask, piece.lengths, piece.objective["temperature"], "auto")
    if packing == "on":
        recorded = recorded.flatten()[piece.inputs.source]
        assert len(recorded) == mask.sum()
    else:
        ours, recorded = ours[mask], recorded[mask]
    torch.testing.assert_close(ours, recorded, atol=2e-4, rtol=1e-4)


def test_bf16_autocast_stays_close_to_float32(tmp_path: Path) -> None:
    (full,) = rows(run_small(tmp_path, name="full", steps=1))
    (half,) = rows(run_small(tmp_path, name="half", steps=1, mixed_precision="bf16"))
    assert half["grad_norm"] > 0 and half["grad_norm"] != full["grad_norm"]
    assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.1)


@pytest.mark.parametrize(("family", "precision"), [("gpt2", "no"), ("opt", "no"), ("llama", "bf16")])
def test_kl_to_an_equal_reference_is_zero(
    tmp_path: Path, model_dirs: dict[str, str], family: str, precision: str
) -> None:
    """No dropout, whatever way a model has it (trl#3234), and the reference in the policy's own precision."""
    path, data = model_dirs.get(family), tmp_path / "p.jsonl"
    if family == "opt":
        path = str(tmp_path / "opt")
        tokenizer = AutoTokenizer.from_pretrained(model_dirs["llama"])
        sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = OPTConfig(vocab_size=len(tokenizer), dropout=0.5, word_embed_proj_dim=32, eos_token_id=1, **sizes)
        OPTForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
    data.write_text(json.dumps({"prompt": "hello"}) + "\n")
    knobs = {"model": path, "train_file": str(data), "reward": ["helpers.rewards:vowels"], "prompts_per_step": 1}
    trainer = run_small(tmp_path, steps=1, mixed_precision=precision, max_prompt_length=64, **knobs)
    assert rows(trainer)[0]["kl"] == 0 and rows(trainer)[0]["kl_clamped"] == 0
    assert not any(m.training for m in trainer.model.modules())


def test_reference_is_skipped_where_both_betas_are_zero(tmp_path: Path) -> None:
    trainer = run_small(tmp_path, preset("grpo", num_generations=4, kl_beta_pos=0.0))
    assert trainer.reference is None and all(r["kl"] == 0 for r in rows(trainer))
    assert run_small(tmp_path, name="kl").reference is not None


def test_zero_gradient_says_why(tmp_path: Path) -> None:
    """A constant reward under plain GRPO without KL moves nothing; with the goal anchor it does."""
    knobs = {"reward": ["helpers.rewards:none"], "steps": 1}
    still = run_small(tmp_path, preset("grpo", num_generations=4, kl_beta_pos=0.0), **knobs)
    (row,) = rows(still)
    assert row["grad_norm"] == 0 and row["zero_variance_groups"] == row["zero_gradient_groups"] == 1
    assert "all equal" in row["note"] and "goal anchor is off" in row["note"] and "no KL" in row["note"]
    knobs["reward"] = ["helpers.rewards:length"]
    (row,) = rows(run_small(tmp_path, preset("exact", num_generations=4), "moved", **knobs))
    assert row["grad_norm"] > 0 and row["zero_gradient_groups"] < 1


@pytest.mark.parametrize("objective", ["paper", "per_row", "corrected"])
def test_truncated_completions_leave_loss_and_normaliser_by_choice(tmp_path: Path, objective: str) -> None:
    method = preset("exact", num_generations=4, mask_truncated=True, temperature_objective=objective)
    (row,) = rows(run_small(tmp_path, method, max_completion_length=2, steps=1))
    assert row["truncated"] == 1 and row["loss"] == 0 and row["grad_norm"] == 0
    assert "no token counts" in row["note"]
    kept = rows(run_small(tmp_path, preset("exact", num_generations=4), "kept", max_completion_length=2, steps=1))
    assert kept[0]["grad_norm"] > 0 and kept[0]["note"] != row["note"]


def test_a_failing_scorer_costs_samples_not_the_run(tmp_path: Path) -> None:
    trainer = run_small(tmp_path, reward=["helpers.rewards:flaky"], reward_timeout=2.0)
    dropped = sum(r["dropped"] for r in rows(trainer))
    summary = json.loads((trainer.out.path / "summary.json").read_text())
    assert 0 < dropped <= summary["dropped_samples"], "the summary counts the held-out samples too"
    nothing = run_small(tmp_path, name="all", reward=["helpers.rewards:always_boom"])
    assert [r["dropped"] for r in rows(nothing)] == [8, 8] and "no token counts" in rows(nothing)[0]["note"]
    assert "KeyError" in nothing.collector.problem


def test_an_unusable_reward_ends_the_run_and_keeps_the_model(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="gave nan for prompt"):
        run_small(tmp_path, reward=["helpers.rewards:sometimes_nan"], steps=50)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["interrupted"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_real_architectures_train_from_the_command_line(
    tmp_path: Path, model_dirs: dict[str, str], family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "trl.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"number {i}", "answer": i}) for i in range(6)) + "\n")
    out = tmp_path / "run"
    argv = ["--model", model_dirs[family], "--train-file", str(data), "--eval-file", str(data), "--steps", "2"]
    argv += ["--reward", "helpers.rewards:vowels", "--max-completion-length", "6", "--max-prompt-length", "64"]
    assert train.main([*argv, "--prompts-per-step", "1", "--output-dir", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["hsr_before"] is None
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (model_dirs[family], out / "model"))
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert any(moved)
    if family == "gemma2":
        assert after.config.final_logit_softcapping == before.config.final_logit_softcapping
    assert "report" in capsys.readouterr().out


@pytest.mark.parametrize(("family", "template"), [("llama", True), ("qwen2", False), ("gemma2", False)])
def test_real_prompts_train_and_evaluate(
    tmp_path: Path, model_dirs: dict[str, str], shared_data: Any, family: str, template: bool
) -> None:
    """The authors' prompts under their rules, IFEval's held out, with each architecture."""
    model = AutoModelForCausalLM.from_pretrained(model_dirs[family])
    model.config.max_position_embeddings = 4096
    model.save_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(model_dirs[family])
    if template:
        tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(tmp_path / "m")
    files = []
    for name in ("mdpgrpo_test.jsonl", "ifeval_prompts.jsonl"):
        lines = sorted(shared_data(name).read_text(encoding="utf-8").splitlines(), key=len)[:6]
        files.append(tmp_path / name)
        files[-1].write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "run"
    argv = ["--model", str(tmp_path / "m"), "--train-file", str(files[0]), "--eval-file", str(files[1])]
    argv += ["--rules", "mdpgrpo", "--steps", "1", "--prompts-per-step", "2", "--max-completion-length", "8"]
    assert train.main([*argv, "--output-dir", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert 0 <= summary["ssr_before"] <= 1 and summary["dropped_samples"] == 0
    argv = ["--model", str(out / "model"), "--file", str(files[1]), "--max-completion-length", "8"]
    assert evaluate.main([*argv, "--output", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["count"] == 6 and scores["unchecked"] == 0


def test_run_directory_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    argv = ["--steps", "2", "--prompts-per-step", "2", "--eval-samples", "6", "--eval-every", "1"]
    assert train.main([*argv, "--output-dir", str(out), "--report-to", "tensorboard"]) == 0
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "completions.jsonl", "report.html", "model"):
        assert (out / name).exists(), name
    assert list(out.glob("*.png")) and list(out.rglob("events.out.tfevents*"))
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in metrics] == [0, 1, 1, 2, 2]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["hsr_before"] == metrics[0]["eval"]["hsr"] and summary["ssr_after"] == metrics[-1]["eval"]["ssr"]
    wanted = "hsr_before hsr_after ssr_before ssr_after steps train_seconds method device versions".split()
    assert all(summary[k] is not None for k in wanted)
    completions = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    phases = [c["phase"] for c in completions]
    assert phases.count("before") == phases.count("after") == 6 and phases.count("train") == 16
    again = train.resolve(["--config", str(out / "config.yaml")])
    assert again[1] == preset("paper", num_generations=4) and again[0].steps == 2
    assert train.main([*argv, "--output-dir", str(out), "--steps", "1"]) == 0
    assert (tmp_path / "demo.1" / "summary.json").exists(), "the earlier run is moved aside, not lost"


def test_interrupt_in_the_last_evaluation_keeps_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = Trainer.evaluate

    def interrupted(self: Trainer, step: int, phase: str | None = None) -> dict[str, Any] | None:
        if phase == "after":
            raise KeyboardInterrupt
        return evaluated(self, step, phase)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    trainer = run_small(tmp_path, steps=1)
    summary = json.loads((trainer.out.path / "summary.json").read_text())
    assert summary["interrupted"] and summary["steps"] == 1 and summary["hsr_before"] is not None
    assert (trainer.out.path / "model" / "model.safetensors").exists()


def test_interrupt_keeps_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def interrupted(self: Trainer, number: int, indices: list[int]) -> dict[str, Any]:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number, indices)

    monkeypatch.setattr(Trainer, "step", interrupted)
    trainer = run_small(tmp_path, steps=5)
    summary = json.loads((trainer.out.path / "summary.json").read_text())
    assert summary["interrupted"] and summary["steps"] == 1 and summary["hsr_after"] is None
    assert (trainer.out.path / "model" / "model.safetensors").exists()


def test_only_an_earlier_run_is_moved(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no earlier run"):
        RunDir(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").exists()
    assert RunDir(tmp_path / "thesis", create=False).moved is None, "the other ranks touch nothing"


def test_move_aside_takes_the_first_free_number(tmp_path: Path) -> None:
    for text in ("first", "second"):
        RunDir(tmp_path / "r").write_json("summary.json", {"text": text})
    assert move_aside(tmp_path / "r") == tmp_path / "r.2"
    assert json.loads((tmp_path / "r.1" / "summary.json").read_text())["text"] == "first"
    assert move_aside(tmp_path / "none") is None


def test_tracker_values_and_sample_table() -> None:
    row = {"step": 3, "loss": 1.5, "note": None, "slots": [{"temperature": 0.4, "reward": 0.5, "ess": None}]}
    assert tracker_values(row) == {"loss": 1.5, "slot_0.4/reward": 0.5}
    text = sample_table(
        [{"satisfied": [True, False], "reward": 0.5, "temperature": 0.4, "response": "a\nb" * 200}], limit=4
    )
    assert text.startswith("  τ 0.4  r 0.50  +-     a b") and "\n" not in text and text.endswith("…")


def test_learning_on_the_embedded_prompts(tmp_path: Path) -> None:
    """Thirty small steps raise the training reward: the mean of the last ten is well above that of the first ten."""
    trainer = run_small(
        tmp_path, preset("exact"), steps=30, prompts_per_step=4, max_completion_length=64, micro_batch_size=32, seed=0
    )
    reward = [r["reward"] for r in rows(trainer)]
    assert sum(reward[-10:]) / 10 > sum(reward[:10]) / 10 + 0.05


def test_train_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3  # type: ignore[misc]
