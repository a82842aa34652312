"""What the golden tables leave open: small texts on the edge of a check, and word by word what other libraries find."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.inputs import needed
from helpers.verifiers import nltk_data, oracle_data

from mdpgrpo_fast.verifiers import ArgumentError, validate, verify
from mdpgrpo_fast.verifiers.rules.ifbench.formats import _without_some_blanks
from mdpgrpo_fast.verifiers.rules.ifbench.words import _PRIMES
from mdpgrpo_fast.verifiers.rules.iftrain.sentences import split
from mdpgrpo_fast.verifiers.rules.m_ifeval.morphemes import is_noun, morphemes
from mdpgrpo_fast.verifiers.rules.m_ifeval.spanish_words import number_with, tokens, words

# Tokens of spaCy 3.8.18, spacy.blank("es"); a space as ␣, a line's end as ⏎.
SPANISH = {
    'hola EE. UU. fin': 'hola EE.␣UU. fin',
    'El Sr. García (Dra. Pérez) vive en EE.UU.': 'El Sr. García ( Dra. Pérez ) vive en EE.UU.',
    'a las 10p.m. y 12m. o 3am': 'a las 10 p.m. y 12 m. o 3 am',
    '(a.m.': '( a.m .',
    '¡¡Hola!!...': '¡ ¡ Hola ! ! ...',
    '10km/h, 5kg.': '10 km/h , 5 kg .',
    'US$100 C$5 A$': 'US$ 100 C$ 5 A$',
    'www.ejemplo.com/a?b=c': 'www.ejemplo.com/a?b=c',
    'uno@ejemplo.com.': 'uno@ejemplo.com .',
    '¿Qué? :-) :)': '¿ Qué ? :-) :)',
    "''": "''",
    "'''": "' ''",
    "''' '": "' '' '",
    '((:))': '( ( :) )',
    'pal norte': 'pa l norte',
    'de 3.5 a 4,5': 'de 3.5 a 4,5',
    'a/b x<y': 'a / b x < y',
    'Ee. Uu. y EE.  UU.': 'Ee.␣Uu. y EE . ␣ UU .',
    "'Sr.'": "' Sr. '",
    '(Sr.)': '( Sr. )',
    '(EE.': '( EE .',
    '...etc.': '... etc.',
    '°C. 20°C.': '°C . 20 °C .',
    '-- —': '-- —',
    '¡Av. Avda.!': '¡ Av. Avda. !',
    ':)x': ':) x',
    'x:)': 'x :)',
    '«8)»': '« 8) »',
    '1am!': '1 am !',
    'hola  mundo \n nuevo': 'hola ␣ mundo ⏎␣ nuevo',
    'O.O.': 'O.O.',
    '(o:o)': '(o: o )',
    'n°5': 'n° 5',
    '+5 +x': '+5 + x',
    'p.ej., S.A.': 'p.ej. , S.A.',
    'el final.': 'el final .',
    'EL FINAL.': 'EL FINAL .',
    'A. b. C.': 'A. b. C.',
    'a.b A.B ñ.o': 'a.b A.B ñ.o',
    '1.2.3': '1.2.3',
    '……': '… …',
    '😀😀a': '😀 😀 a',
    'k.': 'k.',
    '3.': '3 .',
    'ab,cd': 'ab , cd',
    '2*3 2^-1': '2 * 3 2 ^ -1',
    "(¡'Dr.'!)": "( ¡ ' Dr. ' ! )",
    'Q.E.P.D.)': 'Q.E.P.D. )',
    '"Vd."': '" Vd. "',
    "((((((((((((Sr.": "( ( ( ( ( ( ( ( ( ( ( ( Sr.",
    "((((((((((((Sr.)": "( ( ( ( ( ( ( ( ( ( ( ( Sr. )",
    "(Sr.)))))))))))))": "( Sr. ) ) ) ) ) ) ) ) ) ) ) ) )",
    "((((((((((((EE.UU.))))))))))))": "( ( ( ( ( ( ( ( ( ( ( ( EE.UU. ) ) ) ) ) ) ) ) ) ) ) )",
    "X$5": "X$5",
    "U.S$": "U.S$",
    "XAv.": "XAv .",
    "((((((((((((etc.": "( ( ( ( ( ( ( ( ( ( ( ( etc.",
    "((((((((((((etc.)": "( ( ( ( ( ( ( ( ( ( ( ( etc. )",
    "x(((((((((((etc.": "x(((((((((((etc .",
}  # fmt: skip
_QUESTIONS = "".join(f"Question {n}. {'?' * (n - 1)}\n" + "".join(f"{a}. x\n" for a in "ABCDE") for n in (1, 2, 3, 4))
_COMPOSED = " *** ".join(["I met Bob {}. today."] * 3)
CASES: list[tuple[str, str, str, dict[str, Any], bool]] = [
    ("ifeval", "detectable_format:title", "<<a\nb>>", {}, False),
    ("ifeval", "detectable_format:title", "<<a>>", {}, True),
    ("ifeval", "detectable_format:json_format", "```JSON\n[1]\n```", {}, True),
    ("ifeval", "detectable_format:json_format", "```\n[1]\n```", {}, True),
    ("mdpgrpo", "detectable_format:xml_format", "```XML\n<a>b</a>\n```", {}, True),
    ("mdpgrpo", "detectable_format:xml_format", "```xMl\n<a>b</a>\n```", {}, True),
    ("mdpgrpo", "detectable_format:xml_format", "```xml <a>b</a>```", {}, True),
    ("mdpgrpo", "detectable_format:xml_format", "```XML<a>b</a>```", {}, True),
    ("mdpgrpo", "detectable_format:xml_format", "```<a>b</a>```", {}, True),
    ("mdpgrpo", "detectable_format:xml_format", "XX<a>b</a>", {}, False),
    ("ifbench", "words:alphabet", "zebra apple bee", {}, True),
    ("ifbench", "words:alphabet", "...", {}, False),
    ("ifbench", "words:alphabet", "7 days", {}, False),
    ("ifbench", "custom:mcq_count_length", _QUESTIONS, {}, True),
    ("ifbench", "custom:mcq_count_length", _QUESTIONS.replace("???", "??"), {}, False),
    ("ifbench", "custom:date_format_list", "1800-02-29, 1800-04-30,1821-12-31", {}, True),
    ("ifbench", "custom:date_format_list", "1800-02-30", {}, False),
    ("ifbench", "custom:date_format_list", "1800-13-01", {}, False),
    ("ifbench", "custom:date_format_list", "1800-00-99", {}, True),
    ("iftrain", "keywords:keyword_specific_position", 'Say "so" now.', {"keyword": "``", "n": 1, "m": 2}, True),
    ("iftrain", "keywords:keyword_specific_position", "Say so now.", {"keyword": "so", "n": 1, "m": 2}, True),
    ("iftrain", "keywords:keyword_specific_position", "Say so now.", {"keyword": "no", "n": 1, "m": 2}, False),
    *(
        ("iftrain", "count:counting_composition", _COMPOSED.replace("{}", name), {"n_sent": 1, "n_words": 6}, True)
        for name in ("Inc", "Ltd", "Jr", "Sr", "Co")
    ),
    ("m-ifeval", "es:special_character:dieresis", "X x \u00fcX \u00dca", {"let_frequency": 2}, True),
    ("m-ifeval", "es:detectable_content:postscript", "NOTA: algo", {"postscript_marker": "Nota"}, True),
    ("m-ifeval", "es:detectable_content:postscript", "p. d. algo", {"postscript_marker": "P.D."}, True),
    ("m-ifeval", "es:length_constraints:nth_paragraph_first_word", "\n\nXX",
     {"num_paragraphs": 3, "nth_paragraph": 1, "first_word": "XX"}, False),
    ("m-ifeval", "fr:detectable_format:title", "####", {}, False),
    ("m-ifeval", "fr:detectable_format:title", "##a##", {}, True),
    ("m-ifeval", "ja:detectable_format:title", "『』", {}, False),
    ("m-ifeval", "ja:startend:sentence_unified_end", "「はい」です。", {"ending": "です"}, True),
    ("m-ifeval", "ja:startend:sentence_unified_end", "です「はい。」", {"ending": "です"}, True),
    ("m-ifeval", "ja:startend:sentence_unified_end", "です「あ」。", {"ending": "です"}, True),
    ("m-ifeval", "ja:startend:sentence_unified_end", "「あ」「い。」です。", {"ending": "です"}, True),
    ("ifeval", "length_constraints:nth_paragraph_first_word", "'\"Xword? yes",
     {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "xword"}, True),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def genuine() -> Iterator[None]:
    with nltk_data(*oracle_data()):
        yield


@pytest.mark.parametrize(("rules", "id", "response", "kwargs", "verdict"), CASES)
def test_verdicts_on_the_edge(rules: str, id: str, response: str, kwargs: dict[str, Any], verdict: bool) -> None:
    assert verify(id, response, kwargs, rules=rules) is verdict


def test_every_verdict_is_a_bool() -> None:
    """Where a check ends early too."""
    for id in ("custom:csv_special_character", "custom:date_format_list", "words:alphabet", "custom:mcq_count_length"):
        assert verify(id, "none of it", {}, rules="ifbench") is False
    assert verify("count:count_unique", "a a", {}, rules="iftrain") is False
    assert verify("detectable_format:json_format", "{", {}) is False


@pytest.mark.parametrize(
    ("rules", "id", "kwargs"),
    [
        ("iftrain", "count:count_increment_word", {"keyword1": "(", "keyword2": "a"}),
        ("iftrain", "count:count_increment_word", {"keyword1": "a", "keyword2": "("}),
        ("iftrain", "count:count_increment_word", {"keyword1": "a\\ ", "keyword2": "b"}),
        ("iftrain", "new:copy_span_idx", {"prompt_to_repeat": "ab      cd", "n_start": 2, "n_end": 8}),
        ("ifbench", "repeat:repeat_span", {"prompt_to_repeat": "ab      cd", "n_start": 2, "n_end": 7}),
        ("m-ifeval", "es:keywords:letter_frequency", {"letter": "[", "let_frequency": 1, "let_relation": "al menos"}),
        ("m-ifeval", "es:keywords:letter_frequency", {"letter": "{", "let_frequency": 1, "let_relation": "al menos"}),
        ("iftrain", "copy:repeat_phrase", {"phrase": "a( b", "small_n": 1}),
    ],
)
def test_arguments_on_the_edge_are_refused(rules: str, id: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        validate(id, kwargs, rules)


@pytest.mark.parametrize(
    ("rules", "id", "kwargs"),
    [
        ("m-ifeval", "es:keywords:letter_frequency", {"letter": "A", "let_frequency": 1, "let_relation": "al menos"}),
        ("m-ifeval", "fr:keywords:letter_frequency", {"letter": "z", "let_frequency": 1, "let_relation": "au moins"}),
        ("ifbench", "repeat:repeat_span", {"prompt_to_repeat": "ab      cd", "n_start": 2, "n_end": 8}),
        ("iftrain", "new:copy_span_idx", {"prompt_to_repeat": "ab      cd", "n_start": 2, "n_end": 9}),
        ("iftrain", "copy:repeat_phrase", {"phrase": r"what\? is\!", "small_n": 1}),
    ],
)
def test_arguments_on_the_edge_are_taken(rules: str, id: str, kwargs: dict[str, Any]) -> None:
    validate(id, kwargs, rules)
    assert isinstance(verify(id, "a", kwargs, rules=rules), bool)


def test_a_sentence_may_hold_the_marks_of_its_splitter() -> None:
    assert split("Mr. A\ue000 so. No.") == ["Mr. A\ue000 so.", "No."]


def test_blank_lines_are_dropped_as_a_loop_drops_them_that_removes_from_its_own_list() -> None:
    rng = random.Random(5)
    for _ in range(500):
        lines = rng.choices(["", "", " ", "  ", "a", " b"], k=rng.randint(0, 9))
        left = list(lines)
        for line in left:
            if not line.strip():
                left.remove(line)
        assert _without_some_blanks(lines) == left, lines


def test_primes() -> None:
    assert {n for n in range(2, 100) if all(n % d for d in range(2, n))} == _PRIMES


@pytest.mark.parametrize("text", SPANISH)
def test_spanish_words_are_spacy_s(text: str) -> None:
    assert " ".join(tokens(text)).replace("\n", "⏎") == SPANISH[text].replace("␣", " ")
    assert len(tokens(text)) == len(SPANISH[text].split())
    found = words(text)
    marks = [all(unicodedata.category(letter)[0] == "P" for letter in token) for token in tokens(text)]
    assert found == [token for token, is_mark in zip(tokens(text), marks, strict=True) if not is_mark]
    for letters in map(frozenset, ("áéíóúÁÉÍÓÚ", "ñÑ", "üÜ")):
        assert number_with(text, letters) == sum(not letters.isdisjoint(token) for token in tokens(text))


PIECES = [
    piece.replace("␣", " ").replace("⏎", "\n")
    for piece in (
        "東京 です 。 、 ます の は に 行き きれい abc ABC␣ 123 ア カタカナ ー ! ？ ⏎ ⏎⏎ ␣ \u3000 走る"
        " すもももももももものうち 愛 é 한국 😀 々 ぁ 日本語 を 食べ た"
    ).split(" ")
]


def test_japanese_words_are_janome_s() -> None:
    """Short texts, and those longer than what janome reads at a time, with places to begin anew and without."""
    janome = needed("janome.tokenizer").Tokenizer()
    rng = random.Random(3)
    texts = ["".join(rng.choices(PIECES, k=n)) for n in (*rng.choices(range(1, 13), k=300), 300, 700, 700)]
    texts += [
        "あ" * 1500,
        "すもももももももものうち" * 90,
        ("東京です" * 130 + "。") * 3,
        ("東京に" * 180 + "\n\n") * 2,
    ]
    for text in texts:
        expected = list(janome.tokenize(text))
        found = list(morphemes(text))
        assert [m[0] for m in found] == [t.surface for t in expected], text[:50]
        assert [is_noun(m) for m in found] == [t.part_of_speech.startswith("名詞") for t in expected], text[:50]
