"""MDPGRPOTrainer: TRL's GRPOTrainer with the method's sampling, advantages and KL, on our kernels."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOConfig
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from ...config import MDPGRPOConfig as Method
from ...log import say_once
from ...ops.advantages import advantages
from ...reference import Advantages
from ...training.metrics import group_health
from ..loss_types import LossType
from . import sampling
from .config import KernelOptions, MDPGRPOConfig
from .fused import FACTS, IMAGES, KL_BETA, FusedGRPOTrainer
from .rows import WHICH_PROMPT

# Of a batch, beside TRL's own entries.
TEMPERATURE = "sampling_temperature"


class MDPGRPOTrainer(FusedGRPOTrainer):
    """GRPOTrainer of TRL with MDP-GRPO: a drop-in, with the same arguments.

    args: an `MDPGRPOConfig`; a GRPOConfig has none of the method's knobs and trains as TRL does, on our kernels, which
    is said. Rewards are expected in [0, 1], the share of a prompt's constraints that hold. K of the goal anchor is the
    number of entries of the column instruction_id_list, the column num_constraints, or the knob of that name.

    Sampling, log-probs, advantages and the KL coefficient of each completion are the method's in training; evaluation
    is TRL's. All else is TRL's: PEFT, vLLM, FSDP, DeepSpeed, callbacks, tools, environments.

    Raises: ValueError for a rollout_func with multi_temperature, a model whose logits are not those of
    a linear head, an infinite reward; FloatingPointError for a loss that is not finite.
    """

    _tag_names = ["trl", "grpo", "mdp-grpo"]  # noqa: RUF012  TRL's
    _name = "MDP-GRPO"
    _paper = {"title": "MDP-GRPO", "id": "2606.06058"}  # noqa: RUF012

    method: Method | None = None
    _buffered_inputs: Any
    # Whether a completion has had an advantage in this process; None where none was looked at: no step, a GRPOConfig.
    has_learned: bool | None = None
    _rewards: Tensor | None = None  # (N, R) of all ranks, of the last generation
    _taus: Tensor | None = None  # (B,) sampling temperatures of the generation that is under way
    _at_both: list[Tensor]  # its log-probs at the temperatures of sampling, and at that of the loss

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: GRPOConfig | None = None, train_dataset: Any = None,
        *others: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = MDPGRPOConfig(f"{name.rstrip('/').split('/')[-1]}-MDP-GRPO")
        options = KernelOptions()
        if isinstance(args, MDPGRPOConfig):
            self.method, options = args.method(), args.kernels()
            self._check(args, train_dataset, kwargs.get("rollout_func"))
        else:
            say_once(logging.WARNING, "args is a GRPOConfig, not an MDPGRPOConfig: this is TRL's GRPO on our kernels")
        super().__init__(model, reward_funcs, args, train_dataset, *others, **kwargs)
        self.use_kernels(options)

    def _check(self, args: MDPGRPOConfig, train_dataset: Any, rollout_func: Any) -> None:
        if rollout_func is not None and args.multi_temperature:
            raise ValueError(
                "rollout_func samples at temperatures of its own; set multi_temperature = False in MDPGRPOConfig"
            )
        columns = getattr(train_dataset, "column_names", None)
        if args.dual_anchor and columns and not {*columns} & {"instruction_id_list", "num_constraints"}:
            say_once(
                logging.WARNING,
                f"train_dataset has no column instruction_id_list or num_constraints: K is {args.num_constraints} for "
                "all prompts (num_constraints of MDPGRPOConfig)",
            )

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> Any:
        turn = (prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
        if self._taus is None:
            return super()._generate_single_turn(*turn)
        of_batch = self._taus.tolist()
        taus = [of_batch[n] for n in sampling.numbers(prompt_ids)]
        if self.use_transformers_continuous_batching:
            return self._generate_by_temperature(prompt_ids, taus, num_generations)
        if not self.use_vllm:
            sampled_at = sampling.through_transformers(self, taus)
        elif self.vllm_mode == "server":
            sampled_at = sampling.through_server(self.vllm_generation, taus)
        else:
            sampled_at = sampling.through_vllm(self.vllm_generation, taus)
        with sampled_at:
            return super()._generate_single_turn(*turn)

    def _generate_by_temperature(self, prompt_ids: Any, taus: list[float], num_generations: int) -> Any:
        """Continuous batching has one temperature for a batch."""
        assert self._taus is not None and self.method is not None
        found: list[Any] = [None] * len(prompt_ids)
        # A pass for each on every rank, whatever slots it holds: the passes of a sharded model are in step.
        for tau in torch.tensor(self.method.slot_temperatures).unique().tolist():
            places = [i for i, t in enumerate(taus) if t == tau]
            with sampling.replaced(self.generation_config, "temperature", tau):
                part = [prompt_ids[i] for i in places or [0]]
                ids, _ = super()._generate_single_turn(part, None, {}, num_generations)
            for i, completion in zip(places, ids, strict=False):
                found[i] = completion
        return found, None

    def _tool_call_loop(self, prompts: Any, prompt_ids: Any, *others: Any) -> Any:
        # Later turns are of some of the batch, which only their ids can tell.
        numbered = [sampling.Numbered(ids, i) for i, ids in enumerate(prompt_ids)]
        return super()._tool_call_loop(prompts, numbered, *others)

    # ---- a generation batch -----------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._taus, self._at_both = None, []
        if self.method is None or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        method, device = self.method, self.accelerator.device
        first, g = self.accelerator.process_index * len(inputs), method.num_generations
        if method.multi_temperature:
            slots = [method.slot_temperatures[(first + i) % g] for i in range(len(inputs))]
            self._taus = torch.tensor(slots, device=device)
        constraints = self._constraints(inputs)
        batch = super()._generate_and_score_completions(inputs)
        own = slice(first, first + len(inputs))
        found = self._advantages(constraints)
        self._log_groups(found)
        if method.dual_anchor or method.prospect:
            everyone = found.advantage.flatten()
            batch["advantages"] = everyone[own]
            logged: Any = self._logs["advantages"]
            for _ in everyone:
                logged.pop()
            logged.extend(everyone.tolist())
        else:  # TRL's own have the sign of a rounding where rewards are the mean
            batch["advantages"] = batch["advantages"].masked_fill(found.advantage.flatten()[own] == 0, 0)
        some = bool((self.accelerator.gather(batch["advantages"]) != 0).any())
        self.has_learned = some or bool(self.has_learned)
        if method.asymmetric_kl and self.beta != 0:
            batch[KL_BETA] = torch.where(batch["advantages"] < 0, method.kl_beta_neg, self.beta)
        if self._taus is not None:
            batch[TEMPERATURE] = self._taus
            self._at_the_temperature_of_the_loss(batch)
        self._taus, self._at_both = None, []
        return batch

    def _at_the_temperature_of_the_loss(self, batch: dict[str, Any]) -> None:
        """Takes log-probs at the temperatures of sampling, which TRL's importance weight is of, to that of the loss."""
        if self._at_both:
            at_sampling, batch["old_per_token_logps"] = self._at_both
            # For the off-policy mask: what the sampler is off by at its own temperature, and no more.
            batch["sampling_per_token_logps"] += batch["old_per_token_logps"] - at_sampling

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _constraints(self, inputs: list[dict[str, Any]]) -> Tensor | None:
        """(P,) K of the prompts of all ranks; None where nothing depends on it."""
        assert self.method is not None
        if not self.method.dual_anchor:
            return None
        default = self.args.num_constraints
        known = [float(len(r.get("instruction_id_list") or ()) or r.get("num_constraints") or default) for r in inputs]
        return torch.tensor(gather_object(known)[:: self.method.num_generations], device=self.accelerator.device)

    def _advantages(self, constraints: Tensor | None) -> Advantages:
        """Of all ranks' completions."""
        assert self.method is not None and self._rewards is not None
        rewards, valid = self._totals()
        parts: dict[str, Any] = {}
        if self.method.multi_objective_aggregation == "normalize_then_sum":
            single = self._rewards.view(*rewards.shape, -1)
            parts = {"parts": single, "part_weights": self.reward_weights.to(single.device)}
        backend = self.kernel_options.backend
        return advantages(rewards, constraints, self.method, valid=valid, check_values=True, backend=backend, **parts)

    def _totals(self) -> tuple[Tensor, Tensor]:
        """(P, G) weighted sums of the rewards of all ranks' completions, and whether a reward applies to them."""
        assert self.method is not None and self._rewards is not None
        shape = (-1, self.method.num_generations)
        total = (self._rewards * self.reward_weights.to(self._rewards.device)).nansum(1)
        return total.view(shape), (~self._rewards.isnan().all(1)).view(shape)

    def _log_groups(self, found: Advantages) -> None:
        assert self.method is not None
        rewards, valid = self._totals()
        health = group_health(rewards, valid, found, never_idle=self.beta != 0 or self._entropy_bonus_enabled)
        log = self._metrics["train"]
        for name, value in health.items():
            log[f"groups/{name}"].append(value)
        if self.method.multi_temperature:
            slots = torch.tensor(self.method.slot_temperatures)
            for tau in sorted(set(self.method.slot_temperatures)):
                at = (slots == slots.new_tensor(tau)).to(valid.device).expand_as(valid) & valid
                log[f"reward/temperature_{tau:g}"].append(rewards[at].mean().item())

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As TRL's, but that with packing a group's completions stay together where TRL shuffles all of a rank's."""
        if self.packer is None or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        parts = self.args.steps_per_generation
        if self._step % (parts * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            if self.kernel_options.packing == "on" and any(name in batch for name in IMAGES):
                raise ValueError("packing must be auto or off for prompts with images")
            prompts = batch[FACTS][:, WHICH_PROMPT]
            order = torch.randperm(len(prompts))[prompts].argsort(stable=True)
            rows = {name: _in_order(x, order) for name, x in split_pixel_values_by_grid(batch).items()}
            split: list[Any] = split_tensor_dict(rows, parts)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(part) for part in split]
        return self._buffered_inputs[self._step % parts]

    # ---- temperatures and the loss ----------------------------------------------------------------------------------

    def logprob_temperatures(self, model: Any) -> list[Tensor | float]:
        if self.method is None or self._taus is None:
            return [self.temperature]
        if self._is_reference(model):
            return [self.method.kl_temperature]
        of_loss = self._loss_temperature(self._taus)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            # The weight is against what the sampler said, at its own temperature.
            return [self._taus, of_loss] if of_loss is not self._taus else [self._taus]
        return [of_loss]

    def _is_reference(self, model: Any) -> bool:
        """Whether it is TRL's reference: a model of its own, or the policy with its adapter off or another on."""
        if model is self.ref_model:
            return True
        policy = self.accelerator.unwrap_model(self.model)
        off = any(getattr(m, "disable_adapters", False) is True for m in policy.modules())
        # Of prompt learning, which has no layers, peft itself knows.
        off |= getattr(policy, "_adapters_disabled", False)
        return off or getattr(policy, "active_adapter", None) == "ref"

    def keep_logprobs(self, model: Any, logprobs: list[Tensor]) -> None:
        if len(logprobs) == 2:
            self._at_both = logprobs

    def _loss_temperature(self, taus: Tensor) -> Tensor | float:
        assert self.method is not None
        return taus if self.method.temperature_objective == "per_row" else 1.0

    def loss_temperature(self, inputs: dict[str, Any]) -> Tensor | float:
        return self._loss_temperature(inputs[TEMPERATURE]) if TEMPERATURE in inputs else self.temperature

    def grpo_objective(self, inputs: dict[str, Any], **options: Any) -> LossType:
        if self.method is not None and self.model.training:
            options["kl_estimator"] = self.method.kl_estimator
            if TEMPERATURE in inputs:
                options["temperature"] = self.method.kl_temperature
                options |= {n: getattr(self.method, n) for n in ("temperature_objective", "rescale_per_row")}
        return super().grpo_objective(inputs, **options)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        if not math.isfinite(self.last_loss):
            raise FloatingPointError(
                f"the loss is {self.last_loss} at step {self.state.global_step + 1}: look at the rewards, the learning "
                "rate and the precision"
            )
        return loss


def _in_order(x: Any, order: Tensor) -> Any:
    """What a batch has of each completion, a tensor or a list, in another order; anything else as it is."""
    if isinstance(x, list):
        return [x[i] for i in order.tolist()]
    return x[order.to(x.device)] if isinstance(x, Tensor) and x.ndim else x
