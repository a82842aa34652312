"""The linear head of a causal language model, as `linear_token_loss` takes it: found, checked, under LoRA too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.linear.sharded import is_dtensor

# How far logits of a head may be from the model's own, in units of the last place of their dtype.
TOLERANCE = 16


class UnsupportedHead(ValueError):
    """Why the logits of a model cannot be computed from its hidden states by a linear layer alone."""


@dataclass(frozen=True)
class LinearHead:
    """logits = softcap(logit_scale · module(hidden)), with the hidden states that `body` gives.

    module: nn.Linear, or peft's wrapper of one.
    """

    body: nn.Module
    module: nn.Module
    softcap: float | None = None
    logit_scale: float = 1.0

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,), differentiable with respect to whatever is trained of them."""
        return effective_weight(self.module)


def effective_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer; under LoRA (peft) W + Σ scaling · B A of the active adapters.

    Raises: UnsupportedHead for anything else: adapters that are no sum of matrices (DoRA), that drop out while
    training, that are added to weights of 16 bits, and weights of another kind.
    """
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        return effective_weight(_saved(module))
    if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
        return _with_lora(module)
    # Not by its class, which FSDP2 changes: what it computes is what counts.
    if type(module).forward is not nn.Linear.forward:
        raise UnsupportedHead(f"its head is a {type(module).__name__}, not a linear layer")
    for x in (module.weight, module.bias):
        if x is not None and type(x) not in (Tensor, nn.Parameter) and not is_dtensor(x):
            raise UnsupportedHead(f"the weight of its head is a {type(x).__name__}")
    return module.weight, module.bias  # type: ignore[return-value]


def _saved(module: Any) -> nn.Module:
    """The trained copy in peft's ModulesToSaveWrapper, or the original where adapters are off."""
    trained = [name for name in module.active_adapters if name in module.modules_to_save]
    saved = module.modules_to_save[trained[0]] if trained and not module.disable_adapters else module.original_module
    assert isinstance(saved, nn.Module)
    return saved


def _with_lora(module: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias = effective_weight(module.base_layer)
    if module.disable_adapters or module.merged:
        return weight, bias
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        dropout = module.lora_dropout[name]
        if getattr(module, "use_dora", {}).get(name) or name in getattr(module, "lora_variant", {}):
            raise UnsupportedHead("its head is under a variant of LoRA (DoRA or the like) that is no sum of matrices")
        if module.training and getattr(dropout, "p", 0.0) > 0:
            raise UnsupportedHead("its head is under LoRA with dropout, which has no weight of its own; set it to 0")
        a, b = module.lora_A[name], module.lora_B[name]
        if b.bias is not None or getattr(module, "fan_in_fan_out", False):
            raise UnsupportedHead("its head is under LoRA with a bias or a transposed weight")
        if weight.dtype.itemsize < 4:
            raise UnsupportedHead(
                f"its head is under LoRA over {weight.dtype} weights, in which the sum rounds it away"
            )
        weight = weight + module.scaling[name] * (b.weight @ a.weight).to(weight.dtype)
    return weight, bias


def causal_lm(model: nn.Module) -> Any:
    """The transformers model under peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def body_of(lm: Any) -> nn.Module | None:
    """What computes the hidden states under a head; None where it is no module of its own."""
    # Llama 4 alone has the prefix of the composite model around it, whose text part is under "model" too.
    found = (getattr(lm, name, None) for name in (getattr(lm, "base_model_prefix", ""), "model") if name)
    return next((body for body in found if isinstance(body, nn.Module)), None)


def other_parts(model: nn.Module) -> list[str]:
    """Names of the modules of a model that are for images or sound: all but its text part; mostly there is none."""
    lm = causal_lm(model)
    if lm.config.get_text_config() is lm.config or not hasattr(lm, "get_decoder"):
        return []
    text = [m for m in (lm.get_decoder(), lm.get_output_embeddings(), lm.get_input_embeddings()) if m is not None]
    inside = {m for part in text for m in part.modules()}
    holds = {m for m in lm.modules() if any(child in inside for child in m.modules())}
    # The outermost ones.
    return [n for n, m in lm.named_modules() if m not in holds and _parent(lm, n) in holds]


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def find_head(model: nn.Module) -> LinearHead:
    """The head of a causal language model of transformers, checked in one forward pass over three tokens.

    Whatever a model does to its logits besides soft-cap and scale shows in the check. Raises: UnsupportedHead.
    """
    lm = causal_lm(model)
    module = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    body = body_of(lm)
    if module is None or body is None:
        raise UnsupportedHead("it has no head apart from its body")
    head = LinearHead(body, module, *declared_head(lm.config.get_text_config()))
    _check(head, model)
    return head


def declared_head(config: Any) -> tuple[float | None, float]:
    """softcap and logit_scale that the (text) config of a model says."""
    softcap = getattr(config, "final_logit_softcapping", None)
    # Cohere; Falcon-H1.
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    scale = next((x for name in names if (x := getattr(config, name, None)) is not None), None)
    if scale is None:
        # Granite and MiniCPM3 divide by it; HyperCLOVA X multiplies.
        scale = getattr(config, "logits_scaling", None) or 1.0
        scale = scale if config.model_type == "hyperclovax" else 1 / scale
    return None if softcap is None else float(softcap), float(scale)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no module of the model drops out; afterwards each is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def _check(head: LinearHead, model: Any) -> None:
    """Through all of the model: what peft puts before the prompt would be lost on the way around it."""
    weight, bias = head.parameters()
    given: list[Tensor] = []
    hook = head.module.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    try:
        with evaluating(model):
            ids = torch.arange(3, device=weight.device)[None] % len(weight)
            logits = model(input_ids=ids, use_cache=False).logits
            states = head.body(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    if len(given) != 1 or given[0].shape != states.shape or not torch.equal(given[0], states):
        raise UnsupportedHead("its head does not see the last hidden states of its body")
    # A head in float32 takes the states of a body of 16 bits as float32.
    expected = head.logit_scale * nn.functional.linear(states.to(weight.dtype), weight, bias)
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    size = logits.abs().amax().float() * torch.finfo(logits.dtype).eps * TOLERANCE
    if expected.shape != logits.shape or not bool((expected.float() - logits.float()).abs().amax() <= size):
        raise UnsupportedHead("it does more to its logits than a soft-cap and a scale")
