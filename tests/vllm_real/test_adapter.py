"""A LoRA adapter alone, which a real vLLM adds to the weights that it holds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import rows, run_small
from helpers.vllm_real import LORA_RANK, Server, answers, reference_logprobs, train_a_little

from mdpgrpo_fast.config import preset
from mdpgrpo_fast.models.lora import add_adapters, base_weights, merged, save_adapters
from mdpgrpo_fast.rollout.generate import generate
from mdpgrpo_fast.training.task import Task


def test_an_adapter_reaches_the_sampler(engine: Any, model: Any, task: Task) -> None:
    """Greedy answers are the trainer's own at each version, and log-probs those of its forward pass."""
    wrapped = add_adapters(model, r=LORA_RANK, alpha=16.0, dropout=0.0, target_modules=["auto"])
    greedy = {"temperature": None, "eos": task.eos, "max_new_tokens": 48}
    taus, found, sends = [0.5, 1.0, 1.5], [], []
    send = engine._send
    engine._send = lambda *args: sends.append(1) or send(*args)
    for version in (1, 2, 3):
        named = dict(wrapped.named_parameters(remove_duplicate=False))
        engine.sync_adapter(base_weights(named), partial(save_adapters, wrapped, state_dict=named), version)
        ours = answers(generate(wrapped, task.train_ids[:24], **greedy))
        assert answers(engine.generate(task.train_ids[:24], **greedy)) == ours
        knobs = {**greedy, "num_generations": 3, "temperature": taus * 8, "seed": 7}
        r = engine.generate(task.train_ids[:8], **knobs)
        assert (reference_logprobs(wrapped, r)[0] - r.sampling_logprobs)[r.mask].abs().max() < 1e-3
        found.append(ours)
        train_a_little(wrapped, task)
    assert found[0] != found[1] != found[2], "the adapter must change the answers, or nothing is shown"
    assert len(sends) == 1, "the model's own weights go once"
    engine.sync(merged(wrapped, dict(wrapped.named_parameters(remove_duplicate=False))), 4)
    assert answers(engine.generate(task.train_ids[:8], **greedy)) == answers(
        generate(wrapped, task.train_ids[:8], **greedy)
    ), "no adapter is left beside merged weights"


def test_a_run_samples_with_its_adapter(tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the per-row correction, whose weight is 1 only where the sampler has the trainer's policy."""
    method = preset("exact", num_generations=4, temperature_objective="per_row", sampler_correction=True)
    more = {"steps": 3, "lora": True, "lora_r": LORA_RANK, "learning_rate": 3e-3, "max_completion_length": 32}
    knobs = {"rollout": "vllm", "vllm_lora": "adapter", "vllm_sleep": False}
    monkeypatch.setattr("mdpgrpo_fast.training.loop.make_engine", lambda *_: engine)
    logged = rows(run_small(tmp_path, method, **more, **knobs))
    assert len(logged) == 3 and all(row["grad_norm"] > 0 for row in logged)
    assert all(slot["ess"] == pytest.approx(1, abs=1e-4) for row in logged for slot in row["slots"])


def test_a_run_samples_one_step_ahead(tmp_path: Path, server: Server) -> None:
    """The correction's weights are 1 in the first step, and not after it: older weights sample than are trained."""
    method = preset("exact", num_generations=4, temperature_objective="per_row", sampler_correction=True)
    more = {"steps": 4, "learning_rate": 3e-3, "max_completion_length": 32, "async_rollout": 1}
    logged = rows(run_small(tmp_path, method, **more, rollout="vllm", vllm_url=server.url))
    assert [row["staleness"] for row in logged] == [0, 1, 1, 1]
    share = [min(slot["ess"] for slot in row["slots"]) for row in logged]
    assert share[0] == pytest.approx(1, abs=1e-4) and all(0.2 < x < 0.999 for x in share[1:]), share
