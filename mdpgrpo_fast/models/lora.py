"""LoRA through peft: adapters added, taken off for the reference, saved alone and merged."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import ConfigError, needs_package
from ..log import reason_of
from .heads import causal_lm, other_parts

AUTO = "auto"
# Of a key in the state dict of a PeftModel.
PREFIX = "base_model.model."


def import_peft() -> Any:
    """The package peft. Raises: ConfigError where there is none that fits."""
    try:
        import peft
    except (ImportError, RuntimeError) as e:
        why = f"in a version that fits transformers {transformers.__version__}; importing it says: {reason_of(e)}"
        raise ConfigError(f"lora {needs_package('peft', why)}") from None
    return peft


# ---- adapters -------------------------------------------------------------------------------------------------------


def _find_targets(model: Any, wanted: Sequence[str]) -> tuple[list[str], bool]:
    """Names for peft's target_modules, and whether their weights are stored transposed (GPT-2's Conv1D)."""
    # By what it computes: a router may be a linear layer by its class, and give more than a product.
    plain = (nn.Linear.forward, Conv1D.forward)
    outside = other_parts(model)
    linear = {
        name: m
        for name, m in model.named_modules()
        if type(m).forward in plain and not any(name.startswith(f"{part}.") for part in outside)
    }
    if list(wanted) == [AUTO]:
        # In a block, which has a number in its name: neither the head nor projections of the embeddings.
        names = {name.rpartition(".")[2] for name in linear if any(part.isdigit() for part in name.split("."))}
    else:
        names = set(wanted)
    known = sorted({name.rpartition(".")[2] for name in linear})
    if not names:
        raise ConfigError(f"lora_target_modules: {list(wanted)} is no linear layer of this model; it has {known}")
    found: list[nn.Module] = []
    for target in sorted(names):
        matches = [m for name, m in linear.items() if f".{name}".endswith(f".{target}")]
        if not matches:
            raise ConfigError(
                f"lora_target_modules: {target!r} is no linear layer of this model; it has {', '.join(known) or 'none'}"
            )
        found += matches
    return sorted(names), any(isinstance(m, Conv1D) for m in found)


def add_adapters(model: Any, *, r: int, alpha: float, dropout: float, target_modules: Sequence[str]) -> Any:
    """LoRA on the named linear layers: W + alpha / r · B A, with A (r, in) random and B (out, r) 0.

    The model's weights are frozen in place; its adapters are float32 where it is float16 or bfloat16. A is drawn from
    torch's default generator, which has to be seeded alike on all ranks.

    model: of transformers, without adapters. target_modules: last parts of names, as "q_proj", or ["auto"], all linear
    layers of the blocks. dropout: is applied in training mode only, which the trainer never uses.

    Returns: the PeftModel around the model, in the model's training or evaluation mode.

    Raises: ConfigError without a peft that fits, for a module that the model does not have, and where adapters are
    there already.
    """
    peft = import_peft()
    if getattr(model, "peft_config", None):
        raise ConfigError("lora needs a model without adapters; this one has some already: merge them first")
    names, transposed = _find_targets(model, target_modules)
    outside = "|".join(map(re.escape, other_parts(model)))
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        # peft goes by the last parts of names, which a vision tower may have too.
        exclude_modules=rf"({outside})\..*" if outside else None,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=transposed,
    )
    with warnings.catch_warnings():
        # What peft calls of transformers is no news to a user.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft.get_peft_model(model, settings, autocast_adapter_dtype=True)
    # peft leaves what it adds in training mode, where dropout is active.
    return wrapped.train(model.training)


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Inside, the model is the one before `add_adapters`: the reference policy, without a second copy.

    model: the PeftModel itself; unwrap DDP and the like. Raises: TypeError for a model without adapters, which would
    be its own reference.
    """
    _require_peft_model(model, "without_adapters")
    with model.disable_adapter():
        yield


def _require_peft_model(model: Any, where: str) -> None:
    if not hasattr(model, "disable_adapter") or not hasattr(model, "peft_config"):
        raise TypeError(f"{where}: model must be the PeftModel of add_adapters; got {type(model).__name__}")


# ---- export ---------------------------------------------------------------------------------------------------------


def save_adapters(model: Any, path: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """The adapters alone in peft's form: `PeftModel.from_pretrained(base, path)`.

    state_dict: of the PeftModel, gathered, where its own is sharded. Raises: TypeError for a model without adapters.
    """
    _require_peft_model(model, "save_adapters")
    # "auto" would ask the hub whether the vocabulary was resized, and write all of an adapted head.
    model.save_pretrained(str(path), save_embedding_layers=False, state_dict=state_dict)


def load_adapters(model: Any, path: str | Path) -> None:
    """The adapters of `save_adapters` into the model that they are of, to the bit. Raises: ConfigError for others."""
    from safetensors.torch import load_file

    (name,) = model.peft_config
    stored = load_file(Path(path) / "adapter_model.safetensors")
    own = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    if {n.replace(f".{name}.weight", ".weight") for n in own} != stored.keys():
        raise ConfigError(f"the adapters in {str(path)!r} are of another model")
    with torch.no_grad():
        for n, p in own.items():
            p.copy_(stored[n.replace(f".{name}.weight", ".weight")])


def save_merged(model: Any, tokenizer: Any, path: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """The model with its adapters added to its weights, in from_pretrained form: to be loaded without peft.

    The sum is taken in float32 or wider, one layer at a time where its weight is, and rounded once to the dtype of the
    weight. The training model stays as it is, bit for bit; host memory holds the sums of the adapted layers.
    A head that was tied to the embeddings and has an adapter is saved apart from them.

    state_dict: of the PeftModel, gathered, where its own is sharded.

    Raises: TypeError for a model without adapters, ConfigError for adapters other than one plain LoRA.
    """
    _require_peft_model(model, "save_merged")
    lm = causal_lm(model)
    # On the host: beside the model there may be no room for another.
    weights = {n: x.cpu() for n, x in merged(model, model.state_dict() if state_dict is None else state_dict)}
    config, head = lm.config.get_text_config(), lm.get_output_embeddings()
    untie = bool(config.tie_word_embeddings) and hasattr(head, "lora_A")
    settings = [c for c in {id(c): c for c in (lm.config, config)}.values() if untie]
    try:
        for c in settings:
            c.tie_word_embeddings = False
        lm.save_pretrained(str(path), state_dict=weights)
    finally:
        for c in settings:
            c.tie_word_embeddings = True
    tokenizer.save_pretrained(str(path))


def merged(model: Any, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights under the names from before `add_adapters`, one at a time; those without an adapter are not copied.

    state: the PeftModel's parameters by name, a tied head's under both of its names. Raises: ConfigError for adapters
    other than one plain LoRA.
    """
    name, layers = plain_lora(model)
    for key, x in state.items():
        layer, _, rest = key.removeprefix(PREFIX).rpartition(".base_layer.")
        if rest == "weight" and layer in layers:
            x = merged_weight(x, state, f"{PREFIX}{layer}", layers[layer], name)
        if ".lora_" not in key:
            yield f"{layer}.{rest}" if layer else rest, x


def base_weights(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights under the names from before `add_adapters`, without what the adapters add. state: as of `merged`."""
    for key, x in state.items():
        if ".lora_" not in key:
            yield key.removeprefix(PREFIX).replace(".base_layer.", "."), x


def plain_lora(model: Any) -> tuple[str, dict[str, Any]]:
    """Name of the one adapter, and the layers that have it by their names. Raises ConfigError."""
    names = list(model.active_adapters)
    layers = {n: m for n, m in causal_lm(model).named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    settings = model.peft_config[names[0]]
    plain = (
        len(names) == len(model.peft_config) == 1
        and settings.peft_type == "LORA"
        and settings.bias == "none"
        and not settings.modules_to_save
        and not any(m.merged or m.lora_variant or m.lora_B[names[0]].bias is not None for m in layers.values())
    )
    if not plain:
        raise ConfigError(
            "save_merged takes one plain LoRA that is not merged yet (no DoRA, biases or modules_to_save); "
            f"got {names} of type {settings.peft_type}"
        )
    return names[0], layers


@torch.no_grad()
def merged_weight(weight: Tensor, state: Mapping[str, Tensor], prefix: str, layer: Any, name: str) -> Tensor:
    """W + scaling · B A, of the shape, dtype and device of W."""
    a, b = (state[f"{prefix}.lora_{x}.{name}.weight"] for x in "AB")
    dtype = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    delta: Tensor = layer.scaling[name] * (b.to(dtype) @ a.to(dtype))
    return (weight.to(dtype) + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)
