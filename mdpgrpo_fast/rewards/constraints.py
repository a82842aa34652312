"""The reward of a prompt's constraints, by the verifiers."""

from __future__ import annotations

from .. import verifiers
from ..config import TrainConfig
from ..data import Example


class ConstraintReward:
    """Share of a prompt's constraints that a response satisfies, r = satisfied / K; kind "all": 1 or 0; "loose": the
    share under IFEval's loose rule."""

    def __init__(self, rules: str = TrainConfig.rules, kind: str = TrainConfig.constraint_reward) -> None:
        self.rules, self.kind = rules, kind

    def satisfied(self, example: Example, response: str, mode: str = "strict") -> list[bool]:
        """Which of the example's constraints hold, by position."""
        return verifiers.verify_all(
            example.instruction_ids, response, example.kwargs, prompt=example.text, mode=mode, rules=self.rules
        )

    def __call__(self, example: Example, response: str) -> tuple[float, list[bool]]:
        """The reward, and which constraints hold strictly."""
        flags = self.satisfied(example, response)
        held = self.satisfied(example, response, "loose") if self.kind == "loose" else flags
        return float(all(held)) if self.kind == "all" else sum(held) / len(held), flags
