"""Sentences of a text: by NLTK's English Punkt model where its data are found."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Iterator
from typing import NamedTuple

from .punkt import Splitter, Tables
from .scan import engine_of, up_to

DATA = "tokenizers/punkt_tab/english/"
_LOG = logging.getLogger(__name__)


class _Model(NamedTuple):
    source: str
    splitter: Splitter


def spans(text: str) -> Iterator[tuple[int, int]]:
    """The (start, stop) of each sentence of `text`."""
    return _model().splitter.spans(text)


def count(text: str, stop: int) -> int:
    """The number of sentences in `text`, at most `stop`."""
    return up_to(stop, spans(text))


def punkt_source() -> str:
    """Which sentence model answers: NLTK's data, and where they lie, or the built-in one."""
    return _model().source


def fetch(name: str) -> None:
    """Fetch data of NLTK with NLTK's own downloader. Nothing else in this package downloads anything.

    Raises RuntimeError where the data cannot be fetched.
    """
    import nltk

    try:
        nltk.download(name, quiet=True, raise_on_error=True, print_error_to=io.StringIO())
    except Exception as error:  # the downloader lets through whatever the network or the disk raised
        raise RuntimeError(f"{name} could not be fetched: {' '.join(str(error).split())}") from error


def get_punkt() -> str:
    """Fetch NLTK's `punkt_tab` and return `punkt_source()`. Raises RuntimeError as `fetch` does."""
    fetch("punkt_tab")
    _model.cache_clear()
    if _load() is None:
        raise RuntimeError("punkt_tab was fetched, but NLTK does not find it in its data folders")
    return punkt_source()


@functools.lru_cache(maxsize=1)
def _model() -> _Model:
    model = _load()
    if model is None:
        from .english import TABLES

        model = _Model("built-in English model (NLTK's punkt_tab not found)", Splitter(TABLES))
        _LOG.warning(
            "NLTK's punkt_tab is not installed: sentences are split by a built-in model that agrees on most texts but"
            " not all; `mdpgrpo verifiers --get-punkt` fetches it"
        )
    return model


def tables(folder: str) -> Tables:
    """What the Punkt model in `folder`, one of a language of NLTK's `punkt_tab`, has learned."""
    from nltk.tokenize.punkt import PunktLanguageVars, load_punkt_params

    learned = load_punkt_params(folder)
    closing = PunktLanguageVars.re_boundary_realignment
    return Tables(
        abbreviations=learned.abbrev_types,
        collocations=learned.collocations,
        starters=learned.sent_starters,
        met=dict(learned.ortho_context),
        curly="\u2018\u2019\u201c\u201d\xab\xbb" if closing.match("\u2019") else "",
        engine=engine_of(closing),
    )


def _load() -> _Model | None:
    """The model from NLTK's data folders; None where it is not installed."""
    from nltk.data import find

    try:
        folder = find(DATA)
        return _Model(f"NLTK punkt_tab, {folder}", Splitter(tables(folder)))
    except (LookupError, OSError):
        return None
