"""What a decoder layer does between its large matmuls, in few launches, for the time of a decode step."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ROTARY = "apply_rotary_pos_emb"
# Of a GPU's memory, for weights copied together. Those of larger models take longer to read than a launch anyway.
MERGED_SHARE = 1 / 16
LARGE = 100.0  # beyond what models clamp at


class Merged:
    """Linear layers (N_i, K) of one input as one matmul, with a copy of their weights."""

    def __init__(self, *layers: nn.Linear) -> None:
        self.layers, self.sizes = layers, [len(x.weight) for x in layers]
        self.weight = torch.cat([x.weight for x in layers])
        self.bias = None if layers[0].bias is None else torch.cat([x.bias for x in layers])
        self.x: Any = None
        self.parts: Any = None

    def refresh(self) -> None:
        """The weights as they are now, where they were."""
        torch.cat([x.weight for x in self.layers], out=self.weight)
        if self.bias is not None:
            torch.cat([x.bias for x in self.layers], out=self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def part(self, i: int, x: Tensor) -> Tensor:
        """The forward pass of layer i, called in order."""
        if i == 0:
            self.x, self.parts = x, self(x).split(self.sizes, -1)
        if x is not self.x:
            return nn.functional.linear(x, self.layers[i].weight, self.layers[i].bias)
        found: Tensor = self.parts[i]
        if i == len(self.layers) - 1:
            self.x = self.parts = None
        return found


class Fused:
    """What of a model has a kernel that gives the same: found by trying it. In place while called."""

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        self.forwards: list[tuple[Any, Any]] = []  # a module, its forward pass here
        self.rotaries: list[tuple[Any, Any, Any]] = []  # a module of Python, its function, the one here
        self.merged: list[Merged] = []
        device = next(model.parameters()).device
        cuda = device.type == "cuda"
        self.room = MERGED_SHARE * torch.cuda.get_device_properties(device).total_memory if cuda else math.inf
        for module in model.modules():
            self._norm(module)
            self._linears(module)
        for name in {type(module).__module__ for module in model.modules()}:
            self._rotary(sys.modules.get(name), next(model.parameters()))

    def _norm(self, module: Any) -> None:
        from ...kernels.triton.decode import blocks

        weight, eps = module._parameters.get("weight"), getattr(module, "variance_epsilon", None)
        eps = getattr(module, "eps", None) if eps is None else eps
        if not type(module).__name__.endswith("RMSNorm") or weight is None or not isinstance(eps, float):
            return
        if weight.ndim != 1 or len(weight) > blocks.LONGEST_NORM or "forward" in vars(module):
            return
        x = _some(weight, 2, len(weight))
        x[1] *= 1e-3  # small enough that eps shows
        for one_plus in (False, True):
            own = partial(blocks.rms_norm, weight=weight, eps=eps, one_plus=one_plus)
            if _close(own(x), module(x)):
                self.forwards.append((module, own))
                return

    def _linears(self, module: Any) -> None:
        from ...kernels.triton.decode import blocks

        if heads := self._merge(module, "q_proj", "k_proj", "v_proj"):
            self.forwards += [(x, partial(heads.part, i)) for i, x in enumerate(heads.layers)]
        if _is_gated_by_silu(module) and (both := self._merge(module, "gate_proj", "up_proj")):
            self.forwards.append((module, lambda x: module.down_proj(blocks.gated(both(x)))))

    def _merge(self, module: Any, *names: str) -> Merged | None:
        layers = [getattr(module, name, None) for name in names]
        if any(type(x) is not nn.Linear or "forward" in vars(x) for x in layers):
            return None
        kinds = {(x.in_features, x.weight.dtype, x.bias is None) for x in layers}  # type: ignore[union-attr]
        size = sum(x.weight.nbytes for x in layers)  # type: ignore[union-attr]
        if len(kinds) > 1 or size > self.room:
            return None
        self.room -= size
        self.merged.append(Merged(*layers))  # type: ignore[arg-type]
        return self.merged[-1]

    def _rotary(self, place: Any, like: Tensor) -> None:
        from ...kernels.triton.decode import blocks

        if (original := getattr(place, ROTARY, None)) is None:
            return
        q, k = (_some(like, 2, heads, 1, 16) for heads in (4, 2))
        cos, sin = _some(like, 2, 2, 1, 16)
        try:
            same = all(map(_close, blocks.rotate(q, k, cos, sin), original(q, k, cos, sin)))
        except Exception:  # a function of that name with other arguments
            same = False
        if same:
            self.rotaries.append((place, original, partial(_rotate, original, blocks.rotate)))

    def refresh(self) -> None:
        """After weights were changed in place."""
        for merged in self.merged:
            merged.refresh()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            for module, own in self.forwards:
                module.forward = own
            for place, _, own in self.rotaries:
                setattr(place, ROTARY, own)
            yield
        finally:
            for module, _ in self.forwards:
                vars(module).pop("forward", None)
            for place, original, _ in self.rotaries:
                setattr(place, ROTARY, original)


def _some(like: Tensor, *shape: int) -> Tensor:
    """Numbers of both signs; not random, as these come from the generator that sampling has."""
    return (torch.arange(math.prod(shape), device=like.device) * 0.7).sin().view(shape).to(like.dtype)


def _is_gated_by_silu(module: Any) -> bool:
    """Whether a module gives down(silu(gate(x)) * up(x)) to the bit, also of large x: not where it clamps or scales."""
    names = ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (getattr(module, name, None) for name in names)
    act = getattr(module, "act_fn", None)
    if not callable(act) or any(type(x) is not nn.Linear for x in (gate, up, down)) or "forward" in vars(module):
        return False
    x = _some(gate.weight, 2, 1, gate.in_features)  # type: ignore[union-attr]
    z = _some(gate.weight, 2, 64)  # type: ignore[union-attr]
    try:
        x[1] *= LARGE / gate(x[1]).abs().max()  # type: ignore[misc]
        z[1] *= LARGE
        same = torch.equal(module(x), down(act(gate(x)) * up(x)))  # type: ignore[misc]
        return same and _close(act(z), nn.functional.silu(z))
    except Exception:  # a forward pass of other arguments
        return False


def _rotate(original: Any, own: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
    fits = q.ndim == 4 and q.shape[2] == 1 and cos.shape == sin.shape == (len(q), 1, q.shape[3])
    if args or kwargs or not fits or not q.dtype == k.dtype == cos.dtype == sin.dtype:
        return original(q, k, cos, sin, *args, **kwargs)
    return own(q, k, cos, sin)


def _close(a: Tensor, b: Tensor) -> bool:
    eps = torch.finfo(b.dtype).eps
    return a.dtype == b.dtype and torch.allclose(a.float(), b.float(), rtol=4 * eps, atol=4 * eps)
