"""Times of a step: stages, rates, model FLOPs, peaks of devices, traces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from helpers.runs import rows, run_small
from torch.utils.flop_counter import FlopCounterMode

from mdpgrpo_fast.training import timing
from mdpgrpo_fast.training.timing import StageClock, Work, peak_flops


def test_every_stage_is_accounted_for(tmp_path: Path) -> None:
    trainer = run_small(tmp_path, steps=3)
    for row in rows(trainer):
        seconds, rates = row["seconds"], row["stage_tokens_per_second"]
        assert list(seconds) == [*timing.STAGES, "other"] and all(s > 0 for s in seconds.values())
        tokens = row["completion_length"] * 8
        assert row["tokens_per_second"] == pytest.approx(tokens / sum(seconds.values()))
        assert rates["generate"] == pytest.approx(tokens / seconds["generate"])
        through = rates["forward"] * seconds["forward"]
        assert through == pytest.approx(rates["backward"] * seconds["backward"]) and through > tokens
        assert row["mfu"] is None, "the peak of a CPU is not known"
        assert row["memory_mb"] > 0


def test_the_clock_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 3.5, 4.0, 10.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    clock = StageClock(torch.device("cpu"))
    for _ in range(2):
        with clock.stage("forward"):
            pass
    found = clock.read(None, [30, 10], [], 1, None)
    assert found["seconds"]["forward"] == 2.5 and found["seconds"]["other"] == 7.5
    assert found["tokens_per_second"] == 4.0


def test_model_flops_of_a_forward_pass() -> None:
    """Against torch's own counter over the matmuls and attention of one padded sequence."""
    import transformers as tf

    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **heads, attn_implementation="eager"))
    work = Work()
    work.add([5], [[7]])
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(12)[None], logits_to_keep=7)
    # The counter sees all pairs, also those that the causal mask removes; and no norms, of which we count weights.
    counted = counter.get_total_flops() - 3 * 4 * 32 * (144 - 78)
    norms = 2 * 12 * sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert (work.tokens, work.rows, work.pairs) == (12, 7, 78)
    assert work.flops(model) == pytest.approx(counted + norms, rel=0.02)


def test_peaks_are_known_in_half_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "Some GPU": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda"), half=True) == peak
    assert peak_flops(torch.device("cuda"), half=False) is None and peak_flops(torch.device("cpu"), half=True) is None


def test_profile_writes_a_trace(tmp_path: Path) -> None:
    trainer = run_small(tmp_path, steps=4, profile=True)
    (trace,) = (trainer.out.path / "profile").iterdir()
    names = {e.get("name", "") for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert any("linear_token_loss" in n for n in names), "the objective's own op is in it"
