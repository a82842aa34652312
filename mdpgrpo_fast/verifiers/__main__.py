"""The constraint verifiers by themselves.

`--list` prints every instruction type with its arguments and an example; `--responses FILE --prompts FILE` scores
responses in IFEval's form; `--get-punkt` fetches NLTK's sentence model, `--get-data` its tagger too; without any of
these: which sentence model answers.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import ConfigError
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
    parser = argparse.ArgumentParser(
        prog="python -m mdpgrpo_fast.verifiers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--list", action="store_true", help="print the instruction types, of --rules alone where it is given")
    add("--responses", metavar="FILE", help="JSON lines of prompt and response")
    add("--prompts", metavar="FILE", help="JSON lines of prompt, instruction_id_list and kwargs")
    add("--rules", choices=RULES, help="the rule set; default: ifeval, for --list all")
    add("--instructions", metavar="MODULE", nargs="+", default=[], help="modules or .py files with types of one's own")
    add("--json", action="store_true", help="print JSON in place of a table")
    add("--output", metavar="FILE", help="write the scores as JSON here too")
    add("--verdicts", metavar="FILE", help="write each response with its verdicts as JSON lines here")
    add("--get-punkt", action="store_true", help="fetch NLTK's punkt_tab data with NLTK's downloader")
    add("--get-data", action="store_true", help="fetch all data of NLTK that a type asks: punkt_tab, and the tagger")
    args = parser.parse_args(argv)
    if bool(args.responses) != bool(args.prompts):
        parser.error("--responses and --prompts go together")
    for flag in ("output", "verdicts"):
        path = getattr(args, flag)
        if path and not args.responses:
            parser.error(f"--{flag} needs --responses and --prompts")
        if path and not Path(path).parent.is_dir():
            parser.error(f"--{flag}: the folder of {path!r} does not exist")
    try:
        load_instructions(args.instructions)
        if args.list:
            found = types(args.rules)
            print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else "\n\n".join(map(show, found)))
        elif args.responses:
            _score(args)
        else:
            if args.get_punkt or args.get_data:
                get_punkt()
            if args.get_data:
                fetch("averaged_perceptron_tagger_eng")
            print(punkt_source())
    except (ConfigError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _score(args: argparse.Namespace) -> None:
    rules = args.rules or "ifeval"
    scored = score_files(args.prompts, args.responses, rules)
    result = strict_and_loose(
        [s.instruction_ids for s in scored], [s.strict for s in scored], [s.loose for s in scored]
    )
    result = {"rules": rules, **result}
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.verdicts:
        lines = [json.dumps(asdict(row)) + "\n" for row in scored]
        Path(args.verdicts).write_text("".join(lines), encoding="utf-8")
    print(json.dumps(result, indent=2) if args.json else table(result))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--list | head` ends in silence
    sys.exit(main())
