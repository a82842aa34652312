"""The objective's row kernels, one launch each, for a profiler. MDPGRPO_AUTOTUNE=0 keeps the measurement of tiles out.

ncu --clock-control none --kernel-name regex:token_loss_kernel python benchmarks/compiled/profiled_rows.py
"""

from __future__ import annotations

import torch

import mdpgrpo_fast
from mdpgrpo_fast.config import MDPGRPOConfig
from mdpgrpo_fast.kernels.triton.tiles import CANDIDATES, fit
from mdpgrpo_fast.kernels.triton.token_loss import scratch_run

# (vocabulary, rows, tiles by their place among the candidates)
TRITON = ((128256, 2112, (0, 5, 6)), (32000, 8192, (0, 1, 2)))
HOPPER = ((128256, 2112), (32000, 8192))


def main() -> None:
    device = torch.device("cuda")
    for vocab, rows, places in TRITON:
        run = scratch_run(vocab, torch.bfloat16, device, rows)
        for place in places:
            run(fit(CANDIDATES[place], vocab))
            print("triton", vocab, CANDIDATES[place], rows, "rows", flush=True)
    config = MDPGRPOConfig(num_generations=8, multi_temperature=False)
    for vocab, rows in HOPPER:
        shape = 8, rows // 8
        logits = torch.randn(*shape, vocab, device=device).bfloat16().requires_grad_()
        given = {"advantage": torch.linspace(-1, 1, 8, device=device), "kl_beta": 0.1}
        given["ref_logprobs"] = torch.full(shape, -12.0, device=device)
        tokens = torch.randint(0, vocab, shape, device=device)
        mdpgrpo_fast.token_loss(logits, tokens, None, config, backend="cuda", **given)
        print("cuda", vocab, rows, "rows", flush=True)


if __name__ == "__main__":
    main()
