"""The rule-checkable part of FollowBench (Jiang et al., ACL 2024, arXiv 2310.20410) from a local copy of its data.

Verdicts are those of YJiangcm/FollowBench, code/rule_based_evaluation.py (6278f4c), its English part.
"""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..data import Example
from .scores import estimate

LEVELS = 5
CATEGORIES = ("content", "situation", "format", "mixed", "example")  # no rule checks an entry of style
FORMAT_BY_RULE = {22: "three_paragraphs", 30: "five_benefits"}  # by example_id, of the category format

Check = Callable[[str], Any]


@dataclass(frozen=True)
class Entry:
    """One instruction: level n has n constraints, each level of a group one more than the one before."""

    category: str
    example_id: Any
    level: int
    instruction: str
    target: str
    rule: str  # a name of TARGETS or LADDERS, or "template"

    @property
    def group(self) -> tuple[str, str, Any]:
        return self.category, self.rule, self.example_id


# ---- what a rule looks at -------------------------------------------------------------------------------------------


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"[.!?]", text) if part]


def _nth(text: str, n: int) -> str:
    """The n-th sentence, from 1; empty where there are fewer."""
    found = _sentences(text)
    return found[n - 1] if len(found) >= n else ""


def _has(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text) is not None


def _one_sentence(text: str) -> bool:
    return len(_sentences(text)) == 1


def _words(text: str) -> int:
    """Pieces between single spaces."""
    return len(text.split(" "))


def _punctuation(text: str) -> int:
    return sum(char in string.punctuation for char in text)


def _numbered(text: str) -> bool:
    """Every paragraph that is not blank begins with a number and a full stop."""
    paragraphs = [p.lstrip() for p in text.split("\n\n")]
    return all(re.match(r"\d+\.", p) for p in paragraphs if p)


def _brief(text: str) -> bool:
    """The first three paragraphs have fewer than three sentences each."""
    return all(len(_sentences(p)) < 3 for p in text.split("\n\n")[:3])


def _points(text: str) -> list[str]:
    """Sentences, where full stops of abbreviations end none."""
    return re.split(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=\.|\?)\s", text)


def _details(text: str) -> bool:
    """What begins a numbered point has fewer than two full stops."""
    points = [p for p in _points(text) if re.search(r"[1-5]\.", p)]
    return all(p.count(".") < 2 for p in points)


# ---- rules ----------------------------------------------------------------------------------------------------------

# Of level n the first n checks hold.
LADDERS: dict[str, tuple[Check, ...]] = {
    "cnn_dailymail": (
        lambda t: len(_sentences(t)) == 3,
        lambda t: all(len(s.split()) < 15 for s in _sentences(t)),
        lambda t: _has(_nth(t, 1), "Potter") and _has(_nth(t, 2), "actor") and _has(_nth(t, 3), "films"),
        lambda t: not _has(_nth(t, 2), "lavish"),
        lambda t: re.search(r"\b(has|have)\s+\w+", _nth(t, 3)),
    ),
    "xsum": (
        _one_sentence,
        lambda t: _words(t) < 20,
        lambda t: not _has(t, "Newton Stewart"),
        lambda t: re.search(r"\b(am|is|are)\s+\w+ing\b", t),
        lambda t: _has(t, "operation"),
    ),
    "samsum": (
        _one_sentence,
        lambda t: _words(t) < 15,
        lambda t: _has(t, "stuff"),
        lambda t: not re.search("procrast", t, re.IGNORECASE),
        lambda t: _punctuation(t) == 1,
    ),
    "gigaword": (
        lambda t: _words(t) == 8,
        lambda t: not _punctuation(t),
        str.islower,
        lambda t: not _has(t, "bus"),
        lambda t: _has(t, "in"),
    ),
    "arxiv": (
        _one_sentence,
        lambda t: _words(t) <= 20,
        lambda t: t.startswith("We"),
        lambda t: _has(t, "activations"),
        lambda t: not _has(t, "transformer"),
    ),
    "three_paragraphs": (
        lambda t: True,  # how many paragraphs: `_paragraphs`
        _brief,
        lambda t: all(len(s.split()) > 20 for s in _sentences(t)),
        _numbered,
        lambda t: t.endswith("Those are suggestions"),
    ),
    "five_benefits": (
        lambda t: "**" in t,
        lambda t: len(re.findall(r"\*\*\d.+?:", t)) == 5,
        _details,
        lambda t: all(10 <= len(p.split()) <= 15 for p in _points(t)),
        lambda t: not any(word.endswith("-ly") for word in t.split()),
    ),
}


def _last(pattern: str) -> Callable[[str, str], bool]:
    """The last match in the text is the target."""
    return lambda text, target: re.findall(pattern, text)[-1:] == [target]


# A text against the entry's target, which each level has of its own.
TARGETS: dict[str, Callable[[str, str], bool]] = {
    "E2E": str.__eq__,
    "text_editing": str.__eq__,
    "WIKIEVENTS": lambda text, target: set(text.split("\n")) <= set(target.split("\n")),
    "CONLL2003": lambda text, target: text in ast.literal_eval(target),
    "BBH_logical": _last(r"\([A-Z]\)"),
    "BBH_time": _last(r"\d{2}/\d{2}/\d{4}"),
    "self_made_space": lambda text, target: target in text,
    "gsm_8k": _last(r"\$\d+"),
}


def _fits(text: str, template: str) -> bool:
    """The text is the template with an answer of one line for each {answer}."""
    template = template.replace("{instruction}\n", "").replace("{{", "{").replace("}}", "}")
    pieces = map(re.escape, re.split(r"\{answer\}|\.\*", template))
    return re.fullmatch(".*".join(pieces), text) is not None


def satisfied(entry: Entry, text: str) -> bool:
    """Whether the text satisfies all constraints of its level."""
    if entry.rule == "template":
        return _fits(text, entry.target)
    if entry.rule in TARGETS:
        return TARGETS[entry.rule](text, entry.target)
    if entry.rule == "three_paragraphs" and len(text.split("\n\n")) != (4 if entry.level == LEVELS else 3):
        return False  # the closing words stand in a paragraph of their own
    return all(check(text) for check in LADDERS[entry.rule][: entry.level])


# ---- the data, and scores -------------------------------------------------------------------------------------------


def read(folder: str | Path, limit: int = 0) -> list[Entry]:
    """The entries that rules check, each group's five levels in a row. limit: groups of each category; 0: all.

    Raises: ConfigError in one line where a file is missing or is not of FollowBench's form, a group has not each level
        once, or there is no group.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"followbench {str(folder)!r} is no folder")
    entries = []
    for category in CATEGORIES:
        groups: dict[Any, list[Entry]] = {}
        for entry in _entries(Path(folder), category):
            groups.setdefault(entry.group, []).append(entry)
        for key, group in groups.items():
            group.sort(key=lambda e: e.level)
            if (got := [e.level for e in group]) != [1, 2, 3, 4, 5]:
                place = f"followbench {category}_constraints.json: example_id {key[-1]!r}"
                raise ConfigError(f"{place} must have the levels 1 to 5; got {got}")
        entries += [e for group in list(groups.values())[: limit or None] for e in group]
    if not entries:
        raise ConfigError(f"followbench {str(folder)!r} has no group that a rule checks")
    return entries


def _entries(folder: Path, category: str) -> list[Entry]:
    path = folder / f"{category}_constraints.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"followbench: the folder {str(folder)!r} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"followbench {str(path)!r} cannot be read: {' '.join(str(e).split())}") from None
    found = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        try:
            rule = _rule(category, row)
            if not row["level"] or rule is None:
                continue
            entry = Entry(category, row["example_id"], row["level"], row["instruction"], row["target"], rule)
            hash(entry.group)  # a TypeError for an example_id that is a list
            texts = isinstance(entry.instruction, str) and isinstance(entry.target, str)
            if (
                not texts
                or not isinstance(entry.level, int)
                or (rule == "CONLL2003" and not isinstance(ast.literal_eval(entry.target), list))
            ):
                raise ValueError
        except (KeyError, TypeError, ValueError, SyntaxError):
            raise ConfigError(
                f"followbench {str(path)!r}, entry {number}: expected example_id, category, source, level, instruction "
                "and target, as FollowBench's data has them"
            ) from None
        found.append(entry)
    return found


def _rule(category: str, row: dict[str, Any]) -> str | None:
    """What checks a row; None: nothing but a model as a judge."""
    if category == "example":
        return "template"
    if category == "format":
        return FORMAT_BY_RULE.get(row["example_id"])
    source = row["source"]
    return source if source in TARGETS or source in LADDERS else None


def examples(entries: Sequence[Entry]) -> list[Example]:
    """The entries as prompts; `columns["entry"]` is the place of each."""
    places = (f"followbench {e.category}_constraints.json example_id {e.example_id} level {e.level}" for e in entries)
    return [
        Example(e.instruction, columns={"entry": i}, where=place)
        for i, (e, place) in enumerate(zip(entries, places, strict=True))
    ]


def summary(entries: Sequence[Entry], verdicts: Sequence[bool | None]) -> dict[str, Any]:
    """HSR and SSR by level and CSL of each category and of all groups, with their intervals over groups.

    verdicts: of each entry; None: it was not answered, which leaves its group out. Under a rule the verdict is one for
    all constraints of a level, so that SSR equals HSR, as in the official evaluation. CSL is the number of levels
    satisfied from the first on, 0 to 5.
    """
    groups: dict[tuple[str, str, Any], list[bool | None]] = {}
    for entry, verdict in zip(entries, verdicts, strict=True):
        groups.setdefault(entry.group, []).append(verdict)
    whole = {key: row for key, row in groups.items() if None not in row}
    found = {}
    for name in ("all", *CATEGORIES):
        rows = [row for key, row in whole.items() if name in ("all", key[0])]
        levels = [estimate([row[n] for row in rows]) for n in range(LEVELS)]
        csl = estimate([[*row, False].index(False) for row in rows])
        hsr, halves = [value for value, _ in levels], [half for _, half in levels]
        found[name] = {
            "groups": len(rows),
            "hsr": hsr,
            "ssr": hsr,
            "csl": csl[0],
            "intervals": {"hsr": halves, "ssr": halves, "csl": csl[1]},
        }
    return {**found, "groups_left_out": len(groups) - len(whole)}
