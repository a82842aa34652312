"""The coefficient of the entropy bonus, constant or held to a target of the entropy."""

from __future__ import annotations

import math
from typing import Any

from ...config import MDPGRPOConfig


class EntropyControl:
    """With entropy_target, the coefficient grows after an update of at most so much entropy and shrinks after another;
    it acts where the last update's entropy was not above the target (Skywork-OR1, as TRL has it). Kept in checkpoints.
    """

    def __init__(self, method: MDPGRPOConfig) -> None:
        self.method, self.coef, self.last = method, method.entropy_coef, math.inf

    @property
    def adapts(self) -> bool:
        return self.method.entropy_target is not None

    @property
    def applied(self) -> float:
        """The coefficient of the next update's loss."""
        target = self.method.entropy_target
        return self.coef if target is None or self.last <= target else 0.0

    def objective(self) -> dict[str, Any]:
        """What the loss is given: nothing where the coefficient is the config's."""
        return {"entropy_coef": self.applied} if self.adapts else {}

    def follow(self, entropy: float) -> None:
        """After an update. entropy: the mean of its tokens, over all ranks and micro-batches."""
        m = self.method
        assert m.entropy_target is not None
        if entropy <= m.entropy_target:
            self.coef = min(self.coef + m.entropy_coef_delta, m.entropy_coef_max)
        else:
            self.coef = max(self.coef - m.entropy_coef_delta, m.entropy_coef_min)
        self.last = entropy

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef, self.last = state["coef"], state["last"]
