"""Cases of IFBench's types count:*, ratio:*, words:* and sentence:*, for label.py.

words:start_verb needs a tagger: label.py's folders of NLTK data must hold that of tagger.py.
"""

from __future__ import annotations

import random
import string
from itertools import pairwise

from ifeval import SENTENCES, maker, near, prose
from label import Case, Maker

MAKERS: dict[str, Maker] = {}

PLAIN = (
    "apple brass cliff dune ember frost glade heron inlet jetty kelp ledge mist north oak pier quay ridge sand tide"
    " urn vale wharf xenon yarn zinc"
).split()  # one word for each letter
OTHERS = (
    "amber basin creek drift eagle ferry gravel hollow iron juniper knoll lagoon marsh nettle otter pebble quartz reed"
    " slate thistle upland vessel willow xylem yonder zephyr"
).split()
NAMES = "Emma Liam Sophia Noah Ava Leo Zoe Mia Ella Aria Nora Joseph".split()
JAPANESE = "川 みず ヤマ 東京へ 「海」 空。 ひと、 カメラ".split()
ODD_SYLLABLES = "cat river stone remember dog tree banana light wonderful 7".split()
EVEN_SYLLABLES = "water table garden ability window purple basket information café".split()
PALINDROMES = (
    "level radar civic kayak refer rotor madam stats tenet racecar Level ra-dar 12321 deified noon İabaİ".split()
)
MARKS = string.punctuation + " "


def off_by_one(rng: random.Random, odds: float = 0.4) -> int:
    return rng.choice((-1, 1)) if rng.random() < odds else 0


def sentence(words: list[str], end: str = ".") -> str:
    return (" ".join(words) + end)[:1].upper() + (" ".join(words) + end)[1:]


def some_words(rng: random.Random, number: int) -> list[str]:
    return [rng.choice(PLAIN + OTHERS) for _ in range(number)]


def spoiled(rng: random.Random, words: list[str], others: list[str]) -> list[str]:
    """`words`, in two cases of five with one of them replaced or left out."""
    words = list(words)
    if words and rng.random() < 0.4:
        at = rng.randrange(len(words))
        words[at : at + 1] = rng.choice(([], [rng.choice(others)]))
    return words


def dressed(rng: random.Random, words: list[str]) -> str:
    """`words` as a text, with punctuation here and there."""
    marks = [""] * 12 + [",", ".", ";", "!", " -", " —", "?"]
    quoted = [f'"{word}"' if rng.random() < 0.05 else word for word in words]
    return " ".join(word + rng.choice(marks) for word in quoted)


@maker("count:word_count_range", into=MAKERS)
def _(rng: random.Random) -> Case:
    text = prose(rng, 1, 2)
    least = near(rng, len(text.split()) + rng.randint(-2, 1))
    return Case({"min_words": least, "max_words": least + rng.randint(0, 4)}, text)


@maker("count:unique_word_count", into=MAKERS)
def _(rng: random.Random) -> Case:
    text = dressed(rng, [rng.choice([*PLAIN[:8], "The", "the", "it's", "..."]) for _ in range(rng.randint(4, 16))])
    return Case({"N": near(rng, len({word.strip(MARKS) for word in text.lower().split()}))}, text)


@maker("count:conjunctions", into=MAKERS)
def _(rng: random.Random) -> Case:
    forms = ["and", "And", "and,", "but", "BUT", '"but"', "for", "nor", "or", "(or)", "so", "so.", "yet", "and/or"]
    found = [rng.choice(forms) for _ in range(rng.randint(1, 5))]
    words = found + some_words(rng, 4) + ["forty", "sofa", "band"]
    rng.shuffle(words)
    return Case({"small_n": near(rng, len(set(found)))}, " ".join(words))


@maker("count:person_names", into=MAKERS)
def _(rng: random.Random) -> Case:
    found = rng.sample(NAMES, rng.randint(1, 6))
    name = rng.choice(NAMES)
    forms = f"{name}s {name}_1 x{name} {name}\u0301 {name}é Mary-{name} {name}'s {name.lower()}".split()
    words = [rng.choice((name, f"{name}'s", f"({name})", f"*{name}*")) for name in found]
    words += rng.sample(forms, 2) + some_words(rng, 3)
    rng.shuffle(words)
    return Case({"N": near(rng, len(found))}, " ".join(words))


@maker("count:numbers", into=MAKERS)
def _(rng: random.Random) -> Case:
    forms = [*"7 1,000 3.14 $5 10% 2024-05-01 a1b2 4/5 ٣ ½ x² No.9 1st -3".split(), "12 000"]
    found = [rng.choice(forms) for _ in range(rng.randint(0, 4))]
    words = found + some_words(rng, 5)
    rng.shuffle(words)
    number = sum(2 if form in ("a1b2", "12 000") else form not in ("½", "x²") for form in found)
    return Case({"N": near(rng, number) if rng.random() < 0.5 else number}, " ".join(words) + ".")


@maker("count:punctuation", into=MAKERS)
def _(rng: random.Random) -> Case:
    interrobang = rng.choice(("?!", "!?", "‽", "?!?", "!?!", "?!!?", "? !"))
    marks = spoiled(rng, list(".,!?;:"), [",", "…", "！"])
    rng.shuffle(marks)
    marks.insert(rng.randrange(len(marks) + 1), interrobang)
    return Case({}, " ".join(word + mark for word, mark in zip(some_words(rng, len(marks)), marks, strict=True)))


@maker("count:pronouns", into=MAKERS)
def _(rng: random.Random) -> Case:
    forms = "she She/her/hers it's they'll me gimme who's this that ourselves none us. I we, (you) his U.S. its".split()
    forms += "itself mine; each-other lemme 'tis whoever".split()
    found = [rng.choice(forms) for _ in range(rng.randint(1, 6))]
    words = found + some_words(rng, 4)
    rng.shuffle(words)
    number = sum(3 if "/" in form else form not in ("U.S.", "each-other") for form in found)
    return Case({"N": near(rng, number)}, " ".join(words) + rng.choice((".", "?", "")))


@maker("count:words_japanese", into=MAKERS)
def _(rng: random.Random) -> Case:
    n = rng.randint(1, 5)
    words = some_words(rng, rng.randint(1, 12))
    words[n - 1 :: n] = [rng.choice([*JAPANESE, "12", "--", "٣"]) for _ in words[n - 1 :: n]]
    return Case({"N": n}, " ".join(spoiled(rng, words, [*PLAIN, "½", "(x)", "3.5", "ー"])))


@maker("count:keywords_multiple", into=MAKERS)
def _(rng: random.Random) -> Case:
    pairs = [("fish", "Fish"), ("dawn", "DAWN"), ("blue lamp",) * 2, ("É", "é"), ("C++", "c++"), ("pine", "Pine,")]
    chosen = [*rng.sample(pairs, 4), rng.choice((("ice", "iced"), ("nice", "nice"), ("aa", "aa aa"), ("in", "In")))]
    rng.shuffle(chosen)
    words: list[str] = []
    for (_, form), times in zip(chosen, (1, 2, 3, 5, 7), strict=True):
        words += [form] * (times // 2 if form == "aa aa" else times) + ["aa"] * (form == "aa aa" and times % 2)
    words = spoiled(rng, words, ["fish", "pineapple", "lamp", "aaa"])
    rng.shuffle(words)
    padded = [f" {word} " if rng.random() < 0.2 else word for word, _ in chosen]
    return Case({f"keyword{n}": word for n, word in enumerate(padded, start=1)}, " ".join(words))


@maker("ratio:stop_words", into=MAKERS)
def _(rng: random.Random) -> Case:
    stops = ["the", "The", "of", "is", "and", "don't", "it's", "I", "over-and-above"]
    words = [rng.choice(stops) if rng.random() < 0.4 else rng.choice(PLAIN) for _ in range(rng.randint(2, 12))]
    share = 100 * sum(word in stops for word in words) / len(words)
    percentage = rng.choice((share, share, int(share), int(share) + 1, round(share) + rng.randint(-9, 9)))
    return Case({"percentage": min(100, max(0, percentage))}, dressed(rng, words))


def sentences_that_end(rng: random.Random, ends: list[str]) -> str:
    rng.shuffle(ends)
    return " ".join(sentence(some_words(rng, rng.randint(2, 3)), end) for end in ends)


@maker("ratio:sentence_type", into=MAKERS)
def _(rng: random.Random) -> Case:
    questions = rng.randint(0, 3)
    ends = ["."] * max(0, 2 * questions + off_by_one(rng)) + ["?"] * questions + ["!"] * rng.randint(0, 2)
    return Case({}, sentences_that_end(rng, ends + rng.choice(([], [":"], ['."'], ["..."], ["?!"]))))


@maker("ratio:sentence_balance", into=MAKERS)
def _(rng: random.Random) -> Case:
    ends = [end for end in ".?!" for _ in range(rng.randint(1, 2) if rng.random() < 0.15 else 2)]
    return Case({}, sentences_that_end(rng, ends + rng.choice(([], [], [], [")"], ["!?"]))))


@maker("ratio:overlap", into=MAKERS)
def _(rng: random.Random) -> Case:
    reference = rng.choice(SENTENCES)
    start = rng.randrange(len(reference))
    text = reference[start : start + rng.randint(1, 30)] + rng.choice(("", " " + " ".join(some_words(rng, 2))))
    runs, known = ({whole[at : at + 3] for at in range(len(whole) - 2)} for whole in (text, reference))
    share = 100 * len(runs & known) / max(1, len(runs))
    percentage = rng.choice((share, int(share), share - 2, share + 2, int(share) - 2, int(share) + 3, 50))
    return Case({"reference_text": reference, "percentage": min(100, max(0, percentage))}, text)


@maker("ratio:sentence_words", into=MAKERS)
def _(rng: random.Random) -> Case:
    length = rng.randint(8, 16)
    made = []
    for _ in range(3 + off_by_one(rng, 0.15)):
        words = sentence(some_words(rng, 4), "")[: max(1, length + off_by_one(rng, 0.1))].rstrip()
        made.append(words.ljust(length - 1, "x") + rng.choice(".?!"))
    return Case({}, rng.choice((" ", "\n", "  ")).join(made))


@maker("words:alphabet", into=MAKERS)
def _(rng: random.Random) -> Case:
    start, number = rng.randrange(26), rng.randint(1, 30)
    words = [rng.choice((PLAIN, OTHERS))[(start + at) % 26] for at in range(number)]
    words = [rng.choice((word, word, word.capitalize(), f"({word})", f"{word}'s")) for word in words]
    kelvin = [word.replace("k", "\u212a", 1) if word[0] == "k" and rng.random() < 0.5 else word for word in words]
    return Case({}, dressed(rng, spoiled(rng, kelvin, ["7up", "éclair", "İnci", "apple"])))


@maker("words:vowel", into=MAKERS)
def _(rng: random.Random) -> Case:
    pools = ["sand lamb Cedar heat grand", "moss pond rock bold stolen", "mist ridge inlet still", "urn dusk lush gulf"]
    words = [word for pool in rng.sample(pools, 2) for word in rng.sample(pool.split(), 3)]
    rng.shuffle(words)
    return Case({}, dressed(rng, words) + rng.choice(("", "", "", "\n", "\ninlet", " É", " İs", "\u2028")))


@maker("words:consonants", into=MAKERS)
def _(rng: random.Random) -> Case:
    good = "stone Bright thrill sharp-edged MIST x-ray's drift ferns, «north» rhythm cost1 a.bcd".split()
    words = [rng.choice(good) for _ in range(rng.randint(1, 8))]
    return Case({}, " ".join(spoiled(rng, words, ["a", "river", "s-t", "bé", "ocean.", "--", "éstéé"])))


@maker("words:palindrome", into=MAKERS)
def _(rng: random.Random) -> Case:
    words = [rng.choice(PALINDROMES) for _ in range(rng.randint(9, 13))] + some_words(rng, 3)
    rng.shuffle(words)
    return Case({}, dressed(rng, words))


@maker("words:prime_lengths", into=MAKERS)
def _(rng: random.Random) -> Case:
    good = [*"we sea stone harbour lighthouses don't it's e\u0301te\u0301 *to* --".split(), "x" * 97]
    words = [rng.choice(good) for _ in range(rng.randint(1, 6))]
    return Case({}, dressed(rng, spoiled(rng, words, ["I", "four", "sextet", "a" * 101, "eighteen", "well-made"])))


@maker("words:start_verb", into=MAKERS)
def _(rng: random.Random) -> Case:
    starts = "Write Read Take Turn Run Walk Answer Running Built Is Do Can Left Letters The A I Boats Mill Dance 12"
    first = rng.choice([*starts.split(), "* Write", "- Walk", '"Stay', "(Go)", "Don't", "Cannot", "Let's", "Write."])
    following = "a letter|two boats|on|the road|is short|:|, she said|about it|him alone|n't".split("|")
    return Case({}, f"{first} {rng.choice(following)} {rng.choice(('', prose(rng, 1, 1)))}".strip())


@maker("words:repeats", into=MAKERS)
def _(rng: random.Random) -> Case:
    times = rng.randint(1, 4)
    form = rng.choice(PLAIN)
    words = [rng.choice((form, form.upper(), f"{form},", f"*{form}*")) for _ in range(times)] + some_words(rng, 4)
    rng.shuffle(words)
    return Case({"small_n": near(rng, times)}, dressed(rng, words))


@maker("words:odd_even_syllables", into=MAKERS)
def _(rng: random.Random) -> Case:
    turns = [ODD_SYLLABLES[:-1], EVEN_SYLLABLES]
    rng.shuffle(turns)
    words = [rng.choice(turns[at % 2]) for at in range(rng.randint(1, 9))]
    return Case({}, dressed(rng, spoiled(rng, words, [*PLAIN, "7", "X1", "straße", "z" * 45 + "a"])))


@maker("words:last_first", into=MAKERS)
def _(rng: random.Random) -> Case:
    links = [*spoiled(rng, some_words(rng, rng.randint(1, 4)), PLAIN), rng.choice(PLAIN)]
    chain = [[one, *some_words(rng, 2), after] for one, after in pairwise(links)]
    if chain and rng.random() < 0.35:
        rng.choice(chain)[-1] = rng.choice(("apple", "pier's"))
    ends = (".", "!", "?", '."', "...", " .", ".)")
    made = [rng.choice(("", "", "", '"', "(")) + sentence(words, rng.choice(ends)) for words in chain]
    return Case({}, " ".join(made) or ".")


@maker("words:paragraph_last_first", into=MAKERS)
def _(rng: random.Random) -> Case:
    lines = []
    for _ in range(rng.randint(1, 4)):
        word = rng.choice(PLAIN)
        last = rng.choice([*[word] * 4, word.upper(), f"*{word}*", f"{word}-", f"{word}'s", rng.choice(PLAIN)])
        lines.append(rng.choice((sentence([word, *some_words(rng, 3), last]), sentence([word]), "", "---", " \t")))
    return Case({}, "\n".join(lines).strip() or "Tide.")


@maker("words:no_consecutive", into=MAKERS)
def _(rng: random.Random) -> Case:
    words = [rng.choice(PLAIN)]
    for _ in range(rng.randint(0, 9)):
        words.append(rng.choice([word for word in PLAIN + OTHERS if word[0] != words[-1][0]]))
    words = [rng.choice((word, word, word.capitalize(), f"'{word}'")) for word in words]
    if rng.random() < 0.4:
        at = rng.randrange(len(words))
        words.insert(at, words[at][:1] + rng.choice(("", "x", "-")))
    return Case({}, dressed(rng, spoiled(rng, words, ["apple", "Amber", "12", "1st", "éa", "--", "tide"])))


@maker("words:keywords_specific_position", into=MAKERS)
def _(rng: random.Random) -> Case:
    n, m = rng.randint(1, 3), rng.randint(1, 4)
    texts = [some_words(rng, rng.randint(3, 5)) for _ in range(n + rng.randint(0, 1))]
    forms = {"river": "river", "River": "river,", " can ": "cannot", "n't": "don't", "it": "(it)"}
    keyword, form = rng.choice(list(forms.items()))
    texts[n - 1].insert(m - 1, form)
    asked = {"keyword": keyword, "n": max(1, n + off_by_one(rng, 0.2)), "m": m + (keyword == "n't")}
    asked["m"] = max(1, asked["m"] + off_by_one(rng, 0.2))
    return Case(asked, " ".join(sentence(words, rng.choice((".", "!", "?"))) for words in texts))


@maker("words:words_position", into=MAKERS)
def _(rng: random.Random) -> Case:
    keyword = rng.choice(("river", "River", " tide ", "it", "can"))
    form = keyword.strip() if rng.random() < 0.8 else rng.choice((keyword.strip().upper(), "tide", "cannot"))
    first = rng.choice(("The", "Old", "(", "")) if rng.random() < 0.3 else "The"
    middle = some_words(rng, rng.randint(0, 3)) if rng.random() < 0.9 else ["stop. And then"]
    last = rng.choice(("flows", "ebbs", "ebbs", "don't", "")) + rng.choice(
        (".", "!", "", " ./", "...", ' ."', " ^_", ")")
    )
    return Case({"keyword": keyword}, " ".join([first, form, *middle, form, last]).strip())


@maker("sentence:alliteration_increment", into=MAKERS)
def _(rng: random.Random) -> Case:
    made, length = [], rng.choice((0, 2, 3))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(26)
        row = [rng.choice((PLAIN[at], OTHERS[at], f'"{PLAIN[at]}"')) for _ in range(max(0, length))]
        row += [PLAIN[(at + 5) % 26], *([PLAIN[(at + 9) % 26]] * 2 if rng.random() < 0.2 else []), "--"]
        made.append(sentence(row[: rng.randint(len(row) - 1, len(row))], rng.choice((".", "!", "?"))))
        length = length + rng.choice((1, 2, 2, 0)) if length else 2
    return Case({}, " ".join(made))


@maker("sentence:keyword", into=MAKERS)
def _(rng: random.Random) -> Case:
    n = rng.randint(1, 4)
    texts = [some_words(rng, rng.randint(2, 4)) for _ in range(n + rng.randint(0, 1))]
    word = rng.choice(("river", "River", "C++", "old mill", "(x)", "ſ", "é"))
    forms = (
        word,
        word,
        word,
        word.upper(),
        f"*{word}*",
        f"{word}-side",
        f"{word}s",
        f"{word}_1",
        f"a{word}",
        f"{word}'s",
    )
    texts[n - 1].insert(rng.randrange(3), rng.choice(forms))
    asked = {"word": word, "N": max(1, n + off_by_one(rng, 0.25))}
    return Case(asked, " ".join(sentence(words, rng.choice((".", "!", "?"))) for words in texts))


@maker("sentence:increment", into=MAKERS)
def _(rng: random.Random) -> Case:
    step, length, made = rng.randint(0, 3), rng.randint(1, 3), []
    for _ in range(rng.randint(1, 4)):
        words = (
            spoiled(rng, some_words(rng, length), ["--", "well-made", "it's"])
            if rng.random() < 0.3
            else some_words(rng, length)
        )
        made.append(sentence(words, rng.choice((".", "!", "?", " ."))))
        length += step
    return Case({"small_n": step}, " ".join(made))
