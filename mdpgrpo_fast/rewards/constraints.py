"""The reward of a prompt's constraints, by the verifiers."""

from __future__ import annotations

from collections.abc import Sequence

from .. import verifiers
from ..config import TrainConfig
from ..data import Example


class ConstraintReward:
    """Share of a prompt's constraints that a response satisfies, r = satisfied / K; kind "all": 1 or 0; "loose": the
    share under IFEval's loose rule. instructions: modules of types of one's own."""

    def __init__(
        self,
        rules: str = TrainConfig.rules,
        kind: str = TrainConfig.constraint_reward,
        instructions: Sequence[str] = (),
    ) -> None:
        self.rules, self.kind, self.instructions = rules, kind, verifiers.own.absolute(instructions)

    def load(self) -> None:
        """Makes the types of one's own known in this process. Raises ConfigError where one cannot be loaded."""
        verifiers.load_instructions(self.instructions)

    def satisfied(self, example: Example, response: str, mode: verifiers.Mode = "strict") -> list[bool]:
        """Which of the example's constraints hold, by position; of the last answer alone, with what the prompt began of
        it."""
        self.load()
        return verifiers.verify_all(
            example.instruction_ids, example.opening + response, example.kwargs, mode=mode, rules=self.rules
        )

    def __call__(self, example: Example, response: str) -> tuple[float, list[bool]]:
        """The reward, and which constraints hold strictly."""
        flags = self.satisfied(example, response)
        held = self.satisfied(example, response, "loose") if self.kind == "loose" else flags
        return float(all(held)) if self.kind == "all" else sum(held) / len(held), flags
