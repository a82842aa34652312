"""The run directory: what is in it, whose it is, what is moved aside, what trackers and the terminal are shown."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.runs import make_trainer

import mdpgrpo_fast.train as train
from mdpgrpo_fast import durable
from mdpgrpo_fast.config import ConfigError, TrainConfig, preset
from mdpgrpo_fast.training.guard import claim
from mdpgrpo_fast.training.guard.claim import MARKER, Claim, check_unused, claim_new
from mdpgrpo_fast.training.run_dir import RunDir, tracker_values
from mdpgrpo_fast.training.show.progress import sample_table


def test_only_an_earlier_run_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file, text in (
        ("thesis", "chapter.tex", "mine"), ("project", "config.yaml", "title: mine"),
        ("other", "metrics.jsonl", "{}\n"),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
        with pytest.raises(ConfigError, match=rf"output_dir '.*{name}' exists and is no earlier run$"):
            RunDir(tmp_path / name)
        assert [p.name for p in (tmp_path / name).iterdir()] == [file] and (tmp_path / name / file).read_text() == text
    assert RunDir(tmp_path / "thesis", create=False).moved is None, "the other ranks touch nothing"
    assert not (tmp_path / "thesis" / MARKER).exists()

    settings = {"run": {"steps": 3}, "method": {}}
    (tmp_path / "other" / "config.yaml").write_text(yaml.safe_dump(settings))
    said = rf"holds a run of an earlier version of this library \(there is no {MARKER}\): take another name, or move it"
    with pytest.raises(ConfigError, match=said):
        RunDir(tmp_path / "other")

    RunDir(tmp_path / "run").write_summary({})
    monkeypatch.chdir(tmp_path / "run")
    for name in (".", "../run", "..", str(tmp_path)):
        with pytest.raises(ConfigError, match=r"current directory|no earlier run"):
            RunDir(name)
    assert (tmp_path / "run" / "summary.json").exists()


def test_an_earlier_run_gets_the_first_free_number(tmp_path: Path) -> None:
    for text in ("first", "second"):
        RunDir(tmp_path / "r").write_summary({"text": text})
    third = RunDir(tmp_path / "r")
    assert third.moved == tmp_path / "r.2" and [p.name for p in third.path.iterdir()] == [MARKER]
    assert json.loads((tmp_path / "r.1" / "summary.json").read_text())["text"] == "first"
    third.release()
    again = RunDir(tmp_path / "r")
    assert again.moved is None, "nothing but the marker was in it"
    row = json.loads((again.path / MARKER).read_text())
    assert row["pid"] == os.getpid() and set(row) == {"version", "pid", "host", "time"}


def _hold(path: str, begin: Any) -> None:
    run = RunDir(path)
    assert run.unlocked is None
    begin.set()
    time.sleep(60)


def _race(path: str, start: Any, results: Any) -> None:
    start.wait(60)
    said = None
    try:
        run = RunDir(path)
        run.write_summary({"pid": os.getpid()})
    except ConfigError as e:
        said = str(e)
    results.put(said)
    start.wait(60)


def test_one_run_has_a_directory(tmp_path: Path) -> None:
    """Until it ends, or is killed; a child that was forked from it does not keep the lock."""
    path, fork = tmp_path / "run", multiprocessing.get_context("fork")
    begin = fork.Event()
    child = fork.Process(target=_hold, args=(str(path), begin))
    child.start()
    assert begin.wait(60)
    said = rf"output_dir '.*run' is in use by another run \(process {child.pid} on .+\)$"
    for attempt in (RunDir, lambda p: RunDir(p, create=False).resume(), check_unused):
        with pytest.raises(ConfigError, match=said):
            attempt(path)
    child.kill()
    child.join()
    check_unused(path)
    run = RunDir(path, create=False)
    run.resume()
    forked = fork.Process(target=time.sleep, args=(60,))
    forked.start()
    run.release()
    Claim(path).release()
    forked.kill()
    forked.join()


def test_of_runs_that_begin_at_once_one_has_the_directory(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for earlier in (False, True):
        path, results, start = tmp_path / f"run{earlier}", fork.Queue(), fork.Barrier(4)
        if earlier:
            old = RunDir(path)
            old.write_summary({"pid": 0})
            old.release()
        racers = [fork.Process(target=_race, args=(str(path), start, results)) for _ in range(4)]
        for p in racers:
            p.start()
        found = [results.get(timeout=60) for _ in racers]
        for p in racers:
            p.join(60)
        assert found.count(None) == 1 and all("is in use by another run" in x for x in found if x), found
        summaries = [json.loads(p.read_text())["pid"] for p in sorted(tmp_path.glob(f"run{earlier}*/summary.json"))]
        assert len(summaries) == 1 + earlier and (0 in summaries) == earlier, summaries


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(fd: int, kind: int) -> None:
        raise OSError(claim.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claim.fcntl, "flock", unknown)
    assert claim_new(tmp_path / "run")[0].problem == RunDir(tmp_path / "run").unlocked == "No locks available"


def test_files_have_no_nan_and_no_half_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = RunDir(tmp_path / "run")
    row = {"step": 1, "loss": float("nan"), "slots": [{"kl": float("inf")}], "text": "NaN"}
    out.append("metrics.jsonl", row)
    out.write_summary(row)
    found = [json.loads((out.path / name).read_text()) for name in ("metrics.jsonl", "summary.json")]
    assert found == [{"step": 1, "loss": None, "slots": [{"kl": None}], "text": "NaN"}] * 2
    out.write_config(TrainConfig(), preset("paper"))
    assert not list(out.path.glob("*.new"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl", "summary.json", "model", "report.html"])
def test_a_full_disk_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1; what was whole before still is, and can be gone on from. JSON lines are of the second step."""
    out, lines, done = tmp_path / "run", name.endswith(".jsonl"), 2

    def full(path: Path) -> None:
        rows = (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").exists() else 0
        if path.name == name and (rows == 2 or not lines):
            with durable.storing(path):
                raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("append_text", "write_text", "replace_folder"):
        write = getattr(durable, function)
        monkeypatch.setattr(
            durable,
            function,
            lambda a, b, write=write: (full(b if write.__name__ == "replace_folder" else a), write(a, b)),
        )
    knobs: dict[str, Any] = {"steps": 2, "prompts_per_step": 1, "max_completion_length": 8, "save_every": 1}
    if name in ("metrics.jsonl", "report.html"):
        flags = [w for k, v in knobs.items() for w in (f"--{k.replace('_', '-')}", str(v))]
        assert train.main([*flags, "--eval-samples", "1", "--output-dir", str(out)]) == 1
        said = capsys.readouterr().err.splitlines()
        assert f"{str(out / name)!r} cannot be written: No space left on device" in said[-1], said
    else:
        with pytest.raises(durable.StorageError, match=f"{name}' cannot be written: No space left on device"):
            make_trainer(tmp_path, **knobs, eval_samples=1).train()
    if lines:
        done = 1
    assert [json.loads(x)["step"] for x in (out / "metrics.jsonl").read_text().splitlines()][-1] == done
    assert (out / "checkpoints" / f"checkpoint_{done}").is_dir() and not list(out.glob("*.new"))
    assert (out / name).exists() == lines
    assert json.loads((out / "summary.json").read_text())["steps"] == done if name != "summary.json" else True


def test_tracker_values_and_sample_table() -> None:
    row = {
        "step": 3, "loss": 1.5, "kl": float("nan"), "note": None,
        "slots": [{"temperature": 0.4, "reward": 0.5, "ess": None}],
    }  # fmt: skip
    assert tracker_values(row) == {"loss": 1.5, "slot_0.4/reward": 0.5}
    shown = {"satisfied": [True, False], "reward": 0.5, "temperature": 0.4, "response": "a\nb" * 200}
    text = sample_table([{**shown, "finished": True}], limit=4)
    assert " cut a b" in sample_table([{**shown, "finished": False}])
    assert text.startswith("  τ 0.4  r 0.50  +-     a b") and "\n" not in text and text.endswith("…")
