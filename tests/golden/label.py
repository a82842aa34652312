"""Golden tables of this project's own texts, labelled by the official code of a rule set; and a fuzz against it.

`python tests/golden/label.py ifbench CHECKOUT` writes tests/data/ifbench_golden.jsonl.gz: ROWS rows for each type, made
by the rule set's module beside this file. `--fuzz N` writes nothing: it compares N new cases of each type with this
library and exits with 1 where one verdict differs. CHECKOUT is a checkout of the official repository, which the module
names with its commit; none of its code is kept here.

An error that the official code raises counts as not followed, as one bad response must not stop a run.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

DATA = Path(__file__).resolve().parents[1] / "data"
ROWS = 120
LEAST = 15  # rows of each answer a type must have
MODES = ("strict", "loose")


class Case(NamedTuple):
    """One row to label."""

    kwargs: dict[str, Any]
    response: str


# Makes one case; about half of them should be followed.
Maker = Callable[[random.Random], Case]

# Pieces at which readings of a text part ways.
ODD = [
    "\r\n", "\r", "\t", "\u00a0", "\u2028", "\x0b", "\x00", "\u200b", "\ufeff", "\u202e", "\u0301", "\u093e", "\u0e31",
    "\u05b8", "ß", "İ", "ı", "ﬁ", "ς", "½", "²", "٣", "१", "—", "–", "…", "“", "”", "‘", "’", "«", "»", "。",
    "、", "！", "日本語", "カタカナ", "한국어", "हिन्दी", "தமிழ்", "ภาษาไทย",
    "العربية", "עִבְרִית", "naïve", "e\u0301te\u0301",
    "😀", "👩\u200d👩\u200d👧", "🇫🇷", "☺\ufe0f", "*", "**", "***", "* * *", "#", "_", "`", "```", "|", "\\", "/", "<",
    ">", "<<", ">>", "[", "]", "(", ")", "{", "}", '"', "'", "''", ".", "..", "...", "?!", "!?", ",", ";", ":", "-",
    "--", "1", "23", "4.5", "1,000", "10%", "$5", "Mr.", "U.S.", "e.g.", "Ph.D.", "don't", "A", "I", "\n", "\n\n",
    "  ", " ",
]  # fmt: skip


def mutated(rng: random.Random, text: str) -> str:
    """`text`, in about half of all cases with one change that a model or a tokenizer could have made."""
    roll = rng.randrange(16)
    at = rng.randrange(len(text) + 1)
    if roll < 8 or not text:
        return text
    if roll < 11:
        return text[:at] + rng.choice(ODD) + text[at:]
    if roll == 11:
        return rng.choice((str.upper, str.lower, str.title, str.swapcase, str.capitalize))(text)
    if roll == 12:
        return text.replace("\n", rng.choice(("\r\n", " ", "\n\n", "\n ")))
    if roll == 13:
        return text.replace(" ", rng.choice(("  ", "\u00a0", "\n", "\t")), rng.randint(1, 3))
    if roll == 14:
        return (
            rng.choice(("Sure!\n", "Here it is:\n\n", "* ", " "))
            + text
            + rng.choice(("", "\nHope this helps!", "\n", " "))
        )
    return text[:at]


def variants(response: str) -> list[str]:
    """The eight readings of IFEval's loose rule."""
    lines = response.split("\n")
    cuts = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [text for cut in (response, *cuts) for text in (cut, cut.replace("*", ""))]


def official_answer(check: Any, kwargs: dict[str, Any], response: str) -> dict[str, bool]:
    """What the official class `check` answers, strictly and loosely, by an object of its own each."""

    def follows(instruction: Any, text: str) -> bool:
        if not text.strip():
            return False
        try:
            return bool(instruction.check_following(text))
        except Exception:
            return False

    objects = [check(""), check("")]
    for instruction in objects:
        instruction.build_description(**kwargs)
    loose = any(follows(objects[1], text) for text in variants(response))
    return {"strict": follows(objects[0], response), "loose": loose}


def cases(maker: Maker, seed: str) -> Iterator[Case]:
    rng = random.Random(seed)
    while True:
        yield maker(rng)


def table(checks: dict[str, Any], makers: dict[str, Maker]) -> list[dict[str, Any]]:
    """ROWS different rows for each type, with at least LEAST of each answer."""
    rows: list[dict[str, Any]] = []
    for instruction_id, maker in makers.items():
        mine: dict[str, dict[str, Any]] = {}
        answers: Counter[bool] = Counter()
        for tried, case in enumerate(cases(maker, f"golden {instruction_id}")):
            if tried == 100 * ROWS:
                raise SystemExit(f"{instruction_id}: {len(mine)} rows, answers {dict(answers)} after {tried} cases")
            row = {"instruction_id": instruction_id, "kwargs": case.kwargs, "response": case.response}
            key = json.dumps(row)
            answer = official_answer(checks[instruction_id], case.kwargs, case.response)
            open_rows = ROWS - len(mine)
            missing = max(0, LEAST - answers[True]) + max(0, LEAST - answers[False])
            if key in mine or (open_rows <= missing and answers[answer["strict"]] >= LEAST):
                continue
            mine[key] = row | answer
            answers[answer["strict"]] += 1
            if len(mine) == ROWS:
                break
        rows += mine.values()
    return rows


def fuzz(rules: str, checks: dict[str, Any], makers: dict[str, Maker], number: int) -> int:
    """The number of verdicts on which this library and the official code differ; the first of each type is printed."""
    from mdpgrpo_fast.verifiers import verify

    wrong: Counter[str] = Counter()
    for instruction_id, maker in makers.items():
        for _, case in zip(range(number), cases(maker, f"fuzz {number} {instruction_id}"), strict=False):
            answer = official_answer(checks[instruction_id], case.kwargs, case.response)
            ours = {mode: verify(instruction_id, case.response, case.kwargs, mode=mode, rules=rules) for mode in MODES}
            if ours != answer:
                wrong[instruction_id] += 1
                if wrong[instruction_id] == 1:
                    print(f"{instruction_id}: official {answer}, ours {ours}, {case!r}")
    differ = f"{sum(wrong.values())} differ {dict(wrong)}"
    print(f"{rules}: {len(makers)} types, {number} texts each, strict and loose: {differ}")
    return sum(wrong.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", choices=("iftrain", "ifbench", "m-ifeval"))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--fuzz", type=int, metavar="N", help="compare N new cases of each type with this library")
    parser.add_argument("--only", default="", help="types whose id holds this text")
    args = parser.parse_args()
    if args.fuzz is None and args.only:
        parser.error("--only goes with --fuzz: the table is written whole")
    if args.fuzz is not None and args.fuzz < 1:
        parser.error("--fuzz: at least 1")
    from helpers.verifiers import nltk_data, oracle_data

    module = importlib.import_module(args.rules.replace("-", "_"))
    with nltk_data(*oracle_data()):
        checks = module.official(args.checkout)
        makers = {id: maker for id, maker in module.MAKERS.items() if args.only in id}
        if not makers:
            parser.error(f"--only: no type's id holds {args.only!r}")
        if args.fuzz is not None:
            return int(fuzz(args.rules, checks, makers, args.fuzz) > 0)
        rows = table(checks, makers)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    target = DATA / f"{args.rules}_golden.jsonl.gz"
    target.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{target}: {len(rows)} rows of {len(makers)} types, {target.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
