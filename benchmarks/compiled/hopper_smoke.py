"""Losses of every dtype, cluster size, alignment and path of the Hopper kernel: few enough for compute-sanitizer."""

from __future__ import annotations

from typing import Any

import torch

from mdpgrpo_fast import token_loss
from mdpgrpo_fast.config import MDPGRPOConfig

DEVICE = "cuda"
PATHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # config, arguments
    "plain": ({}, {}),
    "soft-cap": ({}, {"softcap": 20.0}),
    "two temperatures": ({}, {"temperature": torch.tensor([0.7, 1.2])}),
    "sequence": ({"importance_level": "sequence"}, {"old_logprobs": torch.full((2, 2), -9.5)}),
    "masked": ({}, {"mask": torch.tensor([[True, False], [True, True]])}),
}


def one(dtype: torch.dtype, vocab: int, path: str, in_place: bool) -> None:
    knobs, more = PATHS[path]
    config = MDPGRPOConfig(num_generations=2, multi_temperature=False, **knobs)
    given = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in more.items()}
    # A view without the last position of a wider, odd storage: rows begin anywhere.
    wide = torch.randn(2, 3, vocab + 3, device=DEVICE, dtype=dtype, requires_grad=True)
    logits = (wide * 1)[:, :-1, 1 : vocab + 1]
    out = token_loss(
        logits, torch.randint(0, vocab, (2, 2), device=DEVICE), given.pop("mask", None), config, advantage=1.0,
        kl_beta=0.1, ref_logprobs=torch.full((2, 2), -9.0, device=DEVICE), backend="cuda", in_place=in_place, **given,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, wide)
    assert gradient.isfinite().all() and out.loss.isfinite(), (dtype, vocab, path)


def main() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for vocab in (1000, 65536, 131073, 256000):
            for path in PATHS:
                one(dtype, vocab, path, in_place=dtype != torch.float16 and path != "plain")
    print("ok")


if __name__ == "__main__":
    main()
