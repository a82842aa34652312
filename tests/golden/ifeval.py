"""Cases of IFEval's 25 types, for label.py; the rule sets built on IFEval label them by their own classes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from label import Case, Maker, mutated

WORDS = (
    "harbour lantern maple quarry ribbon saddle timber velvet willow anchor basket candle copper engine feather garden"
    " hammer island jigsaw kettle ladder marble needle orchard pepper quilt river silver tunnel umbrella"
).split()
SENTENCES = (
    "The kettle sang while we packed the baskets.",
    "Dr. Lind rowed to the island at 6.30 a.m. and found nobody there.",
    "Why would a lighthouse need two doors?",
    "We paid $4.50 for each ribbon, i.e. far too much!",
    'She said, "Leave the lantern on the sill."',
    "Nobody's boat was tied up, so they didn't wait...",
    "A well-kept orchard feeds a village; a poor one feeds crows.",
    "Rain fell (as it does in April) on roof, road and river.",
    "NASA and the U.N. sent letters, yet the café stayed shut.",
    "Turn left at the quarry, then count 1,200 steps.",
    "I AM NOT sure it's the same bell.",
    "Mr. and Mrs. Okoro sell silver spoons & copper pans.",
    "- Bring rope, salt and a_small_map.",
    "What a view!",
    "Then silence.",
    "Can you mend it? Perhaps: ask the smith on St. Mary's Rd. first.",
)
# A clear text of each language, 60 characters and more.
SPEECH = {
    "en": "The old ferry crosses the river every morning, and the children wave at the people on the other side.",
    "de": "Die alte Fähre überquert jeden Morgen den Fluss, und die Kinder winken den Menschen am anderen Ufer zu.",
    "fr": "Le vieux bac traverse la rivière chaque matin et les enfants saluent les gens qui vivent sur l'autre rive.",
    "es": "El viejo barco cruza el río todas las mañanas y los niños saludan a la gente que vive en la otra orilla.",
    "it": "Il vecchio traghetto attraversa il fiume ogni mattina e i bambini salutano la gente sull'altra sponda.",
    "pt": "A velha balsa atravessa o rio todas as manhãs e as crianças acenam para quem está na outra margem.",
    "fi": "Vanha lautta ylittää joen joka aamu, ja lapset vilkuttavat ihmisille, jotka asuvat toisella puolella.",
    "pl": "Stary prom przepływa rzekę każdego ranka, a dzieci machają do ludzi, którzy mieszkają po drugiej stronie.",
    "vi": "Chiếc phà cũ qua sông mỗi buổi sáng và bọn trẻ vẫy tay chào những người sống ở bờ bên kia của con sông.",
    "sw": "Kivuko cha zamani huvuka mto kila asubuhi, na watoto huwapungia mkono watu wanaoishi upande wa pili.",
    "ru": "Старый паром каждое утро пересекает реку, и дети машут руками людям, которые живут на другом берегу.",
    "uk": "Старий пором щоранку перетинає річку, і діти махають руками людям, які живуть на іншому березі річки.",
    "ar": "تعبر العبّارة القديمة النهر كل صباح ويلوّح الأطفال بأيديهم للناس الذين يعيشون على الضفة الأخرى من النهر.",
    "hi": "पुरानी नाव हर सुबह नदी पार करती है और बच्चे दूसरी ओर रहने वाले लोगों को देखकर हाथ हिलाते हैं।",
    "th": "เรือข้ามฟากลำเก่าข้ามแม่น้ำทุกเช้า และเด็กๆ โบกมือให้ผู้คนที่อาศัยอยู่อีกฝั่งหนึ่งของแม่น้ำ",
    "ko": "오래된 나룻배는 매일 아침 강을 건너고, 아이들은 강 건너편 사람들에게 손을 흔듭니다."
    " 오늘도 하늘은 맑고 바람은 아주 부드럽습니다.",
    "ja": "古い船は毎朝川を渡り、子どもたちは向こう岸の人たちに手を振ります。"
    "今日も空は青く、風はとてもおだやかで、だれも急いではいません。",
}  # fmt: skip
RELATIONS = ("at least", "less than")

_MAKERS: dict[str, Maker] = {}


def maker(instruction_id: str, into: dict[str, Maker] = _MAKERS) -> Callable[[Maker], Maker]:
    """Enters the decorated maker under `instruction_id`; its responses are `mutated`."""

    def enter(make: Maker) -> Maker:
        def mutating(rng: random.Random) -> Case:
            kwargs, response = make(rng)
            return Case(kwargs, mutated(rng, response))

        into[instruction_id] = mutating
        return make

    return enter


def some(rng: random.Random, items: Sequence[Any], least: int = 1, most: int = 4) -> list[Any]:
    """`least` to `most` of `items`, in any order."""
    return rng.sample(items, rng.randint(least, min(most, len(items))))


def prose(rng: random.Random, least: int = 1, most: int = 4) -> str:
    """A few sentences."""
    return rng.choice((" ", " ", "\n")).join(some(rng, SENTENCES, least, most))


def near(rng: random.Random, number: int) -> int:
    """`number` or a neighbour of it, at least 0."""
    return max(0, number + rng.choice((-1, 0, 0, 1)))


def recased(rng: random.Random, word: str) -> str:
    """`word`, in one case of four in another case or as part of a longer word."""
    forms = (word.upper(), word.capitalize(), word + "s", "un" + word, f"'{word}'", word + "-like", f"*{word}*")
    return rng.choice(forms) if rng.random() < 0.25 else word


def scattered(rng: random.Random, pieces: Sequence[str], text: str) -> str:
    """`text` with each of `pieces` put in between two of its words."""
    words = text.split(" ")
    for piece in pieces:
        words.insert(rng.randrange(len(words) + 1), piece)
    return " ".join(words)


@maker("keywords:existence")
def _existence(rng: random.Random) -> Case:
    keywords = some(rng, [*WORDS, "silver spoon", "e.g.", "Straße", "café", "K2", "ship's"], 1, 3)
    there = keywords[: rng.choice((len(keywords), len(keywords), len(keywords) - 1))]
    return Case({"keywords": keywords}, scattered(rng, [recased(rng, word) for word in there], prose(rng)))


@maker("keywords:frequency")
def _frequency(rng: random.Random) -> Case:
    keyword, number = rng.choice([*WORDS, " willow ", "a.c", "co-op", "ß", "I"]), rng.randint(1, 4)
    kwargs = {"keyword": keyword, "frequency": number, "relation": rng.choice(RELATIONS)}
    pieces = [recased(rng, keyword.strip()) for _ in range(near(rng, number))]
    return Case(kwargs, scattered(rng, pieces, prose(rng)))


@maker("keywords:forbidden_words")
def _forbidden(rng: random.Random) -> Case:
    words = some(rng, [*WORDS, "two doors", "e.g.", "café", "lien", "ice-cream"], 1, 3)
    word = rng.choice(words)
    pieces = [rng.choice((word, word + "s", "un" + word, word.upper(), f"_{word}", word + "'s", word + "\u0301", "x"))]
    return Case({"forbidden_words": words}, scattered(rng, pieces, prose(rng)))


@maker("keywords:letter_frequency")
def _letter(rng: random.Random) -> Case:
    letter, text = rng.choice("aeizqksEIK"), prose(rng, 1, 2) + rng.choice(("", "", " K", " İ", " ſ"))
    number = near(rng, text.lower().count(letter.lower()))
    return Case({"letter": letter, "let_frequency": number, "let_relation": rng.choice(RELATIONS)}, text)


def _said(rng: random.Random, text: str) -> str:
    """`text` changed a little, but still long enough to be sure of its language."""
    changed = mutated(rng, text)
    return changed if len(changed) >= 60 else text


def _language(rng: random.Random) -> Case:
    language, other = rng.sample(sorted(SPEECH), 2)
    text = rng.choice((SPEECH[language], SPEECH[language], SPEECH[other], SPEECH[other], "12 + 30 = 42", "?!"))
    return Case({"language": language}, _said(rng, text) if len(text) >= 60 else text)


@maker("length_constraints:number_sentences")
def _sentences(rng: random.Random) -> Case:
    number = rng.randint(1, 5)
    kwargs = {"num_sentences": number, "relation": rng.choice(RELATIONS)}
    return Case(kwargs, rng.choice((" ", "\n", "  ")).join(rng.sample(SENTENCES, max(1, near(rng, number)))))


@maker("length_constraints:number_paragraphs")
def _paragraphs(rng: random.Random) -> Case:
    number = rng.randint(1, 4)
    pieces = [rng.choice(SENTENCES) for _ in range(max(1, near(rng, number)))]
    if rng.random() < 0.2:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(("", " ", "\n")))
    return Case({"num_paragraphs": number}, rng.choice(("\n***\n", "***", " *** ", "\n\n***\n\n", "****")).join(pieces))


@maker("length_constraints:number_words")
def _words(rng: random.Random) -> Case:
    number = rng.randint(1, 25)
    words = prose(rng, 3, 4).split(" ")[: max(1, near(rng, number))]
    return Case({"num_words": near(rng, number), "relation": rng.choice(RELATIONS)}, " ".join(words))


@maker("length_constraints:nth_paragraph_first_word")
def _nth_word(rng: random.Random) -> Case:
    number, word = rng.randint(1, 4), rng.choice([*WORDS, "Weiß", "ΟΔΟΣ", "I", "don't", "co-op", "naïve,"])
    nth = rng.randint(1, number)
    pieces = [rng.choice(SENTENCES) for _ in range(number if rng.random() < 0.5 else near(rng, number))]
    if nth <= len(pieces) and rng.random() < 0.9:
        first = rng.choice(
            (
                "{}",
                "{}",
                "{}",
                "{}",
                "{}",
                "'{}'",
                '"{}"',
                "'\"{}",
                "\"'{}",
                "{}.",
                "{},x",
                "**{}**",
                "({})",
                "{}-",
                " {}",
            )
        )
        pieces[nth - 1] = (
            first.format(rng.choice((word, word.upper(), word.capitalize()))) + " " + rng.choice(SENTENCES)
        )
    if rng.random() < 0.15:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(("", " ", "\n")))
    kwargs = {"num_paragraphs": number, "nth_paragraph": nth, "first_word": word}
    return Case(kwargs, rng.choice(("\n\n", "\n\n", "\n\n", "\n\n\n", "\n \n")).join(pieces))


@maker("detectable_content:number_placeholders")
def _placeholders(rng: random.Random) -> Case:
    number = rng.randint(1, 4)
    forms = ("[name]", "[name]", "[your address]", "[]", "[[x]]", "[a\nb]", "[a][b]", "(name)", "]x[")
    return Case({"num_placeholders": number}, scattered(rng, rng.choices(forms, k=near(rng, number)), prose(rng)))


@maker("detectable_content:postscript")
def _postscript(rng: random.Random) -> Case:
    marker = rng.choice(("P.S.", "P.P.S", " P.S. ", "P.P.S.", "PS", "Note:", "N.B."))
    forms = (
        marker,
        marker.strip(),
        "P. S.",
        "P.P.S",
        "P. P. S.",
        "p.s.",
        "p.p.s",
        "P.S",
        "PS",
        "p. p.\u00a0s",
        "pxs!",
        "",
    )
    return Case({"postscript_marker": marker}, prose(rng, 1, 2) + "\n\n" + rng.choice(forms) + " See you.")


@maker("detectable_format:number_bullet_lists")
def _bullets(rng: random.Random) -> Case:
    number = rng.randint(0, 4)
    forms = ("* {}", "* {}", "- {}", "  * {}", "\t- {}", "*{}", "** {}", "-", "* *{}*", "+ {}", "\n- {}", "–{}")
    lines = [rng.choice(forms).format(rng.choice(WORDS)) for _ in range(near(rng, number))]
    return Case(
        {"num_bullets": number}, "\n".join(some(rng, SENTENCES, 0, 1) + lines) + rng.choice(("", "\n", "\nEnd."))
    )


@maker("detectable_format:constrained_response")
def _constrained(rng: random.Random) -> Case:
    answer = rng.choice(("yes.", "no.", "maybe.", "yes.", "no.", "maybe.", "yes.", "no.", "yes", "No.", "perhaps."))
    start = rng.choice(
        (
            "My answer is ",
            "My answer is ",
            "My answer is ",
            "My answer is ",
            "my answer is ",
            "My answer is: ",
            "*My answer is* ",
        )
    )
    return Case({}, rng.choice(("{}", "{}", "{} Really.", "Well. {}", "*{}*")).format(start + answer))


@maker("detectable_format:number_highlighted_sections")
def _highlights(rng: random.Random) -> Case:
    number = rng.randint(1, 4)
    forms = ("*{}*", "*{}*", "**{}**", "***{}***", "* *", "**", "****", "*{}", "*{}\nx*", "__{}__", "** **", "*\u00a0*")
    pieces = [rng.choice(forms).format(rng.choice(WORDS)) for _ in range(near(rng, number))]
    return Case({"num_highlights": number}, scattered(rng, pieces, prose(rng)))


@maker("detectable_format:multiple_sections")
def _sections(rng: random.Random) -> Case:
    number, mark = rng.randint(1, 4), rng.choice(("Section", "SECTION", " Section ", "Day", "Part", "Q.", "(Part|Day)"))
    forms = ("{} {}", "{} {}", "{} {}.", "{}{}", "{}  {}", "\n{} {}\n", "**{} {}**", "{} one {}", "{}\t{}")
    name = rng.choice((mark, mark, mark.upper(), "Part")).strip()
    pieces = [rng.choice(forms).format(name, i + 1) + " " + rng.choice(WORDS) for i in range(near(rng, number))]
    return Case({"section_spliter": mark, "num_sections": number}, "\n".join(pieces) or "Nothing.")


@maker("detectable_format:json_format")
def _json(rng: random.Random) -> Case:
    value: Any = {word: rng.choice((1, 2.5, None, True, [word, "é\n"], {"a": []}, "x")) for word in some(rng, WORDS)}
    text = json.dumps(value, indent=rng.choice((None, 2)), ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.2:
        text = rng.choice(
            ("17", "NaN", "-Infinity", '"word"', "null", "[1,]", "{'a': 1}", "01", "[1] [2]", '"a\tb"', "tru")
        )
    forms = (
        "{}",
        "{}",
        "```json\n{}\n```",
        "```Json\n{}```",
        "```\n{}\n```",
        "```json```{}",
        "{}```",
        "``` json\n{}\n```",
    )
    others = ("{}\n```json", "Here: {}", "````{}````", "~~~\n{}\n~~~", "```JSON{}\n```\n", "{}\nDone.")
    return Case({}, rng.choice(forms + others).replace("{}", text))


@maker("detectable_format:title")
def _title(rng: random.Random) -> Case:
    forms = (
        "<<{}>>",
        "<<{}>>",
        "<< {} >>",
        "<<<{}>>>",
        "<<>>",
        "<< >>",
        "<{}>",
        "<<{}>",
        "<<{}\nx>>",
        ">>{}<<",
        "«{}»",
    )
    others = ("<<\u00a0>>", "<<<>>>", "<<>>>> {}", "<< <{}> >>", "<<<<>>>>")
    return Case({}, rng.choice(forms + others).format(rng.choice(WORDS)) + rng.choice(("\n", " ")) + prose(rng, 1, 2))


@maker("combination:two_responses")
def _two(rng: random.Random) -> Case:
    pieces = rng.sample(SENTENCES, rng.choice((1, 2, 2, 2, 2, 3)))
    if rng.random() < 0.2:
        pieces = [pieces[0], rng.choice(("{}", " {}\n", "{}!")).format(pieces[0])]
    if rng.random() < 0.2:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(("", " ", "\n")))
    return Case({}, rng.choice(("******", "\n******\n", "\n\n******\n\n", "*****", "*******", "***")).join(pieces))


@maker("combination:repeat_prompt")
def _repeat(rng: random.Random) -> Case:
    prompt = rng.choice(SENTENCES) + rng.choice(("", "", " ", "\n", " Be brief."))
    said = rng.choice((prompt, prompt, prompt.strip(), prompt.upper(), prompt[:-1], "Sure. " + prompt, f'"{prompt}"'))
    return Case({"prompt_to_repeat": prompt}, said + rng.choice(("", "\n", "\n\n")) + prose(rng, 0, 2))


@maker("startend:end_checker")
def _end(rng: random.Random) -> Case:
    phrase = rng.choice(("That is all.", "Any questions?", " the end", "Over and out!", "ΤΕΛΟΣ", 'so "be it"', "*fin*"))
    said = rng.choice((phrase, phrase, phrase.strip(), phrase.upper(), f'"{phrase}"', phrase + ".", phrase[:-1], "Fin"))
    return Case(
        {"end_phrase": phrase}, prose(rng, 1, 2) + rng.choice((" ", "\n")) + said + rng.choice(("", "", " ", "\n"))
    )


@maker("change_case:capital_word_frequency")
def _capitals(rng: random.Random) -> Case:
    number = rng.randint(0, 5)
    forms = (
        "NOW",
        "A",
        "I'M",
        "DON'T",
        "WELL-KEPT",
        "U.S.A.",
        "K2",
        "ÉTÉ",
        "Ⅷ",
        "CANNOT",
        "X_Y",
        "(OK)",
        "ABC/DEF",
        "ß",
    )
    kwargs = {"capital_frequency": number, "capital_relation": rng.choice(RELATIONS)}
    return Case(kwargs, scattered(rng, rng.choices(forms, k=near(rng, number)), rng.choice(SENTENCES)))


def _cased(change: Callable[[str], str]) -> Maker:
    def make(rng: random.Random) -> Case:
        speech = [SPEECH["en"], "Nobody could remember who had built the bridge, but all of them crossed it daily."]
        text = rng.choice((*speech, *speech, SPEECH["de"], SPEECH["fi"], SPEECH["ko"], "1 + 1 = 2"))
        return Case({}, _said(rng, rng.choice((change, change, change, str))(text)) if len(text) >= 60 else text)

    return make


@maker("punctuation:no_comma")
def _comma(rng: random.Random) -> Case:
    text = prose(rng, 1, 2)
    return Case({}, text if rng.random() < 0.4 else text.replace(",", rng.choice(("", ";", "،", "，", "、"))))


@maker("startend:quotation")
def _quotation(rng: random.Random) -> Case:
    opening, closing = rng.choice((('"', '"'), ('"', '"'), ('"', '"'), ("'", "'"), ("“", "”"), ('"', ""), ("", '"')))
    text = rng.choice(("", prose(rng, 1, 2), prose(rng, 1, 2)))
    return Case({}, rng.choice(("", " ", "\n")) + opening + text + closing + rng.choice(("", " ", "\n")))


# The language types change their texts themselves.
MAKERS = _MAKERS | {
    "language:response_language": _language,
    "change_case:english_capital": _cased(str.upper),
    "change_case:english_lowercase": _cased(str.lower),
}
