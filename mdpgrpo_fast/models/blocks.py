"""Gradient checkpointing and compilation of the blocks of a model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config import ConfigError
from . import shared_prompt


def enable_checkpointing(model: nn.Module) -> None:
    """Gradient checkpointing: each block keeps its input and computes the rest again for its backward pass.

    Independent of the training or evaluation mode, and of a later `eval()`. Passes without gradients, and those that
    fill a cache, are as they were. In place; a second call changes nothing.

    Raises: ConfigError where transformers marks no layer of the model as one to checkpoint.
    """
    # transformers' own switch asks for training mode, with which come dropout and generation without a cache.
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"gradient_checkpointing cannot be had for this model: a {type(model).__name__} has no "
            "GradientCheckpointingLayer of transformers"
        )
    for layer in layers:
        # On forward and not around the module, so that hooks (FSDP's) run once and outside.
        if getattr(layer.forward, "func", None) is not _recomputed:
            layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    # Computed again, it would write to the cache again.
    if not torch.is_grad_enabled() or any(isinstance(x, transformers.Cache) for x in (*args, *kwargs.values())):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def compile_blocks(model: nn.Module) -> None:
    """torch.compile for each block, but where it fills a cache: sampling has another shape at every step.

    To be called on each copy of a model: what is compiled holds the weights of the blocks that it was made of. Lengths
    may change without compiling again; attention over packed groups stays outside. In place.

    Raises: ConfigError where transformers marks no layer of the model as a block.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"compile cannot be had for this model: a {type(model).__name__} has no blocks to compile")
    shared_prompt.stay_outside()
    for layer in layers:
        layer.forward = partial(_compiled, layer.forward, torch.compile(layer.forward, dynamic=True))


def _compiled(eager: Callable[..., Any], fast: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    cached = any(isinstance(x, transformers.Cache) for x in (*args, *kwargs.values()))
    return (eager if cached else fast)(*args, **kwargs)
