"""The words of a text, as NLTK's tokenizers find them.

`nltk.word_tokenize` takes each sentence through some thirty patterns, up to 1.5 s for 200 kB. Here all sentences take
the same steps in the same order at once, most of them by `str.replace`. The tests hold the two against each other.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import sentences
from .scan import blanks, engine_of

_ASCII_WORD = re.compile(r"\w+", re.ASCII)
# Each begins with the characters that it is about, which the engine finds ten times as fast; what has to stand before
# them is looked up behind them.
_OPENING_QUOTE = re.compile(r"\"(?<=[ (\[{<]\")|''(?<=[ (\[{<]'')")
_FINAL_PERIOD = re.compile(r"\.(?<=[^.\n]\.)(?=[\])}>\"'»”’ ]*\n)")
_DOTS = re.compile(r"(\.\.+)")
_MARKS = re.compile(r"[:,][:,]+")
_CLOSING_APOSTROPHE = re.compile(r"' (?<!'' )")


def alphanumeric(text: str) -> list[str]:
    """What NLTK's `RegexpTokenizer(r"\\w+")` finds: runs of letters, digits and underscores."""
    return _alphanumeric(text).findall(text)


def each_alphanumeric(text: str) -> Iterator[re.Match[str]]:
    """The matches of `alphanumeric`, one by one."""
    return _alphanumeric(text).finditer(text)


def _alphanumeric(text: str) -> re.Pattern[str]:
    return _ASCII_WORD if text.isascii() else _nltks_alphanumeric()


@functools.lru_cache(maxsize=1)
def _nltks_alphanumeric() -> re.Pattern[str]:
    from nltk.tokenize import RegexpTokenizer

    tokenizer = RegexpTokenizer(r"\w+")
    tokenizer.tokenize("")  # compiles
    pattern: re.Pattern[str] = engine_of(tokenizer._regexp).compile(r"\w+")
    return pattern


def tokens(text: str) -> list[str]:
    """What `nltk.word_tokenize(text)` returns."""
    flat = text.replace("\n", "\t")
    return _tokens([flat[start:stop] for start, stop in sentences.spans(text)])


def capitals(text: str) -> int:
    """The number of `tokens` in capitals (`str.isupper`)."""
    return sum(map(str.isupper, tokens(text)))


def first_tokens(text: str, number: int) -> list[str]:
    """The first `number` of `tokens(text)`, without reading on."""
    found: list[str] = []
    for start, stop in sentences.spans(text):
        found += _tokens([text[start:stop].replace("\n", "\t")])
        if len(found) >= number:
            break
    return found[:number]


def _tokens(flat: list[str]) -> list[str]:
    """The tokens of sentences without \n."""
    # A line a sentence: then \n is where a sentence begins and ends, and a blank to every rule.
    text = "".join([f"\n{sentence}" for sentence in flat]) + "\n"
    rules = _rules(text.isascii())
    text = _part_opening_quotes(text, rules)
    text = _part_punctuation(text, rules)
    text = _part_clitics(text, rules)
    return text.split()


class _Rules(NamedTuple):
    part_apostrophes: Callable[[str], str]
    single_marks: dict[str, re.Pattern[str]]
    digit: re.Pattern[str]
    dashes: str
    short_clitic: re.Pattern[str]
    long_clitic: re.Pattern[str]
    blank: re.Pattern[str]
    contractions: dict[str, re.Pattern[str]]


@functools.lru_cache(maxsize=2)
def _rules(is_ascii: bool) -> _Rules:
    """What depends on the NLTK at hand. In an ASCII text, `re`, the faster one, finds what `regex` does."""
    from nltk.tokenize import NLTKWordTokenizer as Nltks

    rule, replacement = Nltks.STARTING_QUOTES[-1]  # an apostrophe before a word
    engine = re if is_ascii else engine_of(rule)
    blank = blanks(engine_of(rule))
    contractions = [*Nltks.CONTRACTIONS2, *Nltks.CONTRACTIONS3]
    return _Rules(
        part_apostrophes=functools.partial(
            engine.compile(rule.pattern.replace(r"(?<!\w)(\')", r"(\')(?<!\w')")).sub, replacement.replace(r"\1", "'")
        ),
        single_marks={mark: engine.compile(rf"{mark}(?<![:,]{mark})(?=[^\d:,])") for mark in ",:"},
        digit=engine.compile(r"\d"),
        dashes="\u2012\u2013\u2014\u2015" if any(rule.search("\u2014") for rule, _ in Nltks.PUNCTUATION) else "",
        short_clitic=re.compile(rf"'(?<=[^'{blank}]')(?=[sSmMdD]?[{blank}])"),
        long_clitic=re.compile(
            rf"'(?<=[^'{blank}]')(?=(?:ll|LL|re|RE|ve|VE)[{blank}])"
            rf"|n't(?<=[^'{blank}]n't)(?=[{blank}])|N'T(?<=[^'{blank}]N'T)(?=[{blank}])"
        ),
        blank=re.compile(f"[{blank}]+"),
        contractions={"".join(re.findall(r"\(([a-z']+)\)", rule.pattern)): rule for rule in contractions},
    )


def _part_opening_quotes(text: str, rules: _Rules) -> str:
    text = _part(text, "«“‘„`").replace(" `  ` ", " `` ")  # pairs of backticks stay together
    if '"' in text or "''" in text:
        text = _OPENING_QUOTE.sub(" `` ", text.replace('\n"', "\n `` "))
    return rules.part_apostrophes(text) if "'" in text else text


def _part_punctuation(text: str, rules: _Rules) -> str:
    text = _FINAL_PERIOD.sub(" . ", text)
    for mark, single in rules.single_marks.items():
        if mark in text:
            text = single.sub(f" {mark} ", text)
    text = _MARKS.sub(functools.partial(_part_marks, rules.digit), text)
    if ".." in text:
        text = " ".join(_DOTS.split(text))
    text = _part(text, ";@#$%&?!" + rules.dashes)
    if "'" in text:
        text = _CLOSING_APOSTROPHE.sub(" ' ", text)
    return _part(text, "*[](){}<>").replace("--", " -- ")


def _part_marks(digit: re.Pattern[str], marks: re.Match[str]) -> str:
    """NLTK parts a comma or colon from the character behind it, and goes on behind both of them."""
    run = marks[0]
    if len(run) % 2 == 0:
        return " " + " ".join(run)
    last = run[-1] if digit.match(marks.string, marks.end()) else f" {run[-1]} "
    return " " + " ".join(run[:-1]) + last


def _part_clitics(text: str, rules: _Rules) -> str:
    text = _part(text, "»”’").replace("''", " '' ").replace('"', " '' ")
    if "'" in text:
        text = rules.long_clitic.sub(r" \g<0>", rules.short_clitic.sub(" '", text))
    lower = text.lower()
    if not lower.isascii():  # to `re`, these too are an i and an s in another case
        lower = lower.replace("i\u0307", "i").replace("\u0131", "i").replace("\u017f", "s")
    found = [rule for word, rule in rules.contractions.items() if word in lower]
    if found:
        text = rules.blank.sub(" ", text)  # some look for a space
    for rule in found:
        text = rule.sub(r" \1 \2 ", text)
    return text


def _part(text: str, characters: str) -> str:
    for character in characters:
        if character in text:
            text = text.replace(character, f" {character} ")
    return text
