"""Prompts from files and data sets: read, checked row by row, rendered and tokenised once."""

from __future__ import annotations

from .chat import prompt_limit, tokenize
from .examples import BadRow, Example, Prompts, batches, read_prompts
from .files import Source

__all__ = ["BadRow", "Example", "Prompts", "Source", "batches", "prompt_limit", "read_prompts", "tokenize"]
