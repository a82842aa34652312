"""`python audit.py PIP_AUDIT FILE`: known vulnerabilities of what is installed here, as pip-audit finds them.

PIP_AUDIT: its command. Exits 1 where there is one, 2 where its services gave no answer, and then nothing was checked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import provenance, write_json


def installed() -> list[str]:
    """name==version of everything but ourselves; without a build's own mark, such as torch's +cpu."""
    found = {(d.name, d.version.split("+")[0]) for d in metadata.distributions() if d.name != "mdpgrpo-fast"}
    return sorted(f"{name}=={version}" for name, version in found)


def audit(command: str, service: str, packages: list[str]) -> list[dict[str, Any]] | str:
    """What pip-audit says of each package, or why it says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, out = Path(folder, "installed.txt"), Path(folder, "audit.json")
        wanted.write_text("\n".join(packages) + "\n", encoding="utf-8")
        options = [
            "--no-deps",
            "--disable-pip",
            "--progress-spinner",
            "off",
            "--timeout",
            "20",
            "-f",
            "json",
            "-s",
            service,
        ]
        try:
            done = subprocess.run(
                [command, *options, "-r", str(wanted), "-o", str(out)], capture_output=True, text=True, timeout=900
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            return str(e)
        text = out.read_text(encoding="utf-8") if out.exists() else ""
        if not text:
            return (done.stderr.strip().split("\n") or [""])[-1] or f"status {done.returncode}"
        rows: list[dict[str, Any]] = json.loads(text)["dependencies"]
        return rows if any("skip_reason" not in row for row in rows) else f"it knows none of {len(rows)} packages"


def main() -> int:
    command, file = sys.argv[1], Path(sys.argv[2])
    begin, packages = time.time(), installed()
    for service in ("pypi", "osv"):
        rows = audit(command, service, packages)
        if not isinstance(rows, str):
            break
        print(f"audit: no answer from {service}: {rows}", file=sys.stderr)
    else:
        print("audit: nothing was checked", file=sys.stderr)
        return 2
    known = [
        {"package": row["name"], "version": row["version"], "id": v["id"], "fixed_in": v["fix_versions"]}
        for row in rows
        for v in row.get("vulns", ())
    ]
    skipped = {row["name"]: row["skip_reason"] for row in rows if "skip_reason" in row}
    document = provenance("make audit") | {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(time.time() - begin),
        "service": service,
        "packages": len(rows) - len(skipped),
        "not_known_to_the_service": skipped,
        "vulnerabilities": known,
    }
    write_json(file, document)
    for row in known:
        print(f"{row['package']} {row['version']}: {row['id']}, fixed in {', '.join(row['fixed_in']) or 'no version'}")
    print(
        f"{document['packages']} packages looked up, {len(skipped)} unknown there, {len(known)} vulnerabilities; {file}"
    )
    return int(bool(known))


if __name__ == "__main__":
    sys.exit(main())
