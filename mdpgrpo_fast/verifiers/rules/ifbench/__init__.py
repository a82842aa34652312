"""IFBench's 58 types beside IFEval's 25; importing this enters them all in `INSTRUCTIONS`."""

from . import counting, custom, formats, words

__all__ = ["counting", "custom", "formats", "words"]
