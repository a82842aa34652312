"""The loop: the three temperature objectives, old log-probs, references, LoRA, interrupts, learning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.losses import ALL_BACKENDS, BACKENDS
from helpers.runs import PLAIN, make_trainer, parameters, rows, run_small
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

import mdpgrpo_fast.train as train
from mdpgrpo_fast.config import preset
from mdpgrpo_fast.models import lora
from mdpgrpo_fast.rewards import Score
from mdpgrpo_fast.training.loop import TrainingLoop
from mdpgrpo_fast.training.timing import StageClock


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


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_the_normaliser_is_of_the_tokens_that_count(tmp_path: Path, aggregation: str) -> None:
    """On-policy without KL a token's loss is -A. Some completions are truncated (trl#6439), all of one micro-batch."""
    method = replace(PLAIN, aggregation=aggregation, mask_truncated=True)
    trainer = make_trainer(tmp_path, method, packing="off", micro_batch_size=2)
    collector, finished = trainer.collector, torch.tensor([True, False, True, True, False, False, False, True])
    lengths = torch.tensor([5, 7, 1, 4, 2, 6, 3, 8])
    rollout = replace(collector.sample([0, 1]), lengths=lengths, finished=finished)
    scores = [Score(i % 3 / 2, {}, None) for i in range(8)]
    batch = collector.assemble(rollout, [0, 1], [""] * 8, scores)
    row = trainer.updates.apply(batch, 1, StageClock(torch.device("cpu")))
    count = lengths * finished
    by_token = -batch.adv.advantage.flatten() * count
    local = by_token.view(-1, 2).sum(1)[[0, 1, 3]] / count.view(-1, 2).sum(1)[[0, 1, 3]]
    expected = {
        "grpo": by_token[finished].div(count[finished]).mean(),
        "dapo": by_token.sum() / count.sum(),
        "dr_grpo": by_token.sum() / (finished.sum() * trainer.run.max_completion_length),
        "bnpo": local.mean(),
    }
    assert row["loss"] == pytest.approx(expected[aggregation].item(), abs=1e-6) and abs(row["loss"]) > 1e-3


def test_fused_kernels_train_as_the_reference_does(tmp_path: Path) -> None:
    """Five steps of the embedded default (fewer and shorter): every logged metric agrees to 1e-4."""
    run, method = train.resolve([])
    small = {"steps": 5, "prompts_per_step": 1, "max_completion_length": 24, "learning_rate": run.learning_rate}
    logged = {b: rows(run_small(tmp_path, method, b, backend=b, **small)) for b in ALL_BACKENDS}
    assert len(logged["torch"]) == 5
    for backend in BACKENDS:
        for ours, theirs in zip(logged[backend], logged["torch"], strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                if isinstance(value, (int, float)) and name not in ("tokens_per_second", "memory_mb"):
                    assert ours[name] == pytest.approx(value, abs=1e-4), (backend, theirs["step"], name)


@pytest.mark.parametrize("knobs", [{}, {"lm_head": "fused", "workspace_mb": 1}, {"skip_idle": True}], ids=str)
def test_the_loss_from_hidden_states_trains_as_that_from_logits(tmp_path: Path, knobs: dict[str, Any]) -> None:
    """Plain GRPO without KL, where some groups have no signal; all but what is left out of the statistics agrees."""
    small = {"steps": 4, "prompts_per_step": 3, "max_completion_length": 24, "seed": 3}
    logits = run_small(tmp_path, PLAIN, "logits", lm_head="logits", **small)
    fused = run_small(tmp_path, PLAIN, "fused", **small, **knobs)
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
    trainer = run_small(tmp_path, method, steps=1)
    cool, plain = rows(trainer)[0]["slots"]
    assert (cool["temperature"], plain["temperature"]) == (0.4, 1.0)
    if objective == "corrected":
        assert cool["ess"] < 1 and plain["ess"] == pytest.approx(1, abs=1e-5)
    else:
        assert cool["ess"] is plain["ess"] is None


@pytest.mark.parametrize("packing", ["on", "off"])
def test_recorded_and_trained_log_probs_agree(tmp_path: Path, packing: str) -> None:
    """`per_row`: the loss's own log-probs at each row's temperature are those recorded when sampling."""
    method = preset("exact", num_generations=4, temperatures=[0.5, 1.0])
    trainer = make_trainer(tmp_path, method, packing=packing)
    batch = trainer.collector.collect([0, 1], 1, StageClock(torch.device("cpu")))
    (m,) = trainer.updates.micro_batches(batch)
    recorded, mask = batch.rollout.sampling_logprobs, batch.rollout.mask
    ours = trainer.model.logprobs(m.inputs, m.mask, m.lengths, m.objective["temperature"], "auto")
    if packing == "on":
        recorded = recorded.flatten()[m.inputs.source]
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
    trainer = run_small(tmp_path, PLAIN)
    assert trainer.reference.model is None and all(r["kl"] == 0 for r in rows(trainer))
    assert make_trainer(tmp_path, name="kl").reference.model is not None


def test_lora_trains_adapters_alone_and_exports_the_sum(tmp_path: Path) -> None:
    trainer = run_small(tmp_path, lora=True, lora_r=4, steps=3, learning_rate=1e-2, save_model=True)
    trained = {n for n, p in trainer.lm.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in n for n in trained)
    first, _, last = rows(trainer)
    assert first["kl"] == 0 < last["kl"], "the reference is the model without its adapters"
    assert trainer.reference.model is None
    merged = AutoModelForCausalLM.from_pretrained(trainer.out.path / "model")
    assert not hasattr(merged, "peft_config") and (trainer.out.path / "adapters" / "adapter_config.json").exists()
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trainer.lm(ids).logits, rtol=1e-4, atol=1e-4)
        with lora.without_adapters(trainer.lm):
            assert (merged(ids).logits - trainer.lm(ids).logits).abs().max() > 1e-3


def test_the_loss_under_lora_is_that_of_a_reference_of_its_own(tmp_path: Path) -> None:
    """The first step's numbers: the base stands in for a second model."""
    full, adapted = run_small(tmp_path, name="full", steps=1), run_small(tmp_path, name="lora", lora=True, steps=1)
    for name in ("loss", "kl", "entropy", "reward", "completion_length"):
        assert rows(adapted)[0][name] == pytest.approx(rows(full)[0][name], abs=1e-6), name


def test_interrupt_in_the_last_evaluation_keeps_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = TrainingLoop.evaluate

    def interrupted(self: TrainingLoop, step: int, phase: str | None = None) -> dict[str, Any] | None:
        if phase == "after":
            raise KeyboardInterrupt
        return evaluated(self, step, phase)

    monkeypatch.setattr(TrainingLoop, "evaluate", interrupted)
    trainer = run_small(tmp_path, steps=1, save_model=True)
    summary = json.loads((trainer.out.path / "summary.json").read_text())
    assert summary["interrupted"] and summary["steps"] == 1 and summary["hsr_before"] is not None
    assert (trainer.out.path / "model" / "model.safetensors").exists()


def test_interrupt_keeps_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = TrainingLoop.step

    def interrupted(self: TrainingLoop, number: int, *indices: list[int]) -> dict[str, Any]:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number, *indices)

    monkeypatch.setattr(TrainingLoop, "step", interrupted)
    trainer = run_small(tmp_path, steps=5, save_model=True)
    summary = json.loads((trainer.out.path / "summary.json").read_text())
    assert summary["interrupted"] and summary["steps"] == 1 and summary["hsr_after"] is None
    assert (trainer.out.path / "model" / "model.safetensors").exists()


def test_learning_on_the_embedded_prompts(tmp_path: Path) -> None:
    """Twenty small steps raise the training reward: the mean of the last seven is well above that of the first."""
    trainer = run_small(tmp_path, preset("exact"), steps=20, prompts_per_step=4, max_completion_length=64, seed=0)
    reward = [r["reward"] for r in rows(trainer)]
    assert sum(reward[-7:]) / 7 > sum(reward[:7]) / 7 + 0.05
