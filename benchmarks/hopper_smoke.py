"""One loss per dtype, cluster size and alignment through the Hopper kernel: short enough for compute-sanitizer."""

from __future__ import annotations

import torch

from mdpgrpo_fast import token_loss
from mdpgrpo_fast.config import MDPGRPOConfig

CONFIG = MDPGRPOConfig(num_generations=2, multi_temperature=False)


def main() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for vocab in (1000, 1001, 65536, 131073, 256000):
            logits = torch.randn(2, 2, vocab, device="cuda", dtype=dtype, requires_grad=True)
            tokens = torch.randint(0, vocab, (2, 2), device="cuda")
            ref = torch.full((2, 2), -9.0, device="cuda")
            out = token_loss(
                logits, tokens, None, CONFIG, advantage=1.0, kl_beta=0.1, ref_logprobs=ref, backend="cuda",
                temperature=torch.tensor([0.7, 1.2], device="cuda"),
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(out.loss, logits)
            assert gradient.isfinite().all() and out.loss.isfinite(), (dtype, vocab)
    print("ok")


if __name__ == "__main__":
    main()
