"""What the verifier tests share: golden rows, the genuine Punkt model, long and hostile responses."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from helpers.inputs import SHARED_DATA, unavailable

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
    return [punkt_folder()]


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


# One set of arguments for each type; thresholds that no long response meets by its first lines.
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

LONG = 200_000
_PROSE = (
    "The committee met on Tuesday, and Dr. Ellis of NASA said that nothing had changed. Why would it? Mr. Ward didn't"
    " agree: \"We've seen 3.5 times as many, e.g. in the U.S. and in Peru,\" he wrote. I'LL wait, he added...\n\n"
    "Section 1\n* A *first* point\n- another [detail]\n"
)


def repeated(unit: str) -> str:
    """`unit` over and over, 200,000 characters long."""
    return (unit * (LONG // len(unit) + 1))[:LONG]


def long_prose() -> str:
    return repeated(_PROSE)


HOSTILE = {
    **{unit: repeated(unit) for unit in "* < > [ ] { \" ' . ! - a A 1 ` # \n \r \x00 \ud800 \u200f".split(" ")},
    **{
        unit: repeated(unit)
        for unit in (
            " ",
            "a ",
            "A ",
            ". ",
            "! ",
            "Mr. ",
            "<<",
            ">>\n<<",
            "<<>>\n",
            "[\n",
            "[]",
            "*\n",
            "- a\n",
            "***\n",
        )
    },
    **{unit: repeated(unit) for unit in ("\n\n", "\r\n", "<a>", "```\n", "p. p. ", "a@", "http://", "A'S. ", "I'M ")},
    "spaces within": "a" + repeated(" ") + "b",
    "spaces behind a fence": "```xml" + repeated(" ") + "x",
    "spaces behind an abbreviation": "A'S e.g." + repeated(" ") + "x",
    "one open tag": "<a" + repeated(" x='y'"),
    "nested JSON": "[" * (LONG // 2) + "]" * (LONG // 2),
    "new abbreviations": " ".join(f"x{i}. y{i}" for i in range(16_000)),
    "entities in entities": '<!DOCTYPE l [<!ENTITY a "' + "x" * 100_000 + '">]><l>' + "&a;" * 30_000 + "</l>",
}
