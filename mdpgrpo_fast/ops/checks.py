"""Checks at the public doors: a ValueError that names the argument, what came and what is expected.

Shapes and dtypes are always checked. Values are looked at where that is free, on the CPU, and elsewhere on request: on
a GPU the look would wait for all work before it. Unlooked-at bad values there give a NaN loss, not a plausible one.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..config import ConfigError, MDPGRPOConfig
from ..kernels.schemas import KNOBS, Rows

Shape = tuple[int, ...]
MAX_REWARD = 1e6
Numbers = Tensor | Sequence[Any]


def refuse(name: str, got: Any, expected: str) -> NoReturn:
    """Called where something does not fit: the words are put together only then, so that checks trace under compile."""
    raise ValueError(f"{name} must be {expected}; got {got}")


def kind_of(x: Any) -> str:
    """What came, where its type is what does not fit."""
    return "None" if x is None else f"a {type(x).__name__}"


def check_tensor(name: str, x: Any, optional: bool = False) -> None:
    if not isinstance(x, Tensor) and not (optional and x is None):
        refuse(name, kind_of(x), f"a tensor{', or None' * optional}")


def is_number(x: Any) -> bool:
    """A symbolic one of torch.compile is one too."""
    return isinstance(x, (int, float, torch.SymInt, torch.SymFloat, Real))


def check_whole(name: str, x: Any) -> None:
    """A whole number, or None."""
    if not (x is None or (isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool))):
        refuse(name, x if isinstance(x, float) else kind_of(x), "a whole number, or None")


def check_flags(**flags: Any) -> None:
    for name, x in flags.items():
        if not (isinstance(x, bool) or (x is None and name == "check_values")):
            refuse(name, kind_of(x), "True or False")


def check_config(config: Any) -> None:
    if not isinstance(config, MDPGRPOConfig):
        refuse("config", kind_of(config), "an MDPGRPOConfig, as `preset` gives one")


def as_tensor(name: str, x: Any, device: torch.device, expected: str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor as it is, a list of numbers (or of lists, or an array) as one on the device; dtype: of a list."""
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, (list, tuple)) and not hasattr(x, "__array__"):
        refuse(name, kind_of(x), f"a tensor or a list {expected}")
    try:
        return torch.as_tensor(x, device=device, dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        refuse(name, f"{x} ({e})", f"a tensor or a list {expected}")


def check_shape(name: str, x: Tensor | None, *shapes: Shape) -> None:
    """x, if there is one, has one of the shapes."""
    if x is not None and tuple(x.shape) not in shapes:
        refuse(name, f"shape {tuple(x.shape)}", f"of shape {' or '.join(str(s) for s in dict.fromkeys(shapes))}")


def check_integers(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.int32, torch.int64):
        refuse(name, x.dtype, "int32 or int64")


def check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        refuse(name, x.dtype, "floating point")


def look(x: Tensor, check_values: bool | None) -> bool:
    """Whether to look at the values of x. Never while compiling, where a look would break the graph."""
    return (x.device.type == "cpu" if check_values is None else check_values) and not torch.compiler.is_compiling()


def check_range(name: str, x: Tensor, end: int, check_values: bool | None) -> None:
    """Integers in [0, end)."""
    if look(x, check_values) and x.numel():
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= end:
            refuse(name, f"range {low} to {high}", f"in [0, {end})")


def check_device(reference: Tensor, called: str = "logits", /, **others: Any) -> None:
    for name, x in others.items():
        if isinstance(x, Tensor) and x.ndim and x.device != reference.device:
            refuse(name, f"device {x.device}", f"on {reference.device}, as {called} are")


def as_rewards(rewards: Any, device: torch.device) -> Tensor:
    """Rewards as floating point: those of a list may be whole numbers."""
    given = as_tensor("rewards", rewards, device, "of numbers")
    return given if isinstance(rewards, Tensor) or given.is_floating_point() else given.float()


def as_constraints(num_constraints: Any, prompts: int, device: torch.device, config: MDPGRPOConfig) -> Tensor:
    """K of each prompt (P,); where no goal anchor asks for it, it may be left out."""
    if num_constraints is None:
        if config.alpha:
            refuse(
                "num_constraints",
                "None, where the goal anchor has weight (dual_anchor)",
                "given with rewards",
            )
        num_constraints = 1
    if is_number(num_constraints):
        if not 1 <= num_constraints < float("inf"):
            refuse("num_constraints", num_constraints, "at least 1")
        # A number is filled in there: a copy from the host would wait for the device.
        return torch.full((prompts,), num_constraints, device=device)
    k = as_tensor("num_constraints", num_constraints, device, "of one number for each prompt, or one for all")
    if k.dtype == torch.bool or k.is_complex():
        refuse("num_constraints", k.dtype, "whole numbers")
    return k


def check_size(name: str, rewards: Tensor) -> None:
    """Beyond, float32 holds a reward to a sixteenth or worse, and from 1e19 on its square overflows."""
    if rewards.numel() and (largest := float(rewards.abs().nan_to_num().max())) > MAX_REWARD:
        refuse(name, f"{largest:g}", f"within ±{MAX_REWARD:g}, what float32 tells apart; divide them all by one number")


def check_rewards(
    rewards: Tensor, num_constraints: Tensor, valid: Tensor | None, group_size: int, check_values: bool | None
) -> None:
    """rewards (P, G), num_constraints (P,), valid (P, G)."""
    if rewards.ndim != 2:
        refuse("rewards", f"shape {tuple(rewards.shape)}", "of shape (P, G)")
    check_floating("rewards", rewards)
    if rewards.shape[1] != group_size:
        refuse("rewards", f"G = {rewards.shape[1]}", f"(P, G) with G = num_generations = {group_size}")
    check_shape("num_constraints", num_constraints, (rewards.shape[0],))
    check_shape("valid", valid, tuple(rewards.shape))
    if valid is not None and valid.dtype != torch.bool:
        refuse("valid", valid.dtype, "bool")
    if look(rewards, check_values):
        counted = rewards if valid is None else rewards.masked_fill(~valid, 0)
        if not bool(counted.isfinite().all()):
            refuse("rewards", "NaN or infinity", "finite (pass valid= to leave samples out)")
        check_size("rewards", counted)
        if not bool((num_constraints >= 1).all()):
            refuse("num_constraints", num_constraints.tolist(), "at least 1")


def check_groups(groups: Tensor, rewards: Tensor, group_size: int) -> None:
    """groups (B,): each of the groups 0 .. P-1 has exactly G completions.

    Always looked at but while compiling, also on a GPU: a wrong map gives plausible and wrong statistics.
    """
    if rewards.ndim != 1:
        refuse("rewards", f"shape {tuple(rewards.shape)}", "of shape (B,) where groups are given")
    check_shape("groups", groups, tuple(rewards.shape))
    check_integers("groups", groups)
    if torch.compiler.is_compiling():
        return
    ids, sizes = groups.unique(return_counts=True)
    for group, size in zip(ids.tolist(), sizes.tolist(), strict=True):
        if size != group_size:
            expected = f"a map in which every group has G = num_generations = {group_size} completions"
            refuse("groups", f"group {group} of size {size}", expected)
    if ids.tolist() != list(range(len(ids))):
        refuse("groups", f"group ids {ids.tolist()[:8]}", f"numbered 0 to {len(ids) - 1}")


def check_rows(
    x: Tensor, rows: Rows, num_completions: int | None, softcap: float | None, check_values: bool | None,
    name: str = "logits", vocab: int | None = None,
) -> tuple[Shape, int]:  # fmt: skip
    """What log-probs take: padded (B, L, V), or packed (T, V) with a completion map. Returns the rows' shape and B.

    rows: as given to a public function. For hidden states (B, L, D) or (T, D): their name, and the vocabulary of the
    head that comes after.
    """
    check_tensor(name, x)
    check_tensor("tokens", rows.tokens)
    check_tensor("mask", rows.mask, optional=True)
    check_tensor("completion", rows.completion, optional=True)
    check_whole("num_completions", num_completions)
    last = "V" if vocab is None else "D"
    if x.ndim != (3 if rows.completion is None else 2):
        packed = f"of shape (T, {last}) with completion="
        padded = f"of shape (B, L, {last}), or (T, {last}) with completion="
        refuse(name, f"shape {tuple(x.shape)}", padded if rows.completion is None else packed)
    check_floating(name, x)
    shape, width = tuple(x.shape[:-1]), x.shape[-1]
    if width < 1:
        refuse(name, f"shape {tuple(x.shape)}", "of at least one column")
    check_shape("tokens", rows.tokens, shape)
    check_integers("tokens", rows.tokens)
    check_shape("mask", rows.mask, shape)
    if softcap is not None and not (is_number(softcap) and softcap > 0):
        refuse("softcap", softcap, "above 0, or None")
    if rows.completion is None:
        if num_completions is not None:
            refuse("num_completions", num_completions, f"left out for padded {name}")
        num_completions = shape[0]
    else:
        check_shape("completion", rows.completion, shape)
        check_integers("completion", rows.completion)
        if num_completions is None:
            refuse("num_completions", None, f"given for packed {name}, or follow from rewards")
        if num_completions < 1 and shape[0] > 0:
            refuse("num_completions", num_completions, f"at least 1, as there are {shape[0]} rows")
        check_range("completion", rows.completion, num_completions, check_values)
    check_knob("temperature", rows.temperature, shape, num_completions, check_values)
    check_shape("logit_floor", rows.logit_floor, shape)
    check_range("tokens", rows.tokens, width if vocab is None else vocab, check_values)
    check_device(x, name, **rows._asdict())
    return shape, num_completions


def check_objective(
    rows: Rows, shape: Shape, num_completions: int, config: MDPGRPOConfig, max_completion_length: int | None,
    denominator: Tensor | float | None, check_values: bool | None, name: str = "logits",
) -> None:  # fmt: skip
    """What the objective takes beside `check_rows`. name: of the logits or hidden states."""
    check_config(config)
    check_whole("max_completion_length", max_completion_length)
    if max_completion_length is None and rows.completion is not None:
        if config.aggregation == "dr_grpo" and config.horizon is None and denominator is None:
            refuse("max_completion_length", None, f"given for packed {name} with aggregation = dr_grpo")
    elif max_completion_length is not None and max_completion_length < 1:
        refuse("max_completion_length", max_completion_length, "at least 1")
    if denominator is not None:
        check_scalar("denominator", denominator)
    for member, x in rows._asdict().items():
        if member not in ("tokens", "mask", "completion", "temperature"):
            if member in KNOBS:
                check_knob(member, x, shape, num_completions, check_values)
            else:
                check_tensor(member, x, optional=True)
                check_shape(member, x, shape)
    if config.weighs_sampling and rows.importance_weight is None:
        raise ConfigError(
            "importance_weight is required by temperature_objective = corrected and by sampler_correction"
        )
    _check_consumed(rows, config)


def _check_consumed(rows: Rows, config: MDPGRPOConfig) -> None:
    """Nothing is given that the objective has no use for."""
    unused = {
        "delta": config.loss not in ("ppo_clip", "luspo"),
        "epsilon_low": config.loss in ("sapo", "vespo"),
        "epsilon_high": config.loss in ("sapo", "vespo"),
    }
    for name, is_unused in unused.items():
        if is_unused and getattr(rows, name) is not None:
            refuse(name, "a value", f"left out for loss = {config.loss}, which has no use for it")
    if rows.sampling_logprobs is not None and config.off_policy_threshold is None:
        refuse("sampling_logprobs", "a tensor", "left out where config.off_policy_threshold is unset")
    if rows.entropy_floor is not None and config.top_entropy_quantile < 1:
        refuse("entropy_floor", "a value", "left out where config.top_entropy_quantile asks for one of its own")


def check_scalar(name: str, x: Any, least: float = -float("inf")) -> None:
    """A number that is not below the least, or a tensor of one."""
    if isinstance(x, Tensor):
        if x.numel() != 1:
            refuse(name, f"shape {tuple(x.shape)}", "a number or a scalar tensor")
    elif not is_number(x):
        refuse(name, kind_of(x), "a number or a scalar tensor")
    elif x < least:
        refuse(name, x, f"{least:g} or above")


def check_pair(name: str, x: Any) -> None:
    """A mean or median, and a deviation."""
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        refuse(name, x if isinstance(x, (tuple, list)) else kind_of(x), "a pair of numbers: a middle and a deviation")
    check_scalar(name, x[0])
    check_scalar(name, x[1], least=0)


def check_knob(
    name: str, x: Tensor | float | None, shape: Shape, num_completions: int, check_values: bool | None
) -> None:
    """A number, or a tensor with one value per completion (B,) or per row; a temperature above 0, delta not below."""
    if isinstance(x, Tensor):
        if x.ndim:
            check_shape(name, x, (num_completions,), shape)
        if name in ("temperature", "delta") and look(x, check_values):
            if name == "temperature" and not bool((x > 0).all()):
                refuse(name, x.tolist(), "above 0 in every row")
            if name == "delta" and bool((x < 0).any()):
                refuse(name, x.tolist(), "0 (no cap) or above in every row")
        return
    if x is not None and not is_number(x):
        refuse(name, kind_of(x), "a number, or a tensor with one value per completion or per row")
    if name == "temperature" and (x is None or not 0 < x < float("inf")):
        refuse(name, x, "above 0")
    elif name == "delta" and x is not None and x < 0:
        refuse(name, x, "0 (no cap) or above")


def check_advantages(
    rows: Rows, num_completions: int, rewards: Tensor | None, num_constraints: Any, valid: Any, groups: Any,
) -> None:  # fmt: skip
    """Either rewards, or advantage and kl_beta; what goes with rewards comes with them."""
    for name in ("advantage", "kl_beta"):
        given = getattr(rows, name) is not None
        if rewards is None and not given:
            refuse(name, None, "given, or rewards")
        if rewards is not None and given:
            refuse(name, "both it and rewards", "left out where rewards are given")
    if rewards is not None and rewards.numel() != num_completions:
        refuse("rewards", f"{rewards.numel()} rewards", f"one for each of {num_completions} completions")
    for name, extra in (("num_constraints", num_constraints), ("valid", valid), ("groups", groups)):
        if rewards is None and extra is not None:
            refuse(name, kind_of(extra), "given with rewards only")


# ---- logits that are to be overwritten -------------------------------------------------------------------------------


def check_in_place(logits: Tensor) -> None:
    if logits.stride(-1) != 1:
        refuse("in_place", f"True with logits of stride {logits.stride()}", "off without unit stride in V")
    if logits.dtype == torch.float16:
        refuse("in_place", "True with float16", "off: a float16 gradient underflows before it is scaled")
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        refuse("in_place", "True with logits that are a leaf", "off for a leaf, whose gradient would be itself")
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride < extent:
                refuse("in_place", f"True with logits of stride {logits.stride()}", "off where rows overlap")
            extent = stride * size
