"""verl's actor config with the method's knobs, checked before Ray starts anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import FSDPActorConfig

from .policy_loss import check_actor


@dataclass
class MDPGRPOActorConfig(FSDPActorConfig):
    """FSDPActorConfig with `mdp_grpo`, the options of `method_of`; `_target_` of the actor in our configs.

    Raises: ConfigError for options or settings that do not go together.
    """

    mdp_grpo: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_actor(self)
