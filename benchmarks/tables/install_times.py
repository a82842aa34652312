"""`python install_times.py LINES FILE`: what `.ci/install` printed, as a result file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from harness import provenance, write_json


def main() -> int:
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"(\w+): auto takes (\w+), (\d+) s", line) for line in lines]
    ways = [{"way": m[1], "auto": m[2], "seconds": int(m[3])} for m in found if m]
    document = provenance("RECORD=benchmarks/results/cpu/install.json make install-check")
    write_json(Path(sys.argv[2]), {**document, "ways": ways})
    return 0


if __name__ == "__main__":
    sys.exit(main())
