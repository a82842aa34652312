"""The rule sets of IF-Train, IFBench and M-IFEval against tables that their official code has labelled.

tests/golden/label.py makes the tables.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.inputs import ROOT
from helpers.verifiers import nltk_data, oracle_data

from mdpgrpo_fast.verifiers import INSTRUCTIONS, verify

TABLES = sorted((ROOT / "tests/data").glob("*_golden.jsonl.gz"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name.split("_")[0])
def test_every_label_is_met(path: Path) -> None:
    rules = path.name.split("_")[0]
    wrong, answers = [], Counter()
    with nltk_data(*oracle_data()):
        for row in rows_of(path):
            answers[row["instruction_id"], row["strict"]] += 1
            for mode in ("strict", "loose"):
                got = verify(row["instruction_id"], row["response"], row["kwargs"], mode=mode, rules=rules)
                if got != row[mode]:
                    wrong.append((row["instruction_id"], row["kwargs"], row["response"], mode))
    assert not wrong
    known = {id for id, entry in INSTRUCTIONS.items() if rules in entry.rules and not entry.own}
    assert {id for id, _ in answers} == known
    for id in known:
        assert answers[id, True] >= 15 and answers[id, False] >= 15 and answers[id, True] + answers[id, False] >= 100


def test_every_rule_set_has_its_table() -> None:
    assert [path.name.split("_")[0] for path in TABLES] == ["ifbench", "iftrain", "m-ifeval"]
