"""`python coverage_result.py DATA FILE`: line coverage by package, from coverage.py's combined data, as a result file.

A package is a folder of mdpgrpo_fast/, or the modules beside them ("."). Of a package below LEAST the missed lines are
listed. Bodies of @triton.jit count as what Triton's interpreter runs of them.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Any

import coverage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import ROOT, installed, provenance, write_json

LEAST = 92.0
# Whose lines run where nothing is counted: verl's parts in an environment of verl's own, scoring processes and their
# guards up to a kill.
UNSEEN = {"integrations/verl": "make test-verl", "rewards": "processes that end by a kill"}
PACKAGE = ROOT / "mdpgrpo_fast"


def ranges(lines: list[int]) -> str:
    """1, 2, 3, 7 as "1-3 7"."""
    parts: list[list[int]] = []
    for n in lines:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return " ".join(f"{a}-{b}" if a < b else str(a) for a, b in parts)


def measured(data: str) -> dict[str, dict[str, Any]]:
    """package -> lines, covered, percent, and the missed lines of each module."""
    found: dict[str, dict[str, Any]] = {}
    run = coverage.Coverage(data_file=data)
    run.load()
    for path in sorted(PACKAGE.rglob("*.py")):
        _, lines, _, missed, _ = run.analysis2(str(path))
        inside = path.relative_to(PACKAGE)
        name = inside.parts[0] if len(inside.parts) > 1 else "."
        name = next((x for x in UNSEEN if inside.as_posix().startswith(f"{x}/")), name)
        entry = found.setdefault(name, {"lines": 0, "covered": 0, "missed": {}})
        entry["lines"] += len(lines)
        entry["covered"] += len(lines) - len(missed)
        if missed:
            entry["missed"][str(inside)] = ranges(missed)
    for entry in found.values():
        entry["percent"] = round(100 * entry["covered"] / entry["lines"], 2)
    return dict(sorted(found.items()))


def main() -> int:
    data, file = sys.argv[1], Path(sys.argv[2])
    begin = Path(data).with_name("begin")
    packages = measured(data)
    lines, covered = (sum(p[x] for p in packages.values()) for x in ("lines", "covered"))
    document: dict[str, Any] = provenance("make coverage")
    document["versions"] |= installed(["coverage", "pytest"])
    if begin.exists():
        document["seconds"] = round(time.time() - begin.stat().st_mtime)
    document |= {"lines": lines, "covered": covered, "percent": round(100 * covered / lines, 2), "packages": packages}
    for name, why in UNSEEN.items():
        packages[name]["unseen"] = why
    low = [name for name, p in packages.items() if p["percent"] < LEAST and name not in UNSEEN]
    out = io.StringIO()
    for name, p in packages.items():
        print(f"{name:18}{p['covered']:7} of {p['lines']:6}  {p['percent']:6.2f} %", file=out)
        if name in low:
            print("".join(f"    {path}: {text}\n" for path, text in p["missed"].items()), end="", file=out)
    print(out.getvalue() + f"{'all':18}{covered:7} of {lines:6}  {document['percent']:6.2f} %")
    for name, p in packages.items():
        if name not in low:
            del p["missed"]
    write_json(file, document)
    if low:
        print(f"below {LEAST:.0f} %: {', '.join(low)}", file=sys.stderr)
    return int(bool(low))


if __name__ == "__main__":
    sys.exit(main())
