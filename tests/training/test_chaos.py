"""Runs killed and hindered at file operations end as an uninterrupted one; `make chaos` does it at all of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.inputs import ROOT, unavailable


def test_killed_and_hindered_runs_end_as_an_uninterrupted_one(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        unavailable("needs gcc")
    output = tmp_path / "chaos.json"
    done = subprocess.run(
        [sys.executable, "tests/chaos.py", "--few", "--output", str(output)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(output.read_text())
    assert found["kills"] >= 10 and found["faults"] >= 5 and not found["failures"]
