"""Cases of IF-Train's types, for label.py.

The official code: allenai/open-instruct at e6c3044aa6201c8bfa4573c1b03142af599e730d, open_instruct/IFEvalG.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import ifeval
from ifeval import RELATIONS, SENTENCES, WORDS, maker, near, prose, recased, scattered, some
from label import Case, Maker

MAKERS: dict[str, Maker] = dict(ifeval.MAKERS)
PHRASES = (
    "The early bird catches the worm",
    "Don't look a gift horse in the mouth",
    "Time flies when having fun",
    "Is it you?",
    "bread and butter",
    "go now",
    "St. Ives is near",
    "well",
    "Wo liegt Straße 9",
)


def official(checkout: Path) -> dict[str, Any]:
    """The official class of each type."""
    import absl.logging
    import langdetect

    langdetect.DetectorFactory.seed = 0  # the library draws at random otherwise
    absl.logging.set_verbosity(absl.logging.FATAL)  # it logs every text without a language
    sys.path.insert(0, str(checkout))
    from open_instruct.IFEvalG import instructions_registry

    return dict(instructions_registry.INSTRUCTION_DICT)


@maker("copy:repeat_phrase", MAKERS)
def _repeat_phrase(rng: random.Random) -> Case:
    phrase, number = rng.choice(PHRASES), rng.randint(1, 3)
    repeats = []
    for _ in range(number if rng.random() < 0.7 else near(rng, number)):
        words = phrase.split()
        for _ in range(rng.choice((1, 1, 1, 1, 1, 1, 0, 2))):
            inner = range(1, len(words) - 1) or range(len(words))
            words[rng.choice(inner)] = rng.choice((rng.choice(WORDS), "x", "two words" if rng.random() < 0.1 else "y"))
        repeats.append(" ".join(words))
    text = rng.choice((". ", "\n", ", ", " ", "\n\n")).join(repeats) + rng.choice(("", ".", "s"))
    return Case(
        {"phrase": rng.choice((phrase, phrase + " ")), "small_n": number}, rng.choice(("", "", "Here: ")) + text
    )


def _prompt(rng: random.Random) -> str:
    return rng.choice((rng.choice(SENTENCES), prose(rng, 1, 2) + "\n", "ΟΔΟΣ", "İzmir'e git", "Straße?", " *Go* "))


def _copied(rng: random.Random, text: str) -> str:
    forms = ("{}", "{}", "{}", "{}", "{}", "{}", " {}\n", "{}!", '"{}"', "Sure: {}", "{}\n\nDone.")
    copy = text if rng.random() < 0.7 else rng.choice((str.upper, str.lower, str.strip, str.title))(text)
    return rng.choice(forms).replace("{}", copy)


@maker("copy:copy", MAKERS)
@maker("copy:copying_simple", MAKERS)
def _copy(rng: random.Random) -> Case:
    prompt = _prompt(rng)
    return Case({"prompt_to_repeat": prompt}, _copied(rng, prompt))


@maker("copy:copying_multiple", MAKERS)
def _copies(rng: random.Random) -> Case:
    prompt, number = _prompt(rng), rng.randint(1, 3)
    copies = [prompt] * (number if rng.random() < 0.7 else near(rng, number))
    if rng.random() < 0.4 and copies:
        copies[rng.randrange(len(copies))] = rng.choice((_copied(rng, prompt), ""))
    between = rng.choice(("******", "\n******\n", "\n******\n", " ****** ", "*****", "*******"))
    return Case({"prompt_to_repeat": prompt, "N": number}, between.join(copies))


@maker("new:copy_span_idx", MAKERS)
def _span(rng: random.Random) -> Case:
    prompt = rng.choice(SENTENCES)
    start = rng.randrange(1, len(prompt) - 4)
    end = rng.randint(start + 1 + prompt[start].isspace(), len(prompt) + 1)  # a blank alone is refused
    off = rng.choice(((0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (0, 1), (1, 0), (0, -1)))
    copy = _copied(rng, prompt[start + off[0] : end + off[1]])
    return Case({"prompt_to_repeat": prompt, "n_start": start, "n_end": end}, copy)


# What the official splitter of sentences knows: titles, sites, decimals, dots, initials, companies, starters, quotes.
_DOTTED = (
    "Mr. Ito came. He sat", "We saw Mrs. Day.", "It runs on kiln.io now.", "See a.gov. Then go", "Pi is 3.14.",
    "v1.2.3 is", "Wait...", "So.. ok", "A Ph.D. helps.", "Ph.D.", "Ask J. Bell. ", "the U.S. She left",
    "the U.S.A. But no", "i.e. that", "a.b.c.d. e", "Acme Inc. They sell", "Acme Inc. sells", "Bo Jr. Mr. Li",
    "Co. He Co. It fell", 'He said "no." Then', "“Go.” I", 'Why?" "Now!" ok', "x\tb. c", "plan B. We", "<stop> on",
    "<prd> on", "?!", "No", "!", "end.",
)  # fmt: skip


def _dotted(rng: random.Random) -> str:
    return rng.choice((" ", " ", "\n")).join(some(rng, (*_DOTTED, *SENTENCES), 1, 4))


@maker("detectable_format:sentence_hyphens", MAKERS)
def _hyphens(rng: random.Random) -> Case:
    pieces = [text.strip() for text in some(rng, SENTENCES if rng.random() < 0.5 else _DOTTED, 1, 4)]
    pieces = [piece.replace("-", rng.choice(("", "", "", "", "-"))) for piece in pieces]
    return Case({}, rng.choice(("-", "-", "-", "-", "-", "-", " - ", "--", " ", "–")).join(pieces))


@maker("keywords:no_adjacent_consecutive", MAKERS)
def _consecutive(rng: random.Random) -> Case:
    words = rng.choices([*WORDS, "I", "1", "2nd", "İzmir", "Z", "[x", "ébène", "éa", "ê"], k=rng.randint(1, 12))
    return Case({}, " ".join(word.capitalize() if rng.random() < 0.3 else word for word in words))


@maker("detectable_format:square_brackets", MAKERS)
def _brackets(rng: random.Random) -> Case:
    forms = ("[{}]", "[{}].", "[[{}]]", "{}", "[{} {}]", "[", "[]", "]{}[")
    words = [rng.choice(forms if rng.random() < 0.1 else forms[:1]) for _ in range(rng.randint(1, 6))]
    return Case({}, rng.choice((" ", " ", " ", "\n", "")).join(word.replace("{}", rng.choice(WORDS)) for word in words))


@maker("keywords:word_once", MAKERS)
def _once(rng: random.Random) -> Case:
    keyword = rng.choice([*WORDS, " willow ", "a.c", "co-op", "ß", "I", "café"])
    pieces = [recased(rng, keyword.strip()) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
    return Case({"keyword": keyword}, scattered(rng, pieces, prose(rng)))


MAKERS["keywords:word_count_different_numbers"] = ifeval.MAKERS["keywords:frequency"]
MAKERS["letters:letter_counting2"] = ifeval.MAKERS["keywords:letter_frequency"]


@maker("count:count_increment_word", MAKERS)
def _increment(rng: random.Random) -> Case:
    one, two = rng.sample([*WORDS, " willow ", "a.c", "co-op", "lant", "ß"], 2)
    numbers = (1, 2) if rng.random() < 0.7 else (rng.randint(0, 2), rng.randint(1, 3))
    pieces = [word.strip() for word, number in zip((one, two), numbers, strict=True) for _ in range(number)]
    pieces = [recased(rng, piece) if rng.random() < 0.5 else piece for piece in pieces]
    return Case({"keyword1": one, "keyword2": two}, scattered(rng, pieces, prose(rng)))


@maker("keywords:exclude_word_harder", MAKERS)
def _exclude(rng: random.Random) -> Case:
    keyword = rng.choice([*WORDS, " two ", "e.g.", "café", "silver spoons"])
    form = rng.choice(("{}", "{}", "{}", "{}", "{}", "{},", "{}s", "({})", "\n{}", "{}\u00a0", "- {}")).format(
        keyword.strip()
    )
    form = form.upper() if rng.random() < 0.1 else form
    kwargs = {"keyword": keyword} | ({"instruction": "Name a willow."} if rng.random() < 0.2 else {})
    edges = rng.choice(("{0} {1}", "{1} {0}", "{0}")).format(prose(rng), form)
    return Case(kwargs, edges if rng.random() < 0.2 else scattered(rng, [form], prose(rng)))


def _paragraphs(dividers: tuple[str, ...]) -> Maker:
    def make(rng: random.Random) -> Case:
        pieces = some(rng, SENTENCES, 1, 3) if rng.random() < 0.4 else rng.sample(SENTENCES, 2)
        if rng.random() < 0.4:
            pieces.insert(rng.choice((0, 1, len(pieces))), rng.choice(("", " ", "\n")))
        return Case({}, rng.choice(dividers).join(pieces))

    return make


maker("paragraphs:paragraphs", MAKERS)(_paragraphs(("\n***\n", "***", " *** ", "\n\n***\n\n", "****", "* * *", "\n\n")))
maker("paragraphs:paragraphs2", MAKERS)(_paragraphs(("\n\n", "\n\n", "\n\n", "\n\n\n", "\n \n", "\n", "\n***\n")))


@maker("first_word:first_word_sent", MAKERS)
def _first_words(rng: random.Random) -> Case:
    word = rng.choice([*WORDS, "The", "I", "ΟΔΟΣ", "Straße", "don't", '"Go"', "in the"])
    pieces = []
    for text in some(rng, (*_DOTTED, *SENTENCES), 1, 3):
        said = rng.choice((word, word, word, word.upper(), word.lower(), word + ",", f'"{word}', "And"))
        pieces.append((said if rng.random() < 0.4 else word) + " " + text.strip())
    pieces = pieces if rng.random() < 0.5 else [f"{word} {' '.join(some(rng, WORDS))}{rng.choice('.?!')}" for _ in "ab"]
    return Case({"first_word": rng.choice((word, word, " " + word, [word], [word, "x"]))}, " ".join(pieces))


@maker("first_word:first_word_answer", MAKERS)
def _first_word(rng: random.Random) -> Case:
    word = rng.choice([*WORDS, "The", "ΟΔΟΣ", "Straße", " don't", "in the"])
    said = rng.choice(("{}", "{}", "{}", "{},", "\n{}", '"{}"', "{}\u00a0a", "{}\u200b", "A {}", "*{}*")).format(
        word.strip()
    )
    return Case(
        {"first_word": word}, rng.choice((said, said, said.upper())) + rng.choice((" ", "\n")) + prose(rng, 1, 2)
    )


@maker("last_word:last_word_sent", MAKERS)
def _last_words(rng: random.Random) -> Case:
    word = rng.choice([*WORDS, "Do", "ΟΔΟΣ", "Straße", "don't", "a_b", "co", "7"])
    forms = ("{}.", "{}.", "{}!", "{}?", '{}."', "{}...", "({}).", "'{}'!", "{}'s.", "{}. ”", "{}", "{} .", "{}.com")
    pieces = []
    for text in some(rng, (*_DOTTED[:4], *SENTENCES), 1, 3):
        text = text.strip(" .?!") if rng.random() < 0.3 else " ".join(some(rng, WORDS))
        said = rng.choice((word, word, word, word.upper(), word.capitalize()))
        pieces.append(text + " " + rng.choice(forms if rng.random() < 0.4 else forms[:4]).format(said))
    return Case({"last_word": rng.choice((word, word, word + " ", [word], [word, "x"]))}, " ".join(pieces))


@maker("last_word:last_word_answer", MAKERS)
def _last_word(rng: random.Random) -> Case:
    word = rng.choice([*WORDS, "The", "ΟΔΟΣ", "Straße", " ok", "a_b", "don't", "co-op"])
    forms = ("{}", "{}.", "{}!", '"{}."', "**{}**", "{}\n", "{}…", "{}'s", "{} .", "{}-x", "“{}”", "x-{}", "{} 😀")
    said = rng.choice(forms).format(word.strip())
    return Case(
        {"last_word": word}, prose(rng, 1, 2) + rng.choice((" ", "\n", "\u00a0")) + rng.choice((said, said.upper()))
    )


@maker("detectable_format:bigram_wrapping", MAKERS)
def _bigrams(rng: random.Random) -> Case:
    forms = ("<<{} {}>>", "<<{} {}>>.", "<<{}>>", "<{} {}>", "{} {}", "<<<{} {}>>>", "<< {} {} >>")
    words = [rng.choice(forms if rng.random() < 0.15 else forms[:1]) for _ in range(rng.randint(1, 5))]
    tail = rng.choice(("", "", "", " " + rng.choice(WORDS), " <<x>>"))
    return Case({}, rng.choice((" ", " ", "\n")).join(word.replace("{}", rng.choice(WORDS)) for word in words) + tail)


def _without(mark: str, others: tuple[str, ...]) -> Maker:
    def make(rng: random.Random) -> Case:
        text = scattered(rng, [rng.choice(("so" + mark, mark, "", ""))], prose(rng, 1, 3))
        return Case({}, text if rng.random() < 0.4 else text.replace(mark, rng.choice(others)))

    return make


maker("punctuation:punctuation_dot", MAKERS)(_without(".", ("", "", "!", "。", "…")))
maker("punctuation:punctuation_exclamation", MAKERS)(_without("!", ("", ".", "！", "!")))


@maker("count:lowercase_counting", MAKERS)
def _lowercase(rng: random.Random) -> Case:
    odd = ("Now", "X", "iPhone", "a_b", "b2", "été", "e\u0301", "don't", "co-op", "2x", "naïve", "I", "ß", "(so)", "ſ")
    words = [rng.choice(odd if rng.random() < 0.3 else WORDS) for _ in range(rng.randint(2, 8))]
    number = max(1, sum(word in WORDS for word in words) + rng.choice((-1, -1, 0, 1)))
    return Case({"N": number}, " ".join(words))


@maker("letters:letter_counting", MAKERS)
def _letters(rng: random.Random) -> Case:
    text = prose(rng, 1, 2) + rng.choice(("", "", " Straße", " Kelvin: \u212a", " ａｂｃ"))
    number = max(1, near(rng, sum(char.isalpha() and char.isascii() for char in text)))
    return Case({"N": number, "relation": rng.choice(RELATIONS)}, text)


@maker("count:counting_composition", MAKERS)
def _composition(rng: random.Random) -> Case:
    sentences, words = rng.randint(1, 3), rng.randint(2, 4)

    def sentence() -> str:
        number = near(rng, words) if rng.random() < 0.1 else words
        odd = (*WORDS, "cannot", "don't", "co-op", "3.5")
        parts = rng.sample(odd if rng.random() < 0.2 else WORDS, max(1, number - 1))
        return " ".join(parts) + (rng.choice(("...", "!", "?")) if rng.random() < 0.2 else ".")

    counts = [
        near(rng, sentences) if rng.random() < 0.1 else sentences for _ in range(rng.choice((3, 3, 3, 3, 3, 3, 2, 4)))
    ]
    pieces = [" ".join(sentence() for _ in range(count)) for count in counts]
    if rng.random() < 0.1:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(("", " ")))
    between = rng.choice(("\n***\n", "\n***\n", "\n\n***\n\n", " *** ", "***", "\n* * *\n"))
    return Case({"n_sent": sentences, "n_words": words}, between.join(pieces))


@maker("count:count_unique", MAKERS)
def _unique(rng: random.Random) -> Case:
    odd = (
        "Maple",
        "cannot",
        "can",
        "not",
        "don't",
        "do",
        "n't",
        "gonna",
        '"so"',
        "so",
        "U.S.",
        ",",
        "silver.",
        "e.g.",
        "'s",
        "wanna",
    )
    words = rng.sample((*WORDS, *WORDS, *odd, *odd) if rng.random() < 0.5 else (*WORDS, *odd), rng.randint(3, 7))
    words += rng.choice(([], [], words[:1], [words[0].upper()]))
    return Case({}, " ".join(words) + rng.choice(("", "", ".", "!", "?\nMaple.")))


@maker("keywords:palindrome", MAKERS)
def _palindrome(rng: random.Random) -> Case:
    pieces = [
        rng.choice(("level", "Anna", "noon,", "x", "12321", "été", "İi", "e\u0301e", "(o)", "kayak.", "😀", "--"))
    ]
    words = [word for word in rng.sample(WORDS, 4) if word != word[::-1]]
    return Case({}, scattered(rng, pieces, " ".join(words)))


@maker("keywords:keyword_specific_position", MAKERS)
def _position(rng: random.Random) -> Case:
    keyword = rng.choice([*WORDS, "The", "don't", "n't", "cannot", "."])
    n, m = rng.randint(1, 3), rng.randint(1, 4)
    sentences = [[*rng.sample(WORDS, rng.randint(m, 5)), "x"] for _ in range(rng.choice((n - 1, n, n, n + 1)))]
    if n <= len(sentences):
        sentences[n - 1].insert(m - 1 if rng.random() < 0.8 else m, keyword)
    ends = (".", "!", "?", "...", " Co.", " Mr. Day.", '."', "", " e.g.")
    text = " ".join(" ".join(words) + rng.choice(ends if rng.random() < 0.2 else ends[:3]) for words in sentences)
    given = rng.choice((keyword, keyword, keyword + " ", [keyword]))
    return Case({"keyword": given, "n": n, "m": m}, text or "x")


@maker("keywords:start_end", MAKERS)
def _start_end(rng: random.Random) -> Case:
    word = rng.choice((*WORDS, "Straße", "don't", "cannot", "U.S.", "etc.", "ΟΔΟΣ", "co-op", "*", '"'))
    end = rng.choice(("{}", "{}", "{}", "{}.", "{}s", '"{}"', "{}!", "\n{}", "{} ")).format(word)
    text = rng.choice((word, word, word.capitalize(), f'"{word}"')) + " " + prose(rng, 1, 2) + " " + end
    return Case({}, rng.choice((text, text, text, text, word, word + " " + word)))
