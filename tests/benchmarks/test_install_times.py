"""What `.ci/install` prints becomes a result file, as the command that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

from helpers.inputs import ROOT

LINES = "isolated: auto takes cpu, 22 s\nm-ifeval adds 1500000 bytes, 3 s\nanything else\n"


def test_lines_and_packages_become_numbers(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text(LINES)
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("a.py", "x" * 10_000)
    (tmp_path / "a.tar.gz").write_bytes(b"1234")
    command = [sys.executable, ROOT / "benchmarks" / "tables" / "install_times.py"]
    files = [tmp_path / name for name in ("lines", "result.json", "a.whl", "a.tar.gz")]
    done = subprocess.run([*command, *files], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ways"] == [{"way": "isolated", "auto": "cpu", "seconds": 22}]
    assert result["sizes"] == [{"what": "m-ifeval", "bytes": 1_500_000, "seconds": 3}]
    assert [p["name"] for p in result["packages"]] == ["a.whl", "a.tar.gz"] and result["packages"][1]["bytes"] == 4
    assert result["installed_bytes"] == 10_000 > result["packages"][0]["bytes"]
