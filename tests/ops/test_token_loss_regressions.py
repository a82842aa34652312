"""Defects once found in the fused objective by reading, each with the input that shows it; and rows without effect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.losses import BACKENDS, DEVICE, assert_matches, call, config_for, gpu, make_batch, rows_like, run

import mdpgrpo_fast

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_banned_by_the_lowest_number(backend: str, dtype: str) -> None:
    """finfo.min instead of -inf: differences of such logits overflow, and entropy must not be inf * 0."""
    batch = make_batch(1, vocab=600, dtype=dtype)
    batch.logits[..., 300:] = torch.finfo(batch.logits.dtype).min
    batch.tokens %= 300
    assert_matches(backend, batch, config_for())


def test_float16_gradient_waits_for_the_loss_scale(backend: str) -> None:
    """Rounded to float16 before an AMP scaler has multiplied it, nearly all of a gradient would be 0."""
    batch = make_batch(2, lengths=(2, 1), vocab=2000, dtype="float16", scale=1.0)
    config = config_for(aggregation="dapo")
    grads = {}
    for name in ("torch", backend):
        on = "cpu" if name == "torch" else DEVICE
        leaf = batch.logits.detach().to(on).requires_grad_()
        out = call(name, replace(batch, logits=leaf), config, on, denominator=8192.0)
        (grads[name],) = torch.autograd.grad(out.loss * 65536, leaf)
    assert grads[backend].dtype == torch.float16
    assert (grads[backend][0, 0] == 0).float().mean() < 0.01
    torch.testing.assert_close(grads[backend].cpu(), grads["torch"], rtol=2e-3, atol=1e-6)
    with pytest.raises(ValueError, match=r"^in_place must be off: a float16 gradient underflows"):
        call(backend, replace(batch, logits=batch.logits.to(DEVICE).requires_grad_() * 1), config, in_place=True)


def test_the_same_slice_again_is_refused_and_another_is_not(backend: str) -> None:
    """logits[:, :-1] is a new tensor each time it is written down, and the same memory."""
    batch, config = make_batch(3), config_for()
    whole = torch.cat([batch.logits, batch.logits], 0).to(DEVICE).requires_grad_() * 1
    b = len(batch.logits)
    for half in (slice(0, b), slice(b, 2 * b)):
        call(backend, replace(batch, logits=whole[half]), config, in_place=True)
    for half in (slice(0, b), slice(b, 2 * b)):
        with pytest.raises(ValueError, match=r"^logits must be logits; got logits that hold their gradient"):
            mdpgrpo_fast.token_logprobs(whole[half], batch.tokens.to(DEVICE), backend=backend)


def test_in_place_on_a_view_of_a_leaf_is_refused(backend: str) -> None:
    batch = make_batch(4)
    leaf = torch.cat([batch.logits, batch.logits[:, :1]], 1).to(DEVICE).requires_grad_()
    with pytest.raises(ValueError, match=r"^in_place must be off for a leaf"):
        call(backend, replace(batch, logits=leaf[:, :-1]), config_for(), in_place=True)


@pytest.mark.parametrize("knob", ["epsilon_low", "epsilon_high"])
def test_a_bound_per_row_at_sequence_level(backend: str, knob: str) -> None:
    batch = make_batch(5, lengths=(3, 2, 3))
    assert_matches(backend, batch, config_for(importance_level="sequence"), **{knob: rows_like(batch, 5, 0.0, 0.1)})


@pytest.mark.parametrize("knob", ["epsilon_low", "epsilon_high"])
def test_a_bound_that_is_nan_is_seen(backend: str, knob: str) -> None:
    batch = make_batch(6)
    bound = torch.tensor([0.2, float("nan"), 0.2, 0.2])
    assert call(backend, batch, config_for(), **{knob: bound}).loss.isnan()


def test_an_unseen_bad_token_spoils_its_gradient_row_too(backend: str) -> None:
    """On-policy the ratio is 1 whatever the log-prob is: the row would lack its own token and look like a gradient."""
    batch = make_batch(7)
    batch.kwargs = {}
    batch.tokens[0, 0] = 10**6
    got = run(backend, batch, config_for(), check_values=False)
    assert got.out.loss.isnan() and got.grad[0, 0].isnan().all() and got.grad[1].isfinite().all()


@pytest.mark.parametrize("shape", [(2,), (1, 2)])
def test_one_denominator(backend: str, shape: tuple[int, ...]) -> None:
    batch, config = make_batch(8), config_for(aggregation="dapo")
    with pytest.raises(ValueError, match=r"^denominator must be a number or a scalar tensor; got shape"):
        call(backend, batch, config, denominator=torch.ones(shape))
    one: Any = call(backend, batch, config, denominator=torch.full((1,), 7.0))
    assert one.loss.shape == () and torch.equal(one.loss, call(backend, batch, config, denominator=7.0).loss)


def test_rows_without_effect_have_a_gradient_of_exactly_zero(backend: str) -> None:
    """A = 0 with β = 0, and a clipped token without KL: zeros are written, not small numbers."""
    batch, config = make_batch(23, lengths=(3, 2), dtype="bfloat16"), config_for()
    del batch.kwargs["ref_logprobs"]
    grad = run(backend, batch, config, advantage=torch.tensor([0.0, 1.0])).grad
    assert (grad[0] == 0).all() and (grad[1, :2] != 0).any()
    batch.kwargs["old_logprobs"] -= 5.0
    got = run(backend, batch, config, advantage=1.0)
    assert got.out.clipped_high[batch.mask.to(DEVICE)].all() and (got.grad == 0).all()


@gpu
@pytest.mark.parametrize("knob", ["temperature", "kl_beta", "advantage", "epsilon_high", "denominator"])
def test_a_scalar_tensor_may_lie_on_the_cpu(backend: str, knob: str) -> None:
    batch = make_batch(52)
    logits, given = batch.logits.to(DEVICE), {k: v.to(DEVICE) for k, v in batch.given().items()}
    args = (logits, batch.tokens.to(DEVICE), batch.mask.to(DEVICE), config_for())
    half = (torch.tensor(0.5, device=device) for device in (DEVICE, "cpu"))
    there, here = (mdpgrpo_fast.token_loss(*args, backend=backend, **{**given, knob: x}).loss for x in half)
    assert torch.equal(here, there)


def test_in_place_compiles(backend: str) -> None:
    batch, config = make_batch(9), config_for()

    def loss(leaf: torch.Tensor, in_place: bool) -> torch.Tensor:
        return call(backend, replace(batch, logits=leaf * 1), config, in_place=in_place).loss

    leaf = batch.logits.to(DEVICE).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,), (expected,) = (torch.autograd.grad(f(leaf, p), leaf) for f, p in ((compiled, True), (loss, False)))
    torch.testing.assert_close(got, expected)
