"""MDP-GRPO: stable reinforcement learning of language models on many checkable constraints.

Public names load their module on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends import backend_report
    from .config import MDPGRPOConfig, TrainConfig, preset
    from .linear import linear_token_logprobs, linear_token_loss
    from .ops import advantages, token_logprobs, token_loss
    from .verifiers import verify, verify_all

__version__ = "0.1.0"

_HOME = {
    "MDPGRPOConfig": "config",
    "TrainConfig": "config",
    "linear_token_logprobs": "linear",
    "linear_token_loss": "linear",
    "preset": "config",
    "advantages": "ops",
    "backend_report": "backends",
    "token_loss": "ops",
    "token_logprobs": "ops",
    "verify": "verifiers",
    "verify_all": "verifiers",
}
__all__ = [
    "MDPGRPOConfig",
    "TrainConfig",
    "advantages",
    "backend_report",
    "linear_token_logprobs",
    "linear_token_loss",
    "preset",
    "token_logprobs",
    "token_loss",
    "verify",
    "verify_all",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
