"""One loss through the installed package, and the data that it ships: prints what `auto` takes, then all backends."""

from importlib.metadata import entry_points
from importlib.resources import files

import torch

from mdpgrpo_fast import backend_report, token_loss
from mdpgrpo_fast.config import MDPGRPOConfig
from mdpgrpo_fast.ops.backends import choose

logits = torch.zeros(2, 3, 5, requires_grad=True)
config = MDPGRPOConfig(num_generations=2, multi_temperature=False)
out = token_loss(logits, torch.zeros(2, 3, dtype=torch.long), None, config, advantage=1.0, kl_beta=0.0)
out.loss.backward()
assert logits.grad is not None and abs(logits.grad[0, 0, 0].item() + (1 - 0.2) / 6) < 1e-6
for name in (
    "report/page.html.jinja",
    "report/compare.html.jinja",
    "report/page.css",
    "kernels/crossovers.json",
    "demo/train.jsonl",
    "launch/ddp.yaml",
    "integrations/verl/configs/one_node.yaml",
):
    assert files("mdpgrpo_fast").joinpath(name).is_file(), f"{name} is not installed"
(plugin,) = entry_points(group="verl.plugins", name="mdpgrpo_fast")  # what verl looks for
assert files(plugin.module.rpartition(".")[0]).joinpath("plugin.py").is_file(), plugin
print(choose("auto", logits.device, logits.dtype))
backend_report()
