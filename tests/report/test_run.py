"""Reading a run directory: every incomplete run is read, and says what it lacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.report import fake_run, odd_run

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.report.run import read_run, score, type_rates


@pytest.mark.parametrize(
    ("case", "reason"),
    [("absent", "does not exist"), ("empty", "it has none of config.yaml, metrics.jsonl"), ("file", "is no directory")],
)
def test_not_a_run_directory(tmp_path: Path, case: str, reason: str) -> None:
    path = tmp_path / case
    if case == "empty":
        path.mkdir()
    elif case == "file":
        path.write_text("text")
    with pytest.raises(ConfigError, match=reason) as error:
        read_run(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "summary.json", "completions.jsonl"])
def test_one_file_missing(tmp_path: Path, missing: str) -> None:
    path = fake_run(tmp_path / "run", steps=2)
    assert not read_run(path).notes
    (path / missing).unlink()
    run = read_run(path)
    notes = " ".join(run.notes)
    assert (f"{missing} is missing." in notes) != (missing == "summary.json")
    assert ("No training step has been recorded" in notes) == (missing == "metrics.jsonl") == (not run.train)
    assert ("The run has no summary" in notes) == (missing == "summary.json") == (not run.summary)
    assert (missing == "config.yaml") == (not run.config) and (missing == "completions.jsonl") == (not run.completions)


def test_run_stopped_halfway(tmp_path: Path) -> None:
    path = fake_run(tmp_path / "run")
    (path / "summary.json").unlink()
    lines = (path / "metrics.jsonl").read_text().splitlines()[:30]
    (path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "lo']))
    run = read_run(path)
    assert any("stopped after step 28 of 60." in note for note in run.notes)
    note = "metrics.jsonl: 1 unreadable line left out, the last one: writing it was probably cut short."
    assert note in run.notes
    assert score(run, "HSR")[1:] == pytest.approx((0.15625, 0.15625 + 0.3125 / 3, 0.125, 0.125))
    first, last = (row["eval"]["types"] for row in (run.evals[0], run.evals[-1]))
    rates = {name: (before, after, count) for name, before, after, count in type_rates(run)}
    assert rates == {name: (first[name]["rate"], last[name]["rate"], last[name]["count"]) for name in last}


def test_interrupted_run_says_so(tmp_path: Path) -> None:
    path = fake_run(tmp_path / "run", steps=3)
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({**summary, "interrupted": True, "hsr_after": None, "types": {}}))
    run = read_run(path)
    assert any("The run was interrupted after step 3" in note for note in run.notes)
    assert type_rates(run)


def test_odd_values_are_noted(tmp_path: Path) -> None:
    notes = read_run(odd_run(tmp_path)).notes
    assert "The loss is not a finite number in 1 of 3 steps, first 1." in notes
    assert any(note.startswith("metrics.jsonl: 2 unreadable lines left out") for note in notes)
    assert "config.yaml could not be read." in notes and "summary.json could not be read." in notes
