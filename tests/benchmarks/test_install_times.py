"""What `.ci/install` prints becomes a result file, as the command that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from helpers.inputs import ROOT

LINES = "isolated: auto takes cpu, 22 s\nm-ifeval adds 1500000 bytes, 3 s\nanything else\n"


def recorded(folder: Path, *packages: Path) -> dict[str, Any]:
    (folder / "lines").write_text(LINES)
    command = [sys.executable, ROOT / "benchmarks" / "tables" / "install_times.py", folder / "lines", folder / "result"]
    done = subprocess.run([*command, *packages], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return dict(json.loads((folder / "result").read_text()))


def test_lines_become_numbers(tmp_path: Path) -> None:
    assert recorded(tmp_path)["ways"] == [{"way": "isolated", "auto": "cpu", "seconds": 22}]
    wheel, sdist = tmp_path / "a.whl", tmp_path / "a.tar.gz"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.py", "x" * 10_000)
    sdist.write_bytes(b"1234")
    result = recorded(tmp_path, wheel, sdist)
    assert result["sizes"] == [{"what": "m-ifeval", "bytes": 1_500_000, "seconds": 3}]
    assert result["packages"] == [{"name": "a.whl", "bytes": wheel.stat().st_size}, {"name": "a.tar.gz", "bytes": 4}]
    assert result["installed_bytes"] == 10_000
