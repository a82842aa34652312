"""IF-Train's checks on form: brackets, hyphens, paragraphs, marks that must not occur.

Each follows allenai/open-instruct, `open_instruct/IFEvalG/instructions.py`.
"""

from __future__ import annotations

from .. import layout
from .kinds import iftrain
from .sentences import split


@iftrain("detectable_format:sentence_hyphens")
def sentence_hyphens(text: str) -> bool:
    """The sentences are joined by hyphens, without blanks; no other hyphen."""
    # As in the original, what goes beyond the shorter of the two lists is not looked at.
    return all(
        piece == sentence for piece, sentence in zip(text.split("-"), split(text.replace("-", " ")), strict=False)
    )


@iftrain("detectable_format:square_brackets")
def square_brackets(text: str) -> bool:
    """Every word stands in square brackets."""
    return all(word[0] == "[" and word[-1] == "]" for word in text.split())


@iftrain("detectable_format:bigram_wrapping")
def bigram_wrapping(text: str) -> bool:
    """Every two words, but for a last one alone, stand in double angle brackets: <<of joy>>."""
    words = text.split()
    return all(
        one.startswith("<<") and other.endswith(">>") for one, other in zip(words[::2], words[1::2], strict=False)
    )


@iftrain("paragraphs:paragraphs")
def two_paragraphs_with_divider(text: str) -> bool:
    """Two paragraphs, divided by ***."""
    return layout.paragraphs(text, 2)


@iftrain("paragraphs:paragraphs2")
def two_paragraphs(text: str) -> bool:
    """Two paragraphs, divided by a blank line."""
    pieces = text.split("\n\n")
    filled = [bool(piece.strip()) for piece in pieces]
    return all(filled[1:-1]) and sum(filled) == 2


@iftrain("punctuation:punctuation_dot")
def no_dot(text: str) -> bool:
    """No dot."""
    return "." not in text


@iftrain("punctuation:punctuation_exclamation")
def no_exclamation(text: str) -> bool:
    """No exclamation mark."""
    return "!" not in text
