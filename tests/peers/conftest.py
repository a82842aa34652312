"""Fixtures of the tests beside other libraries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from golden import scripts


@pytest.fixture(scope="module")
def lm_eval() -> Iterator[Any]:
    """lm-eval's copy of IFEval's official code."""
    with scripts.official() as module:
        yield module
