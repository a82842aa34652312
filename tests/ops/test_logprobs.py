"""Log-probs of given tokens on every fused backend against the reference in float64, and their autograd."""

from __future__ import annotations

import logging
import math
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
from mdpgrpo_fast import reference
from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.ops import backends, fused

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
EACH = torch.tensor([0.4, 0.7, 1.0, 1.3])
SIZE = (len(LENGTHS), max(LENGTHS))


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
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(backend: str, option: str, dtype: str) -> None:
    batch = make_batch(1, dtype=dtype, vocab=130)
    batch.tokens = batch.tokens.int() if dtype == "bfloat16" else batch.tokens
    assert_matches(backend, batch, **OPTIONS[option])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("vocab", [1, 2, 1000, 4097, 32001])
def test_vocabularies(backend: str, vocab: int, dtype: str) -> None:
    """verl#2656, verl#2899: columns past V have probability 0, at a level of -40 too, where a 0 would be the peak."""
    batch = make_batch(2, lengths=(2, 1), vocab=vocab, dtype=dtype)
    batch.tokens = torch.tensor([[vocab - 1, 0], [vocab // 2, 0]])
    batch.logits[0] = -40.0
    batch.logits[0, 0, -1] = -25.0
    got = assert_matches(backend, batch, **({"softcap": 60.0, "temperature": 0.5} if vocab == 4097 else {}))
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("pad", "shift"), [(0, 0), (5, 0), (8, 1)])
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
    backends.say_once.cache_clear()
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


# ---- autograd -------------------------------------------------------------------------------------------------------


def test_rows_without_incoming_gradient_have_none(backend: str) -> None:
    batch = make_batch(9, dtype="bfloat16")
    logits = batch.logits.to(DEVICE).requires_grad_()
    out, _ = mdpgrpo_fast.token_logprobs(logits, batch.tokens.to(DEVICE), backend=backend)
    (grad,) = torch.autograd.grad(out[1:3].sum(), logits)
    assert (grad[[0, 3]] == 0).all() and (grad[1:3].abs().sum(-1) > 0).all()


def test_backward_rules(backend: str) -> None:
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
    batch = make_batch(11)
    leaf = batch.logits.to(DEVICE).requires_grad_()
    logits = leaf * 1
    out, _ = mdpgrpo_fast.token_logprobs(logits, batch.tokens.to(DEVICE), backend=backend)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), leaf)


def test_without_gradient_the_values_are_the_same(backend: str) -> None:
    batch = make_batch(12)
    plain = run(backend, batch)
    with torch.no_grad():
        out = mdpgrpo_fast.token_logprobs(*(to(x, DEVICE) for x in list(batch)[:3]), backend=backend)
    assert torch.equal(out[0], plain.out[0]) and torch.equal(out[1], plain.out[1]) and not out[0].requires_grad


def test_the_same_bits_every_time_and_in_any_company(backend: str) -> None:
    """verl#6280: a row's bits do not depend on what else is in the batch, on its place or on the layout."""
    batch = make_batch(13, lengths=(2, 2, 1), dtype="bfloat16", vocab=5003)
    first, second = run(backend, batch, mask=None), run(backend, batch, mask=None)
    assert torch.equal(first.out[0], second.out[0]) and torch.equal(first.grad, second.grad)
    logits, tokens = batch.logits.to(DEVICE), batch.tokens.to(DEVICE)
    for i, j in ((0, 0), (1, 1), (2, 0)):
        alone = mdpgrpo_fast.token_logprobs(logits[i, j][None], tokens[i, j][None], backend=backend)
        assert alone[0][0] == first.out[0][i, j] and alone[1][0] == first.out[1][i, j]
    moved = mdpgrpo_fast.token_logprobs(logits.flip(0), tokens.flip(0), backend=backend)
    assert torch.equal(moved[0].flip(0), first.out[0])


# ---- bad input ------------------------------------------------------------------------------------------------------


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


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("logits", {"logits": torch.zeros(4)}, r"of shape \(B, L, V\)"),
    ("logits", {"logits": torch.zeros(4, 2, 11, dtype=torch.long)}, "floating point; got torch.int64"),
    ("logits", {"logits": torch.zeros(4, 2, 0)}, "of at least one column"),
    ("tokens", {"tokens": torch.zeros(4, dtype=torch.long)}, r"of shape \(4, 2\); got shape \(4,\)"),
    ("tokens", {"tokens": torch.zeros(4, 2)}, "int32 or int64; got torch.float32"),
    ("tokens", {"tokens": torch.full((4, 2), 11)}, r"in \[0, 11\); got range 11 to 11"),
    ("tokens", {"tokens": torch.full((4, 2), -1)}, r"in \[0, 11\); got range -1 to -1"),
    ("mask", {"mask": torch.ones(4)}, r"of shape \(4, 2\)"),
    ("softcap", {"softcap": -1.0}, "above 0, or None; got -1.0"),
    ("num_completions", {"num_completions": 4}, "left out for padded logits"),
    ("temperature", {"temperature": torch.ones(2)}, r"of shape \(4,\) or \(4, 2\); got shape \(2,\)"),
    ("temperature", {"temperature": torch.zeros(4)}, "above 0 in every row"),
    ("temperature", {"temperature": 0.0}, "above 0; got 0.0"),
]


def test_bad_input_is_refused_before_any_work(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the check came after the work began")

    for module in (fused, reference):
        monkeypatch.setattr(module, "token_logprobs", work)
    batch = make_batch(15)
    good = {"logits": batch.logits, "tokens": batch.tokens, "mask": batch.mask}
    for name, change, message in REFUSALS:
        arguments = {k: to(v, DEVICE) for k, v in {**good, **change}.items()}
        with pytest.raises(ValueError, match=f"^{name} must be {message}"):
            mdpgrpo_fast.token_logprobs(backend=backend, check_values=True, **arguments)
    with pytest.raises(ConfigError, match="unknown backend 'trition'; did you mean 'triton'"):
        mdpgrpo_fast.token_logprobs(**{k: to(v, DEVICE) for k, v in good.items()}, backend="trition")
    with pytest.raises(ValueError, match="cannot run: it takes bfloat16, float16, float32, not float64"):
        mdpgrpo_fast.token_logprobs(batch.logits.double().to(DEVICE), batch.tokens.to(DEVICE), backend=backend)


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
