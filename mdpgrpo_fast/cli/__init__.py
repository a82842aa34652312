"""Command lines from dataclasses of knobs: layers of settings, flags over them, one line for what cannot be used."""

from .flags import Flag
from .layers import read_yaml
from .parser import Layer, parse, peek, read, report_errors

__all__ = ["Flag", "Layer", "parse", "peek", "read", "read_yaml", "report_errors"]
