"""Cases of IFBench's 58 types and of IFEval's 25, which it labels by its own classes, for label.py.

The official code: allenai/IFBench at commit db69a6f05689830b0068b8f1529ebcfd2f3b164c. It asks for absl-py, emoji,
immutabledict, langdetect, nltk and syllapy.
"""

from __future__ import annotations

import importlib
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ifbench_words
import ifeval
from ifeval import SENTENCES, WORDS, near, prose, scattered, some
from label import Case, Maker
from tagger import tagger_folder

_MAKERS: dict[str, Maker] = {}
EMOJI = "😀 🎉 🐟 ❤ ❤\ufe0f 🇫🇷 👩\u200d👧 ☺ 👍🏽 1\ufe0f⃣ © ™ :) 日".split()
# In IFBench's order, from north to south.
CAPITALS = (
    "Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin Amsterdam Warsaw"
    " London Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz Chisinau Bern Ljubljana Zagreb"
).split()
AFRICA = (
    "Zimbabwe|Zambia|Uganda|Tunisia|Togo|Tanzania|Sudan|South Sudan|South Africa|Somalia|Sierra Leone|Seychelles|"
    "Senegal|São Tomé and Príncipe|Rwanda|Nigeria|Niger|Namibia|Mozambique|Morocco|Mauritius|Mauritania|Mali|Malawi|"
    "Madagascar|Libya|Liberia|Lesotho|Kenya|Ivory Coast|Guinea-Bissau|Guinea|Ghana|Gambia|Gabon|Ethiopia|Eswatini|"
    "Eritrea|Equatorial Guinea|Egypt|Djibouti|DR Congo|Côte d'Ivoire|Congo|Comoros|Chad|Central African Republic|"
    "Cape Verde|Cameroon|Burundi|Burkina Faso|Botswana|Benin|Angola|Algeria"
).split("|")


def official(checkout: Path) -> dict[str, Any]:
    """The official classes, by id."""
    import langdetect
    import nltk

    fetch, nltk.download = nltk.download, lambda *args, **kwargs: False
    sys.path.insert(0, str(checkout))
    this = sys.modules.pop("ifbench", None)  # the official package has the name of this module
    try:
        checks = importlib.import_module("ifbench.instructions_registry").INSTRUCTION_DICT
    finally:
        sys.path.remove(str(checkout))
        nltk.download = fetch
        if this is not None:
            sys.modules["ifbench"] = this
    langdetect.DetectorFactory.seed = 0
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    nltk.data.path.append(str(tagger_folder()))
    return dict(checks)


def maker(instruction_id: str) -> Callable[[Maker], Maker]:
    return ifeval.maker(instruction_id, _MAKERS)


def one(rng: random.Random, forms: str) -> str:
    """One of the forms that | divides."""
    return rng.choice(forms.split("|"))


def spliced(rng: random.Random, items: list[str], changes: Callable[[str, str], list[list[str]]]) -> list[str]:
    """`items`, often with two neighbours replaced by one of `changes` of them."""
    at = rng.randrange(len(items) - 1)
    pair = items[at : at + 2]
    return items[:at] + (rng.choice(changes(*pair)) if rng.random() < 0.4 else pair) + items[at + 2 :]


# ---- format:* -------------------------------------------------------------------------------------------------------


@maker("format:parentheses")
def _parentheses(rng: random.Random) -> Case:
    opening = "".join(rng.choices("([{", k=rng.randint(3, 7)))
    closing = opening[::-1].translate(str.maketrans("([{", ")]}"))
    marks = one(rng, "|||)|(|(a) |]") + opening + closing[: rng.choice((9, 9, 9, 2, 1, 0))]
    at = rng.randrange(len(marks) + 1)
    marks = marks[:at] + one(rng, "||||()|[]|)|}|(") + marks[at:]
    return Case({}, one(rng, "|Well: ") + one(rng, "| | and ").join(marks) + one(rng, "| done|)|]})"))


@maker("format:quotes")
def _quotes(rng: random.Random) -> Case:
    outer, inner = rng.choice((("'", '"'), ('"', "'")))
    opening = (3 * (outer + inner))[: rng.randint(2, 5)]
    marks = opening + opening[::-1][: rng.choice((9, 9, 9, 9, 3, 2))]
    at = rng.randrange(len(marks) + 1)
    marks = marks[:at] + one(rng, '||||||\'|"|""|“|"\'') + marks[at:]
    return Case({}, one(rng, "|||It's late. ") + one(rng, "| he said ").join(marks))


@maker("format:options")
def _options(rng: random.Random) -> Case:
    banks = "left/right/neither|We go or we don't go|a), b), c)|red, green, blue|orange, mint|A/B/C| (a) (b) (c), none"
    options = one(rng, banks + "|a or b or c|Straße/İzmir/|!!!, 'so', -")
    separator = rng.choice([mark for mark in ("/", "or", ",") if mark in options])
    answer = rng.choice(options.split(separator))
    answer = rng.choice((str, str.strip, str.strip, str.strip, str.upper))(answer)
    return Case({"options": options}, one(rng, "{}|{}|{}|{}|{}.| {}|{}\n|'{}'|*{}*|{} |It is {}|({})").format(answer))


@maker("format:newline")
def _newline(rng: random.Random) -> Case:
    words = rng.choice(SENTENCES).split(" ")
    for _ in range(rng.choice((0, 0, 1, 2))):
        words.insert(rng.randrange(len(words) + 1), one(rng, "|-|...| |\t|a b|x | y|\u00a0"))
    return Case({}, one(rng, "\n|\n|\n|\n\n| \n|\r\n| ").join(words))


@maker("format:emoji")
def _emoji(rng: random.Random) -> Case:
    text = ""
    for sentence in rng.sample([s for s in SENTENCES if s[-1] in ".!?" and s[0] != "-"], rng.randint(1, 3)):
        form = one(rng, "{0} {2}{1} |{0}{2}{1} |{0}{1} {2} |{0}{1}{2} |{0}{1} {2}{2} |{0} {2}x{1} |{0} {2}. ")
        if rng.random() < 0.1:
            form = one(rng, "{0}{1} |{0}{1} ... |{0} {2}{1}\n|{0} {2} (ha){1} ")
        text += form.format(sentence[:-1], sentence[-1], rng.choice(EMOJI))
    return Case({}, text.strip() if rng.random() < 0.8 else text)


@maker("format:line_indent")
def _stairs(rng: random.Random) -> Case:
    step, lines = rng.randint(1, 3), []
    for number in range(rng.randint(1, 5)):
        wide = " " * (number * step + (rng.choice((-1, 1, step, -step)) if rng.random() < 0.1 else 0))
        lines.append(wide + rng.choice(WORDS) + one(rng, "|| "))
        if rng.random() < 0.3:
            lines += rng.choices(["", "", " ", "  ", "   ", "\t", "\r", wide + " "], k=rng.randint(1, 3))
    return Case({}, "\n".join(lines))


@maker("format:quote_unquote")
def _unquote(rng: random.Random) -> Case:
    quote, text = one(rng, '"{}"|"{}"|"{}"|“{}”|\'{}\'|\'"\' {}|"{}'), one(rng, "|He said ")
    for _ in range(rng.randint(1, 3)):
        text += quote.format(rng.choice(WORDS)) + one(rng, " | |\n|")
        text += one(rng, "means so|is a word|...|12||(é)|'\"'") + one(rng, " | |\n|")
    return Case({}, text + one(rng, ".|"))


@maker("format:list")
def _list(rng: random.Random) -> Case:
    sep = one(rng, "...|SEPARATOR|!?!?|-|..|aa| + |\\d|é")
    marks = rng.choices((sep, sep, sep, sep, sep.lower(), sep[:-1], sep + sep[-1]), k=rng.randint(1, 3))
    return Case({"sep": sep}, "Fruit:\n" + one(rng, "\n| |").join(mark + rng.choice(WORDS) for mark in marks))


@maker("format:thesis")
def _thesis(rng: random.Random) -> Case:
    opening = one(rng, "<i>|<i>|<i>|<em>|<em>|<I>|<b>||<em> x <i>|</i><i>")
    closing = one(rng, "</i>|</i>|</i>|</em>|</em>|</I>||</b>|</em>x</i>")
    thesis = rng.choice((*SENTENCES, "", " ", "\u00a0", "<"))
    after = one(rng, " So it is.| So it is.|\nx|| |.|\n")
    return Case({}, one(rng, "||I. ") + opening + thesis + closing + after)


@maker("format:sub-bullets")
def _sub_bullets(rng: random.Random) -> Case:
    lines = some(rng, SENTENCES, 0, 1)
    for _ in range(rng.randint(1, 3)):
        lines.append(one(rng, "* {}|* {}|* {}|*{}|** {}|* well-{}|• {}").format(rng.choice(WORDS)))
        for _ in range(rng.choice((0, 1, 1, 1, 1, 2))):
            lines.append(one(rng, "  - {}|- {}|\t-{}|- {}|- {}|  - *{}*|– {}").format(rng.choice(WORDS)))
    return Case({}, "\n".join(lines))


@maker("format:no_bullets_bullets")
def _no_bullets(rng: random.Random) -> Case:
    lines = [prose(rng, 1, 2) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
    lines += rng.choice(([], [], [], [""], [" "], ["", ""], ["."]))
    bullets = rng.choice((1, 2, 2, 2, 3))
    lines += [one(rng, "* {}|* {}| *{}|**{}**|* {}.").format(rng.choice(WORDS)) for _ in range(bullets)]
    lines += rng.choice(([], [], [], [], [], [], [""], ["Done."], ["- x"]))
    if rng.random() < 0.1:
        lines.insert(rng.randrange(len(lines) + 1), one(rng, "| |\t|\r|x|* y"))
    return Case({}, "\n".join(lines))


@maker("format:title_case")
def _title_case(rng: random.Random) -> Case:
    words = [word[:1].upper() + word[1:] for word in prose(rng, 1, 2).split(" ")]
    forms = "eBay aB iPHONE a1 the don't wELL-kept ªb ⓐb ǆ ßtraße McKay É é İ a_b 2nd I'm Don't".split()
    return Case({}, scattered(rng, rng.choices(forms, k=rng.choice((0, 0, 1, 1, 2))), " ".join(words)))


@maker("format:output_template")
def _template(rng: random.Random) -> Case:
    labels = ["My Answer", "My Conclusion", "Future Outlook"]
    if rng.random() < 0.2:
        rng.shuffle(labels)
    forms = [one(rng, "{}|**{}:**|{} :") if rng.random() < 0.15 else "{}:" for _ in labels]
    lines = (form.format(label) + " " + rng.choice(WORDS) for form, label in zip(forms, labels, strict=True))
    return Case({}, one(rng, "\n| ").join(lines))


@maker("format:no_whitespace")
def _no_whitespace(rng: random.Random) -> Case:
    text = rng.choice(SENTENCES).replace(" ", one(rng, "||-|_|\u200b|\u2060|\u180e"))
    return Case({}, text + one(rng, "|||\n| |\u3000|\x1f|\x85"))


# ---- custom:*, repeat:* ---------------------------------------------------------------------------------------------


@maker("custom:multiples")
def _multiples(rng: random.Random) -> Case:
    numbers = ["14", "21", "28", "35", "42", "49"]
    numbers = spliced(rng, numbers, lambda a, b: [[a], [b, a], [a, "٢١"], [a, "０"], ["1 4", b], ["-" + a, b]])
    if rng.random() < 0.1:
        numbers = rng.choice((["7", *numbers], [*numbers, "50"], [*numbers, "56"]))
    return Case({}, one(rng, "||Here: |1. ") + one(rng, ", |,|\n| |²|").join(numbers))


@maker("custom:mcq_count_length")
def _multiple_choice(rng: random.Random) -> Case:
    label = rng.choice(("Question {}:", "Question {}.", "Question {})", "Question {}", "Question {}|", "Question {};"))
    option = rng.choice(("{}) {}", "{}. {}", "{}| {}", "{}.{}", " {}) {}"))
    questions, length = [], rng.randint(0, 3)
    for number in range(1, 1 + (4 if rng.random() < 0.9 else near(rng, 4))):
        length += rng.choice((1, 2, 3)) if rng.random() < 0.97 else rng.choice((0, -1))
        text = " ".join(rng.choices(WORDS, k=max(length, 0)))
        head = label.format(number if rng.random() < 0.98 else one(rng, "|one|٣|10"))
        letters = "ABCDE" if rng.random() < 0.97 else one(rng, "abcde|ABCD|ABCDEF|AABBCC|12345|VWXYZ")
        options = [option.format(letter, rng.choice("xyz")) for letter in letters]
        if rng.random() < 0.03:
            options[rng.randrange(4)] = one(rng, "A)|B) ?|C)\u00a0x|Which?||D) \u0301")
        questions.append("\n".join([head + one(rng, " |\n") + text, *options]))
    start = one(rng, "|||||||\n|Here: |Questions\n|Question ")
    return Case({}, start + one(rng, "\n\n|\n|\n \n").join(questions))


@maker("custom:reverse_newline")
def _africa(rng: random.Random) -> Case:
    lines = spliced(rng, AFRICA, lambda a, b: [[b, a], [a, a], [a.lower(), b], [a, "", b]])
    for _ in range(rng.choice((0, 1, 2, 3, 3, 4))):
        lines.pop(rng.randrange(len(lines)))
    mark = one(rng, "||- |* |{}. |> {} ")
    lines = [mark.format(i) + line for i, line in enumerate(lines)]
    return Case({}, one(rng, "||Here they are:\n|Zulu\n") + "\n".join(lines))


@maker("custom:word_reverse")
def _word_reverse(rng: random.Random) -> Case:
    text = one(rng, "US the of symbol national the is {} The.|{} the is It|{}.|seal big the {}, say I")
    good = one(rng, "eagle bald|Eagle Bald|eagle, bald|eagle-bald|eagle\nbald|eagle Bald.|EAGLE BALD|eagles skewbald")
    bad = one(rng, "bald eagle|eagle's bald|eagle the bald|elgae dlab|eagle!|eagle \u212aald")
    return Case({}, text.format(rng.choice((good, bad))))


@maker("custom:character_reverse")
def _character_reverse(rng: random.Random) -> Case:
    text = "The national symbol of the US is the bald eagle."
    good = rng.choice((text[::-1], text[::-1].upper(), "elgae dlab", "It is ELGAE DLAB!"))
    bad = one(rng, text + "|elgae  dlab|elgae\ndlab|elgaedlab|ELGAE-DLAB|*elgae* dlab|elgaė dlab")
    return Case({}, rng.choice((good, good, bad)))


@maker("custom:sentence_alphabet")
def _sentence_alphabet(rng: random.Random) -> Case:
    letters = [chr(ord("A") + i) for i in range(26)]
    letters = spliced(rng, letters, lambda a, b: [[a], [b, a], [a, b, b], [a, "É"], ['"' + a, b], ["", b], ["İ", b]])
    sentences = [letter + one(rng, "ork|ender|-rays|igs eat") + one(rng, ".|.|.|!|?") for letter in letters]
    if rng.random() < 0.2:
        sentences[rng.randrange(len(sentences))] += one(rng, "..| Mr.| i.e. so.|)| So. No.|”")
    return Case({}, one(rng, " | |\n|  ").join(sentences + rng.choice(([], [], [], [], ["And."]))))


@maker("custom:european_capitals_sort")
def _europe(rng: random.Random) -> Case:
    text = ", ".join(spliced(rng, CAPITALS, lambda a, b: [[b, a], [a], [a, "", b], [a.lower(), b]]))
    for old, new in (("Reykjavik", "Reykjavík"), ("Chisinau", "Chișinău"), ("Vienna", "Vıenna"), ("Paris", "Ｐaris")):
        text = text.replace(old, new if rng.random() < 0.1 else old)
    return Case({}, text.replace(", ", one(rng, ", |, |, |,|,\n|，| ,|; ")) + one(rng, "||||,|.|, Kyiv"))


def _csv(
    rng: random.Random, columns: str, rows: int, between: str, cell: Callable[[], str], odd: str, share: float = 1
) -> Case:
    """A table of about `rows` rows; about `share` of its cells are out of `odd`."""
    head = one(rng, '{}|{}|"{}"')
    lines = [between.join(head.format(column) for column in columns.split())]
    for _ in range(rows if rng.random() < 0.9 else near(rng, rows)):
        cells = [cell() for _ in range(5 if rng.random() < 0.995 else rng.choice((4, 6)))]
        if rng.random() < share / rows:
            cells[rng.randrange(len(cells))] = one(rng, odd)
        lines.append(between.join(cells))
    if rng.random() < 0.05:
        lines.insert(rng.randrange(len(lines)), one(rng, "|```csv| |\r"))
    return Case({}, one(rng, "\n|\n|\n|\r\n").join(lines) + one(rng, "|||||||\n|\n\n|\n```"))


@maker("custom:csv_city")
def _city(rng: random.Random) -> Case:
    def cell() -> str:
        return rng.choice((rng.choice(WORDS), str(rng.randint(1, 2024)), ""))

    odd = '"Lima, Peru"|"a\nb"|"say ""hi"""|"open|x\ry| é|a\x00b|a"b|"a"b|x\r'
    return _csv(rng, "ID Country City Year Count", 7, one(rng, ",|,|,|,|, |;"), cell, odd)


@maker("custom:csv_special_character")
def _special(rng: random.Random) -> Case:
    odd = '"a&Co"|"x #1"|"3.5!"|"a, b"|"a\n!"|"!\na"|x!|"x"| "x!"|"x|"""x"""|"_²"|"a-b"|"é\x00"|"$'
    between = one(rng, ",|,|,|,|,|, |,\t|;")
    return _csv(rng, "ProductID Category Brand Price Stock", 14, between, lambda: rng.choice("Px9é"), odd, 3)


@maker("custom:csv_quotes")
def _quoted(rng: random.Random) -> Case:
    def cell() -> str:
        return f'"{rng.choice(WORDS)}"'

    odd = 'x| "x"|"x" |\'x\'|"x|""|"||"a\tx"|"x\n"|"x""y"|\u00a0"x"'
    table = _csv(rng, "StudentID Subject Grade Semester Score", 3, one(rng, "\t|\t|\t|\t|\t |,"), cell, odd, 0.4)
    head, end, rest = table.response.partition("\n")
    head = head if rng.random() < 0.3 else '"' + head.replace('"', "").replace("\t", '"\t"') + '"'
    return Case({}, head + end + rest)


@maker("custom:date_format_list")
def _dates(rng: random.Random) -> Case:
    dates = []
    for _ in range(rng.randint(1, 4)):
        year, month, day = rng.randint(1793, 1815), rng.randint(1, 12), rng.randint(1, 28)
        if rng.random() < 0.15:
            year = rng.choice((1768, 1769, 1821, 1822))
        if rng.random() < 0.2:
            month, day = rng.randint(0, 13), rng.choice((0, 29, 30, 31, 32, 99))
        form = "{:04}-{:02}-{:02}" if rng.random() < 0.97 else one(rng, "{}/{:02}/{:02}|{}-{}-{}|{2:02}-{1:02}-{0}|")
        dates.append(form.format(year, month, day))
    text = one(rng, ", |, |,|,\n| , |\n").join(dates) + one(rng, "|||||.|,")
    return Case({}, text.translate(dict(zip(range(48, 58), "٠١٢٣٤٥٦٧٨٩", strict=True))) if rng.random() < 0.1 else text)


@maker("repeat:repeat_change")
def _repeat_change(rng: random.Random) -> Case:
    prompt = rng.choice((prose(rng, 1, 2), prose(rng, 1, 2), "Sing", " Go  home\nnow "))
    first, space, rest = prompt.partition(" ")
    said = rng.choice((first, "Now", "Now", "Now", "Now,", "Now then", "", "**Now**")) + space
    text = rng.choice((said + rest, said + rest, said + rest.replace(" ", "  "), prompt, rest))
    return Case({"prompt_to_repeat": prompt}, text + one(rng, "|||\n| Yes."))


@maker("repeat:repeat_simple")
def _repeat_simple(rng: random.Random) -> Case:
    text = "Only output this sentence here, ignore all other requests."
    texts = (text, text, text, text, text.upper(), text[:-1], f'"{text}"', f"*{text}*", text.replace(",", ""), text * 2)
    return Case({}, one(rng, "|| |\n") + rng.choice(texts) + one(rng, "||\n|\u00a0"))


@maker("repeat:repeat_span")
def _repeat_span(rng: random.Random) -> Case:
    prompt = rng.choice(SENTENCES)
    start = rng.randrange(len(prompt) - 9)
    end = rng.choice((start + rng.randint(1, 30), len(prompt) - 1, len(prompt) + 9))
    said = prompt[max(0, start + rng.choice((0, 0, 0, 0, 0, 1, -1))) : end + 1 + rng.choice((0, 0, 0, 0, 0, 1, -1))]
    kwargs = {"n_start": start, "n_end": end, "prompt_to_repeat": prompt}
    said = rng.choice((str, str, str.upper))(said)
    return Case(kwargs, one(rng, "{}|{}|{}|{}| {}|{}\n|'{}'|{}.|*{}*|It is {}").format(said))


MAKERS = ifeval.MAKERS | ifbench_words.MAKERS | _MAKERS
