"""M-IFEval's Japanese types, each as lightblue-tech/M-IFEval checks it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal

from ...arguments import Count, Kind, Pattern, Phrase, Request, expected
from ...registry import package
from ...text.patterns import compiled, compiles
from ...text.scan import up_to
from .morphemes import Morpheme, is_noun, morphemes
from .shared import NTH_PARAGRAPH_AGREES, RELATIONS, has_title, m_ifeval, nth_paragraph_of

JapaneseRelation = Literal["以上", "未満"]
with_janome = package("janome")

_OPTIONS = ("はい、そうです。", "いいえ、違います。", "どちらとも言えません。")
_POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
_BULLET = re.compile(r"^[^\S\n]*・[^・].*", re.MULTILINE)
_NUMBERED = re.compile(r"^[^\S\n]*\d+\.\s.*", re.MULTILINE)
_HIGHLIGHT = re.compile(r"《([^\n《》]*)》")
_KANJI = re.compile("[\u4e00-\u9faf]")
_KANJI_AND_READING = re.compile("[\u4e00-\u9faf]+(（[ぁ-ん]+）)?")
_HIRAGANA = re.compile("[ぁ-ゖ]")
_KATAKANA = re.compile("[ァ-ヺｦ-ﾟ]")
_END_MARKS = "。！？"
_DIGIT = re.compile(r"\d")


def _hiragana(value: Any, rules: str) -> str:
    # M-IFEval draws a letter where it is given none of these.
    if not isinstance(value, str) or len(value) != 1 or not "ぁ" <= value <= "ん":
        raise expected("one hiragana letter from ぁ to ん", value)
    return value


Hiragana = Annotated[str, Kind(_hiragana, "one hiragana letter", "の")]


def _morphemes(text: str) -> Iterator[Morpheme] | None:
    """The morphemes of `text`; None where janome gives up, at half a surrogate pair."""
    try:
        return morphemes(text)
    except UnicodeEncodeError:
        return None


@m_ifeval("ja:keywords:existence", needs=with_janome, examples={"keywords": ["夢"]})
def keywords_exist(text: str, keywords: list[Phrase]) -> bool:
    """Every one of `keywords` is a word of the response, as janome divides it."""
    left = set(keywords)
    if all(word in text for word in left):
        for morpheme in _morphemes(text) or ():
            left.discard(morpheme[0])
            if not left:
                return True
    return False


@m_ifeval("ja:keywords:forbidden_words", needs=with_janome, examples={"forbidden_words": ["雨"]})
def forbidden_words(text: str, forbidden_words: list[Phrase]) -> bool:
    """None of `forbidden_words` is a word of the response, as janome divides it."""
    found = _morphemes(text)
    banned = {word for word in forbidden_words if word in text}
    return found is not None and not (banned and any(morpheme[0] in banned for morpheme in found))


@m_ifeval("ja:keywords:frequency", needs=with_janome, examples={"keyword": "音"})
def keyword_frequency(text: str, keyword: Phrase, frequency: Count, relation: JapaneseRelation) -> bool:
    """`keyword` comes `frequency` `relation` times among the words of the response, as janome divides it."""
    found = _morphemes(text)
    if found is None:
        return False
    keyword = keyword.strip()
    number = text.count(keyword)  # as words, at most
    if number >= frequency:
        number = up_to(frequency, (True for morpheme in found if morpheme[0] == keyword))
    return RELATIONS[relation](number, frequency)


@m_ifeval("ja:keywords:letter_frequency")
def letter_frequency(text: str, letter: Hiragana, let_frequency: Count, let_relation: JapaneseRelation) -> bool:
    """`letter`, in hiragana or katakana, comes `let_frequency` `let_relation` times."""
    number = text.count(letter) + text.count(chr(ord(letter) + 96))
    return RELATIONS[let_relation](number, let_frequency)


@m_ifeval("ja:length_constraints:number_sentences")
def number_sentences(text: str, num_sentences: Count, relation: JapaneseRelation) -> bool:
    """`num_sentences` `relation` sentences, as ja_sentence_segmenter splits them."""
    return RELATIONS[relation](up_to(num_sentences + 1, _sentences(text)), num_sentences)


# Of what ja_sentence_segmenter normalizes, this bears on where a sentence ends.
_NORMAL = str.maketrans("｡！？（）｢｣", "。!?()「」")
_LINE_END = "\n\r\x0b\x0c\x1c-\x1e"
_DROPPED_SPACES = re.compile(f"(?<=[の。!?])[ \u3000]+(?=[{_LINE_END}])|(?<=[{_LINE_END}])[ \u3000]+(?=の)")
_QUOTED = re.compile("「[^「」]*」")
_IN_PARENTHESES = re.compile(r"\([^()]*\)")
_PROTECTED = str.maketrans("。!?", "   ")
_SENTENCE_END = re.compile("(?<!∯)[。!?](?!∯)")


def _sentences(text: str) -> Iterator[object]:
    """One item for each sentence."""
    text = _DROPPED_SPACES.sub("", text.strip().translate(_NORMAL))
    for line in _joined_lines(text):
        for opening, quoted in (("「", _QUOTED), ("(", _IN_PARENTHESES)):
            if opening in line:
                line = quoted.sub(lambda found: found[0].translate(_PROTECTED), line)
        yield from _SENTENCE_END.finditer(line)
        if line and not _SENTENCE_END.match(line, len(line) - 1):
            yield line


def _joined_lines(text: str) -> Iterator[str]:
    """The lines of `text`; one that ends with の, and holds more, goes on in the next."""
    pieces: list[str] = []
    open_, size = False, 0
    for line in text.splitlines():
        if pieces and not open_:
            yield "".join(pieces)
            pieces, size = [], 0
        pieces.append(line)
        size += len(line)
        open_ = size > 1 and (line.endswith("の") if line else open_)
    yield "".join(pieces)


@m_ifeval("ja:length_constraints:number_letters")
def number_letters(text: str, num_letters: Count, relation: JapaneseRelation) -> bool:
    """`num_letters` `relation` characters."""
    return RELATIONS[relation](len(text), num_letters)


@m_ifeval("ja:length_constraints:nth_paragraph_first_word", agree=NTH_PARAGRAPH_AGREES, examples={"first_word": "愛"})
def nth_first_word(text: str, num_paragraphs: Count, nth_paragraph: Count, first_word: Phrase) -> bool:
    """`num_paragraphs` paragraphs, divided by blank lines; the `nth_paragraph` begins with `first_word`."""
    paragraph = nth_paragraph_of(text, num_paragraphs, nth_paragraph).lstrip("「").lstrip("『")
    return paragraph.startswith(first_word.lower())


@m_ifeval("ja:detectable_content:postscript", examples={"postscript_marker": "追伸"})
def postscript(text: str, postscript_marker: Phrase) -> bool:
    """A postscript that starts with `postscript_marker`."""
    marker = postscript_marker.strip()
    return re.search(_POSTSCRIPTS.get(marker, re.escape(marker)), text, re.IGNORECASE) is not None


@m_ifeval("ja:detectable_format:number_bullet_lists")
def bullets(text: str, num_bullets: Count) -> bool:
    """Exactly `num_bullets` bullet points, each a line that starts with ・."""
    return up_to(num_bullets + 1, _BULLET.finditer(text)) == num_bullets


@m_ifeval("ja:detectable_format:number_numbered_lists")
def numbered(text: str, num_items: Count) -> bool:
    """Exactly `num_items` points of a numbered list, each a line that starts with a number and a full stop."""
    return up_to(num_items + 1, _NUMBERED.finditer(text)) == num_items


@m_ifeval("ja:detectable_format:constrained_response")
def constrained_response(text: str) -> bool:
    """Holds one of はい、そうです。 いいえ、違います。 どちらとも言えません。"""
    return any(option in text for option in _OPTIONS)


@m_ifeval("ja:detectable_format:number_highlighted_sections")
def highlights(text: str, num_highlights: Count) -> bool:
    """At least `num_highlights` passages in 《》."""
    found = (True for passage in _HIGHLIGHT.finditer(text) if passage[1].strip())
    return up_to(num_highlights, found) == num_highlights


def _section(spliter: str) -> str:
    return rf"第\d+{spliter.strip()}"


@m_ifeval(
    "ja:detectable_format:multiple_sections",
    agree=compiles("section_spliter", _section),
    examples={"section_spliter": "章"},
)
def sections(text: str, section_spliter: Pattern, num_sections: Count) -> bool:
    """At least `num_sections` sections, each begun by 第, a number and `section_spliter`."""
    section = compiled(_section(section_spliter))
    # The original counts what re.split returns, groups of the pattern included.
    return up_to(num_sections, section.finditer(text)) * (1 + section.groups) >= num_sections


@m_ifeval("ja:detectable_format:title")
def title(text: str) -> bool:
    """A title in 『』."""
    return has_title(text, "『", "』")


@m_ifeval("ja:combination:repeat_prompt")
def repeat_prompt(text: str, prompt_to_repeat: Request) -> bool:
    """The response begins with `prompt_to_repeat`, word for word."""
    return text.strip().startswith(prompt_to_repeat.strip())


@m_ifeval("ja:startend:end_checker", examples={"end_phrase": "他に何かございますか？"})
def ends_with(text: str, end_phrase: Phrase) -> bool:
    """The response ends with `end_phrase`."""
    return text.strip().strip("」』").endswith(end_phrase.strip().strip("」』"))


@m_ifeval("ja:startend:quotation")
def quotation(text: str) -> bool:
    """The whole response stands in 「」."""
    text = text.strip()
    return len(text) > 1 and text[0] == "「" and text[-1] == "」"


@m_ifeval("ja:startend:sentence_unified_end", examples={"ending": "です"})
def unified_end(text: str, ending: Phrase) -> bool:
    """Every sentence, up to 。 ！ or ？, ends with `ending`; what stands in 「」 or 『』 does not count."""
    return all(not piece or piece.endswith(ending) for piece in re.split(f"[{_END_MARKS}]", _without_quotes(text)))


def _without_quotes(text: str) -> str:
    for pair in ("「」", "『』"):
        text = "\n".join(_without(line, *pair) for line in text.split("\n")) if pair[0] in text else text
    return text


def _without(line: str, opening: str, closing: str) -> str:
    """`line` without what stands from an opening mark to the next closing one."""
    kept, start = [], 0
    while (at := line.find(opening, start)) >= 0 and (end := line.find(closing, at)) >= 0:
        kept.append(line[start:at])
        start = end + 1
    return "".join(kept) + line[start:]


@m_ifeval("ja:detectable_format:nominal_ending", needs=with_janome)
def nominal_endings(text: str, count: Count) -> bool:
    """At least `count` sentences, outside 「」 and 『』, whose last word is a noun, as janome sees it."""
    text = _without_quotes(text)
    found = _morphemes(text)
    marks = sum(map(text.count, _END_MARKS))  # as many endings, at most
    return found is not None and marks >= count and up_to(count, _nominal_endings(found)) == count


def _nominal_endings(found: Iterator[Morpheme]) -> Iterator[bool]:
    return (True for word, mark in pairwise(found) if mark[0] in _END_MARKS and is_noun(word))


@m_ifeval("ja:letters:furigana")
def furigana(text: str) -> bool:
    """Every run of kanji is followed by its reading in hiragana, in full-width parentheses."""
    return all(found[1] for found in _KANJI_AND_READING.finditer(text))


@m_ifeval("ja:letters:kanji")
def kanji(text: str, kanji_limit: Count, relation: JapaneseRelation) -> bool:
    """`kanji_limit` `relation` kanji."""
    return RELATIONS[relation](up_to(kanji_limit + 1, _KANJI.finditer(text)), kanji_limit)


@m_ifeval("ja:letters:no_hiragana")
def no_hiragana(text: str) -> bool:
    """No hiragana."""
    return _HIRAGANA.search(text) is None


@m_ifeval("ja:letters:hiragana_only")
def hiragana_only(text: str) -> bool:
    """No letters but hiragana."""
    return all("ぁ" <= letter <= "ん" or letter == "ー" or not _is_letter(letter) for letter in set(text))


@m_ifeval("ja:letters:no_katakana")
def no_katakana(text: str) -> bool:
    """No katakana."""
    return _KATAKANA.search(text) is None


@m_ifeval("ja:letters:katakana_only")
def katakana_only(text: str) -> bool:
    """No letters but katakana."""
    return all(
        "ァ" <= letter <= "ン" or letter == "ー" or "ｦ" <= letter <= "ﾟ" or not _is_letter(letter)
        for letter in set(text)
    )


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] == "L"


@m_ifeval("ja:letters:kansuuji")
def kansuuji(text: str) -> bool:
    """No digits: numbers are written in kanji."""
    return _DIGIT.search(text) is None


@m_ifeval("ja:punctuation:no_comma")
def no_comma(text: str) -> bool:
    """No 、"""
    return "、" not in text


@m_ifeval("ja:punctuation:no_period")
def no_period(text: str) -> bool:
    """No 。"""
    return "。" not in text
