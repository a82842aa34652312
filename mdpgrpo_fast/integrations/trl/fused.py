"""TRL's GRPOTrainer with our kernels in place of its loss and log-probs: the same numbers, nothing else changed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ...config import Backend
from ...log import say_once
from ...models.heads import UnsupportedHead, causal_lm
from ...models.packing import Packing, Unpackable
from ...ops.backends import choose
from ...ops.checks import check_flags, refuse
from ...ops.linear.losses import linear_token_logprobs, linear_token_loss
from ...reference import TokenLoss
from ..loss_types import LOSS_TYPES, LossType, denominator, objective_of
from .config import KernelOptions
from .entropy import EntropyBonus
from .head import HeadShape, declared_shape, install, shape_of, unrounded
from .metrics import log_loss
from .rows import COUNTED, Form, Packer, PaddedRows, host_facts

# Of a batch, beside TRL's own entries, shuffled and split as they are: of `rows.host_facts`; (B,) KL coefficients.
FACTS, KL_BETA = "host_facts", "kl_beta"
# What some rows' hidden states and head give; rows: which of the batch they are.
Score = Callable[[Form, slice, Tensor, dict[str, Any]], FusedCausalLMOutput]
# What this TRL's log-probs take of images, after all that text has.
_TAKEN = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
IMAGES = tuple(_TAKEN[_TAKEN.index("compute_aux_loss") + 1 :])
# Of GRPOConfig, whose names and meaning are ours.
_OPTIONS = (
    "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"
)  # fmt: skip


class FusedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer on our kernels. What `accelerate_trl` makes of a trainer, and the base of `MDPGRPOTrainer`."""

    args: Any
    model: Any
    kernel_options: KernelOptions
    fuses_loss = True  # False: only log-probs, with a loss of a subclass's own
    packer: Packer | None = None
    last_loss = 0.0  # of the last micro-batch, summed over ranks

    def use_kernels(self, options: KernelOptions) -> None:
        """To be called once, before training. Raises: ValueError as `accelerate_trl`."""
        self.kernel_options = options
        if options.packing not in ("auto", "on", "off"):
            refuse("packing", repr(options.packing), "auto, on or off")
        if options.backend != "auto":
            choose(options.backend, self.accelerator.device, torch.float32)
        if self.fuses_loss:
            self.grpo_objective({})  # what it refuses, it refuses before anything is sampled
        policy = self.accelerator.unwrap_model(self.model)
        try:
            shape = self._head_shape(policy)
        except UnsupportedHead as e:
            raise ValueError(f"model cannot be trained through the fused head: {e}") from None
        if options.packing != "off":
            self.packer = self._packer(policy)
        install(policy, shape)
        if self.ref_model is not None:
            install(self.accelerator.unwrap_model(self.ref_model), shape)

    def _head_shape(self, policy: Any) -> HeadShape:
        weight = causal_lm(policy).get_output_embeddings().weight
        # Parted by FSDP or DeepSpeed already, a model is not to be tried.
        find = declared_shape if weight.is_meta or hasattr(weight, "ds_id") else shape_of
        return find(policy, self.args.cast_lm_head_to_fp32)

    def _packer(self, policy: Any) -> Packer | None:
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else policy.dtype
        weight, reason = next(policy.parameters()), None
        try:
            if self.aux_loss_enabled or getattr(policy.config.get_text_config(), "output_router_logits", False):
                raise Unpackable("the load-balancing loss of its experts would count a shared prompt once")
            if getattr(getattr(policy, "active_peft_config", None), "is_prompt_learning", False):
                raise Unpackable("peft puts something of its own before every prompt")
            if hasattr(weight, "ds_id"):
                raise Unpackable("its weights are parted by ZeRO-3, so that packed groups cannot be tried")
            packing = Packing(policy, self.accelerator.device, half, trial=not weight.is_meta)
        except Unpackable as e:
            reason = str(e)
        # Where FSDP loads the weights on one rank, that one finds out for all.
        reason = next((r for r in gather_object([reason]) if r is not None), None)
        if reason is None:
            return Packer(packing)
        if self.kernel_options.packing == "on":
            raise ValueError(f"packing = on cannot be had for this model: {reason}")
        say_once(logging.WARNING, f"prompts are not shared inside a group: {reason}")
        return None

    @property
    def skips_idle(self) -> bool:
        """Whether completions with A = 0 report no entropy. An adaptive bonus that rests has to see that of all."""
        return self.kernel_options.skip_idle and self.beta == 0 and not self._entropy_bonus_enabled

    # ---- what MDPGRPOTrainer has of its own -------------------------------------------------------------------------

    def grpo_objective(self, inputs: dict[str, Any], **options: Any) -> LossType:
        """Of a batch, by the trainer's present settings. options: others of `objective_of`."""
        args = self.args
        options = {"temperature": self.temperature, **{n: getattr(args, n) for n in _OPTIONS}, **options}
        return objective_of(
            self.loss_type, importance_sampling_level=self.importance_sampling_level, epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high, delta=args.delta, beta=self.beta,
            use_bias_correction_kl=args.use_bias_correction_kl,
            off_policy_mask_threshold=self.off_policy_mask_threshold, **options,
        )  # fmt: skip

    def loss_temperature(self, inputs: dict[str, Any]) -> Tensor | float:
        """Of the policy's log-probs in the loss: a number, or (B,)."""
        return self.temperature

    def logprob_temperatures(self, model: Any) -> list[Tensor | float]:
        """Of the log-probs without a gradient of a generation batch by a model: numbers, or (B,). TRL takes those at
        the first, `keep_logprobs` all."""
        return [self.temperature]

    def keep_logprobs(self, model: Any, logprobs: list[Tensor]) -> None:
        """Is called with the log-probs (B, L) of a generation batch, one for each temperature."""

    # ---- forward passes ---------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None = None,
        compute_entropy: bool = False, compute_aux_loss: bool = False, **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        trains, batch = torch.is_grad_enabled(), (input_ids, attention_mask, logits_to_keep, batch_size)
        if trains and compute_entropy and self._entropy_bonus_enabled:
            say_once(logging.WARNING, "an entropy bonus in a loss of one's own takes TRL's head: ours has no gradient")
            given: tuple[Tensor, Tensor | None, Tensor | None] = super()._get_per_token_logps_and_entropies(
                model, *batch, compute_entropy, compute_aux_loss, **images
            )
            return given
        temperatures = [self.temperature] if trains else self.logprob_temperatures(model)
        found: list[list[Tensor]] = [[] for _ in temperatures]
        entropies: list[Tensor] = []

        def score(form: Form, rows: slice, hidden: Tensor, head: dict[str, Any]) -> FusedCausalLMOutput:
            states = form.states(hidden)
            for tau, into in zip(temperatures, found, strict=True):
                at = form.of(tau[rows] if isinstance(tau, Tensor) else tau)
                each = linear_token_logprobs(states, **form.arguments(), temperature=at, **head, **self._memory())
                into.append(form.padded(each[0]))
            entropies.append(form.padded(each[1]))
            return FusedCausalLMOutput(log_probs=found[0][-1])

        attended = attention_mask[:, -logits_to_keep:]
        outs = self._passes(model, score, batch, attended, None, compute_aux_loss, images)
        whole = [torch.cat(each) for each in found]
        if not trains:
            self.keep_logprobs(model, whole)
        logprobs = unrounded(torch.cat([out.log_probs for out in outs]), whole[0])
        aux_loss = torch.stack([out.aux_loss for out in outs]).mean() if compute_aux_loss else None
        return logprobs, torch.cat(entropies) if compute_entropy else None, aux_loss

    def _passes(
        self, model: Any, score: Score, batch: tuple[Tensor, Tensor, int, int | None], mask: Tensor,
        facts: Tensor | None, aux_loss: bool, images: dict[str, Any],
    ) -> list[Any]:  # fmt: skip
        """What the model's passes over a batch return, which `score` has made. mask: (B, L) of the rows that count;
        facts: of `host_facts`, if known."""
        input_ids, attention_mask, width, size = batch
        size = size or len(input_ids)
        if self.packer is None or any(x is not None for x in images.values()):
            return self._padded_passes(model, score, batch, mask, facts, 0, aux_loss, images)
        prompt_ids, tokens = input_ids[:, :-width], input_ids[:, -width:]
        if facts is None:
            facts = host_facts(prompt_ids, attention_mask[:, :-width], attention_mask[:, -width:], mask)
        outs = []
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            form = self.packer.rows(prompt_ids[rows], tokens[rows], mask[rows], facts[rows])
            if form is None:
                part = (input_ids[rows], attention_mask[rows], width, None)
                outs += self._padded_passes(model, score, part, mask[rows], facts[rows], start, False, {})
                continue
            packed = functools.partial(score, form, rows)
            with self.accelerator.autocast():
                outs.append(model(**self.packer.packing.arguments(form.packed), fused_lm_head=packed))
        return outs

    def _padded_passes(
        self, model: Any, score: Score, batch: tuple[Tensor, Tensor, int, int | None], mask: Tensor,
        facts: Tensor | None, first: int, aux_loss: bool, images: dict[str, Any],
    ) -> list[Any]:  # fmt: skip
        """As `_passes`, by TRL's own loop over the batch, which knows how images are cut. first: its first row's
        number."""
        outs: list[Any] = []
        at = 0

        def padded(hidden: Tensor, head: dict[str, Any]) -> FusedCausalLMOutput:
            nonlocal at
            own = slice(at, at + len(hidden))
            at = own.stop
            lengths = None if facts is None else facts[own, COUNTED]
            form = PaddedRows(batch[0][own, -batch[2] :], mask[own], lengths)
            return score(form, slice(first + own.start, first + own.stop), hidden, head)

        def call(**inputs: Any) -> Any:
            outs.append(model(**{**inputs, "fused_lm_head": padded}))
            return outs[-1]

        super()._get_per_token_logps_and_entropies(call, *batch, False, aux_loss, **images)
        return outs

    def _memory(self) -> dict[str, Any]:
        o = self.kernel_options
        return {"backend": o.backend, "workspace_bytes": o.workspace_bytes, "fp32_logits": o.fp32_logits}

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        batch[FACTS] = host_facts(batch["prompt_ids"], batch["prompt_mask"], batch["completion_mask"], mask)
        return batch

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self.fuses_loss:
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss
        mode = "train" if self.model.training else "eval"
        attended = inputs["completion_mask"]
        mask = attended * inputs.get("tool_mask", 1)
        config, knobs = self.grpo_objective(inputs)
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        whole, scale = self._normaliser(inputs, mask, steps, mode)
        bonus = EntropyBonus(self, mask, steps)
        of_rows = self._of_rows(inputs, mask)
        # vLLM gives NaN for some tokens, which then count as on-policy.
        sampling = of_rows["sampling_logprobs"]
        unscored = sampling is not None and bool(sampling.isnan().any())
        found: list[TokenLoss] = []
        losses: list[Tensor] = []

        def score(form: Form, rows: slice, hidden: Tensor, head: dict[str, Any]) -> FusedCausalLMOutput:
            states, given = form.states(hidden), {name: form.of(x) for name, x in of_rows.items()}
            common = {**form.arguments(), **head, **self._memory()}
            if self.top_entropy_quantile < 1 or unscored:
                with torch.no_grad():
                    logprobs, entropy = linear_token_logprobs(states, **common, temperature=given["temperature"])
            if unscored:
                sampled = given["sampling_logprobs"]
                given["sampling_logprobs"] = torch.where(sampled.isnan(), logprobs, sampled)
            if self.top_entropy_quantile < 1:
                # TRL's own, over the tokens of all ranks.
                bonus.kept = self.get_high_entropy_mask(form.padded(entropy), mask, 1 - self.top_entropy_quantile)
                given["entropy_floor"] = form.of(torch.where(bonus.kept, 0.0, torch.inf))
            if bonus.coef:
                given["entropy_coef"] = form.of(bonus.per_completion(config.aggregation, whole, scale))
            out = linear_token_loss(
                states, config=config, denominator=whole, skip_idle=self.skips_idle, **common, **given, **knobs
            )
            per_row = ("logprobs", "entropy", "kl", "ratio")
            found.append(dataclasses.replace(out, **{n: form.padded(getattr(out, n)) for n in per_row}))
            # Scaled here, so that the gradient that comes in is 1, whatever it is rounded to.
            losses.append(out.loss * scale)
            return FusedCausalLMOutput(loss=losses[-1], log_probs=found[-1].logprobs)

        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], attended], 1)
        images = {name: inputs.get(name) for name in IMAGES}
        batch = (ids, attention, attended.shape[1], None)
        (passed,) = self._passes(model, score, batch, mask, inputs.get(FACTS), self.aux_loss_enabled, images)
        (out,) = found
        loss = unrounded(passed.loss, losses[0])
        bonus.follow(out.entropy, loss, mode, averages=LOSS_TYPES[self.loss_type][1] != "dapo")
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * passed.aux_loss / steps
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(passed.aux_loss).mean().item())
        self.last_loss = log_loss(self, mode, loss, out, mask, inputs)
        return loss

    def _normaliser(self, inputs: dict[str, Any], mask: Tensor, steps: int, mode: str) -> tuple[Tensor, float]:
        """What the sum over a micro-batch is divided by, and multiplied by after that. steps: of accumulation."""
        tokens = inputs["num_items_in_batch"] if LOSS_TYPES[self.loss_type][1] == "dapo" else None
        whole = denominator(self.loss_type, mask, self.max_completion_length, tokens)
        if tokens is None:
            return whole, 1 / steps
        # The tokens are those of all ranks' generation batch, of which an update takes a part.
        share = self.args.steps_per_generation / steps if mode == "train" else 1
        return whole, self.accelerator.num_processes * share

    def _of_rows(self, inputs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
        """Arguments of `linear_token_loss` that are given for each completion or row."""
        advantage = inputs["advantages"]
        weighs = self.use_vllm and self.vllm_importance_sampling_correction
        return {
            "advantage": advantage.squeeze(1) if advantage.ndim == 2 and advantage.shape[1] == 1 else advantage,
            "kl_beta": inputs.get(KL_BETA, self.beta),
            "temperature": self.loss_temperature(inputs),
            "old_logprobs": inputs.get("old_per_token_logps"),
            "ref_logprobs": inputs["ref_per_token_logps"] if self.beta != 0 else None,
            "importance_weight": inputs["importance_sampling_ratio"].expand(mask.shape) if weighs else None,
            "sampling_logprobs": inputs.get("sampling_per_token_logps") if self.off_policy_mask_threshold else None,
        }


def accelerate_trl(
    trainer: GRPOTrainer, *, backend: Backend = "auto", workspace_bytes: int | None = None, fp32_logits: bool = False,
    skip_idle: bool = False, packing: Literal["auto", "on", "off"] = "off",
) -> FusedGRPOTrainer:  # fmt: skip
    """Puts our kernels in place of the loss and log-probs of a GRPOTrainer of TRL, in place; returns the trainer.

    Numbers stay those of TRL, to rounding, for every loss type and option; PEFT, vLLM, FSDP, DeepSpeed and callbacks
    are TRL's. To be called before `trainer.train()`. A subclass whose `_compute_loss` is its own keeps it, on our
    log-probs, which is said.

    Args:
        trainer: a GRPOTrainer, or of a subclass of it.
        backend, workspace_bytes, fp32_logits, skip_idle: as of `linear_token_loss`. With skip_idle the metric entropy
            is without the completions that were left out.
        packing: "auto": completions of a micro-batch that have their prompt in common are run with one copy of it
            where the model's hidden states are the same then, which is tried; "on" raises ValueError where they are
            not. TRL shuffles completions, so that a micro-batch holds few of a group unless it is all of a generation
            batch; `MDPGRPOTrainer` keeps groups together.

    Raises: ValueError where the model's logits are not those of a linear head, or the trainer's log-probs are its own;
        TypeError for another trainer.
    """
    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(f"trainer must be a GRPOTrainer of TRL; got {type(trainer).__name__}")
    if isinstance(trainer, FusedGRPOTrainer):
        raise ValueError("trainer must be one without our kernels; it has them already")
    kind = type(trainer)
    if kind._get_per_token_logps_and_entropies is not GRPOTrainer._get_per_token_logps_and_entropies:
        raise ValueError(
            f"trainer must have TRL's log-probs; {kind.__name__}._get_per_token_logps_and_entropies is own"
        )
    check_flags(fp32_logits=fp32_logits, skip_idle=skip_idle)
    fused: Any = trainer
    fused.__class__ = type(kind.__name__, (FusedGRPOTrainer, kind), {"__module__": kind.__module__})
    if kind._compute_loss is not GRPOTrainer._compute_loss:
        say_once(logging.WARNING, f"{kind.__name__}._compute_loss is its own and stays: only log-probs are ours")
        fused.fuses_loss = False
    try:
        fused.use_kernels(KernelOptions(backend, workspace_bytes, fp32_logits, skip_idle, packing))
    except Exception:
        fused.__class__ = kind
        raise
    return fused  # type: ignore[no-any-return]
