"""What lacks a package names the extra that brings it, in one sentence that is the same everywhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from helpers.inputs import ROOT
from packaging.requirements import Requirement

from mdpgrpo_fast import doctor
from mdpgrpo_fast.config import EXTRA_OF, how_to_install, needs_package

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


@pytest.mark.parametrize("package", EXTRA_OF)
def test_the_sentence_names_an_extra_that_brings_the_package(package: str) -> None:
    said = re.fullmatch(
        rf"needs the package {package}: pip install (--\S+ )?'mdpgrpo-fast\[([\w-]+)\]'", needs_package(package)
    )
    assert said is not None and said[2] == EXTRA_OF[package]
    brought = {Requirement(x).name for x in EXTRAS[said[2]]}
    assert package in brought or (package == "pyarrow" and "datasets" in brought), "datasets brings pyarrow"
    assert needs_package(package, "why").endswith("]' (why)")


def test_every_extra_for_users_is_named_by_a_sentence() -> None:
    assert EXTRAS.keys() - EXTRA_OF.values() == {"test", "dev"}


def test_extras_refer_to_this_package() -> None:
    (dev,) = map(Requirement, EXTRAS["dev"])
    assert dev.name == PROJECT["name"] and dev.extras == {"test"}


def test_no_sentence_is_worded_by_hand() -> None:
    for path in (ROOT / "mdpgrpo_fast").rglob("*.py"):
        if path != Path(sys.modules["mdpgrpo_fast.config.extras"].__file__ or ""):
            found = re.findall(r"pip install (\S+)", path.read_text(encoding="utf-8"))
            assert set(found) <= {".`", "mdpgrpo-fast`"}, path


def test_the_doctor_says_it_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda package: None)
    lines, _ = doctor.packages()
    for package in doctor.OPTIONAL:
        (line,) = (x for x in lines if x.split()[0] == package)
        how = how_to_install(package) if package in EXTRA_OF else "a CUDA build of torch brings it"
        assert line.endswith(f" needs it ({how})")
