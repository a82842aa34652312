"""Collection: dynamic sampling, and engines in place of the model itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import PLAIN, make_trainer, rows, run_small

import mdpgrpo_fast.train as train
from mdpgrpo_fast.config import TrainConfig, preset
from mdpgrpo_fast.rewards import Score
from mdpgrpo_fast.rollout.generate import Rollout, generate
from mdpgrpo_fast.rollout.vllm.completion import Completion, RolloutError
from mdpgrpo_fast.training.collect import Collector
from mdpgrpo_fast.training.task import prepare
from mdpgrpo_fast.training.timing import StageClock


def test_groups_without_a_gradient_are_refilled_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    sample = Collector.sample

    def counted(self: Collector, prompts: list[int]) -> Rollout:
        drawn.append(len(prompts))
        return sample(self, prompts)

    monkeypatch.setattr(Collector, "sample", counted)
    knobs = {"steps": 3, "prompts_per_step": 3, "max_completion_length": 24, "seed": 3}
    plain = run_small(tmp_path, PLAIN, "plain", **knobs)
    assert drawn == [3, 3, 3] and any(r["zero_gradient_groups"] > 0 for r in rows(plain))
    drawn.clear()
    filled = run_small(tmp_path, PLAIN, "filled", refill=8, **knobs)
    assert len(drawn) > 3 and all(r["zero_gradient_groups"] == 0 for r in rows(filled))
    assert rows(filled)[0]["completion_length"] > 0
    drawn.clear()
    # A reward that is always the same never gives a signal: the bound ends it, and the step says why it learns nothing.
    never = run_small(tmp_path, PLAIN, "never", refill=2, reward=["helpers.rewards:none"], **{**knobs, "steps": 1})
    assert drawn == [3, 3, 3] and rows(never)[0]["zero_gradient_groups"] == 1 and "all equal" in rows(never)[0]["note"]


def test_groups_whose_reward_failed_are_not_refilled(tmp_path: Path) -> None:
    """One that hangs would take its time again."""
    trainer, calls = make_trainer(tmp_path, PLAIN, refill=5), []

    def failing(examples: Any, responses: Any, **_: Any) -> list[Score]:
        calls.append(len(responses))
        return [Score(None, {}, None, "it hung", cause="timeout")] * len(responses)

    trainer.collector.scorer = failing  # type: ignore[assignment]
    batch = trainer.collector.collect([0, 1], 1, StageClock(torch.device("cpu")))
    assert calls == [8] and not batch.valid.any()


def test_groups_with_a_kl_term_are_never_refilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    sample = Collector.sample
    monkeypatch.setattr(Collector, "sample", lambda self, prompts: drawn.append(1) or sample(self, prompts))
    run_small(tmp_path, preset("grpo", num_generations=4), reward=["helpers.rewards:none"], steps=1, refill=3)
    assert drawn == [1]


def test_corrected_weighs_a_token_by_policy_over_sampling(tmp_path: Path) -> None:
    """Up to the cap; what lies behind a completion's end has no say, whatever was recorded there."""
    method = preset("exact", num_generations=4, temperature_objective="corrected", importance_weight_cap=2.0)
    collector = make_trainer(tmp_path, method).collector
    rollout = collector.sample([0])
    policy, sampling = (torch.full_like(rollout.sampling_logprobs, torch.nan) for _ in range(2))
    policy[:, :3], sampling[:, :3] = torch.tensor([[0.2, 0.3, 0.9], [0.4, 0.3, 0.1]]).log()
    lengths = torch.full_like(rollout.lengths, 3)
    rollout = replace(rollout, lengths=lengths, policy_logprobs=policy, sampling_logprobs=sampling)
    batch = collector.assemble(rollout, [0], [""] * 4, [Score(0.5, {}, None)] * 4)
    collector.weigh(batch)
    weight = batch.weight
    assert weight is not None
    torch.testing.assert_close(weight[:, :3], torch.tensor([[0.5, 1.0, 2.0]] * 4))
    assert (weight[:, 3:] == 1).all()


class FakeEngine:
    """Samples with a model of its own, which sync has to bring up to date."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, []  # type: ignore[var-annotated]

    def sync(self, named: Any, version: int) -> None:
        self.calls.append("sync")
        own = self.model.state_dict()
        given = dict(named)
        missing = own.keys() - given.keys()
        assert missing <= {"lm_head.weight"}, missing
        for name, x in given.items():
            own[name].copy_(x.detach())

    def request(self, **asked: Any) -> dict[str, Any]:
        return asked

    def complete(self, request: dict[str, Any], kept: Any = None) -> Rollout:
        self.calls.append("generate")
        return generate(self.model, **request)

    def rollout(self, request: dict[str, Any], completions: Rollout) -> Rollout:
        completions.policy_logprobs.fill_(torch.nan)
        return completions

    def sleep(self) -> None:
        self.calls.append("sleep")


@pytest.mark.parametrize("knobs", [{}, {"lora": True, "lora_r": 4}], ids=str)
def test_an_engine_samples_with_the_weights_of_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knobs: dict[str, Any]
) -> None:
    made: list[FakeEngine] = []

    def fake(*_: Any) -> FakeEngine:
        made.append(FakeEngine(prepare(TrainConfig(max_completion_length=12)).model.eval()))
        return made[-1]

    method = preset("exact", num_generations=4, temperature_objective="corrected")
    own = run_small(tmp_path, method, "own", steps=3, **knobs)
    monkeypatch.setattr("mdpgrpo_fast.training.loop.make_engine", fake)
    theirs = run_small(tmp_path, method, "engine", steps=3, rollout="vllm", **knobs)
    assert made[0].calls == ["sync", "generate", "sleep"] * 3
    for a, b in zip(rows(own), rows(theirs), strict=True):
        assert b["reward"] == a["reward"] and b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        for x, y in zip(a["slots"], b["slots"], strict=True):
            assert y["ess"] == pytest.approx(x["ess"], abs=1e-4), "the effective sample size of each slot is logged"


def test_an_engine_that_fails_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(FakeEngine):
        def complete(self, request: dict[str, Any], kept: Any = None) -> Rollout:
            if len(self.calls) > 3:
                came = [Completion([5, 6], [0.0, 0.0], False), None]
                raise RolloutError("vLLM server http://x: gave up; 1 of 2 completions kept", came)
            return super().complete(request)

    monkeypatch.setattr(
        "mdpgrpo_fast.training.loop.make_engine",
        lambda *_: Failing(prepare(TrainConfig(max_completion_length=12)).model.eval()),
    )
    monkeypatch.setattr("mdpgrpo_fast.training.before.checks.check_vllm", lambda *_: None)
    folder = tmp_path / "run"
    argv = ["--output-dir", str(folder), "--steps", "4", "--prompts-per-step", "2", "--max-completion-length", "8",
            "--eval-samples", "2", "--rollout", "vllm"]  # fmt: skip
    assert train.main(argv) == 1
    *before, said = capsys.readouterr().err.splitlines()
    assert f"1 completions of step 2 are kept in {folder / 'partial_rollout.jsonl'}" in before
    assert said.startswith("error: vLLM server http://x: gave up; 1 of 2 completions kept") and str(folder) in said
    (kept,) = [json.loads(x) for x in (folder / "partial_rollout.jsonl").read_text().splitlines()]
    assert kept["tokens"] == [5, 6] and kept["row"] == 0 and kept["step"] == 2
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1
    assert (folder / "model" / "model.safetensors").exists()
