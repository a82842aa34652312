"""Counting the words in capital letters."""

from . import words


def count(text: str) -> int:
    """The number of NLTK's word tokens in `text` that are in capitals (`str.isupper`)."""
    return sum(map(str.isupper, words.tokens(text)))
