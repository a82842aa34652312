"""The operations in autograd: scales, repeats, tied heads, autocast, compiled graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.linear import BACKENDS, budget, call, make_linear, relative, run, truths
from helpers.losses import DEVICE, config_for

import mdpgrpo_fast
from mdpgrpo_fast import linear_token_logprobs, linear_token_loss
from mdpgrpo_fast.kernels.schemas import Rows, Settings
from mdpgrpo_fast.ops.fused import flat_rows

backends = pytest.mark.parametrize("backend", BACKENDS)


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
def test_autocast_changes_nothing_inside(backend: str) -> None:
    """Sums and entropies of bfloat16 inputs are float32's, whether autocast is on or not."""
    batch, head = make_linear(11, dtype="bfloat16")
    plain = run(backend, batch, head, config_for(), workspace_bytes=budget(head, 3))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = run(backend, batch, head, config_for(), workspace_bytes=budget(head, 3))
    assert torch.equal(plain.out.entropy, cast.out.entropy) and torch.equal(plain.out.logprobs, cast.out.logprobs)
    assert all(torch.equal(plain.grads[k], cast.grads[k]) for k in plain.grads)


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


@pytest.mark.parametrize("needs", [[True] * 3, [True, False, False], [False] * 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_opcheck(needs: list[bool], dtype: str) -> None:
    batch, head = make_linear(13, bias=True, dtype=dtype)
    given = Rows(batch.tokens, batch.mask, advantage=batch.advantage, kl_beta=batch.kl_beta, **batch.kwargs)
    rows, settings = flat_rows(given, 4, batch.tokens.device), Settings(epsilon_low=0.2, epsilon_high=0.2)
    call_ = (batch.logits, head.weight, head.bias)
    checks = ("test_schema", "test_faketensor")
    ours = torch.ops.mdpgrpo_fast
    shared = (list(rows), 4, None, list(settings.numbers), list(settings.flags), 1.0, False, "torch", 1 << 20, "")
    args = (*call_, needs, None, 2, True, *shared)
    torch.library.opcheck(ours.linear_token_loss.default, args, test_utils=checks)
    torch.library.opcheck(ours.linear_token_logprobs.default, (*call_, needs[0], *shared), test_utils=checks)
    _, _, statistics, _ = ours.linear_token_logprobs(*call_, False, *shared)
    incoming = torch.ones(batch.tokens.numel())
    back = (incoming, statistics, *call_, needs, *shared)
    torch.library.opcheck(ours.linear_token_logprobs_backward.default, back, test_utils=checks)
    torch.library.opcheck(ours.linear_scale_.default, (torch.ones(3, 4), torch.tensor(2.0), "torch"), test_utils=checks)
