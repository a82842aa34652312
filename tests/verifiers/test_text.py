"""What reads texts, on its edges: Punkt with any model, the limits of XML to one unit, the steps of a keyword."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET

import pytest
from helpers.verifiers import nltk_data, punkt_folder

from mdpgrpo_fast.verifiers.text import english, markup, patterns, sentences
from mdpgrpo_fast.verifiers.text.punkt import Splitter

WORDS = ["a", "B", "foo", "Bar", "x.y", "1", "-2", "3,5", "I", "j", "e.g", "ab-cd", "Foo", "bar", "BAR", "z-foo", "'s"]
MARKS = [". ", ".", "? ", "! ", "... ", " ", " ", ", ", ".) ", "\n", '." ', "'", ". . .", "; "]


@pytest.mark.parametrize("seed", range(12))
def test_sentences_by_any_model_are_those_of_nltk(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Abbreviations, collocations, words that start sentences and cases met in training, all drawn at random."""
    from nltk.tokenize import punkt

    rng = random.Random(seed)
    lower = [*sorted({word.lower() for word in WORDS}), "##number##"]
    model = punkt.PunktParameters()
    model.abbrev_types = set(rng.sample(lower, 5))
    model.collocations = {(rng.choice(lower), rng.choice([*lower, ".", ""])) for _ in range(12)}
    model.sent_starters = set(rng.sample(lower, 5))
    for word in lower:
        bits = (1 << rng.randint(1, 6) for _ in range(2))
        model.ortho_context[word] = rng.choice([0, 1 << rng.randint(1, 6), sum(set(bits))])
    monkeypatch.setattr(punkt, "load_punkt_params", lambda folder: model)
    ours, nltks = Splitter(sentences.tables("")), punkt.PunktSentenceTokenizer(model)
    for _ in range(300):
        text = "".join(rng.choice(WORDS) + rng.choice(MARKS) for _ in range(rng.randint(1, 12)))
        assert list(ours.spans(text)) == list(nltks.span_tokenize(text)), text


def test_a_splitter_forgets_and_finds_the_same() -> None:
    text = " ".join(f"x{n}-y{n}. z{n}" for n in range(9000))
    with nltk_data(punkt_folder()):
        splitter = sentences._model().splitter
    assert list(splitter.spans(text)) == list(splitter.spans(text)) and len(splitter._known) <= 8192
    assert len(splitter._runs) <= 8192
    long = "a-" * 60 + "b. C"
    assert list(splitter.spans(long)) == [(0, len(long) - 2), (len(long) - 1, len(long))]
    assert not any(len(known) >= 100 for known in (*splitter._known, *splitter._runs))


def test_the_built_in_model_knows_abbreviations_and_what_starts_a_sentence() -> None:
    splitter = Splitter(english.TABLES)
    for text, sizes in (
        ("We saw it etc. He came.", [14, 8]), ("We saw Dr. Fox. In it", [15, 5]), ("It is 3 p.m. Then it is", [12, 10]),
    ):  # fmt: skip
        assert [stop - start for start, stop in splitter.spans(text)] == sizes, text


# ---- XML ------------------------------------------------------------------------------------------------------------


def document(declared: str, content: str) -> str:
    return f"<!DOCTYPE l [{declared}]><l>{content}</l>"


def test_entities_may_come_to_the_limit_and_no_further() -> None:
    """2^21 bytes: of 2,048 references of 1,024 bytes each, in characters of two bytes too."""
    for value in ("x" * 1024, "\u00e9" * 512):
        entity = f'<!ENTITY a "{value}">'
        within = document(entity, "&a;" * 2048)
        assert markup.well_formed(within) and ET.fromstring(within).tag == "l"
        assert not markup.well_formed(document(entity, "&a;" * 2049))
    predefined = document(f'<!ENTITY amp "&#38;#38;"><!ENTITY a "{"x" * 1024}">', "&amp;" * 3000 + "&a;")
    assert markup.well_formed(predefined)
    for name in ("lt", "gt", "amp", "quot", "apos"):
        assert not markup._exceeds(document(f'<!ENTITY {name} "{"x" * 1024}">', f"&{name};" * 3000)), name
    default = f'<!ENTITY a "{"x" * 1024}"><!ATTLIST l b CDATA "{"&a;" * 2049}">'
    assert markup._exceeds(document(default, "")) and not markup._exceeds(document(default.replace("&a;", "&b;"), ""))
    assert not markup.well_formed(predefined.replace("amp ", "hash ").replace("&amp;", "&hash;").replace("#38;#", "#"))


def test_a_character_by_its_number_may_be_one_of_a_reference() -> None:
    """&#38;a; and &#x26;a; are &a; once the entity is read; what is no character is none."""
    for sign in ("&#38;", "&#038;", "&#x26;", "&#x0026;"):
        entity = f'<!ENTITY a "{"x" * 1024}"><!ENTITY b "{f"{sign}a;" * 8}">'
        assert markup.well_formed(document(entity, "&b;" * 250)), sign
        assert not markup.well_formed(document(entity, "&b;" * 257)), sign
    read = {"&#97;": "a", "&#x61;": "a", "&#xD7FF;": "\ud7ff", "&#xD800;": "", "&#xDFFF;": "", "&#xE000;": "\ue000",
            "&#x10FFFF;": "\U0010ffff", "&#x110000;": "", "&#1114111;": "\U0010ffff", "&#1114112;": ""}  # fmt: skip
    assert {given: markup._CHARACTER.sub(markup._character, given) for given in read} == read


def test_entities_within_entities_go_to_a_depth_of_100() -> None:
    def chain(levels: int) -> str:
        declared = '<!ENTITY e0 "x">' + "".join(f'<!ENTITY e{n} "&e{n - 1};">' for n in range(1, levels))
        return document(declared, f"&e{levels - 1};")

    assert markup.well_formed(chain(100)) and not markup.well_formed(chain(101))
    assert not markup.well_formed(document('<!ENTITY a "&b;"><!ENTITY b "&a;">', "&a;"))
    assert not markup.well_formed(document("", "&nobody;"))
    sizes = markup._Sizes({"a": "xy&b;&b;", "b": "\u00e9"})
    assert [sizes.of(name) for name in ("a", "b", "c")] == [2 + 6 + 2 * 2, 2, 0]


def test_declared_attributes_and_elements_come_to_a_million() -> None:
    """Of n attributes and m elements n (n + m): 800 and 450, with the two tags of the outer one."""
    declared = "<!ATTLIST l " + " ".join(f"a{n} CDATA #IMPLIED" for n in range(800)) + ">"
    within, beyond = document(declared, "<b/>" * 448), document(declared, "<b/>" * 449)
    assert not markup._exceeds(within) and markup._exceeds(beyond)
    assert markup.well_formed(within) is True and markup.well_formed(beyond) is False
    assert not markup._exceeds(document(declared, "#" + "<b/>" * 448))
    # An element within an entity counts as often as it could stand there.
    entity = '<!ENTITY e "<i/>">'
    assert markup._exceeds(document(declared + entity, "&e;" + "<b/>" * 448))
    assert markup._exceeds(document(declared + entity, "&e;" * 449))


def test_namespaces_of_attributes_come_to_the_limit() -> None:
    """One prefixed attribute for each of 2,048 elements, of a namespace of 1,024 bytes in its quotes."""

    def made(count: int, length: int = 1022) -> str:
        return f'<l xmlns:p="{"u" * length}">' + '<b p:a=""/>' * count + "</l>"

    assert markup.well_formed(made(2048)) and not markup.well_formed(made(2049))
    assert not markup.well_formed(made(2048, 1023))
    plain = f'<l xmlns="{"u" * 5000}">' + '<b a=""/>' * 2049 + "</l>"
    assert markup.well_formed(plain), "a name without a prefix is in no namespace"
    spelt = f'<!ENTITY e "<i p:b=\'\'/>"><!ATTLIST l xmlns:p CDATA "{"u" * 9000}">'
    assert markup._exceeds(document(spelt, "&e;" * 400)) and not markup._exceeds(document(spelt, "&e;" * 40))
    inner = document("<!ENTITY e \"<i p:b=''/>\">", f'<b xmlns:p="{"u" * 9000}">%s</b>')
    # 149 of 11 bytes have room for 234 attributes, whose 9,002 bytes each are too many.
    assert markup._exceeds(inner % ("&e;" * 149)) and not markup._exceeds(inner % ("&e;" * 147))
    assert markup.well_formed("no XML") is False
    assert markup._exceeds(document('<!ENTITY e "' + "u" * 4000 + '">', "<b xmlns:p='&e;' p:a=''/>" * 400))


# ---- keywords -------------------------------------------------------------------------------------------------------

STEPS = {
    "abc": 9, "a|b": 3 + 10 + 3, "(a)": 5 + 3, "a?": 3 + 10, "a?b": 3 + 10 + 2 * 3, "(a|b)c": 5 + 3 + 10 + 3 + 2 * 3,
    r"\.": 5, "[ab]": 5, "[^]a]": 5, r"[\]]": 5, "(?:a)": 5 + 3, "(?#note)a": 3, "(?i)a": 3, r"(a)\1b": 8 + 5 + 2 * 3,
    "(a?)?b": 5 + 3 + 10 + 2 * 10 - 10 + 3 * 3, "[\U0001f600\U0001f601]": 5 + 4, r"[\U0001F600]": 5 + 2, "": 0,
    "a)b": 3 + 3 + 3, "(?P<n>a)(?P=n)": 8 + 5, "(?=a)(?!b)(?<=c)(?<!d)": 32, "a??": 13, "[a": 3 + 3,
}  # fmt: skip


@pytest.mark.parametrize("pattern", STEPS)
def test_the_steps_of_a_keyword(pattern: str) -> None:
    assert patterns._steps(pattern) == STEPS[pattern]


def _words(letters: int) -> str:
    """34 of them behind 33 bars, of which 32 add to what is allowed: 450 + 32 · 55 steps = 33 · 10 + 3 · 626 + 2."""
    return "|".join(["a"] * 33 + ["a" * (letters - 33)])


def test_a_keyword_may_take_so_many_steps_and_no_more() -> None:
    assert patterns.compiled("a" * 150).pattern == "a" * 150
    with pytest.raises(ValueError, match="may not be so long"):
        patterns.compiled("a" * 151)
    for count in (1, 3):  # 450 and 55 for each |, of which each letter is 3 and a | 10
        spread = "|".join(["a" * ((450 + 45 * count) // 3 - count * 10)] + ["a" * 10] * count)
        assert patterns.compiled(spread).search("a" * 200) is not None
        with pytest.raises(ValueError, match="may not be so long"):
            patterns.compiled("a" * 4 + spread)
    for refused, taken in ((r"\.\." + "a" * 147, r"\.\." + "a" * 146), (_words(627), _words(626))):
        assert patterns.compiled(taken)
        with pytest.raises(ValueError, match="may not be so long"):
            patterns.compiled(refused)
    with pytest.raises(ValueError, match=r"may not be verbose \(\?x\)"):
        patterns.compiled("(?ix)a")
    assert patterns.compiled("(?i)ax").search("AX")
