"""Cases of M-IFEval's Spanish and French types that are not like IFEval's."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import ifeval
import m_ifeval_texts as texts
from ifeval import near, some
from label import Case, Maker
from m_ifeval_makers import (
    cased,
    chosen,
    ended,
    first_words,
    like_ifeval,
    marked,
    of,
    prose,
    quoted,
    relation,
    strewn,
    titled,
)

MAKERS: dict[str, Maker] = {}
maker = functools.partial(ifeval.maker, into=MAKERS)


def _relation_at_will(make: Maker) -> Maker:
    def with_relation(rng: random.Random) -> Case:
        kwargs, response = make(rng)
        return Case(kwargs | rng.choice(({}, {"relation": relation(rng, "es")})), response)

    return with_relation


for _id in (
    "detectable_content:number_placeholders",
    "detectable_format:number_highlighted_sections",
    "detectable_format:multiple_sections",
):
    MAKERS[f"es:{_id}"] = _relation_at_will(like_ifeval("es", ifeval.MAKERS[_id]))


@maker("es:length_constraints:number_words")
def _words(rng: random.Random) -> Case:
    number = rng.randint(1, 30)
    words = strewn(rng, some(rng, texts.ES_PIECES, 0, 3), prose(rng, "es", 2, 4)).split(" ")[:number]
    lines = "".join(word + rng.choice(texts.ES_SPACES) for word in words)
    kwargs = {"num_words": near(rng, len(lines.split())), "relation": relation(rng, "es")}
    return Case(kwargs, rng.choice(("", "", "1. ", "* ", " - ", "\n\n2.\n3. ", "4.\n- ", "\ud800 ")) + lines)


def _tokens(argument: str, relation_argument: str, pieces: tuple[str, ...], is_one: Callable[[str], bool]) -> Maker:
    def make(rng: random.Random) -> Case:
        text = strewn(rng, some(rng, texts.ES_PIECES, 0, 2), rng.choice(texts.SENTENCES["es"]))
        words = [*text.split(" "), *rng.choices(pieces, k=rng.randint(0, 4))]
        rng.shuffle(words)
        kwargs: dict[str, Any] = {argument: near(rng, sum(map(is_one, words)))}
        if relation_argument:
            kwargs[relation_argument] = relation(rng, "es")
        return Case(kwargs, rng.choice(("", "", "", "", "", "\ud800")) + " ".join(words))

    return make


def _has_acute(word: str) -> bool:
    return any(letter in word for letter in "áéíóúÁÉÍÓÚ")


maker("es:change_case:capital_word_frequency")(
    _tokens("capital_frequency", "capital_relation", texts.ES_CAPITALS, str.isupper)
)
maker("es:special_character:tildes")(_tokens("num_words", "relation", texts.ES_ACCENTED, _has_acute))
maker("es:special_character:enie")(_tokens("let_frequency", "", texts.ES_ENIE, lambda word: "ñ" in word.lower()))
maker("es:special_character:dieresis")(
    _tokens("let_frequency", "", texts.ES_DIERESIS, lambda word: "ü" in word.lower())
)
maker("es:length_constraints:nth_paragraph_first_word")(first_words)
maker("es:detectable_content:postscript")(
    marked(
        "es", ("P.D.", "Nota", "P.S.", "Posdata:", " Nota "), ("p. d.", "P.D", "PD.", "anota", "p\u2003d.", "Px!", "")
    )
)
maker("es:detectable_format:constrained_response")(
    chosen(("Sí.", "No.", "Quizás."), ("Sí", "sí.", "Si.", "Quizá.", "No!", "Si\u0301.", "NO.", "Quizás .", "no."))
)
maker("es:startend:end_checker")(
    ended(
        ("Un saludo", "¿Necesitas algo más?", " Adiós. ", '"Fin"', "ΤΕΛΟΣ"),
        ('"{}"', "{}.", '{}."', "{}..", "{} .", "«{}»", '{}".'),
    )
)
maker("es:punctuation:question_marks")(
    of(("¿Vienes? ", "Llueve. ", "\n"), ("¿?", "¿ ?", "¿¿?", "¿", "?", "?¿", "¿Qué\n\nes? ", "¿\u00a0?", "¡Ay!", "¿x"))
)
maker("es:punctuation:exclamation_marks")(
    of(("¡Ven! ", "Llueve. ", "\n"), ("¡!", "¡ !", "¡¡!", "¡", "!", "!¡", "¡Qué\n\nsol! ", "¡\u00a0!", "¿Qué?", "¡x"))
)
for _language, _name in (("es", "spanish"), ("fr", "french")):
    MAKERS[f"{_language}:change_case:{_name}_capital"] = cased(_language, str.upper)
    MAKERS[f"{_language}:change_case:{_name}_lowercase"] = cased(_language, str.lower)


@maker("fr:special_character:ethel_or_cedilla")
def _character(rng: random.Random) -> Case:
    character = rng.choice("çœ")
    pieces = rng.choice((("mer", "cœur", "sœur"), ("leçon", "ça", "mer"), ("ÇA", "ŒUF", "c\u0327a", "oe", "C", "mer")))
    return Case({"forbidden_char": character}, " ".join(some(rng, [*pieces, "été", "nuit"], 1, 4)))


@maker("fr:special_character:accents")
def _accents(rng: random.Random) -> Case:
    pairs = dict(some(rng, texts.FR_ACCENTS, 1, 3))
    spelled = [word for pair in pairs.items() for word in (pair[1], pair[1], pair[1], pair[0])]
    forms = ("{}", "{}", "{}", "{}s", "l'{}", "{}-là", "({})")
    words = [rng.choice(forms).format(rng.choice((word, word, word.upper()))) for word in some(rng, spelled, 1, 3)]
    words.insert(0, rng.choice(("", "", "", "e\u0301cole", "a\u0300", "ÉCOLE", "ß", "ﬁ")))
    return Case({"word_to_accentuate": pairs}, ifeval.scattered(rng, words, rng.choice(texts.SENTENCES["fr"])))


def _pieces(text: str) -> list[str]:
    return [piece + " " for piece in text.split()]


maker("fr:detectable_format:constrained_response")(
    chosen(("Oui.", "Non.", "Peut-être."), ("Oui", "oui.", "Peut être.", "Non !", "Peut-e\u0302tre.", "NON.", "Si."))
)
maker("fr:detectable_format:title")(
    titled("fr", "##{}##|## {} ##|####|#####|## ##|## {}|#{}#|##{}\n##|##{}#|###{}###|######|{}".split("|"))
)
maker("fr:startend:quotation")(quoted("fr", ('""', "«»", "''", "“”", '"»', "« ", " »", "»«", "‹›", "'\"")))
maker("fr:special_character:no_accents")(of(_pieces("mer lune OK e\u0301 œ ø æ ð × ś"), _pieces("été ÇA ï ÿ Ÿ ñ Å")))
maker("fr:detectable_content:informal_address")(
    of(
        _pieces("Tu te t'aime TOI ton tes ta- (tes) vous mer"),
        ["vertu ", "tout ", "tas ", "t' ", "Tuer ", "teſ ", "_tu_ ", "t’as ", "tu\u0301 "],
    )
)
maker("fr:detectable_content:no_digits")(of(_pieces("un deux mer ½ ² ① Ⅳ"), _pieces("3 x1 ٣ १ 2e")))
