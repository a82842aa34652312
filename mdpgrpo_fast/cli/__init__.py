"""Command lines from dataclasses of knobs: layers of settings, flags over them, one line for what cannot be used."""

from .ending import end, report_errors
from .flags import Flag
from .layers import read_yaml
from .parser import Layer, Parser, parse, peek, read

__all__ = ["Flag", "Layer", "Parser", "end", "parse", "peek", "read", "read_yaml", "report_errors"]
