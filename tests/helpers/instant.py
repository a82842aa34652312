"""`pytest -p helpers.instant`: each failure as it happens, for runs that a time limit may cut off before their end."""

from __future__ import annotations

import os
import sys
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    # The process that collects the reports, not each that runs tests.
    if "PYTEST_XDIST_WORKER" in os.environ or report.outcome != "failed":
        return
    print(f"\nFAILED {report.nodeid} ({report.when}, {report.duration:.0f} s)", file=sys.__stderr__, flush=True)
    print("\n".join(str(report.longreprtext).splitlines()[-12:]), file=sys.__stderr__, flush=True)
