"""Checkpoints of a run: everything that the next step depends on, used only where it is whole, and read back.

checkpoints/checkpoint_N after N steps; the newest two are kept. Weights are in from_pretrained form, under LoRA an
adapter folder; under FSDP and DeepSpeed they are in shards, which only a resumed run reads. No file is a pickle.
"""

from .best import Best
from .checkpoints import Checkpoints, Loaded
from .manifest import newest
from .resume import FinishedError, check_resume, check_unfinished, follow_schedule, resolve_resume
from .rows import drop_what_came_later, first_evaluation, logged_rows, lost_rows
from .state import State

__all__ = [
    "Best",
    "Checkpoints",
    "FinishedError",
    "Loaded",
    "State",
    "check_resume",
    "check_unfinished",
    "drop_what_came_later",
    "first_evaluation",
    "follow_schedule",
    "logged_rows",
    "lost_rows",
    "newest",
    "resolve_resume",
]
