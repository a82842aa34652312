"""Backward passes of the fused operations: scales, repeats, other consumers, in place, threads, and the same bits."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.losses import (
    BACKENDS,
    DEVICE,
    GIVEN,
    REWARDS,
    call,
    config_for,
    make_batch,
    not_a_leaf,
    packed,
    run,
    to,
)

import mdpgrpo_fast

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
LEVELS = ["token", "sequence"]
in_place_or_not = pytest.mark.parametrize("in_place", [False, True])


# ---- the objective --------------------------------------------------------------------------------------------------


@in_place_or_not
def test_loss_scale_reaches_the_gradient(backend: str, in_place: bool) -> None:
    """Accumulation and AMP scale the loss; powers of two lose nothing, 0 stops everything."""
    batch, config = make_batch(1, dtype="bfloat16"), config_for()
    plain = run(backend, batch, config).grad
    for scale in (1.0, 0.5, 65536.0, 0.0):
        one, leaf = not_a_leaf(batch)
        loss = call(backend, one, config, in_place=in_place).loss
        (grad,) = torch.autograd.grad(loss * scale, leaf)
        assert torch.equal(grad, plain * scale), scale


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


@in_place_or_not
def test_tensors_of_inference_mode(backend: str, in_place: bool) -> None:
    batch, config = make_batch(1), config_for()
    expected = call(backend, not_a_leaf(batch)[0], config).loss
    with torch.inference_mode():
        inside = replace(batch, logits=batch.logits.to(DEVICE, copy=True))
        assert inside.logits.is_inference()
        assert torch.equal(call(backend, inside, config, in_place=in_place).loss, expected)


@in_place_or_not
def test_backward_twice(backend: str, in_place: bool) -> None:
    """With retain_graph the same gradient again, whatever the first one's scale; without it torch's own error."""
    one, leaf = not_a_leaf(make_batch(2))
    loss = call(backend, one, config_for(), in_place=in_place).loss
    first, second = (torch.autograd.grad(3 * loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().sum() > 0
    (third,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(3 * third, first, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf)


def test_double_backward_is_refused(backend: str) -> None:
    one, leaf = not_a_leaf(make_batch(3))
    (grad,) = torch.autograd.grad(call(backend, one, config_for()).loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(grad.square().sum(), leaf)


def test_only_the_loss_and_the_logits_have_a_gradient(backend: str) -> None:
    """Liger#968: a gradient formed in the forward is that of the sum alone, so per-token outputs are detached."""
    for name in (backend, "torch"):
        one, leaf = not_a_leaf(make_batch(4))
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
    one, leaf = not_a_leaf(batch)
    total = call(backend, one, config).loss + call(backend, one, config).loss * 2 + one.logits.square().sum()
    (grad,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(grad, 3 * plain + 2 * leaf.detach(), rtol=1e-6, atol=1e-7)


def test_backward_on_another_thread(backend: str) -> None:
    """Autograd's threads have another current device: launches go to that of the tensor."""
    batch = make_batch(6)
    one, leaf = not_a_leaf(batch)
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
    one, leaf = not_a_leaf(batch)
    if layout == "view":
        wide = torch.full((*one.logits.shape[:2], 300), 7.0, device=DEVICE, dtype=torch.bfloat16)
        one.logits = torch.cat([one.logits, wide[..., 261:]], -1)[..., :261]
    memory = one.logits.data_ptr()
    out = call(backend, one, config, in_place=True)
    assert torch.equal(out.loss, plain.out.loss) and one.logits.data_ptr() == memory
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert torch.equal(grad, plain.grad)
    assert layout != "view" or (one.logits._base[..., 261:] == 7).all()


def test_in_place_is_seen_by_another_consumer(backend: str) -> None:
    """triton#4004: a write behind autograd's back would silently change what another function saved."""
    one, leaf = not_a_leaf(make_batch(9))
    other = one.logits.exp().sum() + one.logits.logsumexp(-1).sum()
    loss = call(backend, one, config_for(), in_place=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other + loss, leaf)


def test_a_write_to_the_overwritten_logits_is_seen(backend: str) -> None:
    one, leaf = not_a_leaf(make_batch(10))
    loss = call(backend, one, config_for(), in_place=True).loss
    with torch.no_grad():
        one.logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


def test_in_place_without_gradient_leaves_the_logits_alone(backend: str) -> None:
    one, _ = not_a_leaf(make_batch(12))
    before = one.logits.detach().clone()
    with torch.no_grad():
        first, second = (call(backend, one, config_for(), in_place=True).loss for _ in range(2))
    assert torch.equal(one.logits, before) and torch.equal(first, second)


def test_in_place_compiles(backend: str) -> None:
    batch, config = make_batch(9), config_for()

    def loss(leaf: torch.Tensor, in_place: bool) -> torch.Tensor:
        return call(backend, replace(batch, logits=leaf * 1), config, in_place=in_place).loss

    leaf = batch.logits.to(DEVICE).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,), (expected,) = (torch.autograd.grad(f(leaf, p), leaf) for f, p in ((compiled, True), (loss, False)))
    torch.testing.assert_close(got, expected)


# ---- log-probs ------------------------------------------------------------------------------------------------------


def test_rows_without_incoming_gradient_have_none(backend: str) -> None:
    batch = make_batch(9, dtype="bfloat16")
    logits = batch.logits.to(DEVICE).requires_grad_()
    out, _ = mdpgrpo_fast.token_logprobs(logits, batch.tokens.to(DEVICE), backend=backend)
    (grad,) = torch.autograd.grad(out[1:3].sum(), logits)
    assert (grad[[0, 3]] == 0).all() and (grad[1:3].abs().sum(-1) > 0).all()


def test_log_probs_backward_rules(backend: str) -> None:
    """The entropy is detached, the gradient repeats under retain_graph, and a second derivative is refused."""
    batch = make_batch(10)
    logits = batch.logits.to(DEVICE).requires_grad_()
    out, entropy = mdpgrpo_fast.token_logprobs(logits, batch.tokens.to(DEVICE), backend=backend)
    assert not entropy.requires_grad
    first, second = (torch.autograd.grad(out.sum(), logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(out.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(grad.square().sum(), logits)
    torch.autograd.grad(out.sum(), logits)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), logits)


def test_logits_that_change_before_the_backward_are_noticed(backend: str) -> None:
    one, leaf = not_a_leaf(make_batch(11))
    out, _ = mdpgrpo_fast.token_logprobs(one.logits, one.tokens.to(DEVICE), backend=backend)
    with torch.no_grad():
        one.logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), leaf)


# ---- the same every time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_bits_every_time_and_in_any_company(backend: str, level: Any) -> None:
    """verl#6280: a log-prob does not depend on what else is in the batch, its place, the layout, or the operation."""
    batch = make_batch(24, lengths=(2, 2, 1), dtype="bfloat16", vocab=5003)
    config = config_for(importance_level=level, kl_temperature=0.9, num_generations=3)
    first, second = run(backend, batch, config), run(backend, batch, config)
    for name in ("loss", "logprobs", "entropy", "kl", "ratio", "totals"):
        assert torch.equal(getattr(first.out, name), getattr(second.out, name)), name
    assert torch.equal(first.grad, second.grad)
    logits, tokens, mask = (x.to(DEVICE) for x in (batch.logits, batch.tokens, batch.mask))
    other, entropy = mdpgrpo_fast.token_logprobs(logits, tokens, mask, backend=backend)
    if backend == "cuda" and level == "token":  # its log-probs are Triton's, its objective sums in an order of its own
        torch.testing.assert_close(other, first.out.logprobs)
        torch.testing.assert_close(entropy, first.out.entropy)
    else:
        assert torch.equal(other, first.out.logprobs) and torch.equal(entropy, first.out.entropy)
    for i, j in ((0, 0), (1, 1), (2, 0)):
        alone = mdpgrpo_fast.token_logprobs(logits[i, j][None], tokens[i, j][None], backend=backend)
        assert alone[0][0] == other[i, j] and alone[1][0] == entropy[i, j]
    moved = mdpgrpo_fast.token_logprobs(logits.flip(0), tokens.flip(0), mask.flip(0), backend=backend)
    assert torch.equal(moved[0].flip(0), other)


def test_inputs_are_left_alone(backend: str) -> None:
    batch = make_batch(25)
    arguments = {
        **batch.given(),
        **GIVEN,
        **REWARDS,
        "logits": batch.logits,
        "tokens": batch.tokens,
        "mask": batch.mask,
        "valid": torch.tensor([[True, True], [False, True]]),
    }
    arguments["rewards"] = torch.tensor([[0.25, 1.0], [float("nan"), 0.0]])
    before = {k: v.clone() for k, v in arguments.items() if v is not None}
    for name in (backend, "torch"):
        on_device = {k: to(v, DEVICE) for k, v in before.items()}
        mdpgrpo_fast.token_loss(config=config_for(), backend=name, **on_device)
        for k, v in before.items():
            assert torch.equal(on_device[k].cpu().nan_to_num(7), v.nan_to_num(7)), k


def test_without_gradient_the_values_are_the_same(backend: str) -> None:
    batch, config = make_batch(26), config_for(importance_level="sequence")
    with_gradient = run(backend, batch, config).out
    on_device = replace(batch, logits=batch.logits.to(DEVICE))
    plain = call(backend, on_device, config)
    leaf = batch.logits.to(DEVICE, copy=True).requires_grad_()
    tokens, mask = batch.tokens.to(DEVICE), batch.mask.to(DEVICE)
    scored = mdpgrpo_fast.token_logprobs(leaf, tokens, mask, backend=backend)
    with torch.no_grad():
        out = call(backend, replace(batch, logits=leaf), config)
        same = mdpgrpo_fast.token_logprobs(leaf, tokens, mask, backend=backend)
    for other in (plain, out):
        assert torch.equal(other.loss, with_gradient.loss) and not other.loss.requires_grad
    assert torch.equal(same[0], scored[0]) and torch.equal(same[1], scored[1]) and not same[0].requires_grad
