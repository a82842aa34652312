"""LoRA adapter folders as a run's model: found, checked, trained on or merged; their first values as reference."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import ConfigError, TrainConfig
from ..log import reason_of
from .heads import causal_lm
from .lora import PREFIX, import_peft, merged_weight, plain_lora, without_adapters

# Of an adapter_config.json: what makes an adapter more than a product of two matrices beside each weight, as do most
# of peft's "use_..." and "..._config".
MORE_THAN_LORA = {
    "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "alora_invocation_tokens",
    "layer_replication",
}  # fmt: skip
STILL_LORA = {"use_rslora", "eva_config"}
# Initialisations that leave the weights of the model as they are.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def adapter_settings(source: str) -> dict[str, Any] | None:
    """adapter_config.json of a directory or hub id; None where it has none.

    Raises: ConfigError in one line for an adapter other than a plain LoRA, or one that names no base.
    """
    from transformers.utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(source)
        settings = None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
    except OSError:  # no id of the hub either: what is wrong with it the loading of the model says
        return None
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"adapter_config.json of {source!r} cannot be read: {reason_of(e)}") from None
    if found is None:
        return None
    if not isinstance(settings, dict):
        raise ConfigError(f"adapter_config.json of {source!r} must hold an object; got {type(settings).__name__}")
    given = {name for name, value in settings.items() if value}
    more = sorted(
        name
        for name in given - STILL_LORA
        if name in MORE_THAN_LORA or name.startswith("use_") or name.endswith("_config")
    )
    if settings.get("bias", "none") != "none":
        more.append(f"bias = {settings['bias']}")
    if settings.get("init_lora_weights") not in PLAIN_STARTS:
        more.append(f"init_lora_weights = {settings['init_lora_weights']}")
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if kind != "LORA" or task not in (None, "CAUSAL_LM"):
        more = [f"peft_type = {kind}, task_type = {task}"]
    if more:
        raise ConfigError(
            f"model {source!r} must be a full model or a plain LoRA adapter of one; its adapter_config.json has "
            f"{', '.join(more)}"
        )
    if not settings.get("base_model_name_or_path"):
        raise ConfigError(f"adapter_config.json of {source!r} must name its base_model_name_or_path")
    return settings


def adapter_chain(source: str) -> tuple[str, list[str]]:
    """The full model at the bottom of a directory or hub id, and the adapters over it, the innermost first."""
    adapters: list[str] = []
    while (settings := adapter_settings(source)) is not None:
        if source in adapters:
            raise ConfigError(f"base_model_name_or_path of the adapter {source!r} leads back to itself")
        adapters.insert(0, source)
        source = str(settings["base_model_name_or_path"])
    return source, adapters


def resolve_adapter(run: TrainConfig) -> TrainConfig:
    """The run with the LoRA knobs of the adapter whose training goes on; any other run as it is.

    Raises: ConfigError for merge_adapter without an adapter, and LoRA knobs other than those of the adapter.
    """
    settings = None if run.model is None else adapter_settings(run.model)
    if settings is None:
        if run.merge_adapter:
            raise ConfigError(f"merge_adapter needs a model that is a LoRA adapter; got {run.model!r}")
        return run
    if run.merge_adapter:
        return run
    targets = settings.get("target_modules") or []
    taken: dict[str, Any] = {
        "lora_r": settings["r"],
        "lora_alpha": float(settings["lora_alpha"]),
        "lora_target_modules": [targets] if isinstance(targets, str) else sorted(targets),
    }
    for field in (f for f in fields(run) if f.name in taken):
        value = getattr(run, field.name)
        default = TrainConfig.__dataclass_fields__[field.name]
        start = default.default_factory() if callable(default.default_factory) else default.default
        if value not in (start, taken[field.name]):
            raise ConfigError(
                f"{field.name} must be that of the adapter whose training goes on, {taken[field.name]!r}; got "
                f"{value!r} (merge_adapter starts a new one)"
            )
    return replace(run, lora=True, **taken)


def attach_adapter(model: Any, source: str) -> Any:
    """The PeftModel around a model of transformers with the adapter of a directory or hub id, to be trained on.

    Adapters are float32 where the model has 16 bits. Raises: ConfigError for an adapter that does not fit the model.
    """
    peft = import_peft()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            wrapped = peft.PeftModel.from_pretrained(model, source, is_trainable=True)
            stored = peft.utils.save_and_load.load_peft_weights(source, device="cpu")
    except Exception as e:
        raise ConfigError(f"adapter {source!r} cannot be loaded: {reason_of(e)}") from None
    _, layers = plain_lora(wrapped)
    # peft only warns of those that are missing, and not of those that have no place.
    fits = 2 * len(layers) == len(stored) and not any("missing adapter keys" in str(w.message) for w in said)
    if not fits or not all(isinstance(m.base_layer, (nn.Linear, Conv1D)) for m in layers.values()):
        raise ConfigError(
            f"adapter {source!r} does not fit its model: it has {len(stored)} matrices for linear layers; the model "
            f"takes {2 * len(layers)}"
        )
    return wrapped.train(model.training)


@torch.no_grad()
def merge_adapter(model: Any) -> Any:
    """The model of transformers under a PeftModel with its adapter added to its weights, in place.

    Sums are as of `save_merged`; a tied head that has an adapter is untied. Raises: ConfigError for adapters other than
    one plain LoRA.
    """
    name, layers = plain_lora(model)
    lm, state = causal_lm(model), dict(model.named_parameters(remove_duplicate=False))
    sums = {n: merged_weight(m.base_layer.weight, state, f"{PREFIX}{n}", m, name) for n, m in layers.items()}
    for n, m in layers.items():
        m.base_layer.weight = nn.Parameter(sums[n])
    if hasattr(lm.get_output_embeddings(), "lora_A"):
        for config in (lm.config, lm.config.get_text_config()):
            config.tie_word_embeddings = False
    model.base_model.unload()
    return lm.requires_grad_(True)


# ---- the reference of a run that goes on ----------------------------------------------------------------------------


def adds_something(model: Any) -> bool:
    """Whether a PeftModel is another than its base: not where all B are 0, as those of new adapters are."""
    return any(bool(p.any()) for n, p in model.named_parameters() if ".lora_B." in n)


def adapter_values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all adapters in a model, by name; of shards their own part."""
    _gather_again(model)
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}


def as_reference(lm: Any, model: nn.Module, first: Mapping[str, Tensor] | None) -> AbstractContextManager[None]:
    """Inside, the PeftModel is the policy that its run began with: without adapters, or with their first values.

    model: what is wrapped around it for training; first: its `adapter_values` then, None: those of new adapters.
    """
    return without_adapters(lm) if first is None else with_adapter_values(model, first)


@contextmanager
def with_adapter_values(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the adapters have the values of an `adapter_values` of the same model; afterwards their own again, to the
    bit. No graph that needs them may be alive."""
    own = adapter_values(model)
    try:
        _set(model, values)
        yield
    finally:
        _set(model, own)


@torch.no_grad()
def _set(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    _gather_again(model)
    for name, p in model.named_parameters():
        if name in values:
            p.copy_(values[name])


def _gather_again(model: nn.Module) -> None:
    """FSDP2 may have kept whole parameters from the last pass, which would hide the shards and outlive a change."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()
