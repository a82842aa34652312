"""Fixtures of the report's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.report import Page, fake_run

from mdpgrpo_fast.report.page import write_report


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """A complete run and its page."""
    run = fake_run(tmp_path_factory.mktemp("report") / "a <run> & more")
    return run, Page(write_report(run))
