"""The report's page: it says what the files say, whatever is missing, and shows hostile text as text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.inputs import ROOT
from helpers.report import ATTACK, Page, change_summary, fake_run, odd_run, rewrite

from mdpgrpo_fast.report import page as page_module
from mdpgrpo_fast.report.page import main, write_report
from mdpgrpo_fast.report.run import read_run


def test_headline_has_the_numbers_of_the_summary(full: tuple[Path, Page]) -> None:
    _, page = full
    assert "15.6% ± 12.5 → 46.9% ± 12.5 +31.3 points" in page.text
    assert "51.4% ± 6.2 → 78.5% ± 6.2 +27.1 points" in page.text
    for fact in ("Steps 60", "2 min 23 s", "2 min 51 s", "Device cpu", "preset paper", "embedded seed policy",
                 "embedded (32)", "1,234 MB", "Dropped samples 3", "Seed 42", "torch 2.13.0",
                 "Started 2026-01-02 03:04 UTC", "Command mdpgrpo train --steps 60 --learning-rate 1e-4",
                 "Commit 0123456789abcdef", "Parameters 700,000, 12,000 of them trained",
                 "Backend loss cpu, log-probs cpu, advantages torch, sampling transformers"):  # fmt: skip
        assert fact in page.text, fact


def test_a_run_of_before_has_no_intervals_and_fewer_facts(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=20)
    new = ("intervals", "started", "command", "commit", "backend", "parameters", "trained_parameters")
    change_summary(run, **dict.fromkeys(new))

    def without_intervals(row: dict[str, Any]) -> dict[str, Any]:
        row.get("eval", {}).pop("intervals", None)
        return row

    rewrite(run / "metrics.jsonl", without_intervals)
    text = Page(write_report(run)).text
    assert "15.6% → 46.9% +31.3 points" in text and " ± " not in text and "bootstrap" not in text
    assert not any(fact in text for fact in ("Started", "Commit", "Backend", "Parameters"))


def test_intervals_of_scores_that_are_all_alike_are_not_announced(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=20)
    none = {"hsr": None, "ssr": None, "reward": None}
    change_summary(run, intervals={"before": none, "after": none}, held_out=40)

    def alike(row: dict[str, Any]) -> dict[str, Any]:
        if "eval" in row:
            row["eval"]["intervals"] = none
        return row

    rewrite(run / "metrics.jsonl", alike)
    text = Page(write_report(run)).text
    assert "15.6% → 46.9% +31.3 points" in text and " ± " not in text and "bootstrap" not in text
    assert "embedded (40)" in text, "all held-out prompts, of which 32 have constraints"


def test_every_section_is_there(full: tuple[Path, Page]) -> None:
    _, page = full
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for heading in ("Learning", "Group health", "Pace", "Instruction types", "Held-out completions", "Configuration"):
        assert f"<h2>{heading}</h2>" in page.source
        id = next(id for id in ids if f'<section id="{id}"><h2>{heading}<' in page.source)
        assert f'<a href="#{id}">{heading}</a>' in page.source  # the table of contents
    assert "2 of 60 steps: the gradient is 0: the rewards of every group are all equal." in page.text


def test_types_with_rates_and_counts_the_largest_gain_first(full: tuple[Path, Page]) -> None:
    run, page = full
    types = json.loads((run / "summary.json").read_text())["types"]
    for name, row in types.items():
        assert f"{name} {row['before']:.1%} {row['after']:.1%} " in page.text
        change = 100 * (row["after"] - row["before"])
        colour = "yes" if change > 0 else "no"
        assert f'<td class="{colour}">{change:+.1f}</td><td>{row["count"]}</td>' in page.source
    order = sorted(types, key=lambda t: types[t]["before"] - types[t]["after"])
    places = [page.source.index(f'<th scope="row">{name}</th>') for name in order]
    assert places == sorted(places)
    rates = [rate for name in order for rate in (types[name]["before"], types[name]["after"])]
    assert page.bars == [f"{rate:.1%}" for rate in (0.15625, 0.46875, 0.5139, 0.7847, *rates)]


def test_what_got_worse_is_shown_beside_what_got_better(full: tuple[Path, Page]) -> None:
    run, page = full
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    before, after = ([row for row in rows if row["phase"] == phase] for phase in ("before", "after"))
    changes = [sum(a["satisfied"]) - sum(b["satisfied"]) for a, b in zip(after, before, strict=True)]
    better, worse = sorted(c for c in changes if c > 0)[::-1], sorted(c for c in changes if c < 0)
    assert len(better) > 6 and worse  # what one side leaves, the other has
    assert f"Better than before: {len(better)} of 16 The largest changes first, " in page.text
    assert f"Worse than before: {len(worse)} of 16 The largest changes first, {len(worse)} shown." in page.text
    shown = [int(m) for m in re.findall(r"Write about subject (\d+) in", page.text)]
    assert [changes[i] for i in shown] == [*better[: 12 - len(worse)], *worse]
    for i in shown:
        for side, row in (("Before", before[i]), ("After", after[i])):
            end = "" if row["finished"] else " · stopped by the length limit"
            pairs = zip(row["satisfied"], row["instruction_ids"], strict=True)
            marks = " ".join(f"{'✓' if ok else '✗'} {name}" for ok, name in pairs)
            assert f"{side} · reward {row['reward']:.2f}{end} {marks} {row['response']}" in page.text
    assert "Train 3:" not in page.text


@pytest.mark.parametrize(
    ("gains", "losses", "shown"), [(20, 20, (6, 6)), (20, 2, (10, 2)), (3, 20, (3, 9)), (1, 0, (1, 0)), (0, 9, (0, 9))]
)
def test_half_of_the_room_for_either_direction(gains: int, losses: int, shown: tuple[int, int]) -> None:
    pairs = [(float(change), {}, {}) for change in [*range(1, gains + 1), *range(-losses, 0), 0]]
    found = page_module._by_change(pairs)
    counted = {"Better than before": (shown[0], gains), "Worse than before": (shown[1], losses)}
    assert {k: (len(rows), n) for k, (rows, n) in found.items()} == {k: v for k, v in counted.items() if v[0]}
    assert all(abs(rows[0][0]) == max(abs(row[0]) for row in rows) for rows, _ in found.values())


def test_completions_that_did_not_change_are_shown_where_none_did(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=1)
    rewrite(run / "completions.jsonl", lambda row: {**row, "satisfied": [True] * 3})
    text = Page(write_report(run)).text
    assert "As before: 16 of 16 12 shown." in text and "Better than before" not in text


def test_untrusted_text_stays_text(full: tuple[Path, Page]) -> None:
    _, page = full
    assert ATTACK in page.text  # the parser has unescaped it: it is text, not markup
    assert not {"script", "img", "iframe", "link", "b>river"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "<b>river</b>" in page.text
    assert "<h1>a &lt;run&gt; &amp; more</h1>" in page.source


def test_every_field_of_a_run_is_untrusted(tmp_path: Path) -> None:
    path = fake_run(tmp_path / ATTACK.replace("/", "_"), steps=1)
    attack = f'" onload="x" {ATTACK}'
    summary = json.loads((path / "summary.json").read_text())
    hostile = {key: attack for key in ("steps", "method", "device", "model", "train_file", "eval_file", "seed")}
    types = {attack: {"before": -0.1, "after": 1.9, "count": 1}}
    versions = {attack: attack}
    (path / "summary.json").write_text(json.dumps({**summary, **hostile, "types": types, "versions": versions}))
    (path / "config.yaml").write_text(yaml.safe_dump({"run": {attack: attack}, "method": {attack: [attack]}}))
    rewrite(path / "metrics.jsonl", lambda row: {**row, "step": attack, "note": attack, "loss": attack})
    text = {"prompt": [{"role": attack, "content": attack}] * 2, "response": attack, "instruction_ids": [attack] * 3}
    rewrite(path / "completions.jsonl", lambda row: {**row, **text})
    page = Page(write_report(path))
    assert not {"script", "img"} & set(page.tags) and not any(name.startswith("on") for name, _ in page.attributes)
    for before, after in (("preset ", ""), ("Steps ", ""), ("Device ", ""), ("Model ", ""), ("✗ ", ""), ("Seed ", ""),
                          ("Training prompts ", ""), ("Held-out prompts ", " (32)"), ("Versions ", f" {attack}"),
                          ("", " -10.0% 190.0% +200.0 1"), ("", f": {attack}"), ("", f" {attack}"), ("first ", "."),
                          ("1 of 1 steps: ", ".")):  # fmt: skip
        assert f"{before}{attack}{after}" in page.text, before
    assert page.bars[-2:] == ["0.0%", "100.0%"]


def test_page_loads_nothing(full: tuple[Path, Page]) -> None:
    _, page = full
    assert not re.search(r"https?://|//www|@import|url\((?!#)", page.source)
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert references and all(value.startswith("#") for value in references)


def test_configuration_marks_what_is_not_the_default(full: tuple[Path, Page]) -> None:
    _, page = full
    assert '<tr class="set"><th scope="row">learning_rate</th><td>0.0001</td>' in page.source
    assert '<tr class=""><th scope="row">prospect_gain</th><td>1.25</td>' in page.source
    assert page.tags.count("details") == 2


def test_run_stopped_halfway(tmp_path: Path) -> None:
    path = fake_run(tmp_path / "run")
    (path / "summary.json").unlink()
    rewrite(path / "metrics.jsonl", lambda row: row if row["step"] < 29 else None)
    rewrite(path / "completions.jsonl", lambda row: None if row["phase"] == "after" else row)
    text = Page(write_report(path)).text
    assert f"15.6% ± 12.5 → {0.15625 + 0.3125 / 3:.1%} ± 12.5" in text
    assert "not recorded" in text
    notes = read_run(path).notes
    assert notes and all(note in text for note in notes)


def test_reward_of_ones_own_has_no_hsr(tmp_path: Path) -> None:
    path = fake_run(tmp_path / "run", steps=3)
    none = dict.fromkeys(("hsr_before", "hsr_after", "ssr_before", "ssr_after"))
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({**summary, **none, "types": {}}))
    rows = [{"step": s, "eval": {"hsr": None, "ssr": None, "count": 0, "types": {}, "reward": s / 8}} for s in (0, 3)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewrite(path / "completions.jsonl", lambda row: {**row, "satisfied": None, "instruction_ids": []})
    text = Page(write_report(path)).text
    assert "0.000 → 0.375" in text and "No instruction types" in text and "HSR, responses" not in text


def test_nothing_but_an_empty_metrics_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    text = Page(write_report(tmp_path)).text
    assert "No training step has been recorded" in text and "No held-out evaluation has been recorded" in text
    assert "No configuration has been recorded." in text and "No held-out completions have been recorded." in text
    assert not list(tmp_path.glob("*.png"))


def test_odd_values_do_not_stop_the_page(tmp_path: Path) -> None:
    text = Page(write_report(odd_run(tmp_path))).text
    assert "The loss is not a finite number in 1 of 3 steps, first 1." in text
    assert "a$b$_?" in text


def test_long_response_is_cut_and_says_so(tmp_path: Path) -> None:
    path = fake_run(tmp_path / "run", steps=1)
    rewrite(path / "completions.jsonl", lambda row: {**row, "response": "x" * 5000})
    assert "… (3400 more characters)" in Page(write_report(path)).text


def test_template_and_stylesheet_are_package_data() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    suffixes = {path.suffix for path in Path(page_module.__file__).parent.iterdir() if path.suffix not in (".py", "")}
    assert suffixes == {".jinja", ".css"} and '"mdpgrpo_fast.report" = ["*.jinja", "*.css"]' in settings


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = fake_run(tmp_path / "run", steps=1)
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path / "report.html")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["absent"], "run directory 'absent' does not exist"),
        ([], "the following arguments are required: run_dir"),
        (["a", "b"], "unrecognized arguments: b"),
        (["--nothing"], "the following arguments are required: run_dir"),
        (["full"], "the page 'full/report.html' cannot be written: Is a directory"),
    ],
)
def test_a_wrong_command_line_gets_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (fake_run(tmp_path / "full", steps=1) / "report.html").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"
