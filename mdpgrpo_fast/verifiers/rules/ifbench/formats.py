"""IFBench's checks on form: brackets, quotes, bullets, indents, emoji, title case, templates.

Each follows allenai/IFBench, `ifbench/instructions.py`, slips included; where its loops are quadratic, ours are not.
"""

from __future__ import annotations

import re
import string
from collections import defaultdict, deque
from itertools import pairwise

from ...arguments import Phrase
from ...registry import package
from ...text import sentences, words
from .kinds import MARKS, ifbench
from .tables import WITHOUT_PUNCTUATION

_CLOSES = {")": "(", "]": "[", "}": "{"}
_NO_BRACKET = re.compile(r"[^()\[\]{}]+")
_NO_QUOTE = re.compile(r"[^'\"]+")
_DEEP_BRACKETS = 5
_DEEP_QUOTES = 3
_LETTERED_OPTIONS = re.compile(r"\W*[aA]\W*[bB]\W*[cC]")
_AFTER_QUOTE = string.digits + string.punctuation.replace('"', "")
_TEMPLATE = ("My Answer:", "My Conclusion:", "Future Outlook:")
_BLANK = re.compile(r"\s")


@ifbench("format:parentheses")
def nested_brackets(text: str) -> bool:
    """Round, square or curly brackets nested at least 5 deep."""
    opened: list[str] = []
    for bracket in _NO_BRACKET.sub("", text):
        if bracket not in _CLOSES:
            opened.append(bracket)
        elif opened and opened[-1] == _CLOSES[bracket]:
            if len(opened) >= _DEEP_BRACKETS:
                return True
            opened.pop()
        else:
            opened.clear()
    return False


@ifbench("format:quotes")
def nested_quotes(text: str) -> bool:
    """Quotes within quotes at least 3 deep, double and single quotes in turn."""
    depth = deepest = 0
    innermost = ""
    for quote in _NO_QUOTE.sub("", text):
        if depth and quote == innermost:
            depth -= 1
            innermost = "'" if quote == '"' else '"'  # what lies around it is always the other one
            if deepest - depth >= _DEEP_QUOTES:
                return True
        else:
            depth += 1
            innermost = quote
            deepest = max(deepest, depth)
    return False


@ifbench("format:options", examples={"options": "yes/no/maybe"})
def one_option(text: str, options: Phrase) -> bool:
    """One of `options`, which are divided by / or by "or" or by commas, and nothing else."""
    separator = next((mark for mark in ("/", "or") if mark in options), ",")
    choices = [option.strip() for option in options.split(separator)]
    if _LETTERED_OPTIONS.match(options):
        return text in choices
    return text.strip(MARKS).lower() in [choice.strip(MARKS).lower() for choice in choices]


@ifbench("format:newline")
def word_per_line(text: str) -> bool:
    """Each word on a line of its own."""
    text = text.translate(WITHOUT_PUNCTUATION).strip()
    return sum(map(bool, text.split("\n"))) == len(text.split())


@ifbench("format:emoji", needs=package("emoji"))
def emoji_ends(text: str) -> bool:
    """An emoji at the end of every sentence."""
    import emoji

    # One right after the sentence counts too; Punkt takes it for the start of the next one.
    ends = False
    bare = ""
    for start, stop in sentences.spans(text):
        before, bare = bare, text[start:stop].translate(WITHOUT_PUNCTUATION).strip()
        if not bare or (before and not ends and not emoji.is_emoji(bare[0])):
            return False
        ends = any(map(emoji.is_emoji, bare[-2:]))
    return ends


@ifbench("format:line_indent")
def stairs(text: str) -> bool:
    """Each line is indented further than the one before."""
    lines = _without_some_blanks(text.split("\n"))
    indents = (len(line) - len(line.lstrip(" ")) for line in lines)
    return all(here < below for here, below in pairwise(indents))


def _without_some_blanks(lines: list[str]) -> list[str]:
    """`lines` without the blank ones that the original drops: it skips the line after each, and of equal lines it
    drops the first that is left."""
    left: defaultdict[str, deque[int]] = defaultdict(deque)
    dropped = set()
    at = 0
    while at < len(lines):
        if lines[at].strip():
            at += 1
            continue
        equal = left[lines[at]]
        equal.append(at)
        dropped.add(equal.popleft())
        skipped = at + 1
        if skipped < len(lines) and not lines[skipped].strip():
            left[lines[skipped]].append(skipped)
        at += 2
    return [line for at, line in enumerate(lines) if at not in dropped]


@ifbench("format:quote_unquote")
def quotes_explained(text: str) -> bool:
    """Every quoted phrase is followed by an explanation outside quotes."""
    text = "".join(text.replace("'\"'", "").split())
    return '""' not in text and not text.strip(_AFTER_QUOTE).endswith('"')


@ifbench("format:list", examples={"sep": "!?!?"})
def list_marked(text: str, sep: Phrase) -> bool:
    """A list whose items are marked by `sep`: it occurs at least twice."""
    return text.count(sep) >= 2


@ifbench("format:thesis")
def italic_thesis(text: str) -> bool:
    """A thesis in HTML italics, with text after it."""
    start = _first_of(text, "<i>", "<em>", 0)
    end = _first_of(text, "</i>", "</em>", start) if start >= 0 else -1
    # Both tags are taken to be as long as <i> and </i>.
    return end >= 0 and bool(text[start + 3 : end].strip() and text[end + 4 :].strip())


def _first_of(text: str, tag: str, other: str, start: int) -> int:
    """Where `tag` first stands from `start` on, or else `other`; -1 where neither does."""
    found = text.find(tag, start)
    return found if found >= 0 else text.find(other, start)


@ifbench("format:sub-bullets")
def sub_bullets(text: str) -> bool:
    """Every bullet point, marked by *, has at least one sub-bullet, marked by -."""
    return all("-" in bullet for bullet in text.split("*")[1:])


@ifbench("format:no_bullets_bullets")
def sentences_then_bullets(text: str) -> bool:
    """At least two sentences, then at least two bullet points marked by *, and nothing else."""
    lines = [line.strip() for line in text.split("\n")]
    first = next((at for at, line in enumerate(lines) if line.startswith("*")), len(lines))
    prose, bullets = lines[:first], lines[first:]
    if prose and not prose[-1]:
        prose.pop()
    if len(bullets) < 2 or not prose or not all(prose) or not all(line.startswith("*") for line in bullets):
        return False
    return len(prose) > 1 or sentences.count(prose[0], stop=2) == 2


@ifbench("format:title_case")
def title_case(text: str) -> bool:
    """Every major word begins with a capital letter."""
    if not any(map(str.islower, set(text))):
        return True
    return not any(map(_is_lower, set(words.tokens(text))))


def _is_lower(word: str) -> bool:
    """Whether `word` begins with a small letter and the rest is in one case; eBay and 'a1' pass."""
    first, rest = word[:1], word[1:]
    return first.isalpha() and first.islower() and (not rest or rest.islower() or rest.isupper())


@ifbench("format:output_template")
def output_template(text: str) -> bool:
    """The template "My Answer: … My Conclusion: … Future Outlook: …"."""
    return all(label in text for label in _TEMPLATE)


@ifbench("format:no_whitespace")
def no_whitespace(text: str) -> bool:
    """No white space."""
    return _BLANK.search(text) is None
