"""MDP-GRPO: stable reinforcement learning of language models on many checkable constraints.

Public names load their module on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .config import MDPGRPOConfig, TrainConfig, preset
    from .ops.advantages import advantages
    from .ops.backends import backend_report
    from .ops.linear.losses import linear_token_logprobs, linear_token_loss
    from .ops.logprobs import token_logprobs
    from .ops.token_loss import token_loss
    from .verifiers import verify, verify_all

_HOME = {
    "MDPGRPOConfig": "config",
    "TrainConfig": "config",
    "linear_token_logprobs": "ops.linear.losses",
    "linear_token_loss": "ops.linear.losses",
    "preset": "config",
    "advantages": "ops.advantages",
    "backend_report": "ops.backends",
    "token_loss": "ops.token_loss",
    "token_logprobs": "ops.logprobs",
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
