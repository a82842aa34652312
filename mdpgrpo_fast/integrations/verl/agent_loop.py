"""verl's agent loop `mdp_grpo`: one turn, each completion of a prompt at its own temperature."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from ...config import ConfigError
from .method import method_of, options_in

_PARTS = ("temperature", "top_p", "top_k")


class MDPGRPOAgentLoop(SingleTurnAgentLoop):
    """verl's single turn, at the temperature of the completion's slot (multi-temperature sampling of the paper).

    The slot is verl's session_id, the number of the completion among those of its prompt; its temperature is kept as
    `sampling_temperature` in the completion's extra fields. A validation, and any other call at other settings than
    those of rollout, is left as it is: verl tells them apart by nothing else.

    Raises: ConfigError for validation settings that are those of training, for a rollout.temperature that is not 1,
    which is that of the loss's log-probs, and under verl's trainer before v1, which does not number completions.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method = method_of(options_in(self.config.algorithm))
        self.training = {name: self.rollout_config[name] for name in _PARTS}
        if not self.method.multi_temperature:
            return
        if self.training["temperature"] != 1:
            raise ConfigError(
                "actor_rollout_ref.rollout.temperature must be 1 with multi_temperature: the loss's log-probs are at "
                f"it, and completions are drawn at algorithm.mdp_grpo.temperatures; got {self.training['temperature']}"
            )
        if all(self.rollout_config.val_kwargs[name] == value for name, value in self.training.items()):
            raise ConfigError(
                "actor_rollout_ref.rollout.val_kwargs must differ from rollout in temperature, top_p or top_k: else "
                f"validation cannot be told from training; both have {self.training}"
            )

    async def run(
        self, sampling_params: dict[str, Any], session_id: int | None = None, **kwargs: Any
    ) -> AgentLoopOutput:  # fmt: skip
        """One completion. sampling_params: verl's, of rollout or of val_kwargs; session_id: 0 .. n-1."""
        own = dict(sampling_params)
        if self.method.multi_temperature and all(own[name] == value for name, value in self.training.items()):
            if session_id is None:
                raise ConfigError("trainer.use_v1 must be True: verl's older trainer does not number completions")
            taus = self.method.slot_temperatures
            own["temperature"] = taus[int(session_id) % len(taus)]
        output = await super().run(own, **kwargs)
        output.extra_fields["sampling_temperature"] = own["temperature"]
        return output
