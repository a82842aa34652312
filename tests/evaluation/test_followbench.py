"""FollowBench's rules on texts of our own, its scores by hand, and the command on a small copy of its form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdpgrpo_fast import evaluate
from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.evaluation.followbench import CATEGORIES, Entry, read, satisfied, summary

LONG = "word " * 21  # one more than a sentence needs

# rule, level, target, text, verdict
CASES: list[tuple[str, int, str, str, bool]] = [
    ("E2E", 1, "name[A], near[B]", "name[A], near[B]", True),
    ("E2E", 1, "name[A], near[B]", "name[A], near[B].", False),
    ("text_editing", 3, "ab c", "ab c", True),
    ("text_editing", 3, "ab c", "ab  c", False),
    ("WIKIEVENTS", 2, "a killed b\nc fled", "c fled", True),
    ("WIKIEVENTS", 2, "a killed b\nc fled", "c fled\na killed c", False),
    ("CONLL2003", 1, "['Bonn', 'Oslo']", "Oslo", True),
    ("CONLL2003", 1, "['Bonn', 'Oslo']", "Osl", False),
    ("BBH_logical", 1, "(B)", "Not (A), rather (B).", True),
    ("BBH_logical", 1, "(B)", "(B), not (A)", False),
    ("BBH_logical", 1, "(B)", "B", False),
    ("BBH_time", 1, "01/02/1999", "12/31/1998, so 01/02/1999", True),
    ("BBH_time", 1, "01/02/1999", "1/2/1999", False),
    ("self_made_space", 1, "3rd floor", "It is the 3rd floor.", True),
    ("self_made_space", 1, "3rd floor", "It is the 13th floor.", False),
    ("gsm_8k", 1, "$14", "$7 twice is $14.", True),
    ("gsm_8k", 1, "$14", "$14, from $7 and $7", False),
    ("cnn_dailymail", 1, "", "One. Two! Three?", True),
    ("cnn_dailymail", 1, "", "One. Two.", False),
    ("cnn_dailymail", 2, "", f"One. Two. {'a ' * 14}.", True),
    ("cnn_dailymail", 2, "", f"One. Two. {'a ' * 15}.", False),
    ("cnn_dailymail", 3, "", "Potter is. An actor is. The films are.", True),
    ("cnn_dailymail", 3, "", "An actor is. Potter is. The films are.", False),
    ("cnn_dailymail", 4, "", "Potter is. A lavish actor is. The films are.", False),
    ("cnn_dailymail", 5, "", "Potter is. An actor is. The films have won.", True),
    ("cnn_dailymail", 5, "", "Potter is. An actor has won. The films are.", False),
    ("xsum", 1, "", "Just one.", True),
    ("xsum", 2, "", "a " * 18 + "a", True),
    ("xsum", 2, "", "a " * 19 + "a", False),
    ("xsum", 3, "", "A man of Newton Stewart fell", False),
    ("xsum", 4, "", "Police are running a search", True),
    ("xsum", 4, "", "Police ran a search", False),
    ("xsum", 5, "", "Police are running an operation", True),
    ("samsum", 2, "", "a " * 14 + "a", False),
    ("samsum", 3, "", "Kim has stuff to do", True),
    ("samsum", 4, "", "Kim stopped Procrastinating on stuff", False),
    ("samsum", 5, "", "Kim has stuff to do.", True),
    ("samsum", 5, "", "Kim, tired, has stuff to do.", False),
    ("gigaword", 1, "", "one two three four five six seven eight", True),
    ("gigaword", 1, "", "one two three four five six  seven", True),  # between single spaces
    ("gigaword", 2, "", "one two three four five six seven eight.", False),
    ("gigaword", 3, "", "One two three four five six seven eight", False),
    ("gigaword", 4, "", "a bus runs three four five six seven", False),
    ("gigaword", 5, "", "a car runs in four five six seven", True),
    ("arxiv", 2, "", "a " * 19 + "a", True),
    ("arxiv", 3, "", "we study nets", False),
    ("arxiv", 4, "", "We study activations", True),
    ("arxiv", 5, "", "We study activations of a transformer", False),
    ("three_paragraphs", 1, "", "a\n\nb\n\nc", True),
    ("three_paragraphs", 1, "", "a\n\nb\n\nc\n\nd", False),
    ("three_paragraphs", 2, "", "a. b.\n\nb\n\nc", True),
    ("three_paragraphs", 2, "", "a. b. c.\n\nb\n\nc", False),
    ("three_paragraphs", 3, "", f"{LONG}.\n\n{LONG}.\n\n{LONG}", True),
    ("three_paragraphs", 3, "", f"{LONG}.\n\n{LONG}.\n\n{LONG[5:]}", False),
    ("three_paragraphs", 5, "", "a\n\nb\n\nThose are suggestions", False),
    ("five_benefits", 1, "", "**bold**", True),
    ("five_benefits", 2, "", "".join(f"**{n}. Point: " for n in range(5)), True),
    ("five_benefits", 2, "", "".join(f"**{n}. Point: " for n in range(4)), False),
    ("template", 2, "{instruction}\n{{'A': '{answer}'}}", "{'A': 'yes (or) no'}", True),
    ("template", 2, "{instruction}\n{{'A': '{answer}'}}", "{'A': 'yes'", False),
    ("template", 2, "{instruction}\n{{'A': '{answer}'}}", "{'A': 'two\nlines'}", False),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "level", "target", "text", "verdict"), CASES)
def test_rules(rule: str, level: int, target: str, text: str, verdict: bool) -> None:
    assert satisfied(Entry("any", 1, level, "?", target, rule), text) is verdict


def test_levels_and_consistency_by_hand() -> None:
    entries = [Entry("content", i, n, "?", "", "E2E") for i in (1, 2) for n in range(1, 6)]
    entries += [Entry("mixed", 1, n, "?", "", "xsum") for n in range(1, 6)]
    rows = [[True, True, False, True, True], [False, True, True, True, True], [True] * 5]
    found = summary(entries, [v for row in rows for v in row])
    assert found["content"]["hsr"] == found["content"]["ssr"] == [0.5, 1.0, 0.5, 1.0, 1.0]
    assert found["content"]["csl"] == (2 + 0) / 2 and found["mixed"]["csl"] == 5.0
    assert found["all"]["groups"] == 3 and found["all"]["csl"] == pytest.approx(7 / 3)
    assert found["content"]["intervals"]["csl"] is not None and found["mixed"]["intervals"]["csl"] is None
    assert found["format"]["groups"] == 0 and found["groups_left_out"] == 0
    found = summary(entries, [None, *[True] * 14])
    assert found["content"]["groups"] == 1 and found["groups_left_out"] == 1


def rows(category: str, source: str, ids: tuple[int, ...] = (1,), target: str = "") -> list[dict[str, Any]]:
    shared = {"category": category, "source": source, "target": target}
    return [
        {"example_id": i, "level": n, "instruction": f"Say {n}.", **shared}
        for i in ids
        for n in range(category == "example", 6)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One group of each category, and one of content that no rule checks."""
    files = {
        "content": rows("content", "E2E", target="x") + rows("content", "judged", (2,)),
        "situation": rows("situation", "gsm_8k", target="$1"),
        "format": rows("format", "any", (22, 23)),
        "mixed": rows("mixed", "xsum"),
        "example": rows("example", "any", target="{instruction}\n{answer}"),
    }
    path = tmp_path / "followbench"
    path.mkdir()
    for name, found in files.items():
        (path / f"{name}_constraints.json").write_text(json.dumps(found))
    return path


def test_only_what_rules_check_is_read(folder: Path) -> None:
    entries = read(folder)
    assert [e.rule for e in entries[::5]] == ["E2E", "gsm_8k", "three_paragraphs", "xsum", "template"]
    assert [e.level for e in entries] == [1, 2, 3, 4, 5] * 5


def test_the_published_data(shared_data: Callable[[str], Path]) -> None:
    entries = read(shared_data("followbench"))
    groups = {c: sum(e.category == c for e in entries) / 5 for c in CATEGORIES}
    assert groups == {"content": 12, "situation": 8, "format": 2, "mixed": 8, "example": 40}
    assert len(read(shared_data("followbench"), limit=3)) == 5 * (3 + 3 + 2 + 3 + 3)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("mixed", None, "followbench: the folder {folder!r} has no mixed_constraints.json"),
        ("mixed", "[", "followbench {path!r} cannot be read: Expecting value: line 1 column 2 (char 1)"),
        (
            "mixed",
            '[{"level": 1}]',
            "followbench {path!r}, entry 1: expected example_id, category, source, level, instruction and target, as "
            "FollowBench's data has them",
        ),
        (
            "content",
            json.dumps([{**row, "example_id": [1]} for row in rows("content", "E2E")]),
            "followbench {path!r}, entry 2: expected example_id, category, source, level, instruction and target, as "
            "FollowBench's data has them",
        ),
        (
            "content",
            json.dumps([{**row, "level": str(row["level"])} for row in rows("content", "E2E")]),
            "followbench {path!r}, entry 1: expected example_id, category, source, level, instruction and target, as "
            "FollowBench's data has them",
        ),
        (
            "example",
            json.dumps(rows("example", "any")[1:]),
            "followbench example_constraints.json: example_id 1 must have the levels 1 to 5; got [2, 3, 4, 5]",
        ),
    ],
)
def test_a_copy_that_is_none(folder: Path, name: str, text: str | None, said: str) -> None:
    path = folder / f"{name}_constraints.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read(folder)
    assert str(raised.value) == said.format(folder=str(folder), path=str(path))


def test_no_group_is_one_line(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_text("[]")
    with pytest.raises(ConfigError) as raised:
        read(folder)
    assert str(raised.value) == f"followbench {str(folder)!r} has no group that a rule checks"


def test_much_truncation_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--followbench", str(folder), "--cpu", "--max-completion-length", "2"]) == 0
    assert "of the completions were cut at 2 tokens" in capsys.readouterr().out.splitlines()[-1]


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, lines = tmp_path / "s.json", tmp_path / "c.jsonl"
    argv = ["--followbench", str(folder), "--cpu", "--output", str(saved), "--completions", str(lines)]
    assert evaluate.main(argv) == 0
    found = json.loads(saved.read_text())["followbench"]
    answered = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(answered) == 25 and found["all"]["groups"] == 5
    for level in range(1, 6):
        verdicts = [row["satisfied"] for row in answered if row["followbench"]["level"] == level]
        assert found["all"]["hsr"][level - 1] == sum(verdicts) / 5
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        "FollowBench, 5 groups that rules check; HSR by level (SSR is the same under a rule); "
        "CSL: levels in a row, of 5"
    )
    assert [line.split()[:2] for line in out[2:8]] == [["1", c] for c in CATEGORIES] + [["5", "all"]]
    assert out[8] == f"cut at the length limit: {found['truncated']:.3f}"
