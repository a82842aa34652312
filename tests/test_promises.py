"""The page of promises names commands that are there; licences; and what makes mutants makes what it should."""

from __future__ import annotations

import importlib
import re
import sys
import time
from pathlib import Path
from types import ModuleType

import mutation
import pytest
from helpers import mutants
from helpers.inputs import ROOT, needed, unavailable

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def is_there(command: str) -> bool:
    """Whether the targets, files and names of tests that it gives are there."""
    command, _, words = command.partition(" -k ")
    program, *arguments = command.split()
    if program == "make":
        return set(arguments) <= TARGETS
    if program != "pytest":
        return (ROOT / arguments[0]).is_file()
    files = [f for a in arguments for p in ROOT.glob(a) for f in (p.rglob("test_*.py") if p.is_dir() else [p])]
    names = re.findall(r"^def (test_\w+)", "\n".join(f.read_text(encoding="utf-8") for f in files), re.M)
    return all(list(ROOT.glob(a)) for a in arguments) and any(words in name for name in names)


@pytest.fixture(scope="module", params=["promises_table", "licences", "coverage_result"])
def tool(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "coverage_result":
        needed("coverage")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks" / "tables"))
        return importlib.import_module(request.param)


# ---- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["promises_table"], indirect=True)
def test_commands_of_promises_are_there(tool: ModuleType) -> None:
    promises = [p for rows in tool.PROMISES.values() for p in rows]
    assert len({p.text for p in promises}) == len(promises) >= 20
    assert not [p.command for p in promises if not is_there(p.command)]


@pytest.mark.parametrize("tool", ["promises_table"], indirect=True)
def test_figures_of_promises_are_counted(tool: ModuleType) -> None:
    group = {"mutants": 200, "killed": 190, "of": 400, "interval": [0.91, 0.97], "equivalent": 4}
    found = tool.killed("cpp")({"groups": {"cpp": group}})
    assert (
        found
        == "190 of 200 mutants killed, 95.0% (91.0% to 97.0%), drawn from 400; without the 4 that change nothing 96.9%"
    )
    both = tool.killed("cpp", "text")({"groups": {"cpp": group, "text": {**group, "mutants": 400, "of": 400}}})
    assert both == "380 of 600 mutants killed, 63.3%, drawn from 800; without the 8 that change nothing 64.2%"
    row = {"inputs": {"random": 1000, "atheris": 234}, "crashes": 1, "differences": 2}
    fuzz = tool.fuzzed("data")({"targets": {"data_reader": row, "templates": row}})
    assert fuzz == "1,234 inputs, 1 crashes, 2 differences"


# ---- licences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["licences"], indirect=True)
def test_no_run_time_dependency_is_under_the_gpl(tool: ModuleType) -> None:
    try:
        found = tool.entries()
    except tool.metadata.PackageNotFoundError as error:
        unavailable(f"the package is not installed: {error}")
    assert {"torch", "transformers", "numpy"} <= {e.name for e in found if "run time" in e.wanted_by}
    assert not tool.wrong(found), "see docs/licences.md"
    for licence, bad in (
        ("GNU Lesser General Public License v3 (LGPLv3)", True), ("AGPL-3.0-only", True), ("GPL-2.0-or-later", True),
        ("", True), ("MIT OR GPL-3.0-only", False), ("MPL-2.0 AND MIT", False),
    ):  # fmt: skip
        entry = tool.Entry("x", "1", licence, ("run time",))
        assert bool(tool.wrong([entry])) == bad and not tool.wrong([entry._replace(wanted_by=("test",))])


# ---- coverage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["coverage_result"], indirect=True)
def test_lines_that_were_run(tool: ModuleType, tmp_path: Path) -> None:
    assert tool.ranges([1, 2, 3, 7, 9, 10]) == "1-3 7 9-10"
    data = tool.coverage.CoverageData(str(tmp_path / "data"))
    inside, text = "mdpgrpo_fast/verifiers/text/scan.py", (ROOT / "mdpgrpo_fast/verifiers/text/scan.py").read_text()
    data.add_lines({inside: range(1, text.count("\n") + 1)})
    data.write()
    found = tool.measured(str(tmp_path / "data"))
    folders = {p.name for p in (ROOT / "mdpgrpo_fast").iterdir() if list(p.rglob("*.py"))}
    assert set(found) == {".", *folders, *tool.UNSEEN}
    assert "text/scan.py" not in str(found["verifiers"]["missed"]) and 0 < found["verifiers"]["covered"] < 40
    assert found["ops"]["covered"] == 0 == found["ops"]["percent"] and "ops/fused.py" in found["ops"]["missed"]


# ---- mutants --------------------------------------------------------------------------------------------------------

SOURCE = b'''"""Text."""
LIMIT = 3


@register("name")
def f(x: int, least: float = 0.5) -> float:
    """Text."""
    assert x
    if x < LIMIT and not x:
        raise ValueError("text")
    g(x)
    return max(
        x * least,
        -x.clamp(min=1)
    )
'''


def test_mutants_of_python() -> None:
    found = mutants.of_python("m.py", SOURCE, calls=True)
    changes = {(m.old, m.new) for m in found}
    assert {
        ("3", "4"), ('"name"', '("XX" + "name")'), ("0.5", "(2 * 0.5)"), ("<", "<="), ("and", "or"), ("not x", "(x)"),
        ("g(x)", "pass"), ("*", "/"), ("x * least", "(x)"), ("x * least", "(least)"), ("1", "2"),
        ("x.clamp(min=1)", "(x)"), ("-x.clamp(min=1)", "(x.clamp(min=1))"),
    } <= changes  # fmt: skip
    assert not any("text" in old.lower() for old, _ in changes), "docstrings and messages"
    assert {m.scope for m in found} == {None, "f"} and {m.lines for m in found if m.old == "<"} == {(9, 9)}
    for m in found:
        mutated = m.apply(SOURCE)
        compile(mutated, "m.py", "exec")
        assert mutated != SOURCE and mutated.count(b"\n") >= SOURCE.count(b"\n")
        assert SOURCE.split(b"\n")[m.line - 1].strip().decode() == m.text


def test_mutants_of_cpp() -> None:
    source = b"""#include <cmath>
template <class R>
R f(R x, bool b) {  // a + b
  for (int i = 0; i < 3; ++i) x += R(1) - x * b;
  return b && !(x <= 0.5) ? std::max(x, R(0)) : -x;
}
"""
    found = mutants.of_cpp("m.h", source)
    changes = {(m.old, m.new) for m in found}
    assert {
        ("+=", "-="), ("-", "+"), (" - x * b", ""), (" * b", ""), ("1", "2"), ("&&", "||"), ("!", ""), ("<=", "<"),
        ("0.5", "(2 * 0.5 + 1)"), ("std::max", "std::min"), ("-", ""),
        (" ? std::max(x, R(0)) : -x", " ? -x : std::max(x, R(0))"),
    } <= changes  # fmt: skip
    assert {m.line for m in found} == {4, 5} and not any(m.old == "3" for m in found), "no comment, no loop's head"


def test_a_mutant_in_place_and_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of a loaded function is replaced in all that holds it; a module is loaded from a mutated source."""
    from mdpgrpo_fast.verifiers.text import scan

    path = "mdpgrpo_fast/verifiers/text/scan.py"
    (m, *_) = [m for m in mutants.of_python(path, (ROOT / path).read_bytes()) if m.scope == "up_to" and m.new != "pass"]
    held, code = scan.up_to, scan.up_to.__code__
    try:
        mutation.InPlace({path}).apply(m)
        assert held.__code__ is not code and held.__code__.co_name == "up_to"
    finally:
        held.__code__ = code
    finder = mutation.Finder(m)
    spec = finder.find_spec("mdpgrpo_fast.verifiers.text.scan", [str((ROOT / path).parent)])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.up_to.__code__.co_code != code.co_code or module.up_to.__code__.co_consts != code.co_consts
    assert finder.find_spec("os") is None and sys.modules["mdpgrpo_fast.verifiers.text.scan"] is scan


def test_what_becomes_of_a_process() -> None:
    assert mutation.in_a_child(lambda: {"a": 1}) == {"a": 1}
    assert mutation.in_a_child(lambda: 1 / 0) == "crash"

    def forever() -> None:
        while True:
            pass

    assert mutation.in_a_child(forever, cpu=0) == "timeout", "which is 1 second"
    assert mutation.in_a_child(lambda: time.sleep(60), idle=0.2) == "timeout"


def test_summary_of_mutants(monkeypatch: pytest.MonkeyPatch) -> None:
    found = mutants.of_python("m.py", SOURCE)
    lost = found[0]
    monkeypatch.setattr(mutation, "known", lambda: {("m.py", lost.text, lost.old, lost.new): "equivalent: it is"})
    out = mutation.summary([(m, "survived" if m is lost else "killed") for m in found], of=1000)
    assert (
        out["killed"] == len(found) - 1 and out["equivalent"] == 1 and out["modules"]["m.py"]["mutants"] == len(found)
    )
    assert out["survivors"] == [
        {"path": "m.py", "line": lost.text, "old": lost.old, "new": lost.new, "reason": "equivalent: it is"}
    ]
    assert mutation.interval(95, 100) == [0.8882, 0.9785], "Wilson's, as in its tables"
    assert out["interval"][0] < out["share"] < out["interval"][1]
