"""Checkable constraints: IFEval's 25 instruction types, and MDP-GRPO's 26."""

from .registry import INSTRUCTIONS, ArgumentError, Instruction, InstructionError, UnknownInstructionError
from .sentences import punkt_source
from .verify import THINK_TAGS, answer_of, validate, verify, verify_all

__all__ = [
    "INSTRUCTIONS",
    "THINK_TAGS",
    "ArgumentError",
    "Instruction",
    "InstructionError",
    "UnknownInstructionError",
    "answer_of",
    "punkt_source",
    "validate",
    "verify",
    "verify_all",
]
