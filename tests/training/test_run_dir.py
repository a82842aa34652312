"""The run directory: what is in it, what is moved aside, what trackers and the terminal are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.training.run_dir import RunDir, move_aside, tracker_values
from mdpgrpo_fast.training.show.progress import sample_table


def test_only_an_earlier_run_is_moved(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no earlier run"):
        RunDir(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").exists()
    assert RunDir(tmp_path / "thesis", create=False).moved is None, "the other ranks touch nothing"


def test_move_aside_takes_the_first_free_number(tmp_path: Path) -> None:
    for text in ("first", "second"):
        RunDir(tmp_path / "r").write_json("summary.json", {"text": text})
    assert move_aside(tmp_path / "r") == tmp_path / "r.2"
    assert json.loads((tmp_path / "r.1" / "summary.json").read_text())["text"] == "first"
    assert move_aside(tmp_path / "none") is None


def test_tracker_values_and_sample_table() -> None:
    row = {"step": 3, "loss": 1.5, "note": None, "slots": [{"temperature": 0.4, "reward": 0.5, "ess": None}]}
    assert tracker_values(row) == {"loss": 1.5, "slot_0.4/reward": 0.5}
    shown = {"satisfied": [True, False], "reward": 0.5, "temperature": 0.4, "response": "a\nb" * 200}
    text = sample_table([{**shown, "finished": True}], limit=4)
    assert " cut a b" in sample_table([{**shown, "finished": False}])
    assert text.startswith("  τ 0.4  r 0.50  +-     a b") and "\n" not in text and text.endswith("…")
