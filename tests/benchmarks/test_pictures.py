"""The pictures: light and dark, of the numbers in the result files, with words for every candidate."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers.inputs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "tables"))

import linear_table
import pictures
import speed_table

MEASURED = sorted(path.parent for path in speed_table.RESULTS.glob("*/token_loss.json"))


@pytest.mark.parametrize("folder", MEASURED, ids=lambda folder: folder.name)
def test_every_candidate_with_a_time_has_its_bar(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def note(self: pictures.Style, ax: object, values: dict[str, float], ours: set[str], *rest: str) -> None:
        seen.update(values)
        assert {label for label in values if "ours" in label} == ours != set()

    monkeypatch.setattr(pictures.Style, "bars", note)
    shutil.copy(folder / "token_loss.json", tmp_path)
    speed_table.plot(tmp_path)
    rows = json.loads((folder / "token_loss.json").read_text())["results"]
    row = next(r for r in rows if r["case"] == "on-policy" and "ms" in r["candidates"]["reference"])
    assert sorted(seen.values()) == sorted(e["ms"] for e in row["candidates"].values() if "ms" in e)


def test_light_and_dark_pictures_are_there_and_are_drawn(tmp_path: Path) -> None:
    names = ("speed.png", "speed-dark.png", "linear.png", "linear-dark.png")
    cpu = speed_table.RESULTS / "cpu"
    assert all((cpu / name).is_file() for name in names)
    for op in ("token_loss", "linear_token_loss"):
        shutil.copy(cpu / f"{op}.json", tmp_path)
    speed_table.plot(tmp_path)
    linear_table.plot(tmp_path)
    made = [(tmp_path / name).read_bytes() for name in names]
    assert all(data[:8] == b"\x89PNG\r\n\x1a\n" for data in made) and len(set(made)) == 4
