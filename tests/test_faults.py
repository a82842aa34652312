"""The list of planted faults: what each changes is there, once. `make faults` plants them."""

from __future__ import annotations

import faults
import pytest


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda f: f.old[:40])
def test_what_a_fault_changes_is_there_once(fault: faults.Fault) -> None:
    path = faults.find(faults.ROOT, fault)
    assert path.read_text(encoding="utf-8").count(fault.old) == 1
