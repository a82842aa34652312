"""MDPGRPOConfig: TRL's GRPOConfig with the method's knobs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

from trl import GRPOConfig

from ...config import Backend, check_values, require
from ...config import MDPGRPOConfig as Method
from ...config.knobs import knob, knob_of


class KernelOptions(NamedTuple):
    """How the loss and log-probs are computed; backend to fp32_logits and skip_idle as of `linear_token_loss`.

    packing: "off", "auto" (prompts are stored once for the completions of a group where the model gives the same
    hidden states then, which is tried; said once where it does not) or "on" (ValueError there).
    """

    backend: Backend = "auto"
    workspace_bytes: int | None = None
    fp32_logits: bool = False
    skip_idle: bool = False
    packing: Literal["auto", "on", "off"] = "off"


@dataclass
class MDPGRPOConfig(GRPOConfig):
    """GRPOConfig of TRL with the knobs of MDP-GRPO (Salmani-Zarchi et al., ACL 2026), its four components on.

    Names and defaults are those of `mdpgrpo_fast.MDPGRPOConfig`; `beta` is its kl_beta_pos. All else is TRL's, but for
    these defaults: loss_type "grpo", beta 0.01 and use_bias_correction_kl False, as in the paper.

    With multi_temperature the rows of a group are sampled at `temperatures`, and log-probs are at the temperatures of
    temperature_objective and kl_temperature; without it all of them are at `temperature`, as TRL has them. With
    neither dual_anchor nor prospect the advantages are TRL's own. With beta = 0 there is no KL term, whatever
    kl_beta_neg is.

    Raises: ConfigError, a ValueError, for a value out of range.
    """

    beta: float = knob(0.01, "KL coefficient of completions with A >= 0 (kl_beta_pos); 0: no KL term, no reference")
    loss_type: str = knob("grpo", "loss of TRL: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo or vespo")
    use_bias_correction_kl: bool = knob(False, "multiply the KL estimate by the importance ratio (DeepSeek-V3.2)")

    multi_temperature: bool = knob_of(Method, "multi_temperature")
    temperatures: list[float] = knob_of(Method, "temperatures")
    temperature_objective: Literal["paper", "per_row"] = knob(
        "paper", "with multi_temperature: log-probs at temperature 1 (paper), or at each completion's own (per_row)"
    )
    rescale_per_row: bool = knob_of(Method, "rescale_per_row")
    kl_temperature: float = knob(1.0, "with multi_temperature: temperature of the reference KL's log-probabilities")
    dual_anchor: bool = knob_of(Method, "dual_anchor")
    dual_anchor_alpha: float = knob_of(Method, "dual_anchor_alpha")
    goal_mean: Literal["half", "max_half_mean", "mean"] = knob(
        "half", "m of the goal anchor: 0.5 (paper), max(0.5, group mean) (released code), the group mean"
    )
    goal_std: Literal["released", "binomial"] = knob(
        "released", "s of the goal anchor: sqrt(G/(4K)) (released code), sqrt(1/(4K))"
    )
    num_constraints: int = knob(
        1, "K of the goal anchor for prompts that have no column instruction_id_list and no num_constraints"
    )
    group_std: Literal["population", "sample"] = knob_of(Method, "group_std")
    prospect: bool = knob_of(Method, "prospect")
    prospect_beta: float = knob_of(Method, "prospect_beta")
    prospect_gain: float = knob_of(Method, "prospect_gain")
    prospect_loss: float = knob_of(Method, "prospect_loss")
    prospect_on_goal: bool = knob_of(Method, "prospect_on_goal")
    asymmetric_kl: bool = knob(True, "KL coefficient by the sign of the advantage; off: beta for all")
    kl_beta_neg: float = knob_of(Method, "kl_beta_neg")
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = knob_of(Method, "kl_estimator")

    packing: Literal["auto", "on", "off"] = knob(
        "auto", "store a prompt once for the completions of its group: where that is exact, always or never"
    )
    backend: Backend = knob("auto", "auto, torch, triton, cpu or cuda")
    workspace_bytes: int | None = knob(None, "memory of the logits of a chunk of rows; unset: by the device")
    fp32_logits: bool = knob(False, "keep the logits of a chunk in float32 although the model is of 16 bits")
    skip_idle: bool = knob(
        False, "leave completions with A = 0 and no KL term out of the head's matmuls; they then report no entropy"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self, MDPGRPOConfig.__annotations__)
        require(self.num_constraints >= 1, "num_constraints", self.num_constraints, "1 or above")
        masks = self.off_policy_mask_threshold is not None and self.multi_temperature
        if masks and self.use_vllm and not self.vllm_importance_sampling_correction:
            # Else nobody knows what the policy gave at the temperatures that vLLM sampled at.
            at_own = self.temperature_objective == "per_row"
            require(
                at_own,
                "temperature_objective",
                self.temperature_objective,
                "per_row, or vllm_importance_sampling_correction on, for off_policy_mask_threshold with use_vllm",
            )
        self.method()

    def method(self) -> Method:
        """The knobs as the method's config, checked. Raises: ConfigError."""
        shared = {*MDPGRPOConfig.__annotations__, "num_generations", "multi_objective_aggregation"}
        own = shared & {f.name for f in dataclasses.fields(Method)}
        members = {name: getattr(self, name) for name in own}
        decoupled = self.multi_objective_aggregation == "normalize_then_sum"
        # TRL does not look at scale_rewards then.
        scale = "group" if decoupled else self.scale_rewards
        if not self.multi_temperature:
            members |= {"temperature_objective": "paper", "rescale_per_row": False}
        return Method(**{**members, "kl_beta_pos": self.beta, "scale_rewards": scale})

    def kernels(self) -> KernelOptions:
        return KernelOptions(*(getattr(self, name) for name in KernelOptions._fields))
