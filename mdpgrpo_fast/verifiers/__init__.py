"""Checkable constraints: IFEval's 25 instruction types, and MDP-GRPO's 26."""

from .registry import INSTRUCTIONS, ArgumentError, Instruction, InstructionError, UnknownInstructionError
from .sentences import punkt_source
from .verify import validate, verify, verify_all

__all__ = [
    "INSTRUCTIONS",
    "ArgumentError",
    "Instruction",
    "InstructionError",
    "UnknownInstructionError",
    "punkt_source",
    "validate",
    "verify",
    "verify_all",
]
