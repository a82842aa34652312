"""Makers of cases that M-IFEval's languages share."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import m_ifeval_texts as texts
from ifeval import SPEECH, near, some
from label import Case, Maker, mutated

RELATIONS = {
    "ja": {"at least": "以上", "less than": "未満"},
    "es": {"at least": "al menos", "less than": "como máximo"},
    "fr": {"at least": "au moins", "less than": "moins de"},
}


def like_ifeval(language: str, make: Maker) -> Maker:
    """IFEval's cases, with relations of the language and some of its sentences in place of English ones."""

    def translated(rng: random.Random) -> Case:
        kwargs, response = make(rng)
        share = rng.choice((0, 0.6, 1))
        pairs = [pair for pair in texts.INSTEAD[language].items() if rng.random() < share]

        def put(text: str) -> str:
            for english, native in pairs:
                text = text.replace(english, native)
            return text

        words = {name: put(value) if isinstance(value, str) else value for name, value in kwargs.items()}
        words = {name: RELATIONS[language].get(str(value), value) for name, value in words.items()}
        return Case(words, put(response))

    return translated


def prose(rng: random.Random, language: str, least: int = 1, most: int = 4) -> str:
    between = rng.choice(("", "", "\n") if language == "ja" else (" ", " ", "\n"))
    return between.join(some(rng, texts.SENTENCES[language], least, most))


def relation(rng: random.Random, language: str) -> str:
    return rng.choice(list(RELATIONS[language].values()))


def strewn(rng: random.Random, pieces: Sequence[str], text: str) -> str:
    """`text` with each of `pieces` at some place."""
    for piece in pieces:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + piece + text[at:]
    return text


def first_words(rng: random.Random) -> Case:
    words = ("愛", "オリンピック", "首", "ABC", "Creo que", "Desde mi punto de vista", "Él", "para", "ΟΔΟΣ", "uno-dos")
    forms = (
        "{}",
        "{}",
        "{} ",
        "「{}",
        "『「{}",
        "「『{}」",
        "¿{} ",
        "({}) ",
        "{}, ",
        "*{}* ",
        "{}'s ",
        "- {} ",
        "{}s ",
    )
    number, word = rng.randint(1, 3), rng.choice(words)
    nth = rng.randint(1, number)
    there = number if rng.random() < 0.6 else near(rng, number)
    pieces = [prose(rng, rng.choice(("ja", "es")), 1, 1) for _ in range(there)]
    if nth <= len(pieces):
        first = rng.choice((word, word, word.lower(), word.upper(), word.replace(" ", ", "), word.replace(" ", "\n")))
        pieces[nth - 1] = rng.choice(forms).format(first) + rng.choice(("", pieces[nth - 1]))
    if rng.random() < 0.15:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(("", " ", "\n")))
    kwargs = {"num_paragraphs": number, "nth_paragraph": nth, "first_word": word}
    return Case(kwargs, rng.choice(("\n\n", "\n\n", "\n\n", "\n\n\n", "\n \n")).join(pieces))


def marked(language: str, markers: Sequence[str], forms: Sequence[str]) -> Maker:
    """Cases of a postscript."""

    def make(rng: random.Random) -> Case:
        marker = rng.choice(markers)
        said = rng.choice((marker, marker.strip(), marker.upper(), marker.lower(), *forms))
        return Case({"postscript_marker": marker}, prose(rng, language, 1, 2) + "\n\n" + said + " :-)")

    return make


def counted(argument: str, forms: Sequence[str], between: str = "\n") -> Maker:
    """Cases of a type that counts lines or passages of the first of `forms`."""

    def make(rng: random.Random) -> Case:
        number = rng.randint(0, 4)
        shape = rng.choice((forms[:1], forms[:2], forms))
        pieces = [rng.choice(shape).format(rng.choice(texts.JA_WORDS)) for _ in range(near(rng, number))]
        lines = some(rng, texts.SENTENCES["ja"], 0, 1) + pieces + some(rng, ("", "終わり"), 0, 1)
        return Case({argument: number}, between.join(lines) or "なし")

    return make


def chosen(options: Sequence[str], others: Sequence[str]) -> Maker:
    """Cases of a type that looks for one of `options`."""

    def make(rng: random.Random) -> Case:
        around = rng.choice(("{}", "{}", "*{}*", " {}\n", "Bon. {} Ok"))
        return Case({}, around.format(rng.choice(rng.choice((options, others)))))

    return make


def titled(language: str, forms: Sequence[str]) -> Maker:
    def make(rng: random.Random) -> Case:
        head = rng.choice(rng.choice((forms[:2], forms))).replace("{}", rng.choice(("夢の島", "Été", "mar")))
        return Case({}, rng.choice(("", "", "* ")) + head + rng.choice(("\n", " ")) + prose(rng, language, 1, 2))

    return make


def ended(phrases: Sequence[str], forms: Sequence[str]) -> Maker:
    def make(rng: random.Random) -> Case:
        phrase = rng.choice(phrases)
        said = rng.choice((phrase, phrase, phrase.strip(), phrase.upper(), phrase[:-1]))
        said = rng.choice(("{}", "{}", *forms)).replace("{}", said)
        return Case({"end_phrase": phrase}, "Nada. " + said + rng.choice(("", "", " ", "\n")))

    return make


def quoted(language: str, pairs: Sequence[str]) -> Maker:
    def make(rng: random.Random) -> Case:
        pair, ends = rng.choice(pairs), rng.choice(("", " ", "\n"))
        return Case({}, ends + pair[0].strip() + rng.choice(("", prose(rng, language, 1, 2))) + pair[1].strip() + ends)

    return make


def of(good: Sequence[str], others: Sequence[str]) -> Maker:
    """Cases of up to six pieces, half of them of `good` ones alone."""

    def make(rng: random.Random) -> Case:
        return Case({}, "".join(rng.choices(rng.choice((good, [*good, *others])), k=rng.randint(1, 6))))

    return make


def cased(language: str, change: Callable[[str], str]) -> Maker:
    """Long, clear texts, as short ones leave their language open."""

    def make(rng: random.Random) -> Case:
        own = (SPEECH[language], texts.LONG[language])
        text = rng.choice((*own, *own, *own, SPEECH["de"], SPEECH["it"], SPEECH["ko"], "1 + 1 = 2"))
        text = rng.choice((change, change, change, str))(text)
        changed = mutated(rng, text)
        return Case({}, changed if len(changed) >= 60 else text)

    return make
