"""Losses, gradients and weights that are not finite: updates that are skipped, runs that end, nothing that is saved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from helpers.runs import PLAIN, make_trainer, parameters, rows

import mdpgrpo_fast.train as train
from mdpgrpo_fast.training import distributed
from mdpgrpo_fast.training.guard.finite import BadSteps, BadStepsError, check_weights, why_bad
from mdpgrpo_fast.training.update.updates import Updates


def spoil(patch: pytest.MonkeyPatch, passes: set[int], value: float = math.nan) -> list[float]:
    """The gradient of these backward passes is not finite; returns the rates of the schedule after each update."""
    backward, step, count, rates = Updates.forward_backward, Updates.step, [0], []

    def spoiled(self: Updates, *args: Any) -> Any:
        out = backward(self, *args)
        count[0] += 1
        if count[0] in passes:
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = value
        return out

    def stepped(self: Updates, *args: Any) -> Any:
        found = step(self, *args)
        rates.append(self.scheduler.get_last_lr()[0])
        return found

    patch.setattr(Updates, "forward_backward", spoiled)
    patch.setattr(Updates, "step", stepped)
    return rates


def test_an_update_that_is_not_finite_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, steps=3, packing="off", eval_samples=1, save_model=False)
    seen: list[torch.Tensor] = []
    trainer.on_step = lambda row: seen.append(parameters(trainer).clone())
    before = parameters(trainer).clone()
    rates = spoil(monkeypatch, {2}, math.inf)
    trainer.train()
    assert not torch.equal(seen[0], before) and torch.equal(seen[1], seen[0]) and not torch.equal(seen[2], seen[1])
    assert rates[1] == rates[0] > rates[2], "the schedule waits"
    found = rows(trainer)
    assert [(r["skipped_updates"], r["bad_updates"]) for r in found] == [(0, 0), (1, 1), (0, 0)]
    assert found[1]["grad_norm"] is None and found[1]["loss"] is not None
    text = (trainer.out.path / "bad_steps.jsonl").read_text()
    head, *samples = map(json.loads, text.splitlines())
    assert head["step"] == 2 and head["seed"] == 42 and "the norm of its gradient is" in head["updates"][0]["why"]
    assert len(samples) == 8 and {"prompt", "response", "reward", "advantage", "temperature"} <= samples[0].keys()
    assert all(torch.isfinite(x).all() for s in trainer.optimizer.state.values() for x in s.values())


def test_a_run_of_bad_steps_ends_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is that before them, and saved; a resumed run goes on counting."""
    spoil(monkeypatch, set(range(2, 99)))
    out = tmp_path / "run"
    flags = "--steps 9 --prompts-per-step 1 --max-completion-length 8 --eval-samples 1 --packing off --save-every 2"
    assert train.main([*flags.split(), "--max-bad-steps", "2", "--output-dir", str(out)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "error: 2 steps in a row, the last of them step 3, had an update that could not be made (max_bad_steps): "
    ) and last.endswith(f"; bad_steps.jsonl has their rows; what was learned until then is in {out}"), last
    assert (out / "model" / "model.safetensors").exists()
    assert "NaN" not in (out / "metrics.jsonl").read_text() + (out / "summary.json").read_text()
    assert (out / "report.html").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"steps": 1, "learning_rate": 1e39, "max_grad_norm": 0.0, "eval_samples": 1}
    for name, more in (("model", {"save_every": 0}), ("state", {"save_every": 1, "save_model": False})):
        trainer = make_trainer(tmp_path, PLAIN, name, **knobs, **more)
        with pytest.raises(
            FloatingPointError, match=r"^weights are not finite after step 1 \(model\..* is the first\)"
        ):
            trainer.train()
        assert not list(trainer.out.path.glob("**/*.safetensors")) and not trainer.saved
        assert "weights are not finite" in json.loads((trainer.out.path / "summary.json").read_text())["failure"]


def test_bad_steps_are_counted_in_a_row() -> None:
    count = BadSteps(2)
    bad: list[dict[str, Any]] = [{"why": "its loss is nan"}]
    for number in (1, 0, 1, 0):
        count.check({"step": 1, "bad_updates": number}, bad)
    count.record({"bad_updates": 1})
    with pytest.raises(
        BadStepsError, match=r"2 steps in a row, the last of them step 7, .* \(max_bad_steps\): its loss"
    ):
        count.check({"step": 7, "bad_updates": 1}, bad)
    assert why_bad(1.0, 1e20, clipped=True) is None and "too large for AdamW" in str(why_bad(1.0, 1e20, clipped=False))


def test_which_weight_is_not_finite(tmp_path: Path) -> None:
    from accelerate import Accelerator

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 0)).bfloat16()
    check_weights(Accelerator(cpu=True), model, 3)
    with torch.no_grad():
        model[0].bias[1] = -math.inf
    with pytest.raises(FloatingPointError, match=r"weights are not finite after step 3 \(0.bias is the first\)"):
        check_weights(Accelerator(cpu=True), model, 3)


def test_a_rank_that_fails_alone_asks_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be in another collective call, and would wait for each other."""
    trainer = make_trainer(tmp_path, PLAIN, steps=1, eval_samples=1, save_every=0)

    def fail(row: dict[str, Any]) -> None:
        monkeypatch.setattr(distributed, "max_over_ranks", lambda *_: pytest.fail("the others are asked"))
        raise KeyError("of on_step")

    trainer.on_step = fail
    with pytest.raises(KeyError, match="of on_step"):
        trainer.train()
    assert trainer.saved and (trainer.out.path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("precision", ["fp16", "no"])
def test_an_update_that_deepspeed_skips_is_bad_unless_float16_overflowed(precision: str) -> None:
    calls: list[str] = []
    optimizer = SimpleNamespace(
        step_was_skipped=True, step=lambda: calls.append("step"), zero_grad=lambda: calls.append("zero")
    )
    updates: Any = SimpleNamespace(
        accelerator=SimpleNamespace(scaler=None, distributed_type=DistributedType.DEEPSPEED), optimizer=optimizer,
        scheduler=SimpleNamespace(step=lambda: calls.append("scheduler")), begin_change=lambda: None,
        run=SimpleNamespace(max_grad_norm=1.0, mixed_precision=precision),
    )  # fmt: skip
    why = None if precision == "fp16" else "its gradient is not finite"
    assert Updates.step(updates, 1.0, 1.0) == (False, why) and "scheduler" not in calls and calls[-1] == "zero"
    optimizer.step_was_skipped = False
    assert Updates.step(updates, 1.0, 1.0) == (True, None) and "scheduler" in calls
    with pytest.raises(FloatingPointError, match="DeepSpeed has made an update that spoils the weights: its loss"):
        Updates.step(updates, 1.0, math.nan)


def test_the_schedule_waits_where_float16s_scale_was_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update is skipped, the scale is lowered; it is no bad one unless the scale cannot be the reason."""
    trainer = make_trainer(tmp_path, PLAIN, steps=4, packing="off", warmup_steps=4, eval_samples=1, save_model=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    acc = trainer.accelerator
    monkeypatch.setattr(acc, "scaler", scaler)
    monkeypatch.setattr(acc, "clip_grad_norm_", lambda p, norm: (
        scaler.unscale_(trainer.optimizer.optimizer), torch.nn.utils.clip_grad_norm_(p, norm))[1])  # fmt: skip
    monkeypatch.setattr(trainer.optimizer, "step", lambda: (
        scaler.step(trainer.optimizer.optimizer), scaler.update()))  # fmt: skip
    rates = spoil(monkeypatch, {2, 3, 4}, math.inf)
    trainer.train()
    assert [(r["skipped_updates"], r["bad_updates"]) for r in rows(trainer)] == [(0, 0), (1, 0), (1, 0), (1, 1)]
    assert len(set(rates)) == 1 and scaler.get_scale() == 0.5
