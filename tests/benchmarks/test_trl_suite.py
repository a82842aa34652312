"""What the run of TRL's own tests makes of their token numbers and of pytest's report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.inputs import ROOT, needed

sys.path.insert(0, str(ROOT / "benchmarks" / "studies"))

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_it.TestIt" name="test_good[a-1]" />
<testcase classname="tests.test_it.TestIt" name="test_bad"><failure message="assert 1 == 2&#10;more" /></testcase>
<testcase classname="tests.test_it.TestIt" name="test_teardown"><error message="broken" /></testcase>
<testcase classname="tests.test_it.TestIt" name="test_teardown" />
<testcase classname="tests.test_it.TestIt" name="test_left"><skipped type="pytest.skip" message="no GPU" /></testcase>
<testcase classname="tests.test_it.TestIt" name="test_known"><skipped type="pytest.xfail" message="known" /></testcase>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def suite() -> Any:
    needed("trl")
    import trl_suite

    return trl_suite


def test_a_report_says_what_became_of_every_test(suite: Any, tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    found = suite.outcomes(tmp_path / "report.xml")
    assert {name: (o.kind, o.why) for name, o in found.items()} == {
        "TestIt::test_good[a-1]": ("passed", ""),
        "TestIt::test_bad": ("failed", "assert 1 == 2"),
        "TestIt::test_teardown": ("failed", "broken"),
        "TestIt::test_left": ("skipped", "no GPU"),
        "TestIt::test_known": ("xfailed", "known"),
    }
    assert suite.grouped(found) == {"no GPU": ["TestIt::test_left"]}


def test_rows_of_token_numbers_say_the_same_in_the_stand_ins_vocabulary(suite: Any) -> None:
    inputs = sys.modules["trl_suite_inputs"]
    line = "    [151657, 198, 4913, 606, 788, 330, 64648, 22785, 95642, 151658, 151645, 151643],  # of 330\n"
    text = f"width = 4913\n{line}"
    new = inputs.renumbered(text)
    assert new.startswith("width = 4913\n    [") and new.endswith("],  # of 330\n")
    numbers = [int(n) for n in new.partition("[")[2].partition("]")[0].split(",")]
    tokenizer = inputs.make_tokenizer("qwen3")
    said = '<tool_call>\n{"name": "multiply_tool"}}\n</tool_call>'
    assert tokenizer.decode(numbers, skip_special_tokens=True) == said
    assert tokenizer.decode(tokenizer(said + "é")["input_ids"]) == said + "é"
    assert numbers[-2:] == [tokenizer.eos_token_id, tokenizer.pad_token_id] and len(tokenizer) == inputs.SIZE
