"""Cases of M-IFEval's Japanese types."""

from __future__ import annotations

import functools
import random

import ifeval
import m_ifeval_texts as texts
from ifeval import near, some
from label import Case, Maker
from m_ifeval_makers import chosen, counted, ended, first_words, marked, of, prose, quoted, relation, titled

MAKERS: dict[str, Maker] = {}
maker = functools.partial(ifeval.maker, into=MAKERS)


def _word(rng: random.Random, word: str) -> str:
    forms = ("{}が", "{}、", "{}の", "と{}を", "{}", "{}", "{}中", "大{}", "「{}」", "{}\n", "\ud800{}", "{}{}")
    return rng.choice(forms).replace("{}", word)


@maker("ja:keywords:existence")
def _existence(rng: random.Random) -> Case:
    keywords = some(rng, texts.JA_WORDS, 1, 2)
    there = keywords[: rng.choice((len(keywords), len(keywords), len(keywords) - 1))]
    return Case({"keywords": keywords}, "。".join([*(_word(rng, word) for word in there), prose(rng, "ja", 1, 2)]))


@maker("ja:keywords:forbidden_words")
def _forbidden(rng: random.Random) -> Case:
    words = some(rng, texts.JA_WORDS, 1, 3)
    piece = _word(rng, rng.choice((words[0], rng.choice(texts.JA_WORDS))))
    return Case({"forbidden_words": words}, piece + rng.choice(("。", "", "は")) + prose(rng, "ja", 1, 2))


@maker("ja:keywords:frequency")
def _frequency(rng: random.Random) -> Case:
    word, number = rng.choice((*texts.JA_WORDS, " 夢 ")), rng.randint(1, 4)
    pieces = [_word(rng, word.strip()) for _ in range(near(rng, number))]
    kwargs = {"keyword": word, "frequency": number, "relation": relation(rng, "ja")}
    return Case(kwargs, rng.choice(("。", "と", "、")).join([*pieces, prose(rng, "ja", 1, 2)]))


@maker("ja:keywords:letter_frequency")
def _letter(rng: random.Random) -> Case:
    letter, text = rng.choice("ぁあかがしのるをんいゑ"), prose(rng, "ja") + rng.choice(("", "アンコール", "ﾉﾝ", "ヵ"))
    number = near(rng, text.count(letter) + text.count(chr(ord(letter) + 96)))
    return Case({"letter": letter, "let_frequency": number, "let_relation": relation(rng, "ja")}, text)


@maker("ja:length_constraints:number_sentences")
def _sentences(rng: random.Random) -> Case:
    pieces = rng.choices((*texts.SENTENCES["ja"], *texts.JA_BREAKS), k=rng.randint(1, 6))
    ends = ("", "", "\n", " \n", "\n\n", " ", "\u3000\r\n")
    kwargs = {"num_sentences": rng.randint(1, 7), "relation": relation(rng, "ja")}
    return Case(kwargs, "".join(piece + rng.choice(ends) for piece in pieces))


@maker("ja:length_constraints:number_letters")
def _length(rng: random.Random) -> Case:
    text = prose(rng, "ja")
    return Case({"num_letters": near(rng, len(text)), "relation": relation(rng, "ja")}, text)


@maker("ja:detectable_format:multiple_sections")
def _sections(rng: random.Random) -> Case:
    number, mark = rng.randint(1, 4), rng.choice(("章", "節", " 項 ", "(章|節)"))
    forms = ("第{}{}", "第{}{}", "第{}{}\n", "第 {}{}", "{}{}", "第{}の{}", "\u3000第{}{} ", "第１{}{}")
    pieces = [rng.choice(forms).format(i + 1, rng.choice((mark.strip(), "章"))) for i in range(near(rng, number))]
    return Case({"section_spliter": mark, "num_sections": number}, "夢。".join([*pieces, ""]) or "なし")


@maker("ja:startend:sentence_unified_end")
def _ends(rng: random.Random) -> Case:
    ending = rng.choice(("です", "ます", "だ"))
    good = ("夢{}。", "雨{}！", "音{}？", "「そうか。」と猫{}。", "『何！』『え？』{}。")
    others = ("「夢{}。", "鳥だった。", "{}。\n", "海{}", "『a」{}。", "「「x」y」{}。")
    pieces = rng.choices(rng.choice((good, good + others)), k=rng.randint(1, 3))
    return Case({"ending": ending}, "".join(pieces).replace("{}", ending))


@maker("ja:detectable_format:nominal_ending")
def _nominal(rng: random.Random) -> Case:
    number = rng.randint(1, 3)
    nouns = (
        "目の前に広がる海。",
        "忘れられない夏の日！",
        "静かな図書館？",
        "彼はABC。",
        "三つ。",
        "夢！？",
        "走る猫。。",
        "ｱｲ。",
    )
    others = (
        "海が広がる。",
        "「夢。」と言う。",
        "『完。』",
        "静かだ！",
        "夢",
        "夢\n。",
        "♪。",
        "\ud800。",
        "。",
        "「海。\n空。",
    )
    pieces = rng.choices(nouns, k=near(rng, number)) + some(rng, others, 0, 2)
    rng.shuffle(pieces)
    return Case({"count": number}, "".join(pieces) or "なし")


@maker("ja:letters:kanji")
def _kanji(rng: random.Random) -> Case:
    text = prose(rng, "ja", 1, 2) + rng.choice(("", "々〇", "㐀龯", "龰鿿", "一", "\uf900"))
    number = near(rng, sum("\u4e00" <= letter <= "\u9faf" for letter in text))
    return Case({"kanji_limit": number, "relation": relation(rng, "ja")}, text)


def _kana(text: str) -> list[str]:
    return [*text.split(" "), " ", "\n"]


maker("ja:length_constraints:nth_paragraph_first_word")(first_words)
maker("ja:detectable_content:postscript")(
    marked(
        "ja", ("P.S.", "P.P.S", "追伸", "P.P.S.", "(注)", " 追伸 "), ("p. s.", "p. p.\u00a0ſ", "ps", "追 伸", "注", "")
    )
)
maker("ja:detectable_format:number_bullet_lists")(
    counted("num_bullets", ("・{}", " ・{}", "・・{}", "・", "\n\n・{}", "\u3000・{}", "･{}", "* {}", "{}・x"))
)
maker("ja:detectable_format:number_numbered_lists")(
    counted("num_items", ("1. {}", "12.\t{}", "3.{}", "4.", " ５. {}", "6．{}", "\n7.\u3000{}", "x8. {}", "9.\n{}"))
)
maker("ja:detectable_format:number_highlighted_sections")(
    counted(
        "num_highlights", ("《{}》", "《 {} 》", "《》", "《 》", "《《{}》》", "《{}\nx》", "》{}《", "<<{}>>"), ""
    )
)
maker("ja:detectable_format:constrained_response")(
    chosen(
        ("はい、そうです。", "いいえ、違います。", "どちらとも言えません。"),
        (
            "はい、そうです",
            "いいえ。違います。",
            "はい、 そうです。",
            "どちらとも言えます。",
            "はい。",
            "いいえ、\n違います。",
        ),
    )
)
maker("ja:detectable_format:title")(
    titled("ja", "『{}』|『 {} 』|『』|『 』|「{}」|『{}\nx』|』{}『|『『{}』』|『』』|『『』|《{}》|{}".split("|"))
)
maker("ja:startend:end_checker")(
    ended(
        ("他に何かございますか？", "おわり", " 以上です。 ", "「続く」", "『完』。", "ABC"),
        ("「{}」", "『{}』", "{}」』", "{}。", "{} 」", "*{}*", "{}『"),
    )
)
maker("ja:startend:quotation")(quoted("ja", ("「」", "「」", "「」", "『』", '""', "「 ", " 」", "」「", "｢｣")))
maker("ja:letters:furigana")(
    of(
        _kana("漢字（かんじ） 読（よ）む かな カナ 、 （ひら）"),
        _kana("漢字（かん 字（） 漢（カン） 一二（\u3000いち） 字(じ) 々 漢字字 龯（あ） 㐀 字ゝ（ゔ）"),
    )
)
maker("ja:letters:kansuuji")(of(_kana("夢 三つ 百二十 ① ² ½ Ⅳ 。"), _kana("3 ３ ٣ १ x1")))
maker("ja:letters:no_hiragana")(of(_kana("漢字 カナ ABC ー 。 ゝ ゟ \u3099 ゛"), _kana("ひら ぁ ゖ ゔ ん")))
maker("ja:letters:no_katakana")(of(_kana("漢字 ひら ABC ー ・ 。 ヽ ヿ ｡"), _kana("カナ ァ ヺ ｦ ｱ ﾟ ヴ")))
maker("ja:letters:hiragana_only")(of(_kana("ひらがな んぁ ー 。 1 😀 \u3099 ²"), _kana("ゔ ゝ カ 漢 A ｰ ª")))
maker("ja:letters:katakana_only")(of(_kana("カタカナ ンァ ー ・ ｱｲ ﾟ 。 1 \u3099"), _kana("ヴ ヽ ひ 漢 A ｡ ヶ")))
maker("ja:punctuation:no_comma")(of(_kana("夢 。 , ， ﹑ ､ ・"), _kana("、 夢、")))
maker("ja:punctuation:no_period")(of(_kana("夢 、 . ． ｡ ！ \u3000"), _kana("。 夢。")))
