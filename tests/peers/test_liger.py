"""The reference and every fused backend against Liger's chunked loss and its Triton kernel, where options overlap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.inputs import LossInputs, make_inputs
from helpers.losses import ALL_BACKENDS, DEVICE, MAX_LENGTH, config_for, equal_beta, make_batch, run, to

import mdpgrpo_fast
from mdpgrpo_fast.config import MDPGRPOConfig

AGGREGATIONS = ("grpo", "dapo", "dr_grpo", "bnpo")


@pytest.fixture
def head() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(40)
    return torch.randn(4, 5, 16, generator=g), torch.randn(37, 16, generator=g) * 0.7


@pytest.fixture
def liger(peer: Callable[[str], Any], head: tuple[torch.Tensor, torch.Tensor]) -> Callable[..., Any]:
    """`LigerFusedLinearGRPOLoss` of some rows: (loss, gradient of hidden, gradient of the head's weight)."""
    fused = peer("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss

    def compute(batch: LossInputs, rows: Any = slice(None), weight: Any = None, items: Any = None, **knobs: Any) -> Any:
        hidden, matrix = (x.clone().requires_grad_() for x in (head[0][rows], head[1]))
        batch = batch.rows(rows)
        knobs = {"epsilon_low": 0.2, "epsilon_high": 0.2, **knobs}
        loss_fn = fused(compiled=False, max_completion_length=MAX_LENGTH, **knobs)
        loss, _ = loss_fn(
            hidden,
            matrix,
            batch.tokens,
            batch.mask.float(),
            batch.advantage,
            ref_per_token_logps=batch.kwargs.get("ref_logprobs"),
            old_per_token_logps=batch.kwargs.get("old_logprobs"),
            vllm_is_ratio=None if weight is None else weight[rows],
            num_items_in_batch=items,
        )
        return loss, *torch.autograd.grad(loss, (hidden, matrix))

    return compute


def head_inputs(head: tuple[torch.Tensor, torch.Tensor], tau: Any = 1.0) -> LossInputs:
    """A batch whose old and reference log-probs are near those of hidden @ weight.T at τ."""
    hidden, weight = head
    batch, noise = make_inputs(41, vocab=37, dtype="float32"), make_inputs(42, scale=0.1).logits
    at, _ = mdpgrpo_fast.token_logprobs(hidden @ weight.T, batch.tokens, temperature=tau)
    batch.kwargs = {"old_logprobs": at + 2 * noise[..., 0].float(), "ref_logprobs": at + 4 * noise[..., 1].float()}
    return equal_beta(batch)


def run_head(head: tuple[torch.Tensor, torch.Tensor], batch: LossInputs, config: MDPGRPOConfig, **more: Any) -> Any:
    """Our loss and its gradients, through logits; from the head it is the same."""
    hidden, weight = (x.clone().requires_grad_() for x in head)
    rest = {"max_completion_length": MAX_LENGTH, **batch.given(), **more}
    out = mdpgrpo_fast.token_loss(hidden @ weight.T, batch.tokens, batch.mask, config, **rest)
    found = out.loss, *torch.autograd.grad(out.loss, (hidden, weight))
    fused = mdpgrpo_fast.linear_token_loss(
        hidden, weight, batch.tokens, batch.mask, config, workspace_bytes=4 * 37 * 6, **rest
    )
    assert_same((fused.loss, *torch.autograd.grad(fused.loss, (hidden, weight))), found)
    return found


def assert_same(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("delta", [None, 1.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_liger_chunked_loss(head: Any, liger: Any, aggregation: Any, level: Any, delta: float | None) -> None:
    for tau in (1.0, 0.6):
        batch = head_inputs(head, tau)
        theirs = liger(
            batch, loss_type=aggregation, importance_sampling_level=level, temperature=tau, beta=0.1, delta=delta
        )
        config = config_for(
            aggregation=aggregation,
            importance_level=level,
            delta=delta,
            kl_temperature=tau,
            temperature_objective="per_row",
        )
        assert_same(run_head(head, batch, config, temperature=tau), theirs)


# Liger's loss_type is a loss and an aggregation.
LOSSES: dict[str, dict[str, Any]] = {
    "dapo": {"aggregation": "dapo"},
    "cispo": {"loss": "cispo", "aggregation": "dapo", "epsilon_low": 1.0, "epsilon_high": 0.3},
    "sapo": {"loss": "sapo"},
    "luspo": {"loss": "luspo"},
    "vespo": {"loss": "vespo", "aggregation": "dapo"},
}


def liger_knobs(loss_type: str) -> dict[str, Any]:
    """Its cispo has one bound, which is not counted from 1; its luspo is at sequence level."""
    level = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    return {"loss_type": loss_type, **level, **({"epsilon_high": 1.3} if loss_type == "cispo" else {})}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("unbiased", [False, True], ids=["plain", "unbiased"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_liger_chunked_loss_types(head: Any, liger: Any, loss_type: str, unbiased: bool, weighted: bool) -> None:
    batch, more = head_inputs(head), {}
    if loss_type == "luspo":
        batch.mask[:] = True  # by design: with a KL term its mean is over padded positions too
    if weighted:
        more["weight"] = torch.where(batch.mask, torch.linspace(0.4, 2, 20).view(4, 5), 1.0)
    theirs = liger(batch, beta=0.1, use_bias_correction_kl=unbiased, **liger_knobs(loss_type), **more)
    config = config_for(kl_gradient="unbiased" if unbiased else "plain", **LOSSES[loss_type])
    assert_same(run_head(head, batch, config, importance_weight=more.get("weight")), theirs)


@pytest.mark.parametrize("unbiased", [False, True], ids=["plain", "unbiased"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_liger_triton_loss_types(peer: Callable[[str], Any], loss_type: str, unbiased: bool) -> None:
    theirs = peer("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    # By design: the mean of its luspo is over padded positions too.
    batch = equal_beta(make_batch(44, lengths=(3, 3, 3) if loss_type == "luspo" else (3, 1, 2), vocab=37))
    x = torch.cat([batch.logits, torch.zeros(3, 1, 37)], 1).to(DEVICE).requires_grad_()
    arguments = (batch.kwargs["old_logprobs"], batch.kwargs["ref_logprobs"], batch.tokens, batch.advantage)
    knobs = {"eps_high" if k == "epsilon_high" else k: v for k, v in liger_knobs(loss_type).items()}
    loss, *_ = theirs(
        x, *(to(t, DEVICE) for t in arguments), batch.mask.long().to(DEVICE), temperature=1.0, beta=0.1, inplace=False,
        reduce=True, use_bias_correction_kl=unbiased, **{"eps_low": 0.2, "eps_high": 0.2, **knobs},
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, x)
    config = config_for(kl_gradient="unbiased" if unbiased else "plain", **LOSSES[loss_type])
    for backend in ALL_BACKENDS:
        got = run(backend, batch, config)
        assert got.out.loss.item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-6), backend
        torch.testing.assert_close(got.grad, grad[:, :-1], rtol=1e-3, atol=1e-6)


def test_liger_importance_weight_multiplies_the_policy_term_only(head: Any, liger: Any) -> None:
    batch, weight = head_inputs(head), torch.linspace(0.2, 2, 20).view(4, 5)
    theirs = liger(batch, weight=weight, loss_type="grpo", beta=0.1)
    assert_same(run_head(head, batch, config_for(), importance_weight=weight), theirs)


def test_liger_rows_of_two_temperatures_and_two_coefficients(head: Any, liger: Any) -> None:
    """Liger has one temperature and one β a call: one call of ours is the sum of its calls per temperature and sign."""
    taus = torch.tensor([0.5, 0.5, 1.0, 1.0])
    batch = head_inputs(head, taus)
    betas = batch.kl_beta = torch.where(batch.advantage < 0, 0.25, 0.1)
    tokens = batch.mask.sum()
    loss, d_hidden, d_weight = torch.zeros(()), torch.zeros_like(head[0]), torch.zeros_like(head[1])
    for i in range(4):
        # In Liger both policy and KL are at the row's temperature; ours has one temperature for the KL of all rows.
        only = batch.rows(slice(None))
        del only.kwargs["ref_logprobs"]
        row = slice(i, i + 1)
        at = {"loss_type": "dapo", "items": tokens, "temperature": taus[i].item()}
        part = liger(only, row, beta=0.0, use_ref_model=False, **at)
        kl = batch.rows(slice(None))
        kl.advantage = torch.zeros(4)
        extra = liger(kl, row, beta=betas[i].item(), **{**at, "temperature": 1.0})
        loss += part[0] + extra[0]
        d_hidden[row] += part[1] + extra[1]
        d_weight += part[2] + extra[2]
    config = config_for(aggregation="dapo", temperature_objective="per_row")
    assert_same(run_head(head, batch, config, temperature=taus), (loss, d_hidden, d_weight))


@pytest.mark.parametrize(("aggregation", "factor"), [("grpo", 3 / 4), ("dr_grpo", 3 / 4), ("dapo", 1), ("bnpo", 1)])
def test_liger_counts_empty_completions(head: Any, liger: Any, aggregation: Any, factor: float) -> None:
    """By design, as with TRL: the normaliser follows the mask."""
    batch = head_inputs(head)
    batch.mask[2] = False
    loss, d_hidden, _ = liger(batch, loss_type=aggregation, beta=0.1)
    ours, ours_hidden, _ = run_head(head, batch, config_for(aggregation=aggregation))
    assert_same((ours * factor, ours_hidden * factor), (loss, d_hidden))


@pytest.mark.parametrize(("level", "aggregation", "delta"), [("token", "grpo", None), ("sequence", "dapo", 1.3)])
def test_liger_triton_loss(peer: Callable[[str], Any], level: Any, aggregation: Any, delta: float | None) -> None:
    """Liger's own kernel on the same logits, where the options overlap: one temperature, one β, no entropy."""
    theirs = peer("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    batch = equal_beta(make_batch(43, lengths=(3, 1, 2), vocab=37))
    x = torch.cat([batch.logits, torch.zeros(3, 1, 37)], 1).to(DEVICE).requires_grad_()
    arguments = (batch.kwargs["old_logprobs"], batch.kwargs["ref_logprobs"], batch.tokens, batch.advantage)
    loss, *_ = theirs(
        x, *(to(t, DEVICE) for t in arguments), batch.mask.long().to(DEVICE), temperature=0.7, beta=0.1, eps_low=0.2,
        eps_high=0.2, inplace=False, loss_type=aggregation, importance_sampling_level=level, reduce=True, delta=delta,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, x)
    config = config_for(
        aggregation=aggregation,
        importance_level=level,
        delta=delta,
        kl_temperature=0.7,
        temperature_objective="per_row",
    )
    for backend in ALL_BACKENDS:
        got = run(backend, batch, config, temperature=0.7)
        assert got.out.loss.item() == pytest.approx(loss.item(), rel=1e-5), backend
        torch.testing.assert_close(got.grad, grad[:, :-1], rtol=1e-4, atol=1e-6)
