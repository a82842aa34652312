"""Command lines from dataclasses of knobs: layers of settings, flags over them, one line for what cannot be used."""

from .ending import end, report_errors
from .flags import Flag
from .layers import read_yaml
from .parser import Layer, parse, peek, read

__all__ = ["Flag", "Layer", "end", "parse", "peek", "read", "read_yaml", "report_errors"]
