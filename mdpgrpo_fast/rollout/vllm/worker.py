"""Extension of vLLM's workers: take new weights, and say what is held. Imports torch alone, and vLLM never."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_STEP = 1 << 22  # elements mixed at once: 32 MiB of int64


def bit_sum(tensor: Tensor) -> int:
    """Checksum of a tensor of any shape and dtype: its elements' raw bits, each mixed to 64 bits, summed modulo 2**64.

    The sum knows no order and zero bits add nothing, so it survives what an engine does to a weight: of a concatenation
    (q, k and v in one), of shards and of zero padding it is the sum of the parts. Returns a signed 64-bit integer.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
    for piece in bits.split(_STEP):
        x = piece.long()
        # Multiply and shift, twice: without the mixing, changes of one bit up here and one down there would cancel.
        for odd, shift in ((-0x61C8864680B583EB, 32), (-0x3B314601E57A13AD, 29)):
            x = x * odd
            x ^= (x >> shift) & ((1 << (64 - shift)) - 1)
        total += x.sum()
    return int(total)


class WeightSync:
    """Mixed into each of vLLM's workers by `worker_extension_cls`; its methods are called through `collective_rpc`.

    Arguments and results are what JSON can carry, but for tensors handed over inside one process.
    """

    get_model: Any  # of vLLM's worker
    _mdpgrpo_version = ""

    def mdpgrpo_layout(self) -> dict[str, Any]:
        """Parameters held, as name -> dtype, and the parts of fused modules, as qkv_proj -> q_proj, k_proj, v_proj."""
        model = self.get_model()
        held = {name: str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters()}
        return {"held": held, "packed": dict(getattr(model, "packed_modules_mapping", {}))}

    def mdpgrpo_load(self, weights: list[tuple[str, Tensor]] | str) -> None:
        """Load tensors under their checkpoint names; a str is the path of a safetensors file of them."""
        if isinstance(weights, str):
            from safetensors.torch import load_file

            weights = list(load_file(weights).items())
        with torch.no_grad():
            self.get_model().load_weights(weights)

    def mdpgrpo_sums(self) -> dict[str, int]:
        """`bit_sum` of every parameter as it is held."""
        return {name: bit_sum(p) for name, p in self.get_model().named_parameters()}

    def mdpgrpo_version(self, version: str | None = None) -> list[str]:
        """Set the version of the weights where one is given; what it is now, in a list, as JSON keeps lists."""
        if version is not None:
            self._mdpgrpo_version = version
        return [self._mdpgrpo_version]


EXTENSION = f"{WeightSync.__module__}.{WeightSync.__qualname__}"  # vLLM's worker_extension_cls
