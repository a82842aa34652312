"""Responses are untrusted: every type answers to every text, in bounded time.

How long is measured by benchmarks/bench_verifiers.py; here an alarm only keeps a hang from passing for patience.
"""

from __future__ import annotations

import copy
import random
import re
import signal
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from helpers.verifiers import ARGUMENTS, HOSTILE, arguments, hostile, installed, nltk_data, oracle_data

from mdpgrpo_fast.verifiers import INSTRUCTIONS, ArgumentError, validate, verify
from mdpgrpo_fast.verifiers.registry import clean
from mdpgrpo_fast.verifiers.text import markup, patterns

SMALL = [
    "", " ", "\n", "\n\n", "\r\n", "\x00", "\ud800", "\udfff\ud800", "\u200f", "\u202e abc", "\ufeff", "*", "**",
    "******", '"', '""', "<<", "<<>>", "[", "[]", "```", "```json", "```xml\n", "<", "<a>", "</a>", "p.s", "P.S.", ".",
    "...", "'", "a\x00b", "a\u2028b", "\ud83d", "-", "{", "1" * 5000, "\x1c", "\x85", "\u0301", "\U0001f600", "a. b",
]  # fmt: skip
# What these read hardest, beside what every type gets.
HARD = {
    "detectable_format:xml_format": list(HOSTILE)[list(HOSTILE).index("one open tag") :],
    "detectable_format:json_format": [name for name in HOSTILE if "JSON" in name or "long" in name or name == "keys"],
    "change_case:capital_word_frequency": ["new clitics", "marks", "A'S. ", "''A", "CAN'T ", "letters"],
    "length_constraints:number_sentences": ["I. ", "p. p. ", "new abbreviations", "marks"],
    **{
        instruction_id: ["marks and abbreviations", "marks beyond ASCII", "new abbreviations"]
        for instruction_id in ("ratio:sentence_balance", "words:words_position", "keywords:start_end", "count:pronouns")
    },
    "language:response_language": ["scripts", "addresses", "one address", "\xe9", "a"],
}


@pytest.fixture(scope="module", autouse=True)
def genuine() -> Iterator[None]:
    with nltk_data(*oracle_data()):
        yield


@contextmanager
def no_hang(seconds: int = 120) -> Iterator[None]:
    """Far more than any machine needs: a pattern that backtracks over 200,000 characters needs hours."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def hung(*_: object) -> None:
        pytest.fail(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_arguments_are_of_known_types() -> None:
    assert set(ARGUMENTS) <= set(INSTRUCTIONS)


@pytest.mark.parametrize("instruction_id", INSTRUCTIONS)
def test_odd_texts(instruction_id: str) -> None:
    installed(instruction_id)
    kwargs = arguments(instruction_id)
    for rules in INSTRUCTIONS[instruction_id].rules:
        for text in SMALL:
            strict, loose = (
                verify(instruction_id, text, kwargs, mode=mode, rules=rules) for mode in ("strict", "loose")
            )
            assert isinstance(strict, bool) and isinstance(loose, bool)
            assert loose or not strict
            assert text.strip() or not loose


@pytest.mark.parametrize("instruction_id", INSTRUCTIONS)
def test_hostile_texts(instruction_id: str) -> None:
    """Every text at a fortieth of the length, and some at full length."""
    installed(instruction_id)
    kwargs = arguments(instruction_id)
    some = random.Random(instruction_id).sample(list(HOSTILE), 6) + HARD.get(instruction_id, [])
    with no_hang():
        for rules in INSTRUCTIONS[instruction_id].rules:
            cleaned = clean(INSTRUCTIONS[instruction_id], kwargs, rules)
            before = copy.deepcopy(cleaned)
            for text in hostile(5000).values():  # the loose variants include the text as it is
                assert isinstance(verify(instruction_id, text, kwargs, mode="loose", rules=rules), bool)
            for name in some:
                assert isinstance(verify(instruction_id, HOSTILE[name], kwargs, rules=rules), bool)
            # Arguments are remembered, so that a check must leave them alone.
            assert clean(INSTRUCTIONS[instruction_id], kwargs, rules) is cleaned and cleaned == before


# ---- XML ------------------------------------------------------------------------------------------------------------

DOCUMENTS = [
    "<a/>", " <a/>", "<?xml version='1.0'?><a/>", " <?xml version='1.0'?><a/>", "\ufeff<a/>", "<a>é😀</a>", "<a",
    "a<a/>", "<a>x</b>", "<a/><b/>", "<a b='1' b='2'/>", "<a>&amp;&#65;</a>", "<a>&b;</a>", "<a b='&b;'/>",
    "<a>\x00</a>", "", "<p:a/>", "<a p:b=''/>", "<a xmlns:p='u' p:b=''/>",
    "<a xmlns:p='u' xmlns:q='u' p:b='' q:b=''/>", "<a xmlns:p=''/>", "<a xml:lang='de'/>", "<xml:a/>",
    "<a xmlns='u}v'/>", "<a:b:c xmlns:a='u'/>", "<!DOCTYPE a><a/>", "<a><!-- - --></a>",
    "<!DOCTYPE a SYSTEM 'x'><a>&b;</a>", "<!DOCTYPE a SYSTEM 'x'><a b='&b;'/>",
    "<!DOCTYPE a [<!ENTITY b 'x'>]><a>&b;</a>", "<!DOCTYPE a [<!ENTITY b '<b>'>]><a>&b;</b></a>",
    "<!DOCTYPE a [<!ENTITY b '<b/>'>]><a>&b;</a>", "<!DOCTYPE a [<!ENTITY b '<b/>'>]><a b='&b;'/>",
    "<!DOCTYPE a [<!ENTITY b '&#38;c;'><!ENTITY c 'x'>]><a>&b;</a>", "<!DOCTYPE a [<!ENTITY b '&b;'>]><a>&b;</a>",
    "<!DOCTYPE a [<!ENTITY b '&b;'>]><a/>", "<!DOCTYPE a [<!ENTITY b SYSTEM 'x'>]><a>&b;</a>",
    "<!DOCTYPE a [<!ENTITY b SYSTEM 'x'>]><a b='&b;'/>",
    "<!DOCTYPE a [<!ENTITY % p 'x'>%p;<!ENTITY b 'x'>]><a>&b;</a>", "<!DOCTYPE a [%p;]><a>&b;</a>",
    "<?xml version='1.0' standalone='yes'?><!DOCTYPE a [%p;<!ENTITY b 'x'>]><a>&b;</a>",
    "<!DOCTYPE a [<!ENTITY b 'x'> <!-- ' ]> -->]><a>&b;</a>", "<!DOCTYPE a [<!ATTLIST a b CDATA '&c;'>]><a/>",
    "<!DOCTYPE a [<!ATTLIST a p:b CDATA 'x'>]><a/>", "<!DOCTYPE a [<!ATTLIST a xmlns:p CDATA 'u'>]><p:a/>",
    "<!DOCTYPE a [<!ATTLIST a xmlns:p CDATA 'u'>]><a><p:a/></a>", "<!DOCTYPE a [<!ENTITY b 'x' NDATA n>]><a/>",
    "<?xml version='1.0' encoding='utf-16'?><a/>", "<?xml version='1.0' encoding='none'?><a/>",
]  # fmt: skip


@pytest.mark.parametrize("text", DOCUMENTS)
def test_xml_is_what_elementtree_takes(text: str) -> None:
    try:
        ET.fromstring(text)
    except ET.ParseError:
        assert not markup.well_formed(text)
    else:
        assert markup.well_formed(text)


def _chain(links: int) -> str:
    declared = "".join(f"<!ENTITY e{i + 1} '&#38;e{i};'>" for i in range(links - 1))
    return f"<!DOCTYPE a [<!ENTITY e0 'x'>{declared}]><a>&e{links - 1};</a>"


def _entity(times: int, of: str = "x" * 4000) -> str:
    return f"<!DOCTYPE a [<!ENTITY b '{of}'>]><a>{'&b;' * times}</a>"


def _defaults(elements: int) -> str:
    declared = "".join(f" a{i} CDATA ''" for i in range(500))
    return f"<!DOCTYPE a [<!ATTLIST b{declared}>]><a>{'<b/>' * elements}</a>"


def _namespace(attributes: int) -> str:
    return f"<a xmlns:p='{'u' * 1000}'>" + "<b p:c=''/>" * attributes + "</a>"


@pytest.mark.parametrize(
    ("made", "within", "beyond"),
    [
        (_chain, markup.DEEP, markup.DEEP + 1),
        (_entity, markup.SPELT_OUT // 4000, markup.SPELT_OUT // 4000 + 1),
        (_defaults, markup.DECLARED // 500 - 510, markup.DECLARED // 500),
        (_namespace, markup.SPELT_OUT // 1010, markup.SPELT_OUT // 1000 + 1),
    ],
)
def test_xml_beyond_a_limit_is_not_read(made, within: int, beyond: int) -> None:
    # The parser takes them all: these are a few kB above what is read, and far below what hurts.
    assert ET.fromstring(made(beyond)) is not None
    assert markup.well_formed(made(within)) and not markup.well_formed(made(beyond))


def test_a_circle_of_entities_is_no_xml() -> None:
    two = "<!DOCTYPE a [<!ENTITY b '&#38;c;'><!ENTITY c '&#38;b;'>]><a>%s</a>"
    assert not markup.well_formed(two % "&b;") and markup.well_formed(two % "")


# ---- keywords -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keyword",
    [
        "(a|b)" * 10,
        "(a|a)" * 30,
        "(a|a)" * 5 + "Z",
        r"\w?" * 40,
        r"\w?" * 5 + "Z",
        "((((a|b)?)?)?)?" * 2 + "Z",
        "[ab]" * 150,
        "|".join(f"a{i}" for i in range(150)),
        "[" + "".join(chr(0x1F000 + i) for i in range(500)) + "]",  # which re compares one by one
        "(" * 9000 + "a" + ")" * 9000,
        "a?" * 10 + "a" * 10,
        "(a|(b|(c|d)?)?)" + "(?:a|b|c)" * 5,
        "(a)" + "".join(rf"(\{i}\{i})" for i in range(1, 9)),
        "(?x:a # (\n)",
    ],
)
def test_keywords_that_could_take_long_are_refused(keyword: str) -> None:
    for instruction_id, kwargs in (
        ("keywords:existence", {"keywords": ["zebra", keyword]}),
        ("keywords:forbidden_words", {"forbidden_words": [keyword]}),
        ("keywords:frequency", {"keyword": keyword, "frequency": 1, "relation": "at least"}),
        ("detectable_format:multiple_sections", {"section_spliter": keyword, "num_sections": 1}),
        ("detectable_content:postscript", {"postscript_marker": keyword}),
    ):
        said = f"{instruction_id}: {next(iter(kwargs))}: {keyword!r} is read as a regular expression and "
        with pytest.raises(ArgumentError, match=re.escape(said)):
            validate(instruction_id, kwargs)


@pytest.mark.parametrize(
    ("instruction_id", "kwargs"),
    [
        ("keywords:forbidden_words", {"forbidden_words": ["(?i)zebra"]}),
        ("keywords:frequency", {"keyword": "a\\ ", "frequency": 1, "relation": "at least"}),
        ("detectable_format:multiple_sections", {"section_spliter": "(?i)zebra", "num_sections": 1}),
        ("detectable_content:postscript", {"postscript_marker": "a\\ "}),
    ],
)
def test_keywords_have_to_compile_as_the_check_writes_them(instruction_id: str, kwargs: dict) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(kwargs))}: .* is none: "):
        validate(instruction_id, kwargs)


def test_characters_by_number_or_name_count_as_they_are() -> None:
    with pytest.raises(ValueError, match="a response could take seconds"):
        patterns.compiled(r"[\U0001F600\N{GRINNING FACE}]" * 60)


def test_keywords_with_some_choice_are_taken() -> None:
    for keyword in (
        "colou?r",
        "(a|b)(c|d)?",
        "|".join(f"word{i}" for i in range(60)),
        "what?",
        r"(\w)\1",
        "(?i:z)",
        "[😀😁😂]",
    ):
        with no_hang(10):
            assert verify("keywords:existence", HOSTILE["a"], {"keywords": [keyword]}) in (True, False)


@pytest.mark.parametrize(
    "text", ["KISS a", "\u212aiss", "k\u0131ss", "K\u0130SS", "ki\u017fs", "\xe9 kiss", "skiss", "kis"]
)
def test_keywords_are_found_as_re_finds_them(text: str) -> None:
    found = any(form in text for form in ("KISS", "\u212aiss", "k\u0131ss", "K\u0130SS", "ki\u017fs", "kiss"))
    assert verify("keywords:existence", text, {"keywords": ["kiss"]}) == found
    assert verify("keywords:frequency", text, {"keyword": "KISS", "frequency": 1, "relation": "at least"}) == found
    word = found and not text.startswith("s")
    assert verify("keywords:forbidden_words", text, {"forbidden_words": ["Kiss"]}) != word
