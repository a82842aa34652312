"""The text of `--help`: flags by group, each once, with the default that is in effect."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from ..config import ADVANCED, GROUPS
from .flags import Flag

INDENT = 30  # where a flag's meaning begins
FEW = 50  # flags that are all shown


def page(flags: list[Flag], values: dict[str, Any], prog: str, description: str, everything: bool) -> str:
    """The help of a command. values: what lies under the flags; everything: advanced flags too."""
    width = min(120, max(80, shutil.get_terminal_size((100, 24)).columns))
    shown = [f for f in flags if everything or len(flags) <= FEW or f.name not in ADVANCED]
    place = {name: (group, i) for group, names in GROUPS.items() for i, name in enumerate(names)}
    of = {f.name: place.get(f.name, ("", 0)) for f in shown}
    shown.sort(key=lambda f: of[f.name][1])
    more = len(flags) - len(shown)
    lines = [f"usage: {prog} [--flag value ...]", ""]
    lines += [line for text in description.splitlines() for line in textwrap.wrap(text, width) or [""]]
    for group in ["", *GROUPS]:
        members = [f for f in shown if of[f.name][0] == group]
        if members:
            lines += ["", f"{group or 'command'}:"]
            lines += [line for f in members for line in _entry(f, values.get(f.name, f.default), width)]
    lines += ["", f"A switch takes --no- too{f'; --help-all lists {more} more flags' * bool(more)}."]
    return "\n".join(lines)


def _entry(flag: Flag, default: Any, width: int) -> list[str]:
    choices = flag.metavar.startswith("{")
    head = f"  {flag.flag}" + (f" {flag.metavar}{' ...' if flag.many else ''}" if flag.metavar and not choices else "")
    text = flag.help
    if choices:
        text += f" ({', '.join(flag.metavar[1:-1].split(','))})"
    said = _default(flag, default)
    body = textwrap.wrap(f"{text} [{said}]" if said else text, width - INDENT, break_on_hyphens=False)
    if len(head) > INDENT - 2:
        return [head, *(" " * INDENT + line for line in body)]
    return [f"{head:<{INDENT}}{body[0]}", *(" " * INDENT + line for line in body[1:])]


def _default(flag: Flag, value: Any) -> str:
    """As it would be given; nothing where there is none, or a sentence of the help says it."""
    if flag.switch:
        return "on" if value else ""
    if value is None or value == []:
        return ""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
