"""Log-probs of given tokens on every fused backend against the reference in float64."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.inputs import LossInputs
from helpers.losses import (
    BACKENDS,
    DEVICE,
    LENGTHS,
    Result,
    assert_gradient,
    assert_same,
    assert_within,
    double,
    gpu,
    make_batch,
    packed,
    packed_order,
    to,
    wide_view,
)

import mdpgrpo_fast
from mdpgrpo_fast.log import say_once

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
EACH = torch.tensor([0.4, 0.7, 1.0, 1.3])
SIZE = (len(LENGTHS), max(LENGTHS))
VOCABULARIES = [(1, "float32"), (2, "bfloat16"), (1000, "float16"), (4097, "float32"), (4097, "bfloat16"),
                (32001, "bfloat16"), (32001, "float16")]  # fmt: skip


def run(backend: str, batch: LossInputs, device: str = DEVICE, **more: Any) -> Result:
    """Log-probs with entropy, and the gradient of the logits under a different incoming gradient in every row."""
    logits = batch.logits.detach().to(device).requires_grad_()
    more = {k: to(v, device) for k, v in {"mask": batch.mask, **more}.items()}
    out = mdpgrpo_fast.token_logprobs(logits, to(batch.tokens, device), backend=backend, **more)
    incoming = torch.linspace(-1, 2, out[0].numel(), device=device).view_as(out[0]).to(out[0].dtype)
    return Result(out, torch.autograd.grad((out[0] * incoming).sum(), logits)[0])


def assert_matches(backend: str, batch: LossInputs, **more: Any) -> Result:
    exact = {k: to(v, dtype=torch.float64) for k, v in more.items()}
    got, truth, own = (
        run(backend, batch, **more),
        run("torch", double(batch), "cpu", **exact),
        run("torch", batch, "cpu", **more),
    )
    for i, name in enumerate(("logprobs", "entropy")):
        assert got.out[i].dtype == torch.float32
        assert_within(got.out[i], truth.out[i], own.out[i], name)
    assert_gradient(got.grad, truth.grad, truth.out[0], own.grad, batch.logits.dtype)
    return got


# ---- values ---------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_mask": {"mask": None},
    "mask_int": {"mask": torch.tensor([[2, 1], [-1, 0], [0, 0], [1, 1]])},
    "mask_float": {"mask": torch.tensor([[0.5, 1], [-1, 0], [0, 0], [1, 1]])},
    "temperature_number": {"temperature": 0.6},
    "temperature_scalar": {"temperature": torch.tensor(0.6)},
    "temperature_per_completion": {"temperature": EACH},
    "temperature_per_row": {"temperature": 0.3 + torch.arange(8.0).view(4, 2) / 8},
    "softcap": {"softcap": 3.0},
    "softcap_temperature": {"softcap": 30.0, "temperature": EACH, "mask": None},
    "logit_floor": {"logit_floor": torch.arange(8.0).view(4, 2) - 3},
    "logit_floor_softcap": {"logit_floor": torch.arange(8.0).view(4, 2) / 2 - 1, "softcap": 3.0, "temperature": EACH},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(backend: str, option: str) -> None:
    batch = make_batch(1, vocab=130)
    assert_matches(backend, batch, **OPTIONS[option])
    if option in ("plain", "softcap_temperature"):
        half = make_batch(1, dtype="bfloat16", vocab=130)
        half.tokens = half.tokens.int()
        assert_matches(backend, half, **OPTIONS[option])


@pytest.mark.parametrize(("vocab", "dtype"), VOCABULARIES)
def test_vocabularies(backend: str, vocab: int, dtype: str) -> None:
    """verl#2656, verl#2899: columns past V have probability 0, at a level of -40 too, where a 0 would be the peak."""
    batch = make_batch(2, lengths=(2, 1), vocab=vocab, dtype=dtype)
    batch.tokens = torch.tensor([[vocab - 1, 0], [vocab // 2, 0]])
    batch.logits[0] = -40.0
    batch.logits[0, 0, -1] = -25.0
    got = assert_matches(backend, batch, **({"softcap": 30.0, "temperature": 1.5} if vocab == 4097 else {}))
    if vocab != 4097:
        assert got.out[0][0, 1].item() == pytest.approx(-math.log(vocab), abs=1e-5)
        assert got.out[1][0, 1].item() == pytest.approx(math.log(vocab), abs=1e-5)


def test_packed_rows(backend: str) -> None:
    """With a map a temperature is per completion; without one every row stands for itself."""
    batch = make_batch(3)
    whole = run(backend, batch, temperature=EACH)
    rows = packed(batch, seed=1)
    where = {"completion": rows.kwargs["completion"], "num_completions": 4}
    got = assert_matches(backend, rows, temperature=EACH, **where)
    assert torch.equal(got.out[0], whole.out[0].flatten()[packed_order(batch, seed=1).to(DEVICE)])
    alone = run(backend, rows, temperature=EACH[where["completion"]])
    assert torch.equal(alone.out[0], got.out[0]) and torch.equal(alone.grad, got.grad)


def test_huge_and_banned_logits(backend: str) -> None:
    """±1e4 keeps its precision; -inf has probability 0, gradient 0 and no part in the entropy."""
    batch = make_batch(4, vocab=300)
    banned = (batch.tokens[..., None] + torch.arange(1, 250)) % 300
    batch.logits.scatter_(2, banned, -math.inf)
    got = assert_matches(backend, batch, temperature=EACH)
    assert (got.grad.cpu().gather(2, banned) == 0).all()
    assert_matches(backend, batch, softcap=5.0)
    batch.logits = 1e4 * make_batch(4).logits.sign()
    batch.tokens = batch.tokens % 11
    assert_matches(backend, batch)


def test_the_support_of_truncated_sampling(backend: str) -> None:
    """The row's token is in it whatever the bound; outside of it there is neither probability nor gradient."""
    batch = make_batch(9, vocab=5000, dtype="bfloat16")
    batch.tokens[0] = batch.logits[0].argmax(-1)
    plain = run(backend, batch)
    everything = run(backend, batch, logit_floor=torch.full(SIZE, -math.inf))
    assert torch.equal(everything.out[0], plain.out[0]) and torch.equal(everything.grad, plain.grad)
    got = assert_matches(backend, batch, logit_floor=torch.full(SIZE, math.inf))
    assert (got.out[0][0] == 0).all() and (got.out[1][0] < 1e-6).all() and (got.grad[0] == 0).all()
    outside = batch.logits < batch.logits.gather(2, batch.tokens[..., None])
    assert outside[1:].any() and (got.grad.cpu()[outside] == 0).all()
    floor = torch.full(SIZE, 1.0).masked_fill(~batch.mask, math.nan)
    assert_matches(backend, batch, logit_floor=floor, softcap=5.0)
    alone = batch.logits.masked_fill(batch.logits < floor.nan_to_num()[..., None], -math.inf)
    alone.scatter_(2, batch.tokens[..., None], batch.logits.gather(2, batch.tokens[..., None]))
    inside = alone.gather(2, batch.tokens[..., None]).squeeze(2) >= 1
    got, banned = run(backend, batch, logit_floor=floor), run(backend, replace(batch, logits=alone))
    for i in (0, 1):
        torch.testing.assert_close(got.out[i].cpu()[inside & batch.mask], banned.out[i].cpu()[inside & batch.mask])


def test_known_distributions(backend: str) -> None:
    logits = torch.zeros(1, 2, 8, device=DEVICE)
    logits[0, 1, 3] = 1e4
    logprob, entropy = mdpgrpo_fast.token_logprobs(logits, torch.full((1, 2), 3, device=DEVICE), backend=backend)
    assert logprob[0].tolist() == pytest.approx([-math.log(8), 0], abs=1e-6)
    assert entropy[0].tolist() == pytest.approx([math.log(8), 0], abs=1e-6)


def test_half_precision_is_not_rounded_on_the_way(backend: str) -> None:
    """trl#4303: bfloat16 arithmetic at |logit| of 25 is off by up to 0.06; only the logits themselves are rounded."""
    batch = make_batch(5, dtype="bfloat16", scale=8.0, vocab=257)
    exact = batch.logits.double().log_softmax(-1).gather(-1, batch.tokens[..., None]).squeeze(-1)
    rounded = batch.logits.log_softmax(-1).gather(-1, batch.tokens[..., None]).squeeze(-1)
    got = run(backend, batch, mask=None).out[0].cpu()
    assert (got - exact).abs().max() < 1e-5 < (rounded - exact).abs().max()


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "pad", "shift"), [("bfloat16", 0, 0), ("float32", 5, 0), ("float32", 8, 1), ("bfloat16", 8, 1)]
)
def test_strided_views(backend: str, dtype: str, pad: int, shift: int) -> None:
    """Slices like logits[:, :-1], a padded vocabulary that holds NaN, and a base that is not 16-byte aligned."""
    batch = make_batch(6, dtype=dtype, vocab=131)
    plain = run(backend, batch)
    base, view = wide_view(batch.logits, pad, shift)
    out = mdpgrpo_fast.token_logprobs(view, batch.tokens.to(DEVICE), batch.mask.to(DEVICE), backend=backend)
    incoming = torch.linspace(-1, 2, out[0].numel(), device=DEVICE).view_as(out[0])
    (grad,) = torch.autograd.grad((out[0] * incoming).sum(), base)
    assert_same(out[0], plain.out[0])
    assert_same(out[1], plain.out[1])
    assert_same(grad[:, :-1, :131], plain.grad)
    assert (grad[:, -1] == 0).all() and (grad[..., 131:] == 0).all()


def test_a_stride_in_the_vocabulary_is_copied_with_a_notice(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    batch = make_batch(7)
    plain = run(backend, batch)
    batch.logits = batch.logits.transpose(1, 2).contiguous().transpose(1, 2)
    assert batch.logits.stride(-1) != 1 and "copied" not in caplog.text
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="mdpgrpo_fast"):
        assert torch.equal(run(backend, batch).grad, plain.grad) and torch.equal(run(backend, batch).grad, plain.grad)
    assert caplog.text.count("logits are copied: the kernels need unit stride in the vocabulary") == 1


def test_a_stride_of_zero(backend: str) -> None:
    batch = make_batch(7)
    same = batch.logits[:1].contiguous()
    batch.logits = same.repeat(4, 1, 1)
    plain = run(backend, batch)
    batch.logits = same.expand(4, -1, -1)
    assert torch.equal(run(backend, batch).grad, plain.grad)


def test_masked_rows_may_hold_anything(backend: str) -> None:
    """NeMo-RL#4120: inf * 0 in the backward. Masked rows give 0, whatever they hold and whatever gradient comes in."""
    batch = make_batch(8)
    plain, drop = run(backend, batch, temperature=EACH), ~batch.mask
    for junk in (math.nan, math.inf, -math.inf):
        logits = batch.logits.masked_fill(drop[..., None], junk).to(DEVICE).requires_grad_()
        out = mdpgrpo_fast.token_logprobs(
            logits, batch.tokens.to(DEVICE), batch.mask.to(DEVICE), temperature=EACH.to(DEVICE), backend=backend
        )
        incoming = torch.linspace(-1, 2, 8).view(SIZE).masked_fill(drop, junk).to(DEVICE)
        (grad,) = torch.autograd.grad(out[0], logits, grad_outputs=incoming)
        assert torch.equal(out[0], plain.out[0]) and torch.equal(out[1], plain.out[1]) and torch.equal(grad, plain.grad)
        assert (out[0].cpu()[drop] == 0).all() and (out[1].cpu()[drop] == 0).all() and (grad.cpu()[drop] == 0).all()


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_no_rows(backend: str, shape: tuple[int, int]) -> None:
    logits = torch.zeros(*shape, 4, device=DEVICE, requires_grad=True)
    out = mdpgrpo_fast.token_logprobs(logits, torch.zeros(shape, dtype=torch.long, device=DEVICE), backend=backend)
    (grad,) = torch.autograd.grad(out[0].sum(), logits)
    assert out[0].shape == out[1].shape == shape and grad.shape == (*shape, 4)


# ---- values that nobody looked at -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_unseen_bad_values_give_nan_in_their_rows_alone(backend: str) -> None:
    """Nobody looks at values on a GPU: a wrong token, map or temperature is NaN there, and no other row is touched."""
    batch = make_batch(14)
    plain = run(backend, batch, mask=None).out[0]
    wrong = torch.tensor([[True, False], [False, False], [False, True], [False, False]])
    for shift in (11, -12, 2**40):
        batch.tokens = torch.where(wrong, make_batch(14).tokens + shift, make_batch(14).tokens)
        got = run(backend, batch, mask=None, check_values=False).out[0]
        assert torch.equal(got.isnan().cpu(), wrong) and torch.equal(got[~wrong], plain[~wrong])
    batch = make_batch(14)
    for tau in (0.0, -1.0, math.nan):
        got = run(
            backend, batch, mask=None, check_values=False, temperature=torch.ones(SIZE).masked_fill(wrong, tau)
        ).out[0]
        assert torch.equal(got.isnan().cpu(), wrong) and torch.equal(got[~wrong], plain[~wrong])
    rows = packed(batch, seed=2)
    where = rows.kwargs["completion"].masked_fill(torch.arange(5) == 2, 7)
    got = run(backend, rows, completion=where, num_completions=4, check_values=False, temperature=EACH).out[0]
    assert got.isnan().tolist() == [False, False, True, False, False]


@gpu
def test_memory_is_one_gradient(backend: str) -> None:
    """The forward keeps the logits and four numbers a row; the backward writes one gradient."""
    leaf = torch.randn(2, 512, 32000, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.zeros(2, 512, dtype=torch.long, device=DEVICE)
    size = leaf.numel() * leaf.element_size()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = mdpgrpo_fast.token_logprobs(leaf, tokens, backend=backend)
    assert torch.cuda.max_memory_allocated() - before <= 0.02 * size
    torch.autograd.grad(out.sum(), leaf)
    assert torch.cuda.max_memory_allocated() - before <= 1.02 * size
