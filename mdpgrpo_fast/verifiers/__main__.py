"""The constraint verifiers by themselves: `mdpgrpo verifiers` lists the types and fetches their data, `mdpgrpo score`
scores a file of responses.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from ..config import ConfigError
from ..log import printable
from .own import load_instructions
from .registry import INSTRUCTIONS, RULES
from .scoring import score_files, strict_and_loose, table
from .text.sentences import fetch, get_punkt, punkt_source


def types(rules: str | None) -> list[dict[str, Any]]:
    """Every type that `rules` know (None: any rules), by id, as `--list` prints it."""
    return [
        {
            "id": entry.id,
            "rules": list(entry.rules),
            "description": entry.description,
            "arguments": {
                name: kind.wants + (", or absent" if name in entry.optional else "")
                for name, kind in entry.arguments.items()
            },
            "example": entry.example,
        }
        for entry in sorted(INSTRUCTIONS.values(), key=lambda entry: entry.id)
        if rules is None or rules in entry.rules
    ]


def show(entry: dict[str, Any]) -> str:
    lines = [f"{entry['id']}   ({', '.join(entry['rules'])})", f"    {entry['description']}"]
    lines += [f"    {name}: {wants}" for name, wants in entry["arguments"].items()]
    lines.append(f"    example: {json.dumps(entry['example'], ensure_ascii=False)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Lists the types, or fetches their data. Status: 0 done, 1 not fetched, 2 what cannot be used."""
    parser = _parser(
        "mdpgrpo verifiers", "The instruction types and their data; by itself: which sentence model answers."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the instruction types with arguments and an example")
    what.add_argument("--get-punkt", action="store_true", help="fetch NLTK's punkt_tab data with NLTK's downloader")
    what.add_argument("--get-data", action="store_true", help="fetch all data of NLTK that a type asks, the tagger too")
    _add_types(parser, "list the types of this rule set; default: all")
    args = parser.parse_args(argv)
    for flag in ("json", "rules", "instructions"):
        if getattr(args, flag) and not args.list:
            parser.error(f"--{flag} needs --list")
    return _reported(lambda: _show(args))


def score(argv: list[str] | None = None) -> int:
    """Scores a file of responses. Status: 0 done, 1 a check of one's own that raised, 2 what cannot be used."""
    parser = _parser("mdpgrpo score", "Scores a file of responses in IFEval's form, without a model.")
    add = parser.add_argument
    add("--prompts", metavar="FILE", required=True, help="JSON lines of prompt, instruction_id_list and kwargs")
    add("--responses", metavar="FILE", required=True, help="JSON lines of prompt and response, to score")
    _add_types(parser, "the rule set; default: ifeval")
    add("--strip-thinking", action="store_true", help="score what follows the last closing think tag")
    add("--output", metavar="FILE", help="write the scores as JSON here too")
    add("--verdicts", metavar="FILE", help="write each response with its verdicts as JSON lines here")
    add("--overwrite", action="store_true", help="replace output and verdicts where they exist")
    args = parser.parse_args(argv)
    used = {Path(args.prompts).resolve(), Path(args.responses).resolve()}
    for flag in ("output", "verdicts"):
        path = getattr(args, flag)
        if path is None:
            continue
        if Path(path).is_dir() or not Path(path).parent.is_dir():
            parser.error(f"--{flag}: {path!r} cannot be written: its folder does not exist, or it is one")
        if Path(path).resolve() in used:
            parser.error(f"--{flag}: {path!r} is another file of this command")
        if Path(path).exists() and not args.overwrite:
            parser.error(f"--{flag}: {path!r} exists already; --overwrite replaces it")
        used.add(Path(path).resolve())
    return _reported(lambda: _score(args))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(printable(f"error: {message}"), file=sys.stderr)
        sys.exit(2)


def _parser(prog: str, description: str) -> _Parser:
    return _Parser(prog=prog, description=description, allow_abbrev=False)


def _add_types(parser: _Parser, rules: str) -> None:
    add = parser.add_argument
    add("--rules", choices=RULES, help=rules)
    add("--instructions", metavar="MODULE", nargs="+", default=[], help="modules or .py files with types of one's own")
    add("--json", action="store_true", help="print JSON in place of text")


def _reported(work: Callable[[], None]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter of a type
    try:
        work()
    except (ConfigError, RuntimeError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _show(args: argparse.Namespace) -> None:
    load_instructions(args.instructions)
    if args.list:
        found = types(args.rules)
        print(json.dumps(found, indent=2) if args.json else printable("\n\n".join(map(show, found))))
        return
    if args.get_punkt or args.get_data:
        get_punkt()
    if args.get_data:
        fetch("averaged_perceptron_tagger_eng")
    print(punkt_source())


def _score(args: argparse.Namespace) -> None:
    load_instructions(args.instructions)
    rules = args.rules or "ifeval"
    scored, notes = score_files(args.prompts, args.responses, rules, args.strip_thinking)
    result = strict_and_loose(
        [s.instruction_ids for s in scored], [s.strict for s in scored], [s.loose for s in scored]
    )
    result = {"rules": rules, **result}
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.verdicts:
        lines = [json.dumps(asdict(row)) + "\n" for row in scored]
        Path(args.verdicts).write_text("".join(lines), encoding="utf-8")
    for note in notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    print(json.dumps(result, indent=2) if args.json else printable(table(result)))


if __name__ == "__main__":
    sys.exit(main())
