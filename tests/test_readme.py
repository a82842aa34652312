"""The README's numbers and settings are those of the committed result files and of the code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers.inputs import ROOT


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_tool", ROOT / "benchmarks" / "tables" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/command_line.md", "docs/losses.md", "docs/promises.md", "docs/trl.md", "docs/verifiers.md"],
)
def test_a_page_agrees_with_the_result_files(readme: ModuleType, page: str) -> None:
    assert page in readme.PAGES
    text = (ROOT / page).read_text(encoding="utf-8")
    assert readme.render(text, page) == text, "run python benchmarks/tables/readme.py"


def test_result_file_says_where_its_numbers_come_from(readme: ModuleType) -> None:
    result = json.loads(readme.LEARNING.read_text(encoding="utf-8"))
    assert re.fullmatch(r"[0-9a-f]{40}", result["commit"]) and result["machine"] and result["versions"]["torch"]
    assert result["command"].endswith("learning.py") and result["command"].startswith("python ")
    assert {r["variant"] for r in result["runs"]} >= {"paper", "grpo"}


@pytest.mark.parametrize("page", ["README.md", "docs/command_line.md"])
def test_code_runs_as_pasted(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    complete = [block for block in blocks if "mdpgrpo_fast import" in block]
    assert complete
    for block in complete:
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
            capture_output=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_files_that_the_readme_shows_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r'\]\(([^)#:]+)\)|(?:src|srcset)="([^"]+)"', text):
        assert (ROOT / "".join(target)).exists(), target


def test_scripts_that_the_readme_names_exist_or_are_said_to_have_moved() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"(benchmarks/[\w/]+\.py)(?:[^`]*` at \w+ \(now `([\w/.]+)`\))?", text)
    assert named
    for script, moved in named:
        assert (ROOT / (moved or script)).exists(), script


def test_no_section_may_be_lost(readme: ModuleType) -> None:
    with pytest.raises(ValueError, match="lacks the section <!-- results:claim -->"):
        readme.render("# nothing here")
