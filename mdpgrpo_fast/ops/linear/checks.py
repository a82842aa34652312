"""Checks at the doors of `linear_token_loss` and `linear_token_logprobs`, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.schemas import Rows
from ..checks import (
    Shape,
    as_tensor,
    check_device,
    check_floating,
    check_rows,
    check_tensor,
    is_number,
    kind_of,
    look,
    refuse,
)
from . import sharded
from .chunks import bytes_per_row

Lengths = Sequence[int] | Tensor
HEAD_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, num_completions: int | None, softcap: float | None,
    logit_scale: float, fp32_logits: bool, workspace_bytes: int, group: dist.ProcessGroup | None,
    check_values: bool | None,
) -> tuple[Shape, int]:  # fmt: skip
    """Returns the shape of the rows and B."""
    check_floating("hidden", hidden)
    check_tensor("weight", weight)
    check_tensor("bias", bias, optional=True)
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is None:
            continue
        plain = type(x) in (Tensor, torch.nn.Parameter) or (name != "hidden" and sharded.is_dtensor(x))
        if not plain and not torch.compiler.is_compiling():
            refuse(name, f"a {type(x).__name__}", "a plain tensor (quantised weights: dequantise them first)")
        if x.dtype not in HEAD_DTYPES:
            refuse(name, f"{x.dtype}", "floating point of 16 bits or more (quantised weights: dequantise them first)")
        if x.device.type == "meta":
            refuse(name, "a meta tensor", "a tensor with memory")
    shape = tuple(getattr(weight, "ds_shape", weight.shape))
    if len(shape) != 2 or shape[0] < 1:
        refuse("weight", f"shape {shape}", "of shape (V, D)")
    if hidden.ndim and hidden.shape[-1] != shape[1]:
        refuse("weight", f"shape {shape} for hidden of D = {hidden.shape[-1]}", "of shape (V, D) with the D of hidden")
    if bias is not None and tuple(getattr(bias, "ds_shape", bias.shape)) != shape[:1]:
        refuse("bias", f"shape {tuple(bias.shape)}", f"of shape {shape[:1]}, one number per row of weight")
    check_device(hidden, "hidden", weight=weight, bias=bias)
    dtype = compute_dtype(hidden)
    for name, x in (("weight", weight), ("bias", bias)):
        if (
            x is not None
            and x.dtype not in (dtype, torch.float32)
            and not torch.is_autocast_enabled(hidden.device.type)
        ):
            refuse(name, f"{x.dtype}", f"of the dtype of hidden, {dtype}, or float32")
        if x is not None and dtype == torch.float64 and x.dtype != dtype:
            refuse(name, f"{x.dtype}", "float64, as hidden is")
    if bias is not None and bias.dtype != weight.dtype:
        refuse("bias", f"{bias.dtype}", f"of the dtype of weight, {weight.dtype}")
    if not (is_number(logit_scale) and abs(logit_scale) < float("inf")):
        refuse("logit_scale", logit_scale, "a finite number")
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        refuse("workspace_bytes", kind_of(workspace_bytes), "a whole number, or None")
    needed = bytes_per_row(shape[0], dtype, fp32_logits)
    if workspace_bytes < needed:
        refuse("workspace_bytes", workspace_bytes, f"at least {needed}, what one row of V = {shape[0]} takes")
    vocab = shape[0]
    if group is not None:
        if sharded.is_dtensor(weight) or hasattr(weight, "ds_id"):
            refuse("weight", f"a {type(weight).__name__}", "this rank's plain tensor where vocab_group is given")
        if not (torch.compiler.is_compiling() or isinstance(group, dist.ProcessGroup)):
            refuse("vocab_group", kind_of(group), "a process group, or None")
        if rows.logit_floor is not None:
            refuse("logit_floor", "a tensor", "left out with vocab_group: a row's token is on one rank alone")
        # First of all that may differ between ranks: one that raised would leave the others waiting.
        sharded.check_split(shape[0], group)
        vocab *= dist.get_world_size(group)
    return check_rows(hidden, rows, num_completions, softcap, check_values, "hidden", vocab)


def check_lengths(lengths: Lengths | None, rows: Rows, shape: Shape, num_completions: int) -> Tensor | None:
    """Tokens that count of each completion, on the host."""
    mask, completion = rows.mask, rows.completion
    if lengths is None:
        return None
    if isinstance(lengths, Tensor) and lengths.device.type != "cpu":
        refuse("lengths", f"device {lengths.device}", "on the host: a list or a CPU tensor")
    host = as_tensor("lengths", lengths, torch.device("cpu"), "of whole numbers").detach()
    if host.dtype not in (torch.int32, torch.int64) or tuple(host.shape) != (num_completions,):
        refuse("lengths", f"{host.dtype} of shape {tuple(host.shape)}", f"integers of shape ({num_completions},)")
    if not look(host, None):
        return host.long()
    if bool((host < 0).any()):
        refuse("lengths", host.tolist(), "0 or above")
    on_host = all(x is None or look(x, None) for x in (mask, completion))
    if on_host:
        keep = torch.ones(shape) if mask is None else (mask != 0).float()
        counts = keep.sum(1) if completion is None else torch.zeros(num_completions).index_add(0, completion, keep)
        if bool(((host != counts) & (host != 0)).any()):
            refuse("lengths", host.tolist(), f"what mask keeps of each completion, {counts.long().tolist()}, or 0")
    return host.long()


def compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype
