"""What a checkpoint holds, written and put back: weights, optimiser, schedule and the like, random states.

One process and DDP: the weights in from_pretrained form, under LoRA an adapter folder, and the optimiser's state, all
by the first rank. FSDP2: each rank its own shards of both. DeepSpeed: its own files, in the format of `tree`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_model
from torch import Tensor, nn

from ...config import ConfigError
from ...log import reason_of
from ...models.lora import load_adapters, save_adapters
from . import deepspeed_files, tree

WEIGHTS = "model.safetensors"
FOLDER = "state"  # of all that from_pretrained does not take


class State:
    """Everything that the next step depends on. All ranks call each method.

    model, optimizer: as they are wrapped for training; lm, tokenizer: the language model in it. parts: by their names,
    what has state_dict() and load_state_dict(): the schedule, and whatever else a run has.
    """

    def __init__(
        self, accelerator: Accelerator, model: Any, optimizer: Any, lm: Any, tokenizer: Any, parts: Mapping[str, Any]
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.lm, self.tokenizer, self.parts = lm, tokenizer, parts

    @property
    def kind(self) -> str:
        """In which form weights and optimiser are stored."""
        kinds = {DistributedType.FSDP: "shards of FSDP2", DistributedType.DEEPSPEED: "files of DeepSpeed"}
        return kinds.get(self.accelerator.distributed_type, "whole weights")

    def bytes(self) -> int:
        """Of a checkpoint, about: weights that are stored, AdamW's state, a reference that moves."""
        whole = [p for p in self.model.parameters() if self._is_stored(p)]
        trained = sum(_size(p) for p in whole if p.requires_grad)
        stored = 2 * trained + sum(_size(p) for p in whole)
        if self.kind == "files of DeepSpeed":  # beside the weights of the passes those of the optimiser, in float32
            stored += sum(p.numel() * 4 for p in whole)
        reference = getattr(self.parts.get("reference"), "model", None)
        return stored + sum(_size(p) for p in reference.parameters()) if reference is not None else stored

    def _is_stored(self, p: nn.Parameter) -> bool:
        # Under LoRA the base is the model that the run starts from.
        return p.requires_grad or not hasattr(self.lm, "peft_config")

    # ---- writing ----------------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Into a folder that is there. Raises: OSError, SafetensorError."""
        acc, here = self.accelerator, folder / FOLDER
        rank = acc.process_index
        if self.kind == "files of DeepSpeed":
            deepspeed_files.write(self.model, here)
        elif self.kind == "shards of FSDP2":
            tree.write(here / f"shards_{rank}.safetensors", self._shards())
        elif acc.is_main_process:
            self._write_model(folder)
            tree.write(here / "optimizer.safetensors", self.optimizer.state_dict())
        if acc.is_main_process:
            run = {name: part.state_dict() for name, part in self.parts.items()}
            run["scaler"] = acc.scaler.state_dict() if acc.scaler is not None else {}
            tree.write(here / "run.safetensors", run)
        tree.write(here / f"random_{rank}.safetensors", random_state(acc.device))

    def _write_model(self, folder: Path) -> None:
        if hasattr(self.lm, "peft_config"):
            save_adapters(self.lm, folder)
        else:
            # In one file and under the names of the model, so that reading it back is exact and needs no second model.
            self.lm.save_pretrained(folder, max_shard_size="1000TB", save_original_format=False)
        self.tokenizer.save_pretrained(folder)

    def _shards(self) -> dict[str, Any]:
        _reshard(self.model)
        weights = {n: _local(p) for n, p in self.model.named_parameters() if self._is_stored(p)}
        return {"weights": weights, "optimizer": _map(_local, self.optimizer.state_dict())}

    # ---- reading ----------------------------------------------------------------------------------------------------

    def read(self, folder: Path) -> None:
        """From a folder that was found whole. Raises: ConfigError for what is of another model."""
        acc, here = self.accelerator, folder / FOLDER
        rank = acc.process_index
        if self.kind == "files of DeepSpeed":
            deepspeed_files.read(self.model, here)
        elif self.kind == "shards of FSDP2":
            self._read_shards(tree.read(here / f"shards_{rank}.safetensors"))
        else:
            optimizer = tree.read(here / "optimizer.safetensors")
            try:
                if hasattr(self.lm, "peft_config"):
                    load_adapters(self.lm, folder)
                else:
                    load_model(self.lm, folder / WEIGHTS)
                self.optimizer.load_state_dict(optimizer)
            except (RuntimeError, ValueError, KeyError) as e:
                raise ConfigError(f"resume needs the model of the run before; {folder}: {reason_of(e)}") from None
        run = tree.read(here / "run.safetensors")
        for name, part in self.parts.items():
            part.load_state_dict(run[name])
        if acc.scaler is not None and run["scaler"]:
            acc.scaler.load_state_dict(run["scaler"])
        set_random_state(tree.read(here / f"random_{rank}.safetensors"), acc.device)

    @torch.no_grad()
    def _read_shards(self, stored: dict[str, Any]) -> None:
        _reshard(self.model)
        for name, p in self.model.named_parameters():
            if self._is_stored(p):
                _local(p).copy_(stored["weights"][name])
        state = stored["optimizer"]
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        numbers = [i for group in state["param_groups"] for i in group["params"]]
        for i, p in zip(numbers, params, strict=True):
            for name, x in state["state"].get(i, {}).items():
                if isinstance(x, Tensor) and x.shape == _local(p).shape and x.ndim:  # not AdamW's count of steps
                    whole = torch.zeros_like(p, dtype=x.dtype)
                    _local(whole).copy_(x)
                    state["state"][i][name] = whole
        self.optimizer.load_state_dict(state)


def _size(x: Tensor) -> int:
    return int(getattr(x, "ds_numel", x.numel())) * x.element_size()


def _local(x: Tensor) -> Tensor:
    """This rank's shard, which shares its memory with the whole."""
    x = x.detach()
    local: Tensor = getattr(x, "to_local", lambda: x)()
    return local


def _map(f: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, dict):
        return {k: _map(f, v) for k, v in value.items()}
    return [_map(f, v) for v in value] if isinstance(value, list) else value


def _reshard(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ---- random states --------------------------------------------------------------------------------------------------


def random_state(device: torch.device) -> dict[str, Any]:
    """Of Python, numpy, torch on the CPU and on the device."""
    found = {
        "python": random.getstate(),
        "numpy": {k: _plain(v) for k, v in np.random.get_state(legacy=False).items()},
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    key = np.array(inner["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**inner, "key": key}})
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
