"""The objective at one size on each backend, few launches, for a profiler:

    ncu --clock-control none --kernel-name regex:token_loss_kernel python benchmarks/compiled/profiled_rows.py

MDPGRPO_AUTOTUNE=0 keeps the measurement of tiles out of it.
"""

from __future__ import annotations

import argparse

import torch

import mdpgrpo_fast
from mdpgrpo_fast.config import MDPGRPOConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"])
    args = parser.parse_args()
    shape = 8, args.tokens // 8
    config = MDPGRPOConfig(num_generations=8, multi_temperature=False)
    logits = torch.randn(*shape, args.vocab, device="cuda").bfloat16().requires_grad_()
    tokens = torch.randint(0, args.vocab, shape, device="cuda")
    given = {"advantage": torch.linspace(-1, 1, 8, device="cuda"), "kl_beta": 0.1}
    given["ref_logprobs"] = torch.full(shape, -12.0, device="cuda")
    for backend in args.backends:
        out = mdpgrpo_fast.token_loss(logits, tokens, None, config, backend=backend, **given)
        torch.autograd.grad(out.loss, logits)
        print(backend, out.loss.item())


if __name__ == "__main__":
    main()
