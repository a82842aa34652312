"""`python licences.py FILE`: the licences of all dependencies, direct and indirect, by their installed metadata.

Exits 1 where a run-time dependency has a licence of the GPL's family (COPYLEFT), or says none.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = "mdpgrpo-fast"
COPYLEFT = re.compile(r"\b[AL]?GPL|GNU (Affero|Lesser|Library|General)", re.IGNORECASE)


class Entry(NamedTuple):
    name: str
    version: str
    licence: str
    wanted_by: tuple[str, ...]  # "run time", or extras of ours


def licence_of(package: metadata.Distribution) -> str:
    """The SPDX expression, or else the classifiers, or else the first line of the field."""
    expression = package.metadata.get("License-Expression")
    if expression:
        return expression
    classified = [
        c.split(" :: ")[-1] for c in package.metadata.get_all("Classifier") or () if c.startswith("License ::")
    ]
    named = [c for c in classified if c != "OSI Approved"]
    if named:
        return ", ".join(named)
    text = (package.metadata.get("License") or "").strip()
    return text.split("\n")[0][:60] if text else ""


def needed(name: str, extras: frozenset[str]) -> list[Requirement]:
    """What an installed package requires here, with some of its extras."""
    found = []
    for line in metadata.requires(name) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
            found.append(requirement)
    return found


def closure(extra: str = "") -> set[str]:
    """Names of the installed packages that ours brings, with one of its extras or none."""
    found: set[tuple[str, frozenset[str]]] = set()
    left = [(OURS, frozenset({extra} if extra else ()))]
    while left:
        for requirement in needed(*left.pop()):
            entry = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            try:
                metadata.distribution(entry[0])
            except metadata.PackageNotFoundError:
                continue
            if entry not in found:
                found.add(entry)
                left.append((str(entry[0]), entry[1]))
    return {name for name, _ in found} - {OURS}


def entries() -> list[Entry]:
    """Every dependency that is installed, by name."""
    wanted: dict[str, list[str]] = {name: ["run time"] for name in closure()}
    extras = metadata.metadata(OURS).get_all("Provides-Extra") or []
    for extra in extras:
        if extra != "dev":
            for name in closure(extra):
                if wanted.get(name) != ["run time"]:
                    wanted.setdefault(name, []).append(extra)
    found = []
    for name, by in sorted(wanted.items()):
        package = metadata.distribution(name)
        found.append(Entry(name, package.version, licence_of(package), tuple(by)))
    return found


def wrong(found: list[Entry]) -> list[Entry]:
    """Run-time dependencies that may not be there."""
    at_run_time = [e for e in found if "run time" in e.wanted_by]
    return [e for e in at_run_time if not e.licence or (COPYLEFT.search(e.licence) and " OR " not in e.licence)]


def page(found: list[Entry]) -> str:
    run_time = sum("run time" in e.wanted_by for e in found)
    lines = [
        "# Licences of what mdpgrpo_fast depends on",
        "",
        "`make licences` writes this page from the metadata of what is installed: direct and indirect dependencies, "
        f"{run_time} of them at run time, the others of an extra. mdpgrpo_fast itself is under Apache-2.0. No run-time "
        "dependency is under a licence of the GPL's family; a test sees to it. What an extra brings that was not "
        "installed here is not listed.",
        "",
        "| package | version | licence | wanted by |",
        "|---|---|---|---|",
    ]
    for e in sorted(found, key=lambda e: ("run time" not in e.wanted_by, e.name)):
        lines.append(
            f"| {e.name} | {e.version} | {e.licence.replace('|', '/') or 'not said'} | {', '.join(e.wanted_by)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    found = entries()
    Path(sys.argv[1]).write_text(page(found), encoding="utf-8")
    for e in wrong(found):
        print(f"{e.name} {e.version}: {e.licence or 'no licence'}", file=sys.stderr)
    print(f"{len(found)} packages; {sys.argv[1]}")
    return int(bool(wrong(found)))


if __name__ == "__main__":
    sys.exit(main())
