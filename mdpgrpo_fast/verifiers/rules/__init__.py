"""The instruction types, by rule set; importing this enters them all in `INSTRUCTIONS`."""

from . import ifbench, iftrain, layout, m_ifeval, wording

__all__ = ["ifbench", "iftrain", "layout", "m_ifeval", "wording"]
