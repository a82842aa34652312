"""Signals: the step ends or is dropped, a checkpoint is written, and a run that goes on from it is one that was not
interrupted, to the bit."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import SMALL, parameters, run_small

import mdpgrpo_fast.train as train
from mdpgrpo_fast import api
from mdpgrpo_fast.config import TrainConfig, preset
from mdpgrpo_fast.training.checkpoint import Checkpoints
from mdpgrpo_fast.training.guard import keeper, stop
from mdpgrpo_fast.training.guard.stop import Stop, Stopped
from mdpgrpo_fast.training.loop import TrainingLoop

METHOD = preset("exact", num_generations=4, entropy_coef=0.01, entropy_target=5.0)
KNOBS: dict[str, Any] = {
    "steps": 4, "updates_per_rollout": 2, "sync_reference": 1, "reference_mix": 0.5, "eval_every": 2, "warmup_steps": 2,
}  # fmt: skip
TIMES = {"memory_mb", "tokens_per_second", "stage_seconds", "stage_tokens_per_second", "mfu"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainingLoop:
    """A run that nothing interrupts."""
    return run_small(tmp_path_factory.mktemp("whole"), METHOD, **KNOBS)


def numbers(trainer: TrainingLoop) -> list[dict[str, Any]]:
    """All metrics but times, evaluations too."""
    lines = map(json.loads, (trainer.out.path / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in TIMES and "seconds" not in k} for row in lines]


def completions(trainer: TrainingLoop) -> str:
    return (trainer.out.path / "completions.jsonl").read_text()


def kill_in(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, signum: int = signal.SIGTERM) -> None:
    """The signal comes within the n-th call of a method, before or after what that does."""
    method, calls = getattr(owner, name), [0]

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        result = method(self, *args, **kwargs)
        if calls[0] == call:
            os.kill(os.getpid(), signum)
        return result

    patch.setattr(owner, name, killed)


@pytest.mark.parametrize(
    ("where", "call", "signum", "done"),
    [
        ("collect", 3, signal.SIGTERM, 2),  # sampled and scored: the step is dropped
        ("forward_backward", 5, signal.SIGHUP, 2),  # before the first update of a step: dropped
        ("step", 5, signal.SIGINT, 3),  # in the middle of its updates: finished
        ("evaluate", 2, signal.SIGTERM, 2),  # between the steps
    ],
)
def test_a_run_that_a_signal_ended_goes_on_to_the_bit(
    tmp_path: Path, whole: TrainingLoop, monkeypatch: pytest.MonkeyPatch, where: str, call: int, signum: int, done: int
) -> None:
    handlers = [signal.getsignal(n) for n in stop.SIGNALS]
    from mdpgrpo_fast.training import loop
    from mdpgrpo_fast.training.collect import Collector
    from mdpgrpo_fast.training.update.updates import Updates

    with monkeypatch.context() as patch:
        if where == "evaluate":
            answer, calls = loop.answer_and_score, [0]

            def evaluated(*args: Any) -> Any:
                calls[0] += 1
                if calls[0] == call:
                    os.kill(os.getpid(), signum)
                return answer(*args)

            patch.setattr(loop, "answer_and_score", evaluated)
        else:
            kill_in(patch, Collector if where == "collect" else Updates, where, call, signum)
        cut = run_small(tmp_path, METHOD, **KNOBS, save_model=True)
    assert [signal.getsignal(n) for n in stop.SIGNALS] == handlers
    summary = json.loads((cut.out.path / "summary.json").read_text())
    assert cut.stop.signum == signum and summary["interrupted"] and summary["steps"] == done == cut.done
    assert [p.name for p in (cut.out.path / "checkpoints").iterdir()] == [f"checkpoint_{done}"]
    assert (cut.out.path / "model").is_dir()
    again = run_small(tmp_path, METHOD, **KNOBS, resume=True)
    assert torch.equal(parameters(again), parameters(whole))
    assert numbers(again) == numbers(whole) and completions(again) == completions(whole)


def test_status_and_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(keeper, "SECONDS", 0.0)  # a checkpoint after every step
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, *at: (saved.append(at[0]), save(self, *at))[1])
    kill_in(monkeypatch, TrainingLoop, "step", 2)
    argv = "--steps 9 --prompts-per-step 1 --max-completion-length 8 --eval-samples 1 --save-model false".split()
    assert train.main([*argv, "--output-dir", str(tmp_path / "run")]) == 143
    said = capsys.readouterr()
    assert "interrupted by SIGTERM after step 2; --resume goes on from checkpoint_2" in said.err.splitlines()
    last = said.out.splitlines()[-1]
    assert last.startswith("go on   ") and last.endswith("--resume (from step 2)") and saved == [1, 2]


def test_what_is_ignored_stays_so_and_a_thread_has_no_handlers(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with Stop(True, str) as inside:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and inside.signum is None
            assert signal.getsignal(signal.SIGTERM) == inside._handle
    finally:
        signal.signal(signal.SIGHUP, before)
    handlers = [signal.signal(n, signal.SIG_IGN) for n in stop.SIGNALS]
    try:
        with Stop(True, str):
            pass
        assert signal.set_wakeup_fd(-1) == -1
        assert "mdpgrpo-signals" not in [t.name for t in threading.enumerate()]
    finally:
        for n, handler in zip(stop.SIGNALS, handlers, strict=True):
            signal.signal(n, handler)
    seen: list[Any] = []

    def enter() -> None:
        with Stop(True, str):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_where_a_signal_is_looked_at() -> None:
    """At once where a step can be dropped, random states as before; else by who asks; of several ranks so only."""
    cpu = torch.device("cpu")
    with Stop(True, str) as alone:
        state = torch.get_rng_state()
        with pytest.raises(Stopped, match="SIGTERM"), alone.droppable(cpu):
            torch.rand(3)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        assert torch.equal(torch.get_rng_state(), state)
        with pytest.raises(Stopped, match="SIGTERM"), alone.droppable(cpu):
            raise AssertionError("nothing is begun any more")
        alone.settle()
    with Stop(False, str) as rank:
        with rank.droppable(cpu):
            os.kill(os.getpid(), signal.SIGTERM)
            problem = rank.problem()
        assert isinstance(problem, Stopped)
        with pytest.raises(Stopped, match="SIGTERM"), rank.droppable(cpu), rank.apart(True):
            raise AssertionError("nothing is begun any more")
        with rank.apart(False):
            pass
    with Stop(False, str) as rank, pytest.raises(Stopped, match="SIGHUP"), rank.droppable(cpu), rank.apart(True):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(60)
    with Stop(False, str) as rank, rank.apart(False):
        os.kill(os.getpid(), signal.SIGHUP)
        assert isinstance(rank.problem(), Stopped)
        rank.settle()
    with Stop(False, str) as rank:
        with pytest.raises(Stopped, match="SIGINT"):
            Stop(False, str).raise_(signal.SIGINT)
        rank.settle()
    with Stop(True, str) as late, pytest.raises(Stopped), late.droppable(cpu):
        late.begin_change()
        torch.rand(3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        state = torch.get_rng_state()
        late.raise_()
    assert late.half_done
    assert torch.equal(torch.get_rng_state(), state), "a step that has changed something is not taken back"


@pytest.mark.parametrize("second", [False, True])
def test_a_process_that_does_not_come_to_an_end_is_ended(second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After PATIENCE seconds, or by a second signal; where the main thread is in a call that never looks at signals."""
    monkeypatch.setattr(stop, "PATIENCE", 60.0 if second else 0.2)
    monkeypatch.setattr(stop, "SAME", 0.05)
    libc, (read, write) = ctypes.CDLL(None), os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 2)
        os.close(write)
        with Stop(True, lambda: "go on   mdpgrpo train --resume"):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            while True:
                libc.usleep(100_000_000)
    os.close(write)
    for wait in (0.5, 0.5)[: 1 + second]:
        time.sleep(wait)
        os.kill(child, signal.SIGTERM)
    with os.fdopen(read) as f:
        said = f.read().split("\n")
    why = "SIGTERM came once more" if second else "no step could end within 0.2 s of SIGTERM"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert said == ["", f"ended at once, as {why}", "go on   mdpgrpo train --resume", ""]


def test_a_script_gets_its_signal_once_the_run_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[bool] = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append((tmp_path / "run" / "report.html").exists()))
    try:
        kill_in(monkeypatch, TrainingLoop, "step", 1)
        run = TrainConfig(**SMALL, output_dir=str(tmp_path / "run"), save_model=False)
        assert api.Trainer(run=run).train().interrupted and came == [True]
    finally:
        signal.signal(signal.SIGTERM, before)
