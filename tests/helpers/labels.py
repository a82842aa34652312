"""The labels of every golden table, a test for each type: what mutation.py runs of them, as a mutant needs few."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from helpers import verifiers
from helpers.inputs import ROOT

from mdpgrpo_fast.verifiers import INSTRUCTIONS, verify

OFFICIAL = ("iftrain", "ifbench", "m-ifeval")
TYPES = [(rules, id) for id, entry in INSTRUCTIONS.items() for rules in entry.rules if not entry.own]


@functools.cache
def table(rules: str) -> dict[str, list[dict[str, Any]]]:
    """type -> its rows."""
    name = f"{rules}_golden.jsonl.gz"
    found: dict[str, list[dict[str, Any]]] = {}
    for row in verifiers.rows(str(ROOT / "tests/data" / name) if rules in OFFICIAL else name):
        found.setdefault(row["instruction_id"], []).append(row)
    return found


@functools.cache
def folders(rules: str) -> list[Path]:
    return verifiers.oracle_data() if rules in OFFICIAL else [verifiers.punkt_folder()]


@pytest.mark.parametrize("rules", OFFICIAL)
def test_names(rules: str) -> None:
    assert set(table(rules)) == {id for name, id in TYPES if name == rules}


@pytest.mark.parametrize(("rules", "id"), TYPES)
def test_labels(rules: str, id: str) -> None:
    with verifiers.nltk_data(*folders(rules)):
        for row in table(rules).get(id, ()):
            for mode in ("strict", "loose"):
                got = verify(id, row["response"], row["kwargs"], mode=mode, rules=rules)
                assert got == row[mode], row["response"][:200]
