"""Liger's two GRPO losses, `LigerFusedLinearGRPOLoss` and `triton_grpo_loss`, under its signatures, on our kernels.

Every argument of Liger 0.8.5 is here, in its order and with its default. What is different is said at each function.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ..config import MDPGRPOConfig
from ..ops.backends import choose
from ..ops.checks import (
    check_device,
    check_integers,
    check_scalar,
    check_shape,
    check_tensor,
    is_number,
    kind_of,
    refuse,
)
from ..ops.linear.losses import linear_token_logprobs, linear_token_loss
from ..ops.logprobs import token_logprobs
from ..ops.token_loss import token_loss
from ..reference import Layout, TokenLoss, token_objective
from .loss_types import LOSS_TYPES, denominator, objective_of

Knob = Tensor | float


class GRPOLoss(torch.nn.Module):
    """Liger's `LigerFusedLinearGRPOLoss`: the loss from hidden states and lm_head, whose logits are never built.

    Every loss_type is there at both levels; vespo, whose weight is of the sequence by itself, is the same at both. A
    batch of vespo at sequence level with a KL term and use_bias_correction_kl is refused.

    Where TRL 1.16 and Liger differ, it is TRL's: luspo is the mean over completions of the sum over the tokens that
    count, at token level and with a KL term or weights of tokens too, where Liger counts padded positions.

    Args, beside those that are the same as Liger's:
        beta: coefficient of the KL term: a number, or a tensor (B,) with one per completion.
        temperature: of the log-probs: a number, of the KL's too; or a tensor (B,) with one per completion, of the
            policy term, and then the KL term is at temperature 1, of which ref_per_token_logps have to be.
        compiled: not used. The kernels are compiled already.
        chunk_size: not used. A chunk is as many tokens as fit a workspace, see `linear_token_loss`.
        use_ref_model: False: no KL term, whatever beta is; the metric of it is then 0.
        delta: of the clipped loss types; cispo, sapo and vespo have no use for it, and it does nothing there.

    Attributes: the arguments, by their names; each call reads them.
    Raises: ValueError naming the argument, here and in a call.
    """

    def __init__(
        self,
        beta: Knob = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: Knob = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg
        if delta is not None and not (is_number(delta) and delta > 0):
            refuse("delta", delta, "above 0, or None")
        self._objective(beta, temperature)

    def _objective(self, beta: Knob, temperature: Knob) -> tuple[MDPGRPOConfig, dict[str, Any]]:
        names = (
            "loss_type", "importance_sampling_level", "epsilon_low", "epsilon_high", "delta", "use_bias_correction_kl",
            "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
            "vespo_lambda_neg",
        )  # fmt: skip
        return _objective(self.use_ref_model and _is_on(beta), temperature, **{n: getattr(self, n) for n in names})

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        *,
        beta: Knob | None = None,
        temperature: Knob | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, with gradients for _input, lin_weight and bias; and its metrics.

        Args:
            _input: (B, L, H) hidden states, the one at a position predicting its token.
            lin_weight, bias: (V, H) and (V,), see `linear_token_loss`, whose errors call the first one weight.
            selected_token_ids, attention_mask: (B, L); a token counts where its mask is not 0. What else is given at
                those that do not count does not matter.
            advantages: (B,).
            ref_per_token_logps: (B, L), or None: then those of ref_input (B, L, H'), ref_weight and ref_bias, computed
                here without a gradient where there is a KL term.
            old_per_token_logps: (B, L), or None: on-policy.
            vllm_is_ratio: (B, L), (B, 1) or (B,).
            num_items_in_batch: tokens of the whole batch, of all processes, by whose number it is divided: what dapo,
                cispo and vespo are normalised by. None: those of the mask, their mean over all processes.
            beta, temperature: for this call in place of the module's; Liger has no such arguments.

        Returns: the loss (), and (mean KL where beta is not 0, share of clipped tokens), detached.
        """
        beta = self.beta if beta is None else beta
        temperature = self.temperature if temperature is None else temperature
        check_tensor("_input", _input)
        if _input.ndim != 3:
            refuse("_input", f"shape {tuple(_input.shape)}", "of shape (B, L, H)")
        check_tensor("selected_token_ids", selected_token_ids)
        check_tensor("attention_mask", attention_mask)
        _check_rows(
            _input, "_input", _input.shape[1], selected_token_ids=selected_token_ids, attention_mask=attention_mask,
            ref_per_token_logps=ref_per_token_logps, old_per_token_logps=old_per_token_logps,
        )  # fmt: skip
        _check_completions(_input, "_input", advantages, beta=beta, temperature=temperature)
        keep = attention_mask != 0
        tokens = selected_token_ids.masked_fill(~keep, 0)
        config, knobs = self._objective(beta, temperature)
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            refuse("max_completion_length", None, "given for loss_type = dr_grpo")
        if not (self.use_ref_model and _is_on(beta)):
            ref_per_token_logps = None
        elif ref_per_token_logps is None:
            ref = _reference_head(_input, ref_input, ref_weight)
            with torch.no_grad():
                ref_per_token_logps, _ = linear_token_logprobs(
                    *ref, tokens, keep, bias=ref_bias, temperature=config.kl_temperature
                )
        out = linear_token_loss(
            _input, lin_weight, tokens, keep, config, bias=bias, advantage=advantages, kl_beta=beta,
            old_logprobs=old_per_token_logps, ref_logprobs=ref_per_token_logps, temperature=temperature,
            importance_weight=_importance_weight(vllm_is_ratio, keep, self.loss_type),
            denominator=_denominator(self.loss_type, keep, self.max_completion_length, num_items_in_batch),
            # The mean KL is of all completions, those too whose coefficient is 0.
            skip_idle=not isinstance(beta, Tensor), **knobs,
        )  # fmt: skip
        return out.loss, tuple(_metrics(keep, out, beta))


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: Knob = 0.9,
    beta: Knob = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Tensor | float | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, list[Tensor]] | tuple[Tensor, Tensor | None, Tensor]:
    """Liger's `triton_grpo_loss`: the loss from logits, on any device and backend that `token_loss` has.

    Loss types, levels and luspo, num_items_in_batch and vllm_is_ratio as in `GRPOLoss`.

    Args, beside those that are the same as Liger's:
        logits: (B, L + 1, V), the last position of which takes no part. Any strides with unit stride in V.
        old_logp, ref_logp, completion_ids, completion_mask: (B, L). No old_logp: on-policy; no mask: all tokens.
        temperature, beta: a number, or a tensor (B,), as in `GRPOLoss`: with a tensor of temperatures the KL term is at
            temperature 1, of which ref_logp has to be.
        inplace: with reduce, the gradient overwrites the logits in this call (Liger's does in the backward pass):
            nothing may read them afterwards, pass False where something does. Without effect for float16 and float64,
            for logits that are a leaf or not contiguous, on backend torch, and without reduce.
        delta: refused for cispo, sapo and vespo, as Liger does.

    Returns: with reduce the loss () and its metrics, [mean KL where beta is not 0, share of clipped tokens]. Else
        (per_token_loss, per_token_kl or None where beta is 0, is_clipped), each float (B, L) and 0 where the mask is.
        A gradient comes back through the first alone. It is the reference's formulas on `token_logprobs`: right for
        any gradient that comes in, at the price of one more read of the logits than with reduce.
    Raises: ValueError naming the argument.
    """
    check_tensor("logits", logits)
    if logits.ndim != 3 or logits.shape[1] < 1:
        refuse("logits", f"shape {tuple(logits.shape)}", "of shape (B, L + 1, V)")
    check_tensor("completion_ids", completion_ids)
    _check_rows(
        logits, "logits", logits.shape[1] - 1, completion_ids=completion_ids, completion_mask=completion_mask,
        old_logp=old_logp, ref_logp=ref_logp,
    )  # fmt: skip
    _check_completions(logits, "logits", advantages, beta=beta, temperature=temperature)
    config, knobs = _objective(
        _is_on(beta), temperature, loss_type=loss_type, importance_sampling_level=importance_sampling_level,
        epsilon_low=eps_low, epsilon_high=eps_high, delta=delta, use_bias_correction_kl=use_bias_correction_kl,
        sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg, vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos, vespo_k_neg=vespo_k_neg, vespo_lambda_neg=vespo_lambda_neg,
    )  # fmt: skip
    if delta and ("delta" not in knobs or delta < 0):
        refuse("delta", delta, "above 0, or None" if delta < 0 else f"None for loss_type = {loss_type}")
    if _is_on(beta) and ref_logp is None:
        refuse("ref_logp", None, "given where beta is not 0")
    keep = torch.ones_like(completion_ids, dtype=torch.bool) if completion_mask is None else completion_mask != 0
    rows: dict[str, Any] = {
        "old_logprobs": old_logp,
        "ref_logprobs": ref_logp if _is_on(beta) else None,
        "importance_weight": _importance_weight(vllm_is_ratio, keep, loss_type),
    }
    # A masked position more in each row, in place of a slice of the logits, whose gradient would be a copy.
    tokens, longer = pad(completion_ids.masked_fill(~keep, 0), (0, 1)), pad(keep, (0, 1))
    if reduce:
        padded: dict[str, Any] = {name: None if x is None else pad(x, (0, 1)) for name, x in rows.items()}
        out = token_loss(
            logits, tokens, longer, config, advantage=advantages, kl_beta=beta, temperature=temperature,
            denominator=_denominator(loss_type, keep, max_completion_length, num_items_in_batch),
            in_place=inplace and _may_overwrite(logits), **padded, **knobs,
        )  # fmt: skip
        return out.loss, _metrics(keep, out, beta)
    logprobs, entropy = (x[:, :-1] for x in token_logprobs(logits, tokens, longer, temperature=temperature))
    kl_logprobs = logprobs
    if isinstance(temperature, Tensor) and _is_on(beta):
        kl_logprobs = token_logprobs(logits, tokens, longer, temperature=config.kl_temperature)[0][:, :-1]
    layout, real = Layout(len(logits)), logprobs.dtype
    parts = token_objective(
        logprobs, kl_logprobs, entropy, keep, layout, config, advantage=layout.knob(advantages, real),
        kl_beta=layout.knob(beta, real), sampling_logprobs=None, temperature=1.0, entropy_coef=0.0, entropy_floor=0.0,
        **{"epsilon_low": 0.0, "epsilon_high": 0.0, "delta": None, **knobs}, **rows,
    )  # fmt: skip
    return parts.per_token, parts.kl if _is_on(beta) else None, (parts.clipped_low | parts.clipped_high).to(real)


# ---- arguments ------------------------------------------------------------------------------------------------------


def _check_rows(like: Tensor, called: str, width: int, **rows: Any) -> None:
    """Tensors (B, L), or None."""
    for name, x in rows.items():
        check_tensor(name, x, optional=True)
        check_shape(name, x, (len(like), width))
        if name.endswith("_ids"):
            check_integers(name, x)
    check_device(like, called, **rows)


def _check_completions(like: Tensor, called: str, advantages: Any, **knobs: Any) -> None:
    """A tensor (B,), and numbers or tensors (B,)."""
    check_tensor("advantages", advantages)
    for name, x in {"advantages": advantages, **knobs}.items():
        if isinstance(x, Tensor):
            check_shape(name, x, (len(like),))
        elif not is_number(x):
            refuse(name, kind_of(x), "a number, or a tensor with one value per completion")
    check_device(like, called, advantages=advantages, **knobs)


def _is_on(beta: Knob) -> bool:
    """Whether there is a KL term: for all that a tensor says without a look, there is one."""
    return isinstance(beta, Tensor) or beta != 0


def _objective(has_kl: bool, temperature: Knob, **options: Any) -> tuple[MDPGRPOConfig, dict[str, Any]]:
    if isinstance(temperature, Tensor):
        temperature = 1.0  # the KL's
    elif not (is_number(temperature) and 0 < temperature < float("inf")):
        refuse("temperature", temperature, "above 0")
    return objective_of(beta=float(has_kl), temperature=temperature, **options)


def _reference_head(_input: Tensor, ref_input: Any, ref_weight: Any) -> tuple[Tensor, Tensor]:
    if ref_input is None:
        refuse("ref_per_token_logps", None, "given, or ref_input, where beta is not 0 and use_ref_model is on")
    check_tensor("ref_input", ref_input)
    check_tensor("ref_weight", ref_weight)
    if ref_input.shape[:-1] != _input.shape[:-1]:
        refuse("ref_input", f"shape {tuple(ref_input.shape)}", "of shape (B, L, H') with B and L of _input")
    return ref_input, ref_weight


def _importance_weight(given: Any, keep: Tensor, loss_type: str) -> Tensor | None:
    """vllm_is_ratio as a weight of each row: that of a completion weighs each of its tokens.

    vespo takes the product of a completion's weights, in which one of the completion itself is to be once.
    """
    check_tensor("vllm_is_ratio", given, optional=True)
    ratio: Tensor | None = given
    check_shape("vllm_is_ratio", ratio, tuple(keep.shape), (len(keep), 1), (len(keep),))
    if ratio is None or ratio.shape == keep.shape:
        return ratio
    ratio = ratio.reshape(-1, 1)
    if LOSS_TYPES[loss_type][0] != "vespo":
        return ratio.expand(keep.shape)
    first = keep.int().argmax(1, keepdim=True)
    return torch.ones_like(keep, dtype=ratio.dtype).scatter(1, first, ratio)


def _denominator(loss_type: str, keep: Tensor, longest: int | None, num_items_in_batch: Any) -> Tensor:
    """`denominator`, where the tokens of the batch are shared out over all processes."""
    if num_items_in_batch is not None:
        check_scalar("num_items_in_batch", num_items_in_batch)
    if LOSS_TYPES[loss_type][1] != "dapo":
        return denominator(loss_type, keep, longest)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_items_in_batch is None:
        num_items_in_batch = keep.sum()
        if ranks > 1:
            dist.all_reduce(num_items_in_batch)
    return denominator(loss_type, keep, longest, num_items_in_batch / ranks)


def _may_overwrite(logits: Tensor) -> bool:
    """Whether `token_loss` takes in_place for these logits."""
    base = logits if logits._base is None else logits._base
    return (
        logits.dtype in (torch.float32, torch.bfloat16)
        and logits.is_contiguous()
        and not (base.is_leaf and base.requires_grad)
        and choose("auto", logits.device, logits.dtype) != "torch"
    )


def _metrics(keep: Tensor, out: TokenLoss, beta: Knob) -> list[Tensor]:
    tokens = keep.sum().clamp(min=1)
    clipped = (out.clipped_low | out.clipped_high).sum() / tokens
    return [out.kl.sum() / tokens, clipped] if _is_on(beta) else [clipped]
