"""The page on verifiers: its examples run as they stand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from helpers.inputs import ROOT

from mdpgrpo_fast.verifiers import INSTRUCTIONS, verify, verify_all

PAGE = (ROOT / "docs/verifiers.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_what_the_calls_return() -> None:
    calls = re.findall(r"^(verify.*)  # (True|False|\[.*?\])", blocks("python")[0], re.MULTILINE)
    assert len(calls) == 5
    for call, returned in calls:
        assert repr(eval(call, {"verify": verify, "verify_all": verify_all})) == returned, call


def test_the_type_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "checks.py").write_text(blocks("python")[1])
    (tmp_path / "my.jsonl").write_text(blocks("json")[0])
    row = json.loads(blocks("json")[0])
    (tmp_path / "responses.jsonl").write_text(json.dumps({"prompt": row["prompt"], "response": "Hey!!"}))
    own = ["--instructions", "checks.py"]
    listed = [sys.executable, "-m", "mdpgrpo_fast.verifiers", *own, "--list"]
    command = [sys.executable, "-m", "mdpgrpo_fast", "score", *own]
    done = subprocess.run(listed, cwd=tmp_path, capture_output=True, text=True)
    assert "my:emphasis" in done.stdout and "At least `minimum` of `mark`." in done.stdout, done.stderr
    files = ["--prompts", "my.jsonl", "--responses", "responses.jsonl", "--json"]
    done = subprocess.run([*command, *files], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout)["prompt_strict"] == 1, done.stderr
    (tmp_path / "responses.jsonl").write_text(json.dumps({"prompt": row["prompt"], "response": "Hey!"}))
    done = subprocess.run([*command, *files], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout)["prompt_strict"] == 0, done.stderr


def test_the_counts_of_types() -> None:
    counts = dict(re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", PAGE, re.MULTILINE))
    known = Counter(rules for entry in INSTRUCTIONS.values() if not entry.own for rules in entry.rules)
    assert counts == {rules: str(count) for rules, count in known.items()}
