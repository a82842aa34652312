"""Gradient checkpointing, compiled blocks and the fused optimiser: the same results."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import parameters, rows, run_small
from transformers import AutoModelForCausalLM

from mdpgrpo_fast.training.update.updates import Updates


@pytest.mark.parametrize("packing", ["on", pytest.param("off", marks=pytest.mark.long)])
def test_memory_and_speed_options_change_no_result(tmp_path: Path, packing: str) -> None:
    plain = run_small(tmp_path, name="plain", packing=packing, learning_rate=1e-4)
    for i, knobs in enumerate((
        {"gradient_checkpointing": True}, {"fused_adamw": False}, {"compile": True, "gradient_checkpointing": True},
    )):  # fmt: skip
        other = run_small(tmp_path, name=str(i), packing=packing, learning_rate=1e-4, **knobs)
        for a, b in zip(rows(plain), rows(other), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-6), knobs
            assert b["grad_norm"] == pytest.approx(a["grad_norm"]), knobs
        torch.testing.assert_close(parameters(other), parameters(plain), rtol=0, atol=1e-5)


@pytest.mark.long
def test_compiled_blocks_take_other_lengths_without_compiling_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    # What is compiled, and how often, is the same without code for the CPU, which takes a compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    graphs: list[int] = []
    update = Updates.apply

    def watched(self: Updates, *args: Any) -> dict[str, Any]:
        row = update(self, *args)
        graphs.append(counters["stats"]["unique_graphs"])
        return row

    monkeypatch.setattr(Updates, "apply", watched)
    trainer = run_small(tmp_path, compile=True, steps=3)
    assert len({r["completion_length"] for r in rows(trainer)}) > 1, "packed rows of different lengths"
    assert graphs[0] > 0 and graphs == [graphs[0]] * 3


def test_the_config_file_of_a_packed_model_is_as_before(tmp_path: Path) -> None:
    trainer = run_small(tmp_path, steps=1, save_model=True)
    assert "shared_prompt" not in (trainer.out.path / "model" / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(trainer.out.path / "model").config._attn_implementation == "sdpa"
