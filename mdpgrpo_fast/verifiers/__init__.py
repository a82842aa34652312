"""Checkable constraints: the instruction types of IFEval, MDP-GRPO, IF-Train, IFBench and M-IFEval, and one's own."""

from .own import load_instructions
from .registry import (
    INSTRUCTIONS,
    RULES,
    ArgumentError,
    CheckError,
    Instruction,
    InstructionError,
    MissingRequirementError,
    UnknownInstructionError,
    instruction,
)
from .text.sentences import punkt_source
from .verify import THINK_TAGS, Mode, answer_of, opening_of, validate, verify, verify_all

__all__ = [
    "INSTRUCTIONS",
    "RULES",
    "THINK_TAGS",
    "ArgumentError",
    "CheckError",
    "Instruction",
    "InstructionError",
    "MissingRequirementError",
    "Mode",
    "UnknownInstructionError",
    "answer_of",
    "instruction",
    "load_instructions",
    "opening_of",
    "punkt_source",
    "validate",
    "verify",
    "verify_all",
]
