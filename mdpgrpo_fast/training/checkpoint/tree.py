"""Values and tensors in one safetensors file: no code is run where it is read, whatever it holds.

Tensors are stored as they are; the lists, dicts and numbers around them are JSON in the file's metadata ("tree").
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import enum
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...config import ConfigError

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_SEQUENCES: dict[str, Any] = {"size": torch.Size, "tuple": tuple, "set": set}  # a Size is a tuple


def write(path: Path, value: Any, objects: Mapping[str, type] | None = None) -> None:
    """A value of tensors, numbers, texts, None, and dicts, lists, tuples and sets of them, flushed to the disk.

    objects: further classes by the names that they get in the file, of which the attributes are stored. One tensor is
    on the host at a time. Raises: OSError; TypeError for a value of another kind.
    """
    tensors: list[Tensor] = []
    tree = _pack(value, tensors, objects or {}, {})
    header: dict[str, Any] = {"__metadata__": {"tree": json.dumps(tree, allow_nan=False)}}
    # Those of wide elements first, so that each begins at a multiple of its element's size.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    end = 0
    for i in order:
        x, start = tensors[i], end
        end += x.numel() * x.element_size()
        header[str(i)] = {"dtype": _DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for i in order:
            host = tensors[i].detach().to("cpu").contiguous()
            f.write(host.reshape(-1).view(torch.uint8).numpy().data)
        f.flush()
        os.fsync(f.fileno())


def read(path: Path, objects: Mapping[str, type] | None = None) -> Any:
    """What `write` has written, on the host. Raises: ConfigError for any other file."""
    try:
        with safe_open(path, framework="pt") as f:
            return _unpack(json.loads((f.metadata() or {})["tree"]), f, objects or {}, {})
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ConfigError(f"{str(path)!r} cannot be read: {type(e).__name__} ({e})") from None


def _pack(value: Any, tensors: list[Tensor], objects: Mapping[str, type], seen: dict[Any, int]) -> Any:
    def pack(x: Any) -> Any:
        return _pack(x, tensors, objects, seen)

    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, Tensor):
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() == 0 or key not in seen:  # tied weights are stored once
            if value.dtype not in _DTYPES:
                raise TypeError(f"a tensor of {value.dtype} cannot be stored")
            seen[key] = len(tensors)
            tensors.append(value)
        return {"tensor": seen[key]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"dict": [[pack(k), pack(v)] for k, v in value.items()]}
    if isinstance(value, list):
        return [pack(x) for x in value]
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [pack(x) for x in value]}
    for name, kind in objects.items():
        if type(value) is kind:
            return {"object": name, "has": pack(vars(value))}
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__} cannot be stored")


def _unpack(node: Any, file: Any, objects: Mapping[str, type], seen: dict[int, Tensor]) -> Any:
    def unpack(x: Any) -> Any:
        return _unpack(x, file, objects, seen)

    if isinstance(node, list):
        return [unpack(x) for x in node]
    if not isinstance(node, dict):
        return node
    if "object" in node:
        made: Any = object.__new__(objects[node["object"]])
        made.__dict__.update(unpack(node["has"]))
        return made
    ((kind, inner),) = node.items()
    if kind == "tensor":
        if inner not in seen:
            seen[inner] = file.get_tensor(str(inner))
        return seen[inner]
    if kind == "float":
        return float(inner)
    if kind == "dtype":
        found = getattr(torch, inner)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{inner!r} is no dtype")
        return found
    if kind == "dict":
        return {unpack(k): unpack(v) for k, v in inner}
    return _SEQUENCES[kind]([unpack(x) for x in inner])
