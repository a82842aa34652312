"""What the verifier tests share: golden rows, the genuine Punkt model, long and hostile responses."""

from __future__ import annotations

import gzip
import json
import random
import string
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from helpers.inputs import SHARED_DATA, unavailable

from mdpgrpo_fast.verifiers import INSTRUCTIONS, MissingRequirementError, validate
from mdpgrpo_fast.verifiers.text import sentences

RULES = ("ifeval", "mdpgrpo")
PROMPTS = {"ifeval": "ifeval_prompts.jsonl", "mdpgrpo": "mdpgrpo_test.jsonl"}


def rows(name: str) -> list[dict[str, Any]]:
    """The JSON lines of a file of shared/data; only \\n ends a line."""
    path = SHARED_DATA / name
    if not path.exists():
        unavailable(f"shared data file {name} is missing")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode("utf-8").split("\n") if line]


def punkt_folder() -> Path:
    """The NLTK data folder that the llama-index-core wheel carries."""
    try:
        files = metadata.files("llama-index-core") or []
    except metadata.PackageNotFoundError:
        unavailable("the genuine Punkt model is missing: pip install --no-deps llama-index-core==0.14.25")
    for file in files:
        if str(file).endswith("tokenizers/punkt_tab/english/abbrev_types.txt"):
            return Path(str(file.locate())).parents[3]
    unavailable("llama-index-core carries no punkt_tab")
    raise AssertionError


def oracle_data() -> list[Path]:
    """Every folder with NLTK data that the official code of the rule sets reads."""
    from golden.tagger import tagger_folder

    return [punkt_folder(), tagger_folder()]


@contextmanager
def nltk_data(*folders: Path) -> Iterator[pytest.MonkeyPatch]:
    """NLTK's data folders are `folders` alone, and nothing can be downloaded."""
    import nltk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(folder) for folder in folders])
        patch.setattr(nltk, "download", lambda *args, **kwargs: pytest.fail("a download was attempted"))
        sentences._model.cache_clear()
        yield patch
    sentences._model.cache_clear()


# Arguments to try these types with, in place of their examples: no long response meets them by its first lines.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "keywords:existence": {"keywords": ["zebra", "island"]},
    "keywords:frequency": {"keyword": "zebra", "frequency": 50, "relation": "at least"},
    "keywords:forbidden_words": {"forbidden_words": ["zebra", "island"]},
    "keywords:letter_frequency": {"letter": "q", "let_frequency": 5, "let_relation": "less than"},
    "language:response_language": {"language": "fi"},
    "length_constraints:number_sentences": {"num_sentences": 100, "relation": "at least"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 3},
    "length_constraints:number_words": {"num_words": 100_000_000, "relation": "at least"},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 4, "nth_paragraph": 2, "first_word": "zebra"},
    "detectable_content:number_placeholders": {"num_placeholders": 100_000_000},
    "detectable_content:postscript": {"postscript_marker": "P.P.S"},
    "detectable_format:number_bullet_lists": {"num_bullets": 100_000_000},
    "detectable_format:constrained_response": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": 100_000_000},
    "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 100_000_000},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "detectable_format:xml_format": {},
    "combination:two_responses": {},
    "combination:repeat_prompt": {"prompt_to_repeat": "Name a zebra."},
    "startend:end_checker": {"end_phrase": "zebra"},
    "startend:quotation": {},
    "change_case:capital_word_frequency": {"capital_frequency": 100_000_000, "capital_relation": "at least"},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "punctuation:no_comma": {},
}


def arguments(instruction_id: str) -> dict[str, Any]:
    """Arguments to try a type with."""
    return ARGUMENTS.get(instruction_id, INSTRUCTIONS[instruction_id].example)


def installed(instruction_id: str) -> None:
    """Skips, or fails in CI, where what a type needs is not installed."""
    try:
        validate(instruction_id, arguments(instruction_id), INSTRUCTIONS[instruction_id].rules[0])
    except MissingRequirementError as error:
        unavailable(str(error))


LONG = 200_000
_PROSE = (
    "The committee met on Tuesday, and Dr. Ellis of NASA said that nothing had changed. Why would it? Mr. Ward didn't"
    " agree: \"We've seen 3.5 times as many, e.g. in the U.S. and in Peru,\" he wrote. I'LL wait, he added...\n\n"
    "Section 1\n* A *first* point\n- another [detail]\n"
)
_UNITS = [
    *"* < > [ ] { ( } ) \" ' . ! ? , - a A 1 ` # : ; / \\ | @ q".split(" "),
    *"\n \r \x00 \x0b \x1c \x85 \xa0 \ud800 \u200f \u2028 \u0301 \u0130 \xe9 \u4e2d \U0001f600".split(" "),
    *(" ", "a ", "A ", "a.", "A.", ". ", "! ", '?" ', "I. ", "Mr. ", "e.g. ", "a.a.a ", "Hi. ", "A'S. ", "I'M ", "''A"),
    *("CAN'T ", "cannot ", "wanna. ", "THE FOX ", "(a) ", "\u042f ", "zebra ", "zebra", "1.1. ", "1,1", "aA", "a-a."),
    *("<<", ">>\n<<", "<<>>\n", "[\n", "[]", "[[a]] ", "*\n", "- a\n", "***\n", " *** ", "******a", "**a** ", "\t-\n"),
    *("\n\n", "\r\n", "\na", "* a\n\n", "Section 1 ", "Section\n", "SECTION ", "P.P.S", "p. p. "),
    *("<a>", "<a/>", "</a>", "<!--", "<![CDATA[", "&a;", "x='y' ", "```\n", "```json", '{"a":', "[[],", "\\u0041"),
    *("a@", "http://", "www.a.b/c ", "!\u0964", "\u65e5\u672c\u8a9e\u3002", "hello \u043f\u0440\u0438 \u4f60 "),
]  # fmt: skip


def repeated(unit: str, length: int = LONG) -> str:
    """`unit` over and over, `length` characters long."""
    return (unit * (length // len(unit) + 1))[:length]


def long_prose() -> str:
    return repeated(_PROSE)


def hostile(length: int = LONG) -> dict[str, str]:
    """Texts of about `length` characters, by what makes each hard to read."""
    rng, half, tenth = random.Random(0), length // 2, length // 10

    def drawn(alphabet: str) -> str:
        return "".join(rng.choices(alphabet, k=length))

    def many(form: str, count: int = tenth) -> str:
        return "".join(form.replace("#", str(i)) for i in range(count))

    def document(declared: str, content: str) -> str:
        return f"<!DOCTYPE l [{declared}]><l>{content}</l>"

    laughs = '<!ENTITY e0 "lol">' + "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(9))
    return {
        **{unit: repeated(unit, length) for unit in _UNITS},
        "spaces within": "a" + repeated(" ", length) + "b",
        "spaces behind a fence": "```xml" + repeated(" ", length) + "x",
        "spaces behind an abbreviation": "A'S e.g." + repeated(" ", length) + "x",
        "long indents": repeated(" " * 500 + "* a\n", length),
        "one long indent": repeated("\t", length) + "* a",
        "one long line": repeated("word ", length),
        "new words": many("w# ", length // 7),
        "new abbreviations": many("x#. y# ", length // 12),
        "new clitics": many("X#'S. ", length // 10),
        "addresses": many("http://example.org/#/a?b=c some.one#@example.org ", length // 55),
        "one address": "a" * half + "@" + "b" * half,
        "letters": drawn("abcdefgHIJKLM    ."),
        "marks": drawn(".?! A)\"a'-*\n"),
        "marks and abbreviations": "".join(rng.choices([")", "''", "..", "U.S. ", "``"], k=length // 2))[:length],
        "marks beyond ASCII": drawn(". :“é\u0301,"),
        "anything": "".join(chr(rng.randrange(0x110000)) for _ in range(length)),
        "scripts": drawn("ab \u044f\u4e2d\u3042\u30a2\ud55c\u0627\u05d1\u03b1\u0e01\u0915\u0b95\u0d28"),
        "nested JSON": "[" * half + "]" * half,
        "nested JSON objects": '{"a":' * (length // 6) + "1" + "}" * (length // 6),
        "wide JSON": "[" + "[1]," * (length // 4) + "1]",
        "long number": "1" * length,
        "long numbers": "[" + ",".join(["1" * 4300] * (length // 4301)) + "]",
        "long fraction": "-0." + "1" * length + "e-9",
        "escapes": '"' + "\\ud83d\\ude00" * (length // 12) + '"',
        "keys": "{" + many('"k#":#,', length // 16) + '"k":1}',
        "one open tag": "<a" + repeated(" x='y'", length),
        "nested elements": "<a>" * (length // 7) + "</a>" * (length // 7),
        "attributes": "<a " + many("a#='' ", length // 10) + "/>",
        "laughs": document(laughs, "&e9;"),
        "laughs in an attribute": document(laughs, "").replace("<l>", '<l a="&e9;">'),
        "a long entity": document(f'<!ENTITY a "{"x" * half}">', "&a;" * (length // 7)),
        "an entity of elements": document('<!ENTITY a "' + "<b/>" * 150 + '">', "&a;" * (length // 60)),
        "a chain of entities": document('<!ENTITY e0 "">' + many('<!ENTITY e1# "&e#;">', length // 25), "&e19;"),
        "default attributes": document("<!ATTLIST b " + many('p:a# CDATA "" ', length // 35) + ">", "<b/>" * tenth),
        "a long namespace": f'<l xmlns:p="{"u" * half}">' + '<a p:a=""/>' * (length // 22) + "</l>",
        "open comments": "<!DOCTYPE l [" + repeated("<!--", length),
        "open quotes": "<!DOCTYPE l [" + repeated("<!ENTITY a '\"", length),
        "punctuation": drawn(string.punctuation),
        "punctuation and blanks": drawn(string.punctuation + " \n"),
        "printable": drawn(string.printable),
    }


HOSTILE = hostile()
