"""Stand-ins for what docs/other_trainers.md plugs into: the losses of prime-rl 0.8.0 and NeMo-RL 0.7.0.

Names, shapes and what is called with what are theirs; the rest is only as much as a test needs.
"""

from __future__ import annotations

import enum
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.inputs import ROOT
from torch import Tensor


def page() -> str:
    return (ROOT / "docs" / "other_trainers.md").read_text(encoding="utf-8")


def run_block(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the page's block of code defines that imports from these modules, which hold these names."""
    for path in {".".join(name.split(".")[: n + 1]) for name in modules for n in range(name.count(".") + 1)}:
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    for name, members in modules.items():
        vars(sys.modules[name]).update(members)
    blocks = re.findall(r"```python\n(.*?)```", page(), re.DOTALL)
    (block,) = (b for b in blocks if all(f"from {name} import" in b for name in modules))
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    return namespace


# ---- prime-rl -------------------------------------------------------------------------------------------------------


@dataclass
class LossInputs:
    """One sample's tokens: (n,) each; the log-probs of the trainer have a gradient."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor  # bool
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


PRIME_RL = {"prime_rl.trainer.rl.loss": {"LossInputs": LossInputs, "LossOutputs": LossOutputs}}


def prime_rl_loss(custom: Callable[..., LossOutputs], samples: list[LossInputs]) -> tuple[Tensor, dict[str, Tensor]]:
    """Samples one by one, their sum over the tokens of all, and each metric of all samples."""
    outs = [custom(sample) for sample in samples]
    assert all(type(out) is LossOutputs for out in outs)
    tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
    metrics = {name: torch.stack([out.metrics[name] for out in outs]) for name in outs[0].metrics}
    return torch.stack([out.loss for out in outs]).sum() / tokens, metrics


# ---- NeMo-RL --------------------------------------------------------------------------------------------------------


class LossInputType(enum.Enum):
    LOGIT = "logit"
    LOGPROB = "logprob"


class ClippedPGLossFn:
    """Its logged numbers; the loss is not the real one, as no one may use it."""

    input_type = LossInputType.LOGPROB

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.force_on_policy_ratio = cfg.force_on_policy_ratio
        self.reference_policy_kl_penalty = cfg.reference_policy_kl_penalty

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        assert next_token_logprobs.shape == mask.shape and not next_token_logprobs.requires_grad
        ratio = (next_token_logprobs - data["prev_logprobs"][:, 1:]).exp()
        metrics = {
            "loss": float("nan"),
            "probs_ratio": ((ratio * mask).sum() / global_valid_toks).item(),
            "num_valid_samples": data["sample_mask"].sum().item(),
        }
        return torch.full((), float("nan")), metrics


NEMO_RL = {
    "nemo_rl.algorithms.loss": {"ClippedPGLossFn": ClippedPGLossFn},
    "nemo_rl.algorithms.loss.interfaces": {"LossInputType": LossInputType},
}


def nemo_rl_config(**changes: Any) -> Any:
    return SimpleNamespace(**{"force_on_policy_ratio": False, "reference_policy_kl_penalty": 0.01, **changes})


def nemo_rl_loss(loss_fn: Any, logits: Tensor, data: dict[str, Tensor], padding: int = 0) -> tuple[Tensor, list[Any]]:
    """The sum over two micro-batches, and each one's metrics.

    padding: instead each completion by itself, as sequence packing has it: cut to its length, the logits with so many
    more rows.
    """
    assert loss_fn.input_type == LossInputType.LOGIT
    seqs = data["sample_mask"].sum()
    tokens = (data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)).sum()
    size = len(logits)
    calls = []
    if padding:
        for i in range(size):
            width = int(data["token_mask"][i].nonzero().max()) + 1
            own = {k: v[i : i + 1, :width] if v.ndim > 1 else v[i : i + 1] for k, v in data.items()}
            calls.append((torch.nn.functional.pad(logits[i : i + 1, :width], (0, 0, 0, padding)), own))
    else:
        half = size // 2
        calls = [(logits[part], {k: v[part] for k, v in data.items()}) for part in (slice(half), slice(half, size))]
    outs = [loss_fn(data=own, global_valid_seqs=seqs, global_valid_toks=tokens, logits=x) for x, own in calls]
    return torch.stack([loss for loss, _ in outs]).sum(), [metrics for _, metrics in outs]
