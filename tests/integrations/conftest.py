"""What every test of other stacks leaves behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """Its precision and device are global state, which would hold for every later test."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
