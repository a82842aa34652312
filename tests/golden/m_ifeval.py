"""Cases of M-IFEval's Japanese, Spanish and French types, for label.py.

The official code: lightblue-tech/M-IFEval at 0bc3143a919eef2f9ec64aa26da8a546086653de. Labelling needs spaCy
(3.7.5 or 3.8.18), for the tokens of its Spanish models, which blank("es") divides as they do, and janome.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import ifeval
import m_ifeval_es_fr
import m_ifeval_ja
from label import Maker
from m_ifeval_makers import like_ifeval

# Types whose cases are IFEval's, with sentences of the language in place of English ones.
LIKE_IFEVAL = {
    "ja": (
        "length_constraints:number_paragraphs detectable_content:number_placeholders detectable_format:json_format"
        " combination:two_responses combination:repeat_prompt language:response_language"
    ),
    "es": (
        "keywords:existence keywords:frequency keywords:forbidden_words keywords:letter_frequency"
        " language:response_language length_constraints:number_paragraphs detectable_format:number_bullet_lists"
        " detectable_format:json_format detectable_format:title"
        " combination:two_responses combination:repeat_prompt punctuation:no_comma startend:quotation"
    ),
    "fr": (
        "keywords:existence keywords:frequency keywords:forbidden_words keywords:letter_frequency"
        " language:response_language length_constraints:number_sentences length_constraints:number_paragraphs"
        " length_constraints:number_words length_constraints:nth_paragraph_first_word"
        " detectable_content:number_placeholders detectable_content:postscript detectable_format:number_bullet_lists"
        " detectable_format:number_highlighted_sections detectable_format:multiple_sections"
        " detectable_format:json_format combination:two_responses combination:repeat_prompt startend:end_checker"
        " change_case:capital_word_frequency punctuation:no_comma"
    ),
}


def official(checkout: Path) -> dict[str, Any]:
    """The official class of each type."""
    import absl.logging
    import langdetect
    import nltk

    try:
        import spacy
    except ImportError:
        raise SystemExit("labelling M-IFEval needs spaCy: pip install spacy==3.8.18") from None
    langdetect.DetectorFactory.seed = 0  # the library draws at random otherwise
    absl.logging.set_verbosity(absl.logging.FATAL)  # it logs every text without a language
    sys.path.insert(0, str(checkout))
    load = functools.cache(lambda model: spacy.blank("es"))  # xx_sent_ud_sm too, but no type here asks it
    with mock.patch.object(nltk, "download", lambda *args, **kwargs: True), mock.patch.object(spacy, "load", load):
        import instructions_registry
        from instruction_utils import ja_instructions_util
    ja_instructions_util.Tokenizer = functools.cache(ja_instructions_util.Tokenizer)  # it loads it for each text
    return {id: check for id, check in instructions_registry.INSTRUCTION_DICT.items() if id[:2] in LIKE_IFEVAL}


MAKERS: dict[str, Maker] = {
    **{
        f"{language}:{id}": like_ifeval(language, ifeval.MAKERS[id])
        for language, ids in LIKE_IFEVAL.items()
        for id in ids.split()
    },
    **m_ifeval_ja.MAKERS,
    **m_ifeval_es_fr.MAKERS,
}
