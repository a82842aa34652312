"""Micro-batches: exact accumulation, the budget of packing, groups replaced by others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.runs import make_trainer, rows, run_small
from transformers import AutoModelForCausalLM

from mdpgrpo_fast.config import ConfigError, TrainConfig, preset
from mdpgrpo_fast.rollout.generate import generate
from mdpgrpo_fast.training.batch import micro_batch_budget, replace_groups

PADDED = {"packing": "off", "micro_batch_size": 8}
LARGEST = 176  # tokens that a group of `SMALL` may need at most


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_accumulation_is_exact(tmp_path: Path, aggregation: str) -> None:
    """Micro-batches of 3 rows (which split a group), packed groups and one group at a time give the update of one
    padded batch: normalisers are the whole batch's."""
    method = preset("exact", num_generations=4, aggregation=aggregation)
    (whole,) = rows(run_small(tmp_path, method, "whole", **PADDED, steps=1))
    for parts in ({**PADDED, "micro_batch_size": 3}, {}, {"tokens_per_micro_batch": LARGEST}):
        (split,) = rows(run_small(tmp_path, method, str(len(parts)), **parts, steps=1))
        for name in ("loss", "kl", "entropy", "ratio_max", "clip_low"):
            assert whole[name] == pytest.approx(split[name], abs=1e-6), (parts, name)
        assert whole["grad_norm"] == pytest.approx(split["grad_norm"], rel=1e-4), parts


def test_bnpo_is_the_mean_over_local_batches(tmp_path: Path) -> None:
    method = preset("exact", num_generations=4, aggregation="bnpo")
    knobs = {"steps": 1, "max_completion_length": 48, "packing": "off"}
    (whole,) = rows(run_small(tmp_path, method, "whole", micro_batch_size=8, **knobs))
    (parts,) = rows(run_small(tmp_path, method, "parts", micro_batch_size=4, **knobs))
    assert whole["completion_length"] == parts["completion_length"] and whole["truncated"] < 1
    assert whole["loss"] != pytest.approx(parts["loss"], abs=1e-5), "ragged halves weigh their tokens differently"


def test_the_budget_of_packing(tmp_path: Path) -> None:
    """The default, or what the largest group may need; under masks no more than that, or none where it does not pay."""
    trainer = make_trainer(tmp_path)
    lengths = list(map(len, trainer.task.train_ids))
    packing, longest = trainer.policy.packing, max(lengths)
    assert packing is not None and packing.mode == "blocks" and trainer.budget == 8192
    padded = "under masks attention would look at 3.9 times the pairs"
    for completion, mode, expected, why in (
        (4096, "blocks", longest + 4 * 4096, None),
        (16, "masks", longest + 4 * 16, None),
        (4096, "masks", 0, padded),
    ):
        packing.mode = mode  # type: ignore[assignment]
        run = TrainConfig(max_completion_length=completion)
        budget, said = micro_batch_budget(packing, lengths, run, trainer.method)
        assert budget == expected and (said is None if why is None else why in str(said))
    with pytest.raises(ConfigError, match=f"a whole group: a prompt of {longest} and 4 completions of 12 tokens"):
        micro_batch_budget(
            packing, lengths, TrainConfig(tokens_per_micro_batch=60, max_completion_length=12), trainer.method
        )


def test_what_packing_does_not_use_or_not_pay_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for packing, said in (("on", True), ("off", False)):
        notes = make_trainer(tmp_path, name=packing, packing=packing, micro_batch_size=4).facts.notes
        assert any("micro_batch_size is not used: groups are packed" in note for note in notes) == said
    monkeypatch.setattr("mdpgrpo_fast.models.packing.Packing.mode_for", lambda self, longest: "masks")
    trainer = make_trainer(tmp_path, name="masks", max_completion_length=400, micro_batch_size=4)
    said = " ".join(trainer.facts.notes)
    assert trainer.budget == 0
    assert "prompts are not shared inside a group: under masks" in said and "micro_batch_size" not in said


def test_replaced_groups_are_the_others_in_both_widths(model_dirs: dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    torch.manual_seed(0)
    draw = {"temperature": [1.0] * 4, "eos": [2], "num_generations": 2}
    ours = generate(model, [[5, 6, 7], [8]], max_new_tokens=4, **draw)
    theirs = generate(model, [[9] * 5, [3, 4]], max_new_tokens=7, **draw)
    for a, b in ((ours, theirs), (theirs, ours)):
        mixed = replace_groups(a, [1, 0], b, 2)
        for i, j in zip((0, 1, 2, 3), (2, 3, 0, 1), strict=True):
            assert mixed.prompt_ids[i, mixed.prompt_mask[i]].equal(b.prompt_ids[j, b.prompt_mask[j]])
            assert mixed.tokens[i, mixed.mask[i]].equal(b.tokens[j, b.mask[j]])
            assert mixed.sampling_logprobs[i, mixed.mask[i]].equal(b.sampling_logprobs[j, b.mask[j]])
