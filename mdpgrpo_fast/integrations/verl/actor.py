"""verl's actor config with the method's knobs, checked before Ray starts anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import FSDPActorConfig

from ...config import ConfigError
from .method import check_sampling, method_of, options_in
from .policy_loss import check_actor


@dataclass
class MDPGRPOActorConfig(FSDPActorConfig):
    """FSDPActorConfig with `mdp_grpo`, the options of `method_of`; `_target_` of the actor in our configs.

    beside: settings of verl that are not the actor's, as our configs give them: temperature, top_p and top_k of
    rollout, val_kwargs, use_v1. What the agent loop asks of them is looked at here, since verl goes on without the
    completions whose agent loop raised.

    Raises: ConfigError for options or settings that do not go together.
    """

    mdp_grpo: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_actor(self)
        if self.beside:
            check_sampling(method_of(options_in(self)), self.beside, self.beside["val_kwargs"])
            if not self.beside["use_v1"] and not self.mdp_grpo.get("num_constraints"):
                raise ConfigError(
                    "trainer.use_v1 must be True: verl's older trainer neither numbers the completions of a prompt nor "
                    "keeps its constraints; there num_constraints and multi_temperature=False have to be set"
                )
