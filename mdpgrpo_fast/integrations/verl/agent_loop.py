"""verl's agent loop `mdp_grpo`: one turn, each completion of a prompt at its own temperature."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from ...config import ConfigError
from .method import SAMPLING, check_sampling, method_of, options_in


class MDPGRPOAgentLoop(SingleTurnAgentLoop):
    """verl's single turn, at the temperature of the completion's slot (multi-temperature sampling of the paper).

    The slot is verl's session_id, the number of the completion among those of its prompt; its temperature is kept as
    `sampling_temperature` in the completion's extra fields. A validation, and any other call at other settings than
    those of rollout, is left as it is.

    Raises: ConfigError as `check_sampling`, and under verl's trainer before v1, which does not number completions.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method = method_of(options_in(self.config.algorithm))
        self.training = {name: self.rollout_config[name] for name in SAMPLING}
        check_sampling(self.method, self.training, self.rollout_config.val_kwargs)

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
