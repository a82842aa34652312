"""`integrations.liger` under Liger's own signatures: beside Liger where both can, beside plain PyTorch elsewhere."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.imports import PACKAGE, Graph
from helpers.inputs import ROOT, LossInputs, make_inputs
from helpers.linear import Head, make_linear
from helpers.losses import DEVICE, MAX_LENGTH
from torch import Tensor

from mdpgrpo_fast.integrations.liger import GRPOLoss, triton_grpo_loss
from mdpgrpo_fast.ops.backends import choose

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
PAIRS = [(x, "token") for x in LOSS_TYPES] + [(x, "sequence") for x in LOSS_TYPES]
BOTH = [(x, level) for x, level in PAIRS if level == "token" or x in CLIPPED]
ONLY_OURS = [pair for pair in PAIRS if pair not in BOTH]
LENGTHS = (5, 3, 1, 4)


def assert_same(ours: Any, theirs: Any, rtol: float = 1e-4, atol: float = 3e-6) -> None:
    """atol: of a tensor's largest member, where that is above 1."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol * max(1.0, b.abs().max().item()))


def lengths_of(loss_type: str) -> tuple[int, ...]:
    """By design, Liger's luspo counts padded positions: there is only a comparison where there are none."""
    return (5, 5, 5, 5) if loss_type == "luspo" else LENGTHS


def bounds_of(loss_type: str, low: str = "epsilon_low", high: str = "epsilon_high") -> dict[str, float]:
    return {low: 0.1, high: 1.1 if loss_type == "cispo" else 0.15}


def weight_of(batch: LossInputs) -> Tensor:
    return torch.where(batch.mask, torch.linspace(0.4, 2, batch.mask.numel()).view(batch.mask.shape), 1.0)


# ---- signatures -----------------------------------------------------------------------------------------------------


def parameters(function: Any) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def test_signatures_are_those_of_liger(peer: Callable[[str], Any]) -> None:
    fused = peer("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    assert parameters(GRPOLoss) == parameters(fused)
    theirs = parameters(fused.forward)
    assert parameters(GRPOLoss.forward)[: len(theirs)] == theirs
    more = list(inspect.signature(GRPOLoss.forward).parameters.values())[len(theirs) :]
    assert [p.name for p in more] == ["beta", "temperature"] and all(p.kind == p.KEYWORD_ONLY for p in more)
    assert parameters(triton_grpo_loss) == parameters(peer("liger_kernel.transformers.grpo_loss").triton_grpo_loss)


def test_arguments_are_attributes_as_in_liger(peer: Callable[[str], Any]) -> None:
    given = {"beta": 0.3, "chunk_size": 2, "compiled": False, "loss_type": "sapo", "delta": 4.0, "vespo_k_neg": 2.5}
    ours, theirs = GRPOLoss(**given), peer("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(**given)
    for name, _ in parameters(GRPOLoss):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_neither_liger_nor_trl_is_imported() -> None:
    graph = Graph(PACKAGE)
    for name in ("integrations.liger", *graph.reach("integrations.liger")):
        assert not graph.outside(name) & {"liger_kernel", "trl"}, name


# ---- the loss from hidden states ------------------------------------------------------------------------------------


def head_loss(loss_class: Any, batch: LossInputs, head: Head, call: dict[str, Any], **options: Any) -> list[Tensor]:
    """Loss, gradients of hidden states, weight and bias, metrics."""
    leaves = [x.detach().clone().requires_grad_() for x in (batch.logits, head.weight, head.bias) if x is not None]
    loss_fn = loss_class(compiled=False, **{"max_completion_length": MAX_LENGTH, **options})
    loss, metrics = loss_fn(
        *leaves[:2], batch.tokens, batch.mask.float(), batch.advantage,
        **{
            "bias": leaves[2] if head.bias is not None else None,
            "ref_per_token_logps": batch.kwargs["ref_logprobs"],
            "old_per_token_logps": batch.kwargs["old_logprobs"],
            **call,
        },
    )  # fmt: skip
    assert isinstance(metrics, tuple)
    return [loss, *torch.autograd.grad(loss, leaves), *metrics]


# What is added to a call: (constructor's, call's); functions of the batch where they need it.
OPTIONS: dict[str, Callable[[LossInputs], tuple[dict[str, Any], dict[str, Any]]]] = {
    "plain": lambda b: ({}, {}),
    "bias": lambda b: ({}, {}),
    "no_kl": lambda b: ({"beta": 0.0, "use_ref_model": False}, {"ref_per_token_logps": None}),
    "no_reference_model": lambda b: ({"use_ref_model": False}, {}),
    "unbiased": lambda b: ({"use_bias_correction_kl": True}, {}),
    "unbiased_delta": lambda b: ({"use_bias_correction_kl": True, "delta": 1.05}, {}),
    "delta": lambda b: ({"delta": 1.3}, {}),
    "temperature": lambda b: ({"temperature": 0.7}, {}),
    "items": lambda b: ({}, {"num_items_in_batch": 29}),
    "items_tensor": lambda b: ({}, {"num_items_in_batch": torch.tensor(29)}),
    "on_policy": lambda b: ({}, {"old_per_token_logps": None}),
    "on_policy_unbiased": lambda b: ({"use_bias_correction_kl": True}, {"old_per_token_logps": None}),
    "weights": lambda b: ({}, {"vllm_is_ratio": weight_of(b)}),
    "completion_weights": lambda b: ({}, {"vllm_is_ratio": torch.tensor([[0.5], [1.5], [0.8], [1.2]])}),
    "flat_weights": lambda b: ({}, {"vllm_is_ratio": torch.tensor([0.5, 1.5, 0.8, 1.2])}),
    "chunks": lambda b: ({"chunk_size": 2}, {}),
    "shapes": lambda b: (
        {"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.4, "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5,
         "vespo_k_neg": 2.0, "vespo_lambda_neg": 1.5},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("loss_type", "level"), BOTH)
def test_from_hidden_states(peer: Callable[[str], Any], loss_type: str, level: str, option: str) -> None:
    liger = peer("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    batch, head = make_linear(50, lengths_of(loss_type), bias=option == "bias")
    options, call = OPTIONS[option](batch)
    options = {
        "beta": 0.1, "loss_type": loss_type, "importance_sampling_level": level, **bounds_of(loss_type), **options
    }  # fmt: skip
    theirs = head_loss(liger, batch, head, call, **options)
    assert_same(head_loss(GRPOLoss, batch, head, call, **options), theirs)
    if option == "plain" and loss_type in (*CLIPPED, "cispo"):
        assert theirs[-1] > 0, "nothing is clipped"


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_reference_from_its_hidden_states(peer: Callable[[str], Any], bias: bool) -> None:
    liger = peer("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    batch, head = make_linear(51, LENGTHS, bias=bias)
    other, ref = make_linear(51, LENGTHS, width=6, bias=bias)
    call = {"ref_input": other.logits, "ref_weight": ref.weight, "ref_bias": ref.bias, "ref_per_token_logps": None}
    options = {"beta": 0.1, "temperature": 0.8}
    theirs = head_loss(liger, batch, head, call, **options)
    assert_same(head_loss(GRPOLoss, batch, head, call, **options), theirs)
    given = {**call, "ref_per_token_logps": batch.kwargs["ref_logprobs"]}
    with pytest.warns(UserWarning, match="Both ref_per_token_logps and ref_input"):
        theirs = head_loss(liger, batch, head, given, **options)
    assert_same(head_loss(GRPOLoss, batch, head, given, **options), theirs)


def test_bfloat16_beside_liger(peer: Callable[[str], Any]) -> None:
    liger = peer("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    batch, head = make_linear(52, LENGTHS, dtype="bfloat16", bias=True)
    theirs, ours = (head_loss(c, batch, head, {}, beta=0.1) for c in (liger, GRPOLoss))
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    assert_same(ours, theirs, rtol=3e-2, atol=3e-3)


@pytest.mark.parametrize("items", [None, 40], ids=["", "items"])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo", "grpo", "bnpo"])
def test_normaliser_of_several_processes(
    peer: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, loss_type: str, items: int | None
) -> None:
    """The other of two processes has 8 tokens."""
    liger = peer("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    batch, head = make_linear(53, LENGTHS)
    alone = head_loss(GRPOLoss, batch, head, {}, loss_type=loss_type)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, op=None: x.add_(8))
    call = {"num_items_in_batch": items}
    theirs, ours = (head_loss(c, batch, head, call, loss_type=loss_type) for c in (liger, GRPOLoss))
    assert_same(ours, theirs)
    assert torch.equal(ours[0], alone[0]) == (loss_type in ("grpo", "bnpo"))


# ---- the loss from logits -------------------------------------------------------------------------------------------


def logits_of(batch: LossInputs) -> Tensor:
    """A leaf (B, L + 1, V), the last position of which is noise."""
    last = torch.full_like(batch.logits[:, :1], 2.0)
    return torch.cat([batch.logits, last], 1).to(DEVICE).requires_grad_()


def logits_loss(loss_fn: Any, batch: LossInputs, upstream: Tensor | None = None, **options: Any) -> list[Any]:
    """Loss, gradient, metrics; or, of the tokens' losses, the gradient for one that comes in."""
    x = logits_of(batch)
    given = {
        "old_logp": batch.kwargs["old_logprobs"], "ref_logp": batch.kwargs["ref_logprobs"],
        "completion_mask": batch.mask.long(), **options,
    }  # fmt: skip
    given = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in given.items()}
    loss, *rest = loss_fn(
        x, completion_ids=batch.tokens.to(DEVICE), advantages=batch.advantage.to(DEVICE), inplace=False,
        reduce=upstream is None, **given,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, x, None if upstream is None else upstream.to(DEVICE))
    if upstream is None:
        assert isinstance(rest[0], list)
    return [loss, grad, *(rest[0] if upstream is None else rest)]


LOGITS_OPTIONS: dict[str, Callable[[LossInputs], dict[str, Any]]] = {
    "plain": lambda b: {},
    "unmasked": lambda b: {"completion_mask": None},
    "no_kl": lambda b: {"beta": 0.0, "ref_logp": None},
    "unbiased": lambda b: {"use_bias_correction_kl": True},
    "delta": lambda b: {"delta": 1.3},
    "weights": lambda b: {"vllm_is_ratio": weight_of(b)},
    "completion_weights": lambda b: {"vllm_is_ratio": torch.tensor([[0.5], [1.5], [0.8]])},
    "items": lambda b: {"num_items_in_batch": 29},
    "on_policy": lambda b: {"old_logp": None, "use_bias_correction_kl": True},
}


def logits_batch(loss_type: str) -> LossInputs:
    return make_inputs(54, (3, 3, 3) if loss_type == "luspo" else (3, 1, 2), vocab=37, dtype="float32")


@pytest.mark.parametrize("reduce", [True, False], ids=["reduced", "per_token"])
@pytest.mark.parametrize(("loss_type", "level"), BOTH)
def test_from_logits(peer: Callable[[str], Any], loss_type: str, level: str, reduce: bool) -> None:
    liger = peer("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    for option, make in LOGITS_OPTIONS.items():
        if option == "delta" and loss_type not in CLIPPED:
            continue  # both refuse it
        batch = logits_batch(loss_type)
        options = {
            "loss_type": loss_type, "importance_sampling_level": level, "temperature": 0.8,
            "max_completion_length": MAX_LENGTH, **bounds_of(loss_type, "eps_low", "eps_high"), **make(batch),
        }  # fmt: skip
        # At masked positions too, where nothing may come of it.
        upstream = None if reduce else torch.linspace(-1, 2, 9).view(3, 3)
        theirs = logits_loss(liger, batch, upstream, **options)
        ours = logits_loss(triton_grpo_loss, batch, upstream, **options)
        assert [x is None for x in ours] == [x is None for x in theirs], option
        if loss_type == "luspo" and level == "token" and reduce:
            # Liger 0.8.5 reads its (B, 1) shares as (B, L) there: what lies behind them in memory is in its gradient.
            del ours[1], theirs[1]
        assert_same((x for x in ours if x is not None), (x for x in theirs if x is not None), rtol=1e-3)


def test_defaults_are_those_of_liger(peer: Callable[[str], Any]) -> None:
    """dr_grpo without a length takes that of the rows; temperature, clip range and reduce are left out."""
    liger = peer("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    batch = logits_batch("dr_grpo")
    for options in ({"loss_type": "dr_grpo"}, {}):
        for upstream in (None, torch.ones(3, 3)):
            assert_same(
                logits_loss(triton_grpo_loss, batch, upstream, **options),
                logits_loss(liger, batch, upstream, **options),
            )


# ---- what Liger has not ---------------------------------------------------------------------------------------------


def plain(
    batch: LossInputs, logits: Tensor, loss_type: str, level: str, beta: Any = 0.1, tau: Any = 1.0,
    weight: Tensor | None = None, unbiased: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """TRL's formulas: the loss of each token, and of all."""

    def at(t: Any) -> Tensor:
        t = t[:, None, None] if isinstance(t, Tensor) else t
        return (logits / t).log_softmax(-1).gather(-1, batch.tokens[..., None]).squeeze(-1)

    mask, adv = batch.mask.to(logits.dtype), batch.advantage[:, None]
    old, ref = batch.kwargs["old_logprobs"], batch.kwargs["ref_logprobs"]
    logps, kl_logps = at(tau), at(1.0 if isinstance(tau, Tensor) else tau)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    log_ratio = (logps - old) * mask
    ratio = (log_ratio.sum(1, keepdim=True) / lengths if level == "sequence" else log_ratio).exp()
    bounds = bounds_of(loss_type)
    if loss_type == "cispo":
        objective = ratio.clamp(max=bounds["epsilon_high"]).detach() * adv * logps
    elif loss_type == "sapo":
        t = torch.where(adv > 0, 1.0, 1.05)
        objective = adv * torch.sigmoid(t * (ratio - 1)) * 4 / t
    elif loss_type == "vespo":
        k, rate = torch.where(adv >= 0, 2.0, 3.0), torch.where(adv >= 0, 3.0, 2.0)
        w = log_ratio.sum(1, keepdim=True)
        objective = (rate + k * w - rate * w.exp()).exp().detach() * adv * logps
    else:
        inside = ratio.clamp(1 - bounds["epsilon_low"], 1 + bounds["epsilon_high"])
        objective = torch.minimum(ratio * adv, inside * adv)
    d = ref - kl_logps
    kl = (d.exp() - d - 1) * (ratio if unbiased else 1)
    beta = beta[:, None] if isinstance(beta, Tensor) else beta
    each = (-objective * (1 if weight is None else weight) + beta * kl) * mask
    total = {
        "bnpo": each.sum() / mask.sum(),
        "dr_grpo": each.sum() / (len(mask) * MAX_LENGTH),
        "luspo": each.sum(1).mean(),
    }
    mean = each.sum() / mask.sum() if loss_type in ("dapo", "cispo", "vespo") else (each.sum(1) / lengths[:, 0]).mean()
    return each, total.get(loss_type, mean)


def assert_plain(loss_type: str, level: str, tau: Any = 1.0, beta: Any = 0.1, **options: Any) -> None:
    """All three doors beside the formulas: loss and gradients."""
    unbiased = options.get("use_bias_correction_kl", False)
    batch, head = make_linear(55, LENGTHS)
    ours = head_loss(
        GRPOLoss, batch, head, {}, loss_type=loss_type, importance_sampling_level=level, temperature=tau, beta=beta,
        **bounds_of(loss_type), **options,
    )  # fmt: skip
    leaves = batch.logits.clone().requires_grad_(), head.weight.clone().requires_grad_()
    _, loss = plain(batch, leaves[0] @ leaves[1].T, loss_type, level, beta, tau, unbiased=unbiased)
    assert_same(ours[:3], (loss, *torch.autograd.grad(loss, leaves)))

    batch = make_inputs(56, LENGTHS, dtype="float32")
    given = {
        "loss_type": loss_type, "importance_sampling_level": level, "temperature": tau, "beta": beta,
        "max_completion_length": MAX_LENGTH, **bounds_of(loss_type, "eps_low", "eps_high"), **options,
    }  # fmt: skip
    x, upstream = batch.logits.clone().requires_grad_(), torch.linspace(-1, 2, 20).view(4, 5)
    each, loss = plain(batch, x, loss_type, level, beta, tau, unbiased=unbiased)
    for incoming, value in ((None, loss), (upstream, each)):
        got, grad, *_ = logits_loss(triton_grpo_loss, batch, incoming, **given)
        (expected,) = torch.autograd.grad(value, x, incoming, retain_graph=True)
        assert_same((got.cpu(), grad[:, :-1].cpu()), (value, expected))
        assert (grad[:, -1] == 0).all()


@pytest.mark.parametrize("unbiased", [False, True], ids=["", "unbiased"])
@pytest.mark.parametrize(("loss_type", "level"), [*ONLY_OURS, ("luspo", "token"), ("luspo", "sequence")])
def test_what_liger_refuses_is_there(loss_type: str, level: str, unbiased: bool) -> None:
    """And luspo where rows are padded, which is TRL's."""
    if loss_type == "vespo" and unbiased:
        with pytest.raises(ValueError, match="importance_sampling_level must be token"):
            GRPOLoss(loss_type=loss_type, importance_sampling_level=level, use_bias_correction_kl=True)
    else:
        assert_plain(loss_type, level, use_bias_correction_kl=unbiased)


@pytest.mark.parametrize(("loss_type", "level"), PAIRS)
def test_a_temperature_and_a_coefficient_per_completion(loss_type: str, level: str) -> None:
    taus, betas = torch.tensor([0.4, 0.7, 1.0, 1.3]), torch.tensor([0.1, 0.25, 0.0, 0.3])
    assert_plain(loss_type, level, tau=taus, beta=betas)
    assert_plain(loss_type, level, beta=betas)


def test_knobs_of_a_call_are_before_those_of_the_module() -> None:
    batch, head = make_linear(57, LENGTHS)
    taus, betas = torch.tensor([0.4, 0.7, 1.0, 1.3]), torch.tensor([0.1, 0.25, 0.0, 0.3])
    expected = head_loss(GRPOLoss, batch, head, {}, temperature=taus, beta=betas)
    assert_same(head_loss(GRPOLoss, batch, head, {"temperature": taus, "beta": betas}, beta=0.5), expected, 0, 0)
    # The same reference from its hidden states: at temperature 1, as that of the KL term.
    ref = {"ref_input": batch.logits, "ref_weight": head.weight, "ref_per_token_logps": None}
    logps = (batch.logits @ head.weight.T).log_softmax(-1).gather(-1, batch.tokens[..., None]).squeeze(-1)
    got = head_loss(GRPOLoss, batch, head, ref, temperature=taus, beta=betas)
    assert_same(got, head_loss(GRPOLoss, batch, head, {"ref_per_token_logps": logps}, temperature=taus, beta=betas))


def test_mean_kl_is_of_completions_without_a_coefficient_too() -> None:
    batch, head = make_linear(58, LENGTHS)
    batch.advantage = torch.tensor([1.0, 0.0, -1.0, 0.0])
    number = head_loss(GRPOLoss, batch, head, {}, beta=0.1)
    each = head_loss(GRPOLoss, batch, head, {}, beta=torch.tensor([0.1, 0.0, 0.1, 0.2]))
    assert_same(each[-2:], number[-2:])


def test_vespo_takes_the_weight_of_a_completion_once() -> None:
    """At sequence level, which Liger refuses; also where the first token does not count."""
    batch, head = make_linear(59, LENGTHS)
    batch.mask = batch.mask & (torch.arange(5) > 0)
    weight = torch.tensor([0.5, 1.5, 0.8, 1.2])
    rows = torch.where(batch.mask, weight[:, None] ** (1 / batch.mask.sum(1, keepdim=True).clamp(min=1)), 1.0)
    options = {"loss_type": "vespo", "importance_sampling_level": "sequence"}
    once, spread = (head_loss(GRPOLoss, batch, head, {"vllm_is_ratio": w}, **options) for w in (weight, rows))
    assert_same(once, spread)


def test_what_masked_positions_hold_does_not_matter() -> None:
    batch, head = make_linear(60, LENGTHS)
    expected = head_loss(GRPOLoss, batch, head, {}, beta=0.1)
    out = ~batch.mask
    kwargs = {k: x.masked_fill(out, torch.nan) for k, x in batch.kwargs.items()}
    dirty = replace(batch, tokens=batch.tokens.masked_fill(out, -100), kwargs=kwargs)
    assert_same(head_loss(GRPOLoss, dirty, head, {}, beta=0.1), expected, 0, 0)
    logits = replace(dirty, logits=make_inputs(60, LENGTHS, dtype="float32", vocab=37).logits)
    for upstream in (None, torch.ones(4, 5)):
        assert all(x.isfinite().all() for x in logits_loss(triton_grpo_loss, logits, upstream))


# ---- in place -------------------------------------------------------------------------------------------------------


def test_inplace_writes_the_gradient_into_the_logits() -> None:
    batch = make_inputs(61, LENGTHS, dtype="float32")
    given = {
        "old_logp": batch.kwargs["old_logprobs"].to(DEVICE), "ref_logp": batch.kwargs["ref_logprobs"].to(DEVICE),
        "completion_ids": batch.tokens.to(DEVICE), "advantages": batch.advantage.to(DEVICE),
        "completion_mask": batch.mask.to(DEVICE),
    }  # fmt: skip
    expected = logits_loss(triton_grpo_loss, batch)
    fused = choose("auto", torch.device(DEVICE), torch.float32) != "torch"
    leaf = logits_of(batch)

    def overwrites(logits: Tensor, **options: Any) -> bool:
        before = logits.detach().clone()
        loss, *_ = triton_grpo_loss(logits, **given, **{"reduce": True, **options})
        changed = not torch.equal(logits.detach(), before)
        if options.get("reduce", True):
            (grad,) = torch.autograd.grad(loss, leaf)
            assert_same((loss.float(), grad), expected[:2], rtol=1e-2 if logits.dtype == torch.float16 else 1e-4)
        return changed

    assert overwrites(leaf * 1) == fused
    assert not overwrites(leaf * 1, inplace=False)
    assert not overwrites(leaf * 1, reduce=False)
    assert not overwrites(leaf)
    assert not overwrites((leaf * 1).half()) and not overwrites((leaf * 1).double())
    assert not overwrites((leaf * 1).transpose(0, 1).contiguous().transpose(0, 1))
    plain_logits = leaf.detach() * 1
    triton_grpo_loss(plain_logits, **given, reduce=True)
    assert torch.equal(plain_logits, leaf.detach())


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of grpo"),
        ({"importance_sampling_level": "batch"}, "importance_sampling_level must be token or sequence"),
        ({"delta": 0.0}, "delta must be above 0"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos must be above 0"),
        ({"sapo_temperature_neg": -1.0}, "sapo_temperature_neg must be above 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": "hot"}, "temperature must be above 0"),
    ],
)
def test_errors_of_the_constructor(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        GRPOLoss(**options)


HEAD_ERRORS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"_input": torch.zeros(4, 8)}, "_input must be of shape"),
    ({}, {"_input": None}, "_input must be a tensor"),
    ({}, {"lin_weight": torch.zeros(37, 5)}, "weight must be of shape"),
    ({}, {"selected_token_ids": torch.zeros(4, 4, dtype=torch.long)}, "selected_token_ids must be of shape"),
    ({}, {"selected_token_ids": torch.zeros(4, 5)}, "selected_token_ids must be int32 or int64"),
    ({}, {"attention_mask": torch.ones(5, 4)}, "attention_mask must be of shape"),
    ({}, {"attention_mask": None}, "attention_mask must be a tensor"),
    ({}, {"advantages": torch.zeros(4, 1)}, "advantages must be of shape"),
    ({}, {"advantages": 1.0}, "advantages must be a tensor"),
    ({}, {"bias": torch.zeros(5)}, "bias must be of shape"),
    ({}, {"old_per_token_logps": torch.zeros(4)}, "old_per_token_logps must be of shape"),
    ({}, {"ref_per_token_logps": torch.zeros(4, 6)}, "ref_per_token_logps must be of shape"),
    ({}, {"ref_per_token_logps": None}, "ref_per_token_logps must be given, or ref_input"),
    ({}, {"ref_per_token_logps": None, "ref_input": torch.zeros(4, 5, 8)}, "ref_weight must be a tensor"),
    (
        {}, {"ref_per_token_logps": None, "ref_input": torch.zeros(4, 8), "ref_weight": torch.zeros(37, 8)},
        "ref_input must be of shape",
    ),
    ({}, {"vllm_is_ratio": torch.ones(4, 2)}, "vllm_is_ratio must be of shape"),
    ({}, {"num_items_in_batch": "many"}, "num_items_in_batch must be a number"),
    ({}, {"temperature": torch.ones(3)}, "temperature must be of shape"),
    ({}, {"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])}, "temperature must be above 0"),
    ({}, {"beta": torch.ones(4, 1)}, "beta must be of shape"),
    ({}, {"beta": "0.1"}, "beta must be a number"),
    ({"loss_type": "dr_grpo", "max_completion_length": None}, {}, "max_completion_length must be given"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "call", "message"), HEAD_ERRORS)
def test_errors_of_a_call(options: dict[str, Any], call: dict[str, Any], message: str) -> None:
    batch, head = make_linear(62, LENGTHS)
    given = {
        "_input": batch.logits, "lin_weight": head.weight, "selected_token_ids": batch.tokens,
        "attention_mask": batch.mask, "advantages": batch.advantage,
        "ref_per_token_logps": batch.kwargs["ref_logprobs"], **call,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{message}"):
        GRPOLoss(**options)(**given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": torch.zeros(4, 11)}, "logits must be of shape"),
        ({"logits": torch.zeros(4, 5, 11)}, "completion_ids must be of shape"),
        ({"completion_ids": torch.zeros(4, 5)}, "completion_ids must be int32 or int64"),
        ({"completion_mask": torch.ones(4, 6)}, "completion_mask must be of shape"),
        ({"advantages": torch.zeros(5)}, "advantages must be of shape"),
        ({"old_logp": torch.zeros(5, 4)}, "old_logp must be of shape"),
        ({"ref_logp": torch.zeros(5, 4)}, "ref_logp must be of shape"),
        ({"ref_logp": None}, "ref_logp must be given"),
        ({"loss_type": "ppo"}, "loss_type must be one of grpo"),
        ({"importance_sampling_level": "batch"}, "importance_sampling_level must be token or sequence"),
        ({"loss_type": "sapo", "delta": 2.0}, "delta must be None for loss_type = sapo"),
        ({"delta": -1.0}, "delta must be above 0"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"temperature": torch.ones(5)}, "temperature must be of shape"),
        ({"beta": torch.ones(5)}, "beta must be of shape"),
        ({"vllm_is_ratio": torch.ones(5, 1)}, "vllm_is_ratio must be of shape"),
    ],
)
@pytest.mark.parametrize("reduce", [True, False])
def test_errors_of_the_loss_from_logits(options: dict[str, Any], message: str, reduce: bool) -> None:
    batch = make_inputs(63, LENGTHS, dtype="float32")
    given = {
        "logits": logits_of(batch).detach().cpu(), "completion_ids": batch.tokens, "advantages": batch.advantage,
        "old_logp": batch.kwargs["old_logprobs"], "ref_logp": batch.kwargs["ref_logprobs"], **options,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{message}"):
        triton_grpo_loss(**given, reduce=reduce)


# ---- the page -------------------------------------------------------------------------------------------------------


def test_code_of_the_page_runs_as_pasted() -> None:
    text = (ROOT / "docs" / "liger.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found: dict[str, Any] = {}
    exec(block, found)
    assert found["loss"].isfinite() and len(found["metrics"]) == 2
    assert found["hidden"].grad.abs().sum() > 0
