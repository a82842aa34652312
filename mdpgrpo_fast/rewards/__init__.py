"""Rewards: constraints, functions of TRL's signature and reward models, scored for a whole step; what fails is said."""

from .constraints import ConstraintReward
from .functions import RewardError, TrainerState, load_reward, per_completion
from .scorer import Score, Scorer, named_spec

__all__ = [
    "ConstraintReward",
    "RewardError",
    "Score",
    "Scorer",
    "TrainerState",
    "load_reward",
    "named_spec",
    "per_completion",
]
