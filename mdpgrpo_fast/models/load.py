"""Loading of a causal language model with its tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..config import ConfigError
from ..demo import SEED_POLICY
from ..log import log, reason_of
from .adapters import adapter_chain, attach_adapter, merge_adapter
from .heads import body_of, causal_lm, other_parts
from .lora import plain_lora


def load(
    path: str | None, dtype: str = "auto", attention: str = "auto", *, tokenizer: str | None = None,
    trust_remote_code: bool = False, text_only: bool | None = False, keep_adapter: bool = False,
    allow_random: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """Model and tokenizer of a directory or hub id; None: the embedded seed policy.

    A LoRA adapter comes with its base, added to its weights, or to be trained on (keep_adapter). Parts for images or
    sound are frozen.

    attention: an attn_implementation of transformers, or "auto". tokenizer: directory or hub id; None: the adapter's,
    else the model's. text_only: take the text part of a model with others; False refuses a model whose other parts
    would be lost in a save, None lets them go. allow_random: weights that the files lack are drawn at random.

    Raises: ConfigError in one line where the path is none or is no causal language model, or the attention cannot run.
    """
    source, base, adapters, where = _place(path)
    config = _read_config(base, where, trust_remote_code)
    places = [*reversed(adapters), base]
    made = _load_tokenizer(source, places, tokenizer, trust_remote_code)  # before the weights, which take longer
    model = _load_model(base, config, dtype, attention, where, trust_remote_code, text_only, allow_random)
    for i, adapter in enumerate(adapters):
        model = attach_adapter(model, adapter)
        if i == len(adapters) - 1 and keep_adapter:
            break
        model = merge_adapter(model)
        # What a new adapter is saved as being one of.
        model.name_or_path = _absolute(adapter)
    _freeze_other_parts(model)
    return model, made


def read_config(path: str | None, trust_remote_code: bool = False) -> Any:
    """The configuration of the full model that `load` would load. Raises: ConfigError in one line, as `load` does."""
    _, base, _, where = _place(path)
    return _read_config(base, where, trust_remote_code)


def _place(path: str | None) -> tuple[str, str, list[str], str]:
    """The directory or hub id, that of the full model, the adapters over it, and how an error begins."""
    source = str(SEED_POLICY) if path is None else path
    base, adapters = adapter_chain(source)
    where = f"model {source!r} cannot be loaded"
    if adapters:
        where += f": base_model_name_or_path {base!r} of its adapter_config.json"
    return source, base, adapters, where


def _read_config(source: str, where: str, trust_remote_code: bool) -> Any:
    try:
        # Said explicitly, so that nothing is asked on stdin.
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as e:  # of any kind: what a checkpoint or its code may have in it nobody knows
        raise ConfigError(f"{where}: {_reason(e, source)}") from None


def adopt(
    model: Any, tokenizer: Any = None, attention: str = "auto", *, trust_remote_code: bool = False,
    text_only: bool = False, keep_adapter: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """A causal language model of transformers that is loaded already, and a copy of its tokenizer, as `load` has them.

    The model keeps its dtype. In place: parts for images or sound are frozen, and attention other than "auto" is set.

    tokenizer: loaded, a directory or a hub id; None: that of the directory that the model was loaded from.

    Raises: ConfigError in one line for anything else, without a tokenizer, or where the attention cannot run.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(causal_lm(model), "generate"):
        raise ConfigError(
            "model must be a directory, a hub id or a causal language model of transformers; "
            f"got {type(model).__name__}"
        )
    lm = causal_lm(model)
    if hasattr(model, "peft_config"):
        if not keep_adapter:
            raise ConfigError("lora must be on for a model with LoRA adapters, whose training goes on; got False")
        plain_lora(model)
    if tokenizer is None:
        tokenizer = getattr(lm.config, "_name_or_path", "")
        if not tokenizer or not Path(tokenizer).is_dir():
            raise ConfigError("tokenizer must be given beside a loaded model that names no directory to take it from")
    if isinstance(tokenizer, str):
        tokenizer = _load_tokenizer(tokenizer, [tokenizer], tokenizer, trust_remote_code)
    if attention != "auto":
        try:
            lm.set_attn_implementation(attention)
        except Exception as e:
            raise ConfigError(f"the model cannot have attention = {attention}: {reason_of(e)}") from None
    if text_only and _parts(lm.config):
        if lm is not model:
            raise ConfigError("text_only needs a model without adapters; this one has some already")
        model = _text_part(model, type(model).__name__)
    _freeze_other_parts(model)
    # A chat template from a file becomes the copy's.
    return model, copy.copy(tokenizer)


def base_model(path: str | None) -> str:
    """The full model's directory or hub id: of an adapter its base."""
    return adapter_chain(str(SEED_POLICY) if path is None else path)[0]


def _freeze_other_parts(model: Any) -> None:
    for name in other_parts(model):
        # Text alone gives them no gradient, for which DDP would wait.
        causal_lm(model).get_submodule(name).requires_grad_(False)


def _absolute(source: str) -> str:
    return str(Path(source).absolute()) if Path(source).is_dir() else source


def _reason(e: Exception, source: str) -> str:
    if "trust_remote_code" in str(e):
        return "it brings Python code along, which trust_remote_code (--trust-remote-code) lets run"
    if not Path(source).exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        return "there is no such directory"
    if (Path(source) / "model" / "config.json").is_file():
        return f"it is a run directory; its model is {str(Path(source) / 'model')!r}"
    return reason_of(e)


def _load_model(
    source: str, config: Any, dtype: str, attention: str, where: str, trust_remote_code: bool, text_only: bool | None,
    allow_random: bool,
) -> Any:  # fmt: skip
    how = "" if attention == "auto" else f" with attention = {attention}"
    options: dict[str, Any] = {
        "dtype": dtype, "attn_implementation": None if attention == "auto" else attention,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    try:
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        parts = _parts(config)
        if parts and text_only is False and getattr(kind, "config_class", type(config)) is not type(config):
            raise _lost(source, parts)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except ConfigError:
        raise
    except Exception as e:  # as above
        raise ConfigError(f"{where}{how}: {_reason(e, source)}") from None
    model, info = loaded
    _check_weights(model, info, where, allow_random)
    if parts and type(model.config) is type(config):
        if info["unexpected_keys"] and text_only is False:
            raise _lost(source, sorted({key.partition(".")[0] for key in info["unexpected_keys"]}))
        if text_only:
            model = _text_part(model, source)
    model.name_or_path = _absolute(source)
    return model


def _parts(config: Any) -> list[str]:
    """Names of what a model has beside its text part."""
    if config.get_text_config() is config:
        return []
    text = config.get_text_config()
    names = [n for n in config.sub_configs if getattr(config, n, None) not in (None, text)]
    return [n.removesuffix("_config") for n in names]


def _lost(source: str, parts: list[str]) -> ConfigError:
    return ConfigError(
        f"model {source!r} has other parts than text ({', '.join(parts)}), which would be missing where it is saved; "
        "text_only (--text-only) trains and saves its text part alone"
    )


def _check_weights(model: Any, info: dict[str, Any], where: str, allow_random: bool) -> None:
    """transformers draws at random what a checkpoint does not have. Raises: ConfigError instead."""
    missing = sorted(set(info["missing_keys"]) & {n for n, _ in model.named_parameters(remove_duplicate=False)})
    if missing and not allow_random:
        raise ConfigError(
            f"{where}: as a {type(model).__name__} it needs {len(missing)} more weights than the checkpoint has, the "
            f"first of them {', '.join(missing[:3])} (--allow-random-weights trains it with random ones)"
        )
    if missing:
        log.warning("%d weights are random, which the files lack: %s …", len(missing), ", ".join(missing[:3]))
    for name, found, wanted in sorted(info["mismatched_keys"])[:1]:
        raise ConfigError(f"{where}: its {name} must have shape {tuple(wanted)} by its config.json; got {tuple(found)}")


def _text_part(model: Any, source: str) -> Any:
    """The causal language model of a composite one's text part, around the same weights. Raises: ConfigError."""
    config = model.config.get_text_config()
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    decoder = model.get_decoder()
    with torch.device("meta"):
        text = None if kind is None else kind._from_config(config, dtype=model.dtype)
    if text is None or type(body_of(text)) is not type(decoder):
        raise ConfigError(f"text_only cannot be had for model {source!r}: transformers has no class for its text part")
    name = next(n for n, m in text.named_children() if m is body_of(text))
    setattr(text, name, decoder)
    text.set_output_embeddings(model.get_output_embeddings())
    text.config._attn_implementation_internal = config._attn_implementation_internal
    text.generation_config = model.generation_config
    return text.eval()


def _load_tokenizer(source: str, places: list[str], tokenizer: str | None, trust_remote_code: bool) -> Any:
    """From a place of its own, or the first of those that a model came from that has one."""
    from transformers.utils import cached_file

    quiet: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    place = tokenizer or places[-1]
    try:
        if tokenizer is None:
            place = next((p for p in places if cached_file(p, "tokenizer_config.json", **quiet)), place)
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as e:
        said = f"tokenizer {place!r}" if tokenizer else f"the tokenizer of model {source!r}"
        more = "" if tokenizer else " (tokenizer names another)"
        raise ConfigError(f"{said} cannot be loaded{more}: {_reason(e, place)}") from None


def context_length(model: Any) -> int | None:
    """Positions the model was built for, where its configuration says so."""
    return positions_of(model.config)


def positions_of(config: Any) -> int | None:
    """The same of a configuration."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
