"""Memory of a run: what its tensors take, what the device has, and whether that cannot be enough."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ...config import ConfigError, MDPGRPOConfig, TrainConfig
from ...ops.linear.chunks import bytes_per_row, default_workspace

# Values that a layer keeps for its backward pass, per token and hidden unit: 34 bytes of 16 bits (Korthikanti et al.
# 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.1, attention without its scores).
KEPT_PER_LAYER = 17
ITEMSIZE = {"float32": 4, "bfloat16": 2}
SAFETENSORS_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


def training_bytes(weights: float, trained: float, reference: bool) -> dict[str, float]:
    """Bytes of what lasts from step to step. weights, trained: bytes of all and of the trained weights."""
    parts = {"weights": weights, "gradients": trained, "AdamW": 2 * trained}
    return parts | ({"reference": weights} if reference else {})


def pass_bytes(
    run: TrainConfig, config: Any, tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Bytes of a forward and backward pass over so many tokens, roughly. config: of the text model."""
    logits: float = tokens * bytes_per_row(config.vocab_size, dtype, run.fp32_logits)
    if run.lm_head != "logits":
        workspace = run.workspace_mb << 20 if run.workspace_mb else default_workspace(device)
        logits = min(logits, workspace)
    layers, width = config.num_hidden_layers, config.hidden_size * tokens * dtype.itemsize
    kept = layers + KEPT_PER_LAYER if run.gradient_checkpointing else layers * KEPT_PER_LAYER
    return {"logits": logits, "activations": kept * width}


def device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU; on the CPU that of the machine with its swap, or of its control group; None: not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        found.append(sum(int(fields[name].split()[0]) << 10 for name in ("MemTotal", "SwapTotal")))
    except (OSError, ValueError, KeyError):  # no Linux
        try:
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        except (AttributeError, ValueError, OSError):
            return None
    with suppress(OSError, ValueError):  # no group, or one without a limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return min(found)


def stored_weights(source: str, config: Any) -> tuple[int, int] | None:
    """Number and bytes of the weights of a directory or hub id: from the headers of its safetensors files, or where
    they are not here yet from the index of its shards; None where it has neither. config: the model's."""
    from transformers.utils import cached_file

    quiet: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    files = list(Path(source).glob("model*.safetensors"))
    if not Path(source).is_dir() and (index := cached_file(source, "model.safetensors.index.json", **quiet)):
        size = int(json.loads(Path(index).read_text(encoding="utf-8"))["metadata"]["total_size"])
        return size // (config.dtype or torch.float32).itemsize, size
    count = size = 0
    for file in files:
        try:
            with file.open("rb") as f:
                header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
            for name, tensor in header.items():
                if name != "__metadata__":
                    start, end = tensor["data_offsets"]
                    size += end - start
                    count += (end - start) // SAFETENSORS_SIZES[tensor["dtype"]]
        except (OSError, ValueError, KeyError, OverflowError, MemoryError):  # loading says what is wrong with it
            return None
    return (count, size) if files else None


def gigabytes(size: float) -> str:
    """Bytes in words, in units of 10⁹ or 10⁶."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def check_memory(run: TrainConfig, method: MDPGRPOConfig, source: str, config: Any, device: torch.device) -> None:
    """Raises ConfigError where the tensors that last from step to step alone exceed the memory of the device.

    source, config: of the full model. Nothing is said of sharded runs, and where the size of the weights is not known.
    """
    stored, has = stored_weights(source, config), device_bytes(device)
    sharded = any(os.environ.get(f"ACCELERATE_USE_{kind}", "") == "true" for kind in ("FSDP", "DEEPSPEED"))
    if stored is None or has is None or sharded:
        return
    count, size = stored
    weights = size if run.dtype == "auto" else count * ITEMSIZE[run.dtype]
    # Other parts than text are not trained, or not loaded: how much of it they are is not known here.
    whole = config.get_text_config() is config
    trained, reference = (weights if whole and not run.lora else 0), method.needs_reference and not run.lora
    parts = training_bytes(weights, trained, whole and reference)
    if device.type == "cpu":
        has //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    total = sum(parts.values())
    if total <= has:
        return
    lower = [flag for flag, helps in (
        ("--lora", not run.lora), ("--dtype bfloat16", run.dtype == "float32"),
        ("--kl-beta-pos 0 --kl-beta-neg 0", reference),
    ) if helps]  # fmt: skip
    sums = " + ".join(f"{name} {gigabytes(x)}" for name, x in parts.items() if x)
    where = "a process on the CPU" if device.type == "cpu" else "the GPU"
    raise ConfigError(
        f"the memory cannot suffice: {sums} = {gigabytes(total)}, and {where} has {gigabytes(has)}"
        + (f"; {', '.join(lower)} lower it" if lower else "")
    )
