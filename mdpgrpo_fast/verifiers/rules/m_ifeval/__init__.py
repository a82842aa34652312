"""M-IFEval's Japanese, Spanish and French types; importing this enters them all in `INSTRUCTIONS`."""

from ...registry import LEFT_OUT
from . import french, japanese, shared, spanish

__all__ = ["french", "japanese", "shared", "spanish"]

LEFT_OUT["es:length_constraints:number_sentences"] = (
    "its sentences are those of spaCy's trained models es_core_news_sm and xx_sent_ud_sm 3.7, which pip does not find"
    " by name"
)
