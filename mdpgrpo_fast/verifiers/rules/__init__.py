"""The instruction types, by rule set; importing this enters them all in `INSTRUCTIONS`."""

from . import layout, wording

__all__ = ["layout", "wording"]
