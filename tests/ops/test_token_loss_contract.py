"""How the objective behaves: autograd, in place, determinism, values that nobody looked at, bad input, and Liger."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.inputs import LossInputs
from helpers.losses import (
    BACKENDS,
    DEVICE,
    GIVEN,
    REWARDS,
    call,
    config_for,
    make_batch,
    packed,
    run,
    to,
)

import mdpgrpo_fast
from mdpgrpo_fast import reference
from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.ops import fused

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
LEVELS = ["token", "sequence"]


def on_device(batch: LossInputs) -> tuple[LossInputs, torch.Tensor]:
    """The batch with logits that are not a leaf, and the leaf behind them."""
    leaf = batch.logits.to(DEVICE, copy=True).requires_grad_()
    return replace(batch, logits=leaf * 1), leaf


# ---- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_loss_scale_reaches_the_gradient(backend: str, in_place: bool) -> None:
    """Accumulation and AMP scale the loss; powers of two lose nothing, 0 stops everything."""
    batch, config = make_batch(1, dtype="bfloat16"), config_for()
    plain = run(backend, batch, config).grad
    for scale in (1.0, 0.5, 65536.0, 0.0):
        one, leaf = on_device(batch)
        loss = call(backend, one, config, in_place=in_place).loss
        (grad,) = torch.autograd.grad(loss * scale, leaf)
        assert torch.equal(grad, plain * scale), scale


@pytest.mark.parametrize("in_place", [False, True])
def test_tensors_of_inference_mode(backend: str, in_place: bool) -> None:
    batch, config = make_batch(1), config_for()
    expected = call(backend, on_device(batch)[0], config).loss
    with torch.inference_mode():
        inside = replace(batch, logits=batch.logits.to(DEVICE, copy=True))
        assert inside.logits.is_inference()
        assert torch.equal(call(backend, inside, config, in_place=in_place).loss, expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_backward_twice(backend: str, in_place: bool) -> None:
    """With retain_graph the same gradient again, whatever the first one's scale; without it torch's own error."""
    one, leaf = on_device(make_batch(2))
    loss = call(backend, one, config_for(), in_place=in_place).loss
    first, second = (torch.autograd.grad(3 * loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().sum() > 0
    (third,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(3 * third, first, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf)


def test_double_backward_is_refused(backend: str) -> None:
    one, leaf = on_device(make_batch(3))
    (grad,) = torch.autograd.grad(call(backend, one, config_for()).loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(grad.square().sum(), leaf)


def test_only_the_loss_and_the_logits_have_a_gradient(backend: str) -> None:
    """Liger#968: a gradient formed in the forward is that of the sum alone, so per-token outputs are detached."""
    for name in (backend, "torch"):
        one, leaf = on_device(make_batch(4))
        weights = {n: one.kwargs[n].to(DEVICE).requires_grad_() for n in ("old_logprobs", "ref_logprobs")}
        advantage = one.advantage.to(DEVICE).requires_grad_()
        out = call(name, one, config_for(), advantage=advantage, **weights)
        for x in (out.logprobs, out.entropy, out.kl, out.ratio, out.completion_kl, out.totals):
            assert not x.requires_grad
        grads = torch.autograd.grad(out.loss, [leaf, advantage, *weights.values()], allow_unused=True)
        assert grads[0].abs().sum() > 0 and grads[1:] == (None, None, None), name


def test_two_consumers_of_the_same_logits(backend: str) -> None:
    batch, config = make_batch(5), config_for()
    plain = run(backend, batch, config).grad
    one, leaf = on_device(batch)
    total = call(backend, one, config).loss + call(backend, one, config).loss * 2 + one.logits.square().sum()
    (grad,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(grad, 3 * plain + 2 * leaf.detach(), rtol=1e-6, atol=1e-7)


def test_backward_on_another_thread(backend: str) -> None:
    """Autograd's threads have another current device: launches go to that of the tensor."""
    batch = make_batch(6)
    one, leaf = on_device(batch)
    loss = call(backend, one, config_for()).loss
    grads: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: grads.extend(torch.autograd.grad(2 * loss, leaf)))
    thread.start()
    thread.join()
    assert torch.equal(grads[0], 2 * run(backend, batch, config_for()).grad)


# ---- in place -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "packed", "view"])
def test_in_place_gives_the_same_gradient_in_the_memory_of_the_logits(backend: str, layout: str) -> None:
    """The target logit is read before it is overwritten, and the rest of a wider tensor stays as it is."""
    batch = make_batch(7, dtype="bfloat16", vocab=261)
    batch = packed(batch) if layout == "packed" else batch
    config = config_for(importance_level="sequence", kl_temperature=0.8)
    plain = run(backend, batch, config)
    one, leaf = on_device(batch)
    if layout == "view":
        wide = torch.full((*one.logits.shape[:2], 300), 7.0, device=DEVICE, dtype=torch.bfloat16)
        one.logits = torch.cat([one.logits, wide[..., 261:]], -1)[..., :261]
    memory = one.logits.data_ptr()
    out = call(backend, one, config, in_place=True)
    assert torch.equal(out.loss, plain.out.loss) and one.logits.data_ptr() == memory
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert torch.equal(grad, plain.grad)
    assert layout != "view" or (one.logits._base[..., 261:] == 7).all()


def test_overwritten_logits_are_refused(backend: str) -> None:
    one, _ = on_device(make_batch(8))
    call(backend, one, config_for(), in_place=True)
    for again in (
        lambda: call(backend, one, config_for(), in_place=True),
        lambda: call("torch", one, config_for()),
        lambda: mdpgrpo_fast.token_logprobs(one.logits, one.tokens.to(DEVICE), backend=backend),
    ):
        with pytest.raises(ValueError, match=r"^logits must be logits.*; got .* gradient"):
            again()
    with torch.no_grad():
        one.logits.zero_()  # logits again, whoever wrote them
    assert call(backend, one, config_for()).loss.isfinite()


def test_in_place_is_seen_by_another_consumer(backend: str) -> None:
    """triton#4004: a write behind autograd's back would silently change what another function saved."""
    one, leaf = on_device(make_batch(9))
    other = one.logits.exp().sum() + one.logits.logsumexp(-1).sum()
    loss = call(backend, one, config_for(), in_place=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other + loss, leaf)


def test_a_write_to_the_overwritten_logits_is_seen(backend: str) -> None:
    one, leaf = on_device(make_batch(10))
    loss = call(backend, one, config_for(), in_place=True).loss
    with torch.no_grad():
        one.logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


def test_in_place_is_refused_where_it_cannot_work(backend: str) -> None:
    one, leaf = on_device(make_batch(11))
    turned = one.logits.transpose(1, 2).contiguous().transpose(1, 2)
    for name, logits, message in (
        (backend, one.logits[:1].expand(4, -1, -1), "off "),  # one gradient for four rows of the same memory
        (backend, leaf, "off for .* leaf"),
        (backend, turned, "off without unit stride in V; got .*stride"),
        ("torch", one.logits, "left off: backend torch computes the gradient in the backward pass; got True"),
    ):
        with pytest.raises(ValueError, match=f"^in_place must be {message}"):
            call(name, replace(one, logits=logits), config_for(), in_place=True)


def test_in_place_without_gradient_leaves_the_logits_alone(backend: str) -> None:
    one, _ = on_device(make_batch(12))
    before = one.logits.detach().clone()
    with torch.no_grad():
        first, second = (call(backend, one, config_for(), in_place=True).loss for _ in range(2))
    assert torch.equal(one.logits, before) and torch.equal(first, second)


# ---- determinism ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_bits_every_time_and_in_any_company(backend: str, level: Any) -> None:
    """verl#6280: a log-prob does not depend on what else is in the batch, nor on which operation computes it."""
    batch = make_batch(24, lengths=(2, 1), dtype="bfloat16", vocab=5003)
    config = config_for(importance_level=level, kl_temperature=0.9)
    first, second = run(backend, batch, config), run(backend, batch, config)
    for name in ("loss", "logprobs", "entropy", "kl", "ratio", "totals"):
        assert torch.equal(getattr(first.out, name), getattr(second.out, name)), name
    assert torch.equal(first.grad, second.grad)
    args = (batch.logits.to(DEVICE), batch.tokens.to(DEVICE))
    alone, _ = mdpgrpo_fast.token_logprobs(*(x[1:, :1] for x in args), backend=backend)
    assert torch.equal(alone[0, 0], first.out.logprobs[1, 0])
    other, entropy = mdpgrpo_fast.token_logprobs(*args, batch.mask.to(DEVICE), backend=backend)
    assert torch.equal(other, first.out.logprobs) and torch.equal(entropy, first.out.entropy)


def test_inputs_are_left_alone(backend: str) -> None:
    batch = make_batch(25)
    arguments = {
        **batch.given(),
        **GIVEN,
        **REWARDS,
        "logits": batch.logits,
        "tokens": batch.tokens,
        "mask": batch.mask,
    }
    before = {k: v.clone() for k, v in arguments.items() if v is not None}
    on_device = {k: to(v, DEVICE) for k, v in before.items()}
    mdpgrpo_fast.token_loss(config=config_for(), backend=backend, **on_device)
    assert all(torch.equal(on_device[k].cpu(), v) for k, v in before.items())


def test_without_gradient_the_loss_is_the_same(backend: str) -> None:
    batch, config = make_batch(26), config_for(importance_level="sequence")
    with_gradient = run(backend, batch, config).out
    plain = call(backend, replace(batch, logits=batch.logits.to(DEVICE)), config)
    with torch.no_grad():
        out = call(backend, replace(batch, logits=batch.logits.to(DEVICE, copy=True).requires_grad_()), config)
    for other in (plain, out):
        assert torch.equal(other.loss, with_gradient.loss) and not other.loss.requires_grad


# ---- values that nobody looked at -----------------------------------------------------------------------------------

NAN_REWARDS = {**GIVEN, **REWARDS, "rewards": torch.tensor([[0.25, math.nan], [0.5, math.inf]])}
BAD_VALUES: dict[str, tuple[bool, Callable[[LossInputs], dict[str, Any]]]] = {  # packed?, change
    "token_too_large": (False, lambda b: {"tokens": b.tokens + 11}),
    "token_negative": (False, lambda b: {"tokens": b.tokens.int() - 12}),
    "token_far_out": (True, lambda b: {"tokens": b.tokens + 2**40}),
    "completion_too_large": (True, lambda b: {"completion": b.kwargs["completion"] + 4}),
    "completion_negative": (True, lambda b: {"completion": b.kwargs["completion"] - 4}),
    "reward_nan": (False, lambda b: NAN_REWARDS),
    "num_constraints_zero": (False, lambda b: {**GIVEN, **REWARDS, "num_constraints": torch.tensor([4, 0])}),
    "temperature_zero": (False, lambda b: {"temperature": torch.zeros(4)}),
    "temperature_negative": (False, lambda b: {"temperature": torch.full((4,), -1.0)}),
    "temperature_nan": (False, lambda b: {"temperature": torch.tensor(math.nan)}),
    "advantage_nan": (False, lambda b: {"advantage": math.nan}),
    "denominator_nan": (False, lambda b: {"denominator": torch.tensor(math.nan)}),
    "logits_nan": (False, lambda b: {"logits": b.logits * math.nan}),
    "old_logprobs_nan": (False, lambda b: {"old_logprobs": torch.full((4, 1), math.nan)}),
    "ref_logprobs_nan": (False, lambda b: {"ref_logprobs": torch.full((4, 1), math.nan)}),
    "importance_weight_nan": (False, lambda b: {"importance_weight": torch.full((4, 1), math.nan)}),
}
ON, OFF, SEQUENCE = ("old_logprobs", "ref_logprobs"), ("ref_logprobs",), {"importance_level": "sequence"}
POLICIES: list[tuple[tuple[str, ...], dict[str, Any]]] = [  # arguments left out, config
    (ON, {}), (ON, SEQUENCE), (OFF, {}), (OFF, SEQUENCE), (OFF, {"delta": 2.0}), (OFF, {"delta": 2.0, **SEQUENCE}),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_VALUES)
@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")
def test_unseen_bad_values_give_a_nan_loss(backend: str, case: str) -> None:
    """On a GPU nobody looks at values: a clip must not make a plausible loss of them, and no kernel may crash."""
    is_packed, change = BAD_VALUES[case]
    finite = []
    for absent, knobs in POLICIES:
        batch = make_batch(13, lengths=(1, 0, 0, 1))
        batch = packed(batch) if is_packed else batch
        for name in absent:
            del batch.kwargs[name]
        more = change(batch)
        batch = replace(batch, logits=more.get("logits", batch.logits), tokens=more.get("tokens", batch.tokens))
        more = {k: v for k, v in more.items() if k not in ("logits", "tokens")}
        loss = run(backend, batch, config_for(**knobs), check_values=False, **more).out.loss
        finite += [] if loss.isnan() else [(absent, knobs, loss.item())]
    assert finite == []


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that must not be reached."""

    def work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the check came after the work began")

    for module in (fused, reference):
        for name in ("token_loss", "token_logprobs", "advantages"):
            monkeypatch.setattr(module, name, work)


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("logits", {"logits": torch.zeros(3, 11)}, r"of shape \(B, L, V\), or \(T, V\) with completion=; got shape"),
    ("logits", {"completion": torch.zeros(3, dtype=torch.long)}, r"of shape \(T, V\)"),
    ("logits", {"logits": torch.zeros(4, 2, 11, dtype=torch.long)}, "floating point; got torch.int64"),
    ("logits", {"logits": torch.zeros(4, 2, 0)}, "of at least one column"),
    ("tokens", {"tokens": torch.zeros(4, 3, dtype=torch.long)}, r"of shape \(4, 2\); got shape \(4, 3\)"),
    ("tokens", {"tokens": torch.zeros(4, 2)}, "int32 or int64; got torch.float32"),
    ("tokens", {"tokens": torch.full((4, 2), 11)}, r"in \[0, 11\); got range 11 to 11"),
    ("tokens", {"tokens": torch.full((4, 2), -1)}, r"in \[0, 11\); got range -1 to -1"),
    ("old_logprobs", {"old_logprobs": torch.zeros(4, 2, device="meta")}, "on (cpu|cuda:0), .*; got device meta"),
    ("mask", {"mask": torch.ones(4)}, r"of shape \(4, 2\); got shape \(4,\)"),
    ("softcap", {"softcap": 0.0}, "above 0, or None; got 0.0"),
    ("num_completions", {"num_completions": 4}, "left out for padded logits; got 4"),
    ("temperature", {"temperature": torch.ones(3)}, r"of shape \(4,\) or \(4, 2\); got shape \(3,\)"),
    ("temperature", {"temperature": torch.zeros(4)}, "above 0 in every row; got"),
    ("temperature", {"temperature": -1.0}, "above 0; got -1.0"),
    ("temperature", {"temperature": math.nan}, "above 0; got nan"),
    ("max_completion_length", {"max_completion_length": 0}, "at least 1; got 0"),
    ("old_logprobs", {"old_logprobs": torch.zeros(4)}, r"of shape \(4, 2\); got shape \(4,\)"),
    ("ref_logprobs", {"ref_logprobs": torch.zeros(3)}, r"of shape \(4, 2\)"),
    ("denominator", {"denominator": torch.ones(4)}, ""),
    ("importance_weight", {"importance_weight": torch.ones(4, 1)}, r"of shape \(4, 2\)"),
    ("epsilon_low", {"epsilon_low": torch.ones(3)}, r"of shape \(4,\) or \(4, 2\)"),
    ("epsilon_high", {"epsilon_high": torch.ones(1, 3)}, r"of shape \(4,\) or \(4, 2\)"),
    ("advantage", {"advantage": None}, "given, or rewards; got None"),
    ("kl_beta", {"kl_beta": None}, "given, or rewards; got None"),
    ("advantage", {"advantage": torch.ones(4, 1)}, r"of shape \(4,\) or \(4, 2\); got shape \(4, 1\)"),
    ("kl_beta", {"kl_beta": torch.ones(2)}, r"of shape \(4,\) or \(4, 2\)"),
    ("num_constraints", {"num_constraints": torch.ones(2)}, "given with rewards only"),
    ("valid", {"valid": torch.ones(2, 2, dtype=torch.bool)}, "given with rewards only"),
    ("groups", {"groups": torch.arange(4)}, "given with rewards only"),
    ("advantage", REWARDS, "left out where rewards are given; got both"),
    ("kl_beta", {**REWARDS, "advantage": None}, "left out where rewards are given; got both"),
    ("num_constraints", {**GIVEN, "rewards": torch.zeros(2, 2)}, "given with rewards; got None"),
    ("rewards", {**GIVEN, **REWARDS, "rewards": torch.zeros(4)}, r"of shape \(P, G\); got shape \(4,\)"),
    ("rewards", {**GIVEN, **REWARDS, "rewards": torch.zeros(4, 1)}, r"\(P, G\) with G = .* = 2; got G = 1"),
    ("rewards", {**GIVEN, "rewards": torch.zeros(3, 2), "num_constraints": torch.ones(3)},
     "one for each of 4 completions; got 6 rewards"),
    ("groups", {**GIVEN, **REWARDS, "rewards": torch.zeros(4), "groups": torch.tensor([0, 1, 1, 1])},
     "a map in which every group has G = num_generations = 2 completions; got group 0 of size 1"),
]  # fmt: skip
PACKED_REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("completion", {"completion": torch.zeros(3, dtype=torch.long)}, r"of shape \(5,\); got shape \(3,\)"),
    ("completion", {"completion": torch.zeros(5)}, "int32 or int64; got torch.float32"),
    ("completion", {"completion": torch.full((5,), 4)}, r"in \[0, 4\); got range 4 to 4"),
    ("completion", {"completion": torch.full((5,), -1)}, r"in \[0, 4\); got range -1 to -1"),
    ("num_completions", {"num_completions": None}, "given for packed logits, or follow from rewards; got None"),
    ("temperature", {"temperature": torch.ones(6)}, r"of shape \(4,\) or \(5,\); got shape \(6,\)"),
]


def assert_refused(backend: str, batch: LossInputs, name: str, change: dict[str, Any], message: str) -> None:
    arguments = {"logits": batch.logits, "tokens": batch.tokens, "mask": batch.mask, **batch.given(), **change}
    arguments = {k: v if getattr(v, "is_meta", False) else to(v, DEVICE) for k, v in arguments.items()}
    with pytest.raises(ValueError, match=f"^{name} must be {message}"):
        mdpgrpo_fast.token_loss(config=config_for(), backend=backend, check_values=True, **arguments)


@pytest.mark.usefixtures("no_work")
def test_bad_input_is_refused_before_any_work(backend: str) -> None:
    """Every message names the argument, what came and what is expected."""
    for case in REFUSALS:
        assert_refused(backend, make_batch(15), *case)
    for case in PACKED_REFUSALS:
        assert_refused(backend, packed(make_batch(15)), *case)


@pytest.mark.usefixtures("no_work")
def test_bad_settings_are_refused_before_any_work(backend: str) -> None:
    batch = packed(make_batch(16))
    with pytest.raises(ValueError, match=r"^max_completion_length must be given for packed logits with .* dr_grpo"):
        call(backend, batch, config_for(aggregation="dr_grpo"), max_completion_length=None)
    with pytest.raises(ConfigError, match="importance_weight is required by temperature_objective = corrected"):
        call(backend, batch, config_for(temperature_objective="corrected"))
    with pytest.raises(ConfigError, match="unknown backend 'tritn'; did you mean 'triton'"):
        call("tritn", batch, config_for())
    with pytest.raises(
        ValueError, match=r"^backend 'triton' cannot run: it takes bfloat16, float16, float32, not float64"
    ):
        call("triton", replace(batch, logits=batch.logits.double().to(DEVICE)), config_for())


# ---- a peer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "aggregation", "delta"), [("token", "grpo", None), ("sequence", "dapo", 1.3)])
def test_liger_triton_loss(
    backend: str, peer: Callable[[str], Any], level: Any, aggregation: Any, delta: float | None
) -> None:
    """Liger's own kernel on the same logits, where the options overlap: one temperature, one β, no entropy."""
    theirs = peer("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    batch = make_batch(43, lengths=(3, 1, 2), vocab=37)
    batch.kl_beta = torch.full((3,), 0.1)
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
    got = run(backend, batch, config, temperature=0.7)
    assert got.out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(got.grad, grad[:, :-1], rtol=1e-4, atol=1e-6)
