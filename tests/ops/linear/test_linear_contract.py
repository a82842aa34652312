"""What the linear operations promise beside their numbers: autograd, autocast, tied heads, graphs, bad input."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.inputs import LossInputs
from helpers.linear import BACKENDS, Head, budget, call, make_linear, relative, run, truths
from helpers.losses import (
    DEVICE,
    EACH,
    config_for,
    gpu,
    packed,
    to,
)

import mdpgrpo_fast
from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.kernels import onednn
from mdpgrpo_fast.log import say_once
from mdpgrpo_fast.ops.linear.losses import linear_token_logprobs, linear_token_loss

backends = pytest.mark.parametrize("backend", BACKENDS)


# ---- log-probs ------------------------------------------------------------------------------------------------------


def logprobs(
    backend: str, batch: LossInputs, head: Head, frozen: bool = False, **more: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """ℓ, entropy and the gradients under another incoming gradient in every row."""
    hidden = batch.logits.detach().to(DEVICE).requires_grad_()
    leaves = head.to(DEVICE).leaves(frozen)
    more = {k: v if k == "lengths" else to(v, DEVICE) for k, v in {"mask": batch.mask, **more}.items()}
    found, entropy = linear_token_logprobs(
        hidden, leaves.weight, to(batch.tokens, DEVICE), bias=leaves.bias, logit_scale=head.logit_scale,
        backend=backend, **more,
    )  # fmt: skip
    incoming = torch.linspace(-1, 2, found.numel(), device=DEVICE).view_as(found).to(found.dtype)
    inputs = {"hidden": hidden} | ({} if frozen else {"weight": leaves.weight})
    inputs |= {} if frozen or leaves.bias is None else {"bias": leaves.bias}
    grads = torch.autograd.grad((found * incoming).sum(), list(inputs.values()))
    return found.detach(), entropy, dict(zip(inputs, grads, strict=True))


def expected_logprobs(batch: LossInputs, head: Head, dtype: torch.dtype, **more: Any) -> Any:
    hidden, leaves = batch.logits.detach().to(dtype).requires_grad_(), head.to("cpu", dtype).leaves()
    more = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in more.items()}
    more = {"mask": batch.mask, **more}
    found, entropy = mdpgrpo_fast.token_logprobs(leaves.logits(hidden), batch.tokens, backend="torch", **more)
    incoming = torch.linspace(-1, 2, found.numel()).view_as(found).to(found.dtype)
    inputs = {"hidden": hidden, "weight": leaves.weight, "bias": leaves.bias}
    inputs = {k: x for k, x in inputs.items() if x is not None}
    grads = torch.autograd.grad((found * incoming).sum(), list(inputs.values()))
    return found.detach(), entropy, dict(zip(inputs, grads, strict=True))


@backends
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("frozen", [False, True])
def test_log_probs_and_their_gradient(backend: str, dtype: str, frozen: bool) -> None:
    """With a frozen head the backward pass has no matmul; with a trained one the logits are built again."""
    batch, head = make_linear(1, dtype=dtype, bias=True, logit_scale=0.5)
    for more in ({}, {"mask": None}, {"temperature": 0.6}, {"temperature": EACH, "softcap": 4.0}):
        exact = expected_logprobs(batch, head, torch.float64, **more)
        own = expected_logprobs(batch, head, batch.logits.dtype, **more)
        for rows in (1, 3, 100):
            got = logprobs(backend, batch, head, frozen, workspace_bytes=budget(head, rows), **more)
            eps = torch.finfo(batch.logits.dtype).eps
            for i in (0, 1):
                assert relative(got[i], exact[i]) <= 2 * relative(own[i], exact[i]) + eps + 1e-6
            for name, g in got[2].items():
                assert g.dtype == batch.logits.dtype
                assert relative(g, exact[2][name]) <= 2 * relative(own[2][name], exact[2][name]) + 2 * eps + 1e-5, name


@backends
def test_log_probs_of_packed_rows(backend: str) -> None:
    batch, head = make_linear(2)
    rows = packed(batch, seed=1, drop_masked=False)
    where = {"completion": rows.kwargs["completion"], "num_completions": 4, "temperature": EACH}
    got = logprobs(backend, rows, head, workspace_bytes=budget(head, 2), **where)
    truth = expected_logprobs(rows, head, torch.float64, **where)
    torch.testing.assert_close(got[0].cpu().double(), truth[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[2]["weight"].cpu().double(), truth[2]["weight"], rtol=1e-4, atol=1e-5)
    alone = logprobs(backend, rows, head, temperature=EACH[where["completion"]])
    torch.testing.assert_close(alone[0], got[0])


def test_log_probs_gradcheck() -> None:
    batch, head = make_linear(3, lengths=(2, 1), vocab=5, width=3, dtype="float64", bias=True)
    leaves = head.leaves()

    def function(hidden: Any, weight: Any, bias: Any) -> Any:
        return linear_token_logprobs(hidden, weight, batch.tokens, batch.mask, bias=bias, softcap=3.0,
                                     temperature=EACH[:2].double(), workspace_bytes=2 * 5 * 8)[0]  # fmt: skip

    inputs = (batch.logits.requires_grad_(), leaves.weight, leaves.bias)
    assert torch.autograd.gradcheck(function, inputs)


def test_log_probs_are_those_of_the_objective() -> None:
    """To the bit: the old policy's and the new one's differ by nothing on-policy."""
    batch, head = make_linear(4, lengths=(40, 33), vocab=501, width=32, dtype="bfloat16")
    batch.kwargs.clear()
    for backend in BACKENDS:
        scored = linear_token_logprobs(
            batch.logits.to(DEVICE), to(head.weight, DEVICE), to(batch.tokens, DEVICE), to(batch.mask, DEVICE),
            backend=backend, workspace_bytes=budget(head, 16),
        )  # fmt: skip
        out = run(backend, batch, head, config_for(), workspace_bytes=budget(head, 16)).out
        assert torch.equal(scored[0], out.logprobs) and torch.equal(scored[1], out.entropy)


# ---- autograd -------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loss_scale_reaches_every_gradient(backend: str, dtype: str) -> None:
    """By the accumulation's share, and by an AMP scaler's: float16 is rounded only after it."""
    batch, head = make_linear(5, dtype=dtype, bias=True)
    hidden, leaves = batch.logits.to(DEVICE).requires_grad_(), head.to(DEVICE).leaves()
    inputs = (hidden, leaves.weight, leaves.bias)
    for scale in (1.0, 0.25, 4096.0):
        truth, _ = truths(batch, head, config_for())
        out = call(backend, hidden, leaves, batch, config_for(), workspace_bytes=budget(head, 3))
        grads = torch.autograd.grad(out.loss * scale, inputs)
        for g, name in zip(grads, truth.grads, strict=True):
            assert relative(g, scale * truth.grads[name]) < (2e-5 if dtype == "float32" else 5e-3), (scale, name)


def test_small_float16_gradients_survive_until_the_scale() -> None:
    """A share of 1e-6 is below what float16 holds well; times the scaler's 65536 nothing is lost."""
    batch, head = make_linear(6, dtype="float16")
    truth, _ = truths(batch, head, config_for(), denominator=1e6)
    for backend in BACKENDS:
        hidden, leaves = batch.logits.to(DEVICE).requires_grad_(), head.to(DEVICE).leaves()
        out = call(backend, hidden, leaves, batch, config_for(), denominator=1e6, workspace_bytes=budget(head, 2))
        grads = torch.autograd.grad(out.loss * 65536, (hidden, leaves.weight))
        for g, name in zip(grads, truth.grads, strict=True):
            assert relative(g, 65536 * truth.grads[name]) < 5e-3, (backend, name)


@backends
def test_backward_twice(backend: str) -> None:
    batch, head = make_linear(7)
    hidden, leaves = batch.logits.to(DEVICE).requires_grad_(), head.to(DEVICE).leaves()
    out = call(backend, hidden, leaves, batch, config_for())
    first = torch.autograd.grad(out.loss * 3, (hidden, leaves.weight), retain_graph=True)
    second = torch.autograd.grad(out.loss * 3, (hidden, leaves.weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()
    out = call(backend, hidden, leaves, batch, config_for())
    (g,) = torch.autograd.grad(out.loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


@backends
def test_only_the_loss_has_a_gradient(backend: str) -> None:
    batch, head = make_linear(8)
    hidden = batch.logits.to(DEVICE).requires_grad_()
    out = call(backend, hidden, head.to(DEVICE).leaves(), batch, config_for())
    assert out.loss.requires_grad
    for name in ("logprobs", "entropy", "kl", "ratio", "completion_kl", "totals"):
        assert not getattr(out, name).requires_grad, name


@backends
def test_a_tied_head_gets_the_sum_of_both_gradients(backend: str) -> None:
    """One parameter as embedding and head: what autograd adds up is what the logits' path gives."""
    batch, head = make_linear(9, vocab=37, width=8)
    tied = torch.nn.Parameter(head.weight.clone())

    def states() -> torch.Tensor:
        return torch.tanh(torch.nn.functional.embedding(batch.tokens.roll(1, 1), tied)) + batch.logits

    more = {k: v for k, v in batch.given().items()}
    mdpgrpo_fast.token_loss(states() @ tied.T, batch.tokens, batch.mask, config_for(), **more).loss.backward()
    expected, tied.grad = tied.grad, None
    assert expected is not None
    tied.data = tied.data.to(DEVICE)
    batch = replace(batch, logits=batch.logits.to(DEVICE), tokens=batch.tokens.to(DEVICE))
    out = call(backend, states(), replace(head, weight=tied), batch, config_for(), workspace_bytes=budget(head, 2))
    out.loss.backward()
    torch.testing.assert_close(tied.grad.cpu(), expected, rtol=1e-4, atol=1e-6)


@backends
def test_master_weights_and_autocast(backend: str) -> None:
    """float32 weights under bfloat16 states: matmuls in bfloat16, the weight's gradient in float32, not rounded."""
    batch, head = make_linear(10, dtype="bfloat16", bias=True)
    truth, own = truths(batch, head, config_for())
    master = replace(head, weight=head.weight.float(), bias=None if head.bias is None else head.bias.float())
    hidden, leaves = batch.logits.to(DEVICE).requires_grad_(), master.to(DEVICE).leaves()
    inputs = (hidden, leaves.weight, leaves.bias)
    out = call(backend, hidden, leaves, batch, config_for(), workspace_bytes=budget(head, 3))
    grads = torch.autograd.grad(out.loss, inputs)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    for g, name in zip(grads, truth.grads, strict=True):
        assert relative(g, truth.grads[name]) <= 2 * relative(own.grads[name], truth.grads[name]) + 2**-7, name
    full = batch.logits.float().to(DEVICE).requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = call(backend, full, leaves, batch, config_for(), workspace_bytes=budget(head, 3))
    assert torch.equal(cast.loss, out.loss)
    again = torch.autograd.grad(cast.loss, (full, leaves.weight, leaves.bias))
    assert [g.dtype for g in again] == [torch.float32] * 3
    assert all(torch.equal(a, b.float()) for a, b in zip(again, grads, strict=True))


@backends
def test_a_nan_is_never_lost(backend: str) -> None:
    """In a hidden state, a weight or a knob that is not looked at: the loss says so."""
    batch, head = make_linear(11, lengths=(2, 2))
    spoilt = batch.logits.clone()
    spoilt[0, 0, 0] = math.nan
    for old in (batch.kwargs["old_logprobs"], None):
        got = run(backend, replace(batch, logits=spoilt), head, config_for(), old_logprobs=old, ref_logprobs=None)
        assert got.out.loss.isnan() and got.grads["weight"].isnan().any()
    for name, value in (("temperature", torch.tensor([1.0, -1.0])), ("advantage", torch.tensor([math.nan, 1.0])),
                        ("epsilon_low", torch.tensor([math.nan, 0.2]))):  # fmt: skip
        if backend == "torch" and name != "advantage":
            continue  # the reference's own way with them
        got = run(backend, batch, head, config_for(), **{name: value}, check_values=False)
        assert got.out.loss.isnan(), name


@backends
@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")
def test_bad_indices_that_are_not_looked_at_give_nan(backend: str) -> None:
    """A token or a completion that does not exist: a NaN loss, not a plausible number and not a crash."""
    batch, head = make_linear(11, lengths=(2, 2))
    for token in (37, -1):
        wrong = replace(batch, tokens=batch.tokens.clone().index_fill_(1, torch.tensor([1]), token))
        got = run(backend, wrong, head, config_for(), check_values=False)
        assert got.out.loss.isnan() and got.out.logprobs[:, 1].isnan().all()
        assert logprobs(backend, wrong, head, check_values=False)[0][:, 1].isnan().all()
    for completion in (2, -1):
        rows = packed(batch, seed=3)
        rows.kwargs["num_completions"] = 2
        rows.kwargs["completion"] = rows.kwargs["completion"].index_fill(0, torch.tensor([1]), completion)
        assert run(backend, rows, head, config_for(), check_values=False).out.loss.isnan()


@backends
def test_autocast_changes_nothing_inside(backend: str) -> None:
    """Sums and entropies of bfloat16 inputs are float32's, whether autocast is on or not."""
    batch, head = make_linear(11, dtype="bfloat16")
    plain = run(backend, batch, head, config_for(), workspace_bytes=budget(head, 3))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = run(backend, batch, head, config_for(), workspace_bytes=budget(head, 3))
    assert torch.equal(plain.out.entropy, cast.out.entropy) and torch.equal(plain.out.logprobs, cast.out.logprobs)
    assert all(torch.equal(plain.grads[k], cast.grads[k]) for k in plain.grads)


@backends
@pytest.mark.parametrize("frozen", [False, True])
def test_what_comes_in_at_a_masked_row_stays_out(backend: str, frozen: bool) -> None:
    batch, head = make_linear(11)
    hidden, leaves = batch.logits.to(DEVICE).requires_grad_(), head.to(DEVICE).leaves(frozen)
    mask = batch.mask.to(DEVICE)
    ell, _ = linear_token_logprobs(hidden, leaves.weight, batch.tokens.to(DEVICE), mask, backend=backend)
    (g,) = torch.autograd.grad(ell, hidden, torch.where(mask, 1.0, math.inf))
    assert g.isfinite().all() and (g[~mask] == 0).all() and (g[mask] != 0).any()


def test_without_gradients_nothing_is_kept_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "prefers_onednn", lambda: False)  # its op, one for one, has no flops in a trace
    batch, head = make_linear(11)
    hidden = batch.logits.requires_grad_()
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode, torch.profiler.profile(with_flops=True) as trace:
            ell, _ = linear_token_logprobs(hidden, head.weight, batch.tokens, batch.mask)
        flops = sum(e.flops for e in trace.key_averages() if e.key in ("aten::mm", "aten::addmm")) / 2
        assert flops >= 5 * 37 * 8 and (flops > 1.2 * 16 * 37 * 8) == ell.requires_grad


# ---- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch"])
def test_in_a_compiled_graph(backend: str) -> None:
    """One graph without a break, and the same numbers; the loop over chunks is not unrolled into it."""
    batch, head = make_linear(12, bias=True)
    hidden, leaves = batch.logits.requires_grad_(), head.leaves()
    config, given = config_for(), batch.given()

    def loss(hidden: Any, weight: Any, bias: Any) -> Any:
        a = linear_token_loss(hidden * 2, weight, batch.tokens, batch.mask, config, bias=bias, backend=backend,
                              workspace_bytes=budget(head, 3), **given).loss  # fmt: skip
        b, entropy = linear_token_logprobs(hidden, weight, batch.tokens, batch.mask, backend=backend)
        return a + (b * entropy.detach()).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (hidden, leaves.weight, leaves.bias)
    one, two = loss(*inputs), compiled(*inputs)
    torch.testing.assert_close(two, one)
    for a, b in zip(torch.autograd.grad(two, inputs), torch.autograd.grad(one, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("needs", [[1, 1, 1], [1, 0, 0], [0, 0, 0]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_opcheck(needs: list[int], dtype: str) -> None:
    batch, head = make_linear(13, bias=True, dtype=dtype)
    rows = (batch.tokens.flatten(), batch.mask.flatten(), None, 4, None)
    numbers, flags = [1.0, 0.2, 0.2, 0.0, 1.0, 0.0, 1.0], [0, 3, 0, 0, 0, 0, 1, *needs]
    knobs = (batch.advantage, batch.kl_beta, batch.kwargs["old_logprobs"].flatten(), None, None, None, None, None, None)
    call_ = (batch.logits, head.weight, head.bias)
    checks = ("test_schema", "test_faketensor")
    ours = torch.ops.mdpgrpo_fast
    args = (*call_, *rows, *knobs, 2, numbers, flags, "torch", 1 << 20, "")
    torch.library.opcheck(ours.linear_token_loss.default, args, test_utils=checks)
    shared = (*rows, None, [1.0, 0.0, 1.0], False, "torch", 1 << 20, "")
    torch.library.opcheck(ours.linear_token_logprobs.default, (*call_, bool(needs[0]), *shared), test_utils=checks)
    _, _, statistics, _ = ours.linear_token_logprobs(*call_, False, *shared)
    incoming = torch.ones(batch.tokens.numel())
    back = (incoming, statistics, *call_, [bool(n) for n in needs], *shared)
    torch.library.opcheck(ours.linear_token_logprobs_backward.default, back, test_utils=checks)
    torch.library.opcheck(ours.linear_scale_.default, (torch.ones(3, 4), torch.tensor(2.0), "torch"), test_utils=checks)


# ---- bad input ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_work() -> Iterator[None]:
    """Nothing is computed or allocated before the checks are done."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("work before the checks")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "zeros", "addmm", "mm"):
            patch.setattr(torch, name, fail)
        patch.setattr(torch.autograd.Function, "apply", fail)
        yield


W = torch.zeros(37, 8)
BAD_HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"weight": torch.zeros(37, 9)}, r"weight must be of shape \(V, D\) with the D of hidden; got"),
    "one_dimension": ({"weight": torch.zeros(37)}, r"weight must be of shape \(V, D\); got shape \(37,\)"),
    "no_row": ({"weight": torch.zeros(0, 8)}, r"weight must be of shape \(V, D\)"),
    "device": ({"weight": torch.zeros(37, 8, device="meta")}, "weight must be a tensor with memory; got a meta tensor"),
    "hidden_meta": ({"hidden": torch.zeros(2, 2, 8, device="meta")}, "hidden must be a tensor with memory"),
    "quantised": ({"weight": torch.zeros(37, 8, dtype=torch.int8)}, "weight must be floating point of 16 bits or more"),
    "float8": ({"weight": torch.zeros(37, 8).to(torch.float8_e4m3fn)}, "weight must be floating point of 16 bits"),
    "dtype": ({"weight": W.bfloat16()}, "weight must be of the dtype of hidden, torch.float32, or float32; got"),
    "double": ({"hidden": torch.zeros(2, 2, 8).double()}, "weight must be float64, as hidden is; got torch.float32"),
    "bias_length": ({"bias": torch.zeros(36)}, r"bias must be of shape \(37,\), one number per row of weight"),
    "bias_dtype": ({"bias": torch.zeros(37).double()}, "bias must be"),
    "budget": ({"workspace_bytes": 147}, "workspace_bytes must be at least 148, what one row of V = 37 takes; got 147"),
    "scale": ({"logit_scale": math.inf}, "logit_scale must be a finite number; got inf"),
    "hidden_shape": ({"hidden": torch.zeros(4, 8)}, r"tokens must be of shape|hidden must be of shape \(B, L, D\)"),
    "tokens": ({"tokens": torch.full((2, 2), 37)}, r"tokens must be in \[0, 37\); got range 37 to 37"),
    "lengths": ({"lengths": [1, 2, 3]}, r"lengths must be integers of shape \(2,\)"),
    "lengths_negative": ({"lengths": [-1, 2]}, r"lengths must be 0 or above"),
    "softcap": ({"softcap": 0.0}, "softcap must be above 0, or None"),
    "temperature": ({"temperature": 0.0}, "temperature must be above 0"),
}  # fmt: skip
BAD_OBJECTIVES: dict[str, tuple[dict[str, Any], str]] = {
    "old_logprobs": ({"old_logprobs": torch.zeros(3)}, "old_logprobs must be of shape"),
    "advantage": ({"advantage": None}, "advantage must be given, or rewards; got None"),
    "both": ({"rewards": torch.zeros(1, 2), "num_constraints": torch.ones(1)}, "advantage must be left out where"),
    "denominator": ({"denominator": torch.ones(2)}, "denominator must be a number or a scalar tensor"),
    "backend": ({"backend": "tritn"}, "unknown backend 'tritn'; did you mean 'triton'?"),
}  # fmt: skip


def good(**more: Any) -> dict[str, Any]:
    return {
        "hidden": torch.zeros(2, 2, 8), "weight": W, "tokens": torch.zeros(2, 2, dtype=torch.long), "mask": None, **more
    }  # fmt: skip


@pytest.mark.parametrize("case", [*BAD_HEADS, *BAD_OBJECTIVES])
def test_bad_input_is_refused_before_any_work(case: str) -> None:
    wrong, message = {**BAD_HEADS, **BAD_OBJECTIVES}[case]
    given = {**good(config=config_for(), advantage=1.0, kl_beta=0.1), **wrong}
    with pytest.raises(ValueError, match=message), no_work():
        linear_token_loss(**given)
    if case in BAD_HEADS:
        given = {**good(), **wrong}
        with pytest.raises(ValueError, match=message), no_work():
            linear_token_logprobs(**given)


def test_wrapped_weights_are_refused_and_not_read_as_numbers() -> None:
    class Quantised(torch.Tensor):
        pass

    with pytest.raises(ValueError, match=r"weight must be a plain tensor \(quantised weights: dequantise them first\)"):
        linear_token_logprobs(**good(weight=W.as_subclass(Quantised)))


def test_corrected_wants_its_weight() -> None:
    with pytest.raises(ConfigError, match="importance_weight is required"):
        linear_token_loss(**good(config=config_for(temperature_objective="corrected"), advantage=1.0, kl_beta=0.1))


@gpu
def test_devices_that_differ() -> None:
    with pytest.raises(ValueError, match="weight must be on cpu, as hidden are; got device cuda:0"):
        linear_token_logprobs(**good(weight=W.cuda()))


def test_an_explicit_backend_that_cannot_run_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    say_once.cache_clear()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="backend 'triton' cannot run: the tensors are on the CPU"):
            linear_token_logprobs(**good(), backend="triton")
    with caplog.at_level(logging.INFO, "mdpgrpo_fast"):
        linear_token_logprobs(**good())
    assert "backend cpu: the tensors are torch.float32 on cpu" in caplog.text or DEVICE == "cuda"
