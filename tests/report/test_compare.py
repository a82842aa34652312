"""Several runs on one page and in one table: names, scores, settings that differ; hostile text; one line per error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.report import ATTACK, Page, change_config, change_summary, fake_run, odd_run

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.report.compare import main, names, settings_that_differ
from mdpgrpo_fast.report.run import read_run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, as a/run and b/run of the current directory; the second learns more, with another seed."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        fake_run(tmp_path / name / "run", steps=24)
    b = tmp_path / "b" / "run"
    change_config(b, seed=7, learning_rate=3e-4, prospect=False, output_dir="elsewhere")
    change_summary(b, hsr_after=0.75, device="NVIDIA H200", train_seconds=12.5)
    return tmp_path


def test_the_table_on_the_terminal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a/run", "b/run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run    HSR before    HSR after     SSR before   SSR after    steps  training    total",
        "a/run  15.6% ± 12.5  46.9% ± 12.5  51.4% ± 6.2  78.5% ± 6.2  24     2 min 23 s  2 min 51 s",
        "b/run  15.6% ± 12.5  75.0% ± 12.5  51.4% ± 6.2  78.5% ± 6.2  24     12.5 s      2 min 51 s",
        "compare.html",
    ]


def test_the_page_has_curves_scores_and_what_differs(here: Path) -> None:
    assert main(["a/run", "b/run", "--output", "page.html"]) == 0
    page = Page(here / "page.html")
    for title in ("Held-out HSR", "Held-out SSR", "Training reward", "Training HSR", "Entropy", "KL to the reference",
                  "Completion length", "Seconds per step"):  # fmt: skip
        assert f'aria-label="{title}"' in page.source, title
    assert "b/run 15.6% ± 12.5 75.0% ± 12.5" in page.text
    assert "<title>step 20\na/run 41.7% ± 12.5%\nb/run 41.7% ± 12.5%</title>" in page.source
    for row in ("learning_rate 0.0001 0.0003", "seed 42 7", "prospect True False", "device cpu NVIDIA H200"):
        assert f" {row} " in page.text, row
    assert "output_dir" not in page.text and "num_generations" not in page.text  # no setting of learning; the same
    assert page.tags.count("svg") and not {"script", "img", "link", "iframe"} & set(page.tags)
    assert all(value.startswith("#") for name, value in page.attributes if name in ("src", "href"))


def test_settings_of_other_versions_and_of_runs_alike(here: Path) -> None:
    (here / "b/run/config.yaml").write_text("run: {seed: 42}\nmethod: {later_knob: [1, 2]}\n")
    rows = dict(settings_that_differ([read_run(here / "a/run"), read_run(here / "b/run")]))
    assert rows["later_knob"] == ["not recorded", "1 2"] and rows["steps"] == ["24", "not recorded"]
    assert "seed" not in rows
    assert settings_that_differ([read_run(here / "a/run")] * 2) == []


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["x/a", "x/b"], ["a", "b"]),
        (["s1/demo", "s2/demo"], ["s1/demo", "s2/demo"]),
        (["x/a/demo", "x/b/demo", "c"], ["a/demo", "b/demo", "c"]),
        (["r1", "sub/r1"], None),
        (["x/demo", "x/demo/again"], ["demo", "again"]),
        (["p/a/r/1", "p/b/r/1", "p/b/s/1"], ["a/r/1", "b/r/1", "s/1"]),
    ],
)
def test_names_are_the_shortest_that_tell_apart(tmp_path: Path, paths: list[str], expected: list[str] | None) -> None:
    found = names([tmp_path / path for path in paths])
    assert found == (expected or [f"{tmp_path.name}/r1", "sub/r1"])
    assert len(set(found)) == len(found)


def test_the_same_directory_twice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is given twice"):
        names([tmp_path / "a", tmp_path / "b" / ".." / "a"])


@pytest.mark.parametrize(
    ("of_a", "of_b", "said"),
    [
        ({}, {"eval_file": "other.jsonl"}, True),
        ({"held_out": 40}, {"held_out": 50}, True),  # as many with constraints in both
        ({"held_out": 40}, {"held_out": 40}, False),
        ({}, {"held_out": 40}, False),  # one of before, which tells of those with constraints alone
    ],
)
def test_other_held_out_prompts_are_said(
    here: Path, of_a: dict[str, Any], of_b: dict[str, Any], said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    change_summary(here / "a/run", **of_a)
    change_summary(here / "b/run", **of_b)
    main(["a/run", "b/run"])
    note = "The runs have different held-out prompts: their scores are not comparable."
    assert (note in Page(here / "compare.html").text) is said
    assert capsys.readouterr().err == f"note: {note}\n" * said


def test_damaged_and_unfinished_runs_are_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "odd").mkdir()
    odd_run(here / "odd")
    (here / "a/run/summary.json").unlink()
    assert main(["a/run", "b/run", "odd"]) == 0
    text = Page(here / "compare.html").text
    assert "a/run: The run has no summary" in text and "odd: config.yaml could not be read." in text
    assert "\nodd " in capsys.readouterr().out


def test_names_and_settings_are_hostile_text(here: Path) -> None:
    evil = fake_run(here / ATTACK.replace("/", "_"), steps=3)
    change_summary(evil, device=ATTACK, command=ATTACK, started=ATTACK)
    config = json.dumps({"run": {ATTACK: ATTACK}, "method": {}})
    (evil / "config.yaml").write_text(config)
    assert main(["a/run", str(evil)]) == 0
    page = Page(here / "compare.html")
    assert not {"script", "img"} & set(page.tags) and not any(name.startswith("on") for name, _ in page.attributes)
    assert f"{ATTACK} not recorded {ATTACK}" in page.text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["a/run"], "compare needs two run directories or more; got 'a/run' alone"),
        (["a/run", "absent"], "run directory 'absent' does not exist"),
        (["a/run", "a"], "'a' is not a run directory: it has none of config.yaml, metrics.jsonl, summary.json, "
         "completions.jsonl"),
        (["a/run", "a/run/"], "run directory 'a/run' is given twice"),
        (["a/run", "b/run", "--nothing"], "unrecognized arguments: --nothing"),
        (["a/run", "b/run", "--output", "there.html"], "output 'there.html' exists; --overwrite replaces it"),
        (["a/run", "b/run", "--output", "no/page.html"], "the page 'no/page.html' cannot be written: No such file or "
         "directory"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_gets_one_line(
    here: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "there.html").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(argv)
    streams = capsys.readouterr()
    assert stop.value.code == 2 and streams.err == f"error: {message}\n" and not streams.out
    assert (here / "there.html").read_text() == "mine"


def test_overwrite_replaces_the_page(here: Path) -> None:
    (here / "there.html").write_text("mine")
    assert main(["a/run", "b/run", "--output", "there.html", "--overwrite"]) == 0
    assert "Settings that differ" in (here / "there.html").read_text()
