"""Checkable constraints: IFEval's 25 instruction types, and MDP-GRPO's 26."""

from .registry import INSTRUCTIONS, ArgumentError, Instruction, InstructionError, UnknownInstructionError
from .verify import validate, verify, verify_all

__all__ = [
    "INSTRUCTIONS",
    "ArgumentError",
    "Instruction",
    "InstructionError",
    "UnknownInstructionError",
    "validate",
    "verify",
    "verify_all",
]
