"""MDP-GRPO: stable reinforcement learning of language models on many checkable constraints.

Public names load their module on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .api import Trainer, TrainResult, train
    from .config import ConfigError, MDPGRPOConfig, TrainConfig, preset
    from .ops.advantages import advantages
    from .ops.backends import backend_report
    from .ops.linear.losses import linear_token_logprobs, linear_token_loss
    from .ops.logprobs import token_logprobs
    from .ops.token_loss import token_loss
    from .reference import Advantages, TokenLoss
    from .rewards import RewardError
    from .rollout.generate import Rollout
    from .verifiers import verify, verify_all

__all__ = [
    "Advantages",
    "ConfigError",
    "MDPGRPOConfig",
    "RewardError",
    "Rollout",
    "TokenLoss",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "advantages",
    "backend_report",
    "linear_token_logprobs",
    "linear_token_loss",
    "preset",
    "token_logprobs",
    "token_loss",
    "train",
    "verify",
    "verify_all",
]
_HOME = {
    "api": "TrainResult Trainer train",
    "config": "ConfigError MDPGRPOConfig TrainConfig preset",
    "ops.advantages": "advantages",
    "ops.backends": "backend_report",
    "ops.linear.losses": "linear_token_logprobs linear_token_loss",
    "ops.logprobs": "token_logprobs",
    "ops.token_loss": "token_loss",
    "reference": "Advantages TokenLoss",
    "rewards": "RewardError",
    "rollout.generate": "Rollout",
    "verifiers": "verify verify_all",
}

# Type checkers know each name, and that there is no other.
if not TYPE_CHECKING:

    def __getattr__(name):
        home = next((module for module, names in _HOME.items() if name in names.split()), None)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
