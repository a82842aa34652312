"""MDP-GRPO and our kernels inside TRL's GRPOTrainer (TRL 1.16 or newer)."""

from .versions import check

check()

from .config import MDPGRPOConfig  # noqa: E402
from .data import constraint_dataset, constraint_reward  # noqa: E402
from .fused import FusedGRPOTrainer, accelerate_trl  # noqa: E402
from .trainer import MDPGRPOTrainer  # noqa: E402

__all__ = [
    "FusedGRPOTrainer",
    "MDPGRPOConfig",
    "MDPGRPOTrainer",
    "accelerate_trl",
    "constraint_dataset",
    "constraint_reward",
]
