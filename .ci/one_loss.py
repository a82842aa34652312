"""One loss through the installed package: prints the backend that `auto` takes, then the report of all backends."""

import torch

from mdpgrpo_fast import backend_report, token_loss
from mdpgrpo_fast.config import MDPGRPOConfig
from mdpgrpo_fast.ops.backends import choose

logits = torch.zeros(2, 3, 5, requires_grad=True)
config = MDPGRPOConfig(num_generations=2, multi_temperature=False)
out = token_loss(logits, torch.zeros(2, 3, dtype=torch.long), None, config, advantage=1.0, kl_beta=0.0)
out.loss.backward()
assert logits.grad is not None and abs(logits.grad[0, 0, 0].item() + (1 - 0.2) / 6) < 1e-6
print(choose("auto", logits.device, logits.dtype))
backend_report()
