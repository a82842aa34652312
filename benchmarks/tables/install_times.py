"""`python install_times.py LINES FILE [PACKAGE ...]`: what `.ci/install` printed, as a result file; with the sdist and
the wheel, what `.ci/install_sizes` printed."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import provenance, write_json


def main() -> int:
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    packages = list(map(Path, sys.argv[3:]))
    ways = [re.fullmatch(r"(\w+): auto takes (\w+), (\d+) s", line) for line in lines]
    sizes = [re.fullmatch(r"([\w-]+) adds (\d+) bytes, (\d+) s", line) for line in lines]
    if packages:
        document: dict[str, Any] = {
            **provenance("RECORD=benchmarks/results/cpu/install_sizes.json make install-sizes"),
            "packages": [{"name": p.name, "bytes": p.stat().st_size} for p in packages],
            "installed_bytes": sum(
                f.file_size for p in packages if p.suffix == ".whl" for f in zipfile.ZipFile(p).filelist
            ),
            "sizes": [{"what": m[1], "bytes": int(m[2]), "seconds": int(m[3])} for m in sizes if m],
        }
    else:
        document = provenance("RECORD=benchmarks/results/cpu/install.json make install-check")
        document["ways"] = [{"way": m[1], "auto": m[2], "seconds": int(m[3])} for m in ways if m]
    write_json(Path(sys.argv[2]), document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
