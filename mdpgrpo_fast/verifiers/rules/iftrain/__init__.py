"""IF-Train's 29 types beside IFEval's 25; importing this enters them all in `INSTRUCTIONS`."""

from . import copying, counting, formats, words

__all__ = ["copying", "counting", "formats", "words"]
