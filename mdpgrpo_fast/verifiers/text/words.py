"""The word tokens of a text, as `nltk.word_tokenize` finds them."""

from __future__ import annotations

from . import sentences


def tokens(text: str) -> list[str]:
    """What `nltk.word_tokenize(text)` returns."""
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    return [token for start, stop in sentences.spans(text) for token in tokenizer.tokenize(text[start:stop])]
