"""Fingerprints of what a run learns from: a run that goes on has the same, whatever their files are called."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...data import Example

SAMPLED = 64  # values of each weight


def fingerprint(prompts: Sequence[Sequence[int]], examples: Sequence[Example] = ()) -> str:
    """The number of prompts, and what tells them, in their order and with all that rewards see of them, from others.

    prompts: their token ids; examples: their rows.
    """
    digest = hashlib.blake2b(digest_size=8)
    for ids in prompts:
        digest.update(array("q", [len(ids), *ids]).tobytes())
    for x in examples:
        row = [x.prompt, x.instruction_ids, x.kwargs, x.columns]
        try:
            text = json.dumps(row, sort_keys=True, default=_in_words)
        except (TypeError, ValueError):  # keys of several types, or a value in itself
            text = repr(row)
        digest.update(text.encode(errors="surrogatepass") + b"\n")
    return f"{len(prompts)} prompts ({digest.hexdigest()})"


def _in_words(value: Any) -> Any:
    """A value that JSON has not: numpy's and pandas' by what they hold, others by their class alone: an address in
    memory would be another in each process."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return dict(value)
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """Of names, shapes and SAMPLED values of each weight, evenly spaced, of a model that is whole on this rank.

    Adapters' A is left out, which starts at random.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, p in model.named_parameters():
        if ".lora_A" in name or ".lora_embedding_A" in name:
            continue
        flat = p.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].float().cpu()
        digest.update(f"{name} {tuple(p.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()
