"""Rewards: constraints, lengths, functions of TRL's signature, models, scored for a whole step; what fails is said."""

from .constraints import ConstraintReward
from .functions import RewardError, TrainerState, load_reward, per_completion
from .lengths import get_cosine_scaled_reward, get_soft_overlong_punishment
from .scorer import Score, Scorer, named_spec

__all__ = [
    "ConstraintReward",
    "RewardError",
    "Score",
    "Scorer",
    "TrainerState",
    "get_cosine_scaled_reward",
    "get_soft_overlong_punishment",
    "load_reward",
    "named_spec",
    "per_completion",
]
