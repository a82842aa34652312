"""IF-Train's sentences: split at . ? and !, but for the dots of titles, sites, decimals, initials and companies.

A dot is settled by what lies around it, title before site before decimal and so on; where two readings overlap, the
earlier one takes the characters from the later one, as in the original, which rewrites the text once for each.
"""

from __future__ import annotations

import re
from itertools import count

# What the original marks dots and ends with; a text that holds them is read as if it had been marked already.
_HIDDEN, _END = "<prd>", "<stop>"
_FIRST_PRIVATE = 0xE000
# Words that begin a sentence.
_STARTER = r" (?:Mrs?|Ms|Dr|Prof|Capt|Cpt|Lt|(?:He|She|It|They|Their|Our|We|But|However|That|This)\s|Wherever)"
_COMPANIES = ("Inc", "Ltd", "Jr", "Sr", "Co")
_TITLE_OR_SITE = re.compile(r"\.(?:(?<=Mr\.)|(?<=St\.)|(?<=Ms\.)|(?<=Dr\.)|(?<=Mrs\.)|(?=com|net|org|io|gov|edu|me))")
# Two decimals do not share a digit: in 1.2.3 the second dot, which is swallowed here, ends a sentence.
_DECIMAL = re.compile(r"\.(?<=[0-9]\.)[0-9](?:\.(?=[0-9]))?")
_DOTS = re.compile(r"\.{2,}")
_INITIAL_BEHIND_TAB = re.compile(r"[^\S ]([A-Za-z])\.(?= )")
_INITIALS = re.compile(rf"\.(?<=[A-Za-z]\.)(?:[A-Za-z]\.)+(?:(?<=[A-Z]\.[A-Z]\.)(?={_STARTER})())?")
_COMPANY_AND_STARTER = re.compile(rf"( (?:{'|'.join(_COMPANIES)}))\.({_STARTER})")
_INITIAL_OR_COMPANY = re.compile(rf"\.(?:(?<= [A-Za-z]\.)|{'|'.join(rf'(?<= {name}[.])' for name in _COMPANIES)})")


def split(text: str) -> list[str]:
    """The sentences of `text`, stripped; some may be empty, but for the last."""
    hidden, end = _unused(text)
    text = f" {text}  ".replace("\n", " ").replace(_HIDDEN, hidden).replace(_END, end)
    if "." in text:
        text = _settled(text, hidden, end)
    for mark, quote in ((".", "”"), (".", '"'), ("!", '"'), ("?", '"')):
        text = text.replace(mark + quote, quote + mark)
    for mark in ".?!":
        text = text.replace(mark, mark + end)
    pieces = [piece.strip() for piece in text.replace(hidden, ".").split(end)]
    return pieces if pieces[-1] else pieces[:-1]


def _unused(text: str) -> tuple[str, str]:
    """Two characters that `text` does not hold."""
    seen = set() if text.isascii() else set(text)
    free = (char for char in map(chr, count(_FIRST_PRIVATE)) if char not in seen)
    return next(free), next(free)


def _settled(text: str, hidden: str, end: str) -> str:
    """`text` with every dot that ends no sentence hidden."""
    text = _TITLE_OR_SITE.sub(hidden, text)
    text = _DECIMAL.sub(lambda found: hidden + found[0][1:], text)
    if ".." in text:
        text = _DOTS.sub(lambda found: hidden * len(found[0]) + end, text)
    text = text.replace("Ph.D.", f"Ph{hidden}D{hidden}")
    text = _INITIAL_BEHIND_TAB.sub(rf" \1{hidden}", text)

    def initials(found: re.Match[str]) -> str:
        letters = found[0][1::2]
        dots = [hidden] * len(letters)
        if len(letters) % 3 == 0:  # the original hides them by threes, then by twos: one of four stays
            dots[-1] = "."
        return hidden + "".join(map("".join, zip(letters, dots, strict=True))) + (end if found.lastindex else "")

    text = _INITIALS.sub(initials, text)
    if any(f" {name}." in text for name in _COMPANIES):
        text = _COMPANY_AND_STARTER.sub(rf"\1{end}\2", text)
    return _INITIAL_OR_COMPANY.sub(hidden, text)
