"""Sampling of one step: what is drawn is what the log-probs say, on both backends, with and without truncation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.losses import DEVICE
from torch import Tensor

from mdpgrpo_fast.kernels.triton.library import sample as sample_in_kernel
from mdpgrpo_fast.ops.logprobs import token_logprobs
from mdpgrpo_fast.rollout import sampling
from mdpgrpo_fast.rollout.sampling import draw, sample


@pytest.fixture(params=["cpu", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled kernel, and what runs where it is not there."""
    choose = sampling.backends.choose

    def chosen(wish: str, device: torch.device, dtype: torch.dtype) -> str:
        return "torch" if request.param == "torch" else choose(wish, device, dtype)

    monkeypatch.setattr(sampling.backends, "choose", chosen)
    return request.param


def peaked(rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))).to(dtype)


def exact(logits: Tensor, temperature: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Log-probs in float64, by sorting each row."""
    x = (logits.double() / temperature.double()[:, None]).log_softmax(1)
    values, order = x.sort(dim=1, descending=True, stable=True)
    keep = torch.ones_like(x, dtype=torch.bool)
    if top_k:
        keep[:, top_k:] = False
    p = values.masked_fill(~keep, -math.inf).softmax(1)
    keep &= p.cumsum(1) - p < top_p
    keep &= p >= min_p * p[:, :1]
    return torch.empty_like(x).scatter(1, order, values.masked_fill(~keep, -math.inf)).log_softmax(1)


def chi_square(counts: Tensor, p: Tensor) -> tuple[float, int]:
    """Of counts (V,) against p (V,), and its degrees of freedom; tokens expected less than 5 times are one bin."""
    expected = p * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 0
    assert (observed[~kept] == 0).all(), "a token of probability 0 was drawn"
    return ((observed - expected)[kept] ** 2 / expected[kept]).sum().item(), int(kept.sum()) - 1


def assert_drawn_from(tokens: Tensor, p: Tensor) -> None:
    """Chance goes beyond this bound less than once in a million."""
    value, freedom = chi_square(torch.bincount(tokens.cpu(), minlength=len(p)), p)
    assert value < freedom + 5 * math.sqrt(2 * freedom) + 20, f"chi-square {value:.1f}, {freedom} degrees of freedom"


# ---- blocked inverse CDF --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 1024, 1500])
def test_draw_is_the_inverse_of_the_cumulative_sum(size: int) -> None:
    p = peaked(1, size).softmax(1).expand(4000, -1)
    u = torch.linspace(0, 1 - 2**-53, 4000, dtype=torch.float64)
    got = draw(p, u)
    running = p[0].double().cumsum(0)
    expected = (running[None] <= (u * running[-1])[:, None]).sum(1)
    # Sums of blocks are rounded: a u that lies on a border may fall on its other side.
    apart = (got - expected).abs()
    assert (apart == 0).double().mean() > 0.995 and apart.max() <= 1 and got.max() < size


def test_draw_never_takes_what_has_probability_0() -> None:
    p = torch.zeros(3, 1300)
    p[0, 700], p[1, 0], p[2, 1299] = 1e-30, 1.0, 0.3
    for u in (0.0, 0.5, 1 - 2**-53, 1.0):
        assert draw(p, torch.full((3,), u, dtype=torch.float64)).tolist() == [700, 0, 1299]
    p[1, 1] = p[1, 600] = 1.0
    u = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    assert draw(p[1].expand(3, -1), u).tolist() == [0, 1, 600]


# ---- frequencies ----------------------------------------------------------------------------------------------------

DRAWS = 6000


@pytest.mark.parametrize("vocab", [5, 1300, 4500])
def test_frequencies(vocab: int, backend: str) -> None:
    torch.manual_seed(0)
    logits = peaked(1, vocab)
    taus = torch.tensor([0.4, 1.0, 2.5])
    tokens, *_ = sample(logits.expand(3 * DRAWS, -1), taus.repeat(DRAWS))
    for slot, tau in enumerate(taus):
        assert_drawn_from(tokens[slot::3], exact(logits, tau[None])[0].exp())


@pytest.mark.parametrize("knobs", [{"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 9, "top_p": 0.9}], ids=str)
def test_truncated_frequencies(knobs: dict[str, Any], backend: str) -> None:
    torch.manual_seed(1)
    logits, tau = peaked(1, 60), torch.tensor([1.3])
    tokens, *_ = sample(logits.expand(DRAWS, -1), tau.expand(DRAWS), **knobs)
    assert_drawn_from(tokens, exact(logits, tau, **knobs)[0].exp())


# ---- log-probs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "knobs", [{}, {"top_k": 20}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 50, "min_p": 0.02}], ids=str
)
def test_logprobs(dtype: torch.dtype, knobs: dict[str, Any], backend: str) -> None:
    torch.manual_seed(0)
    logits, tau = peaked(64, 3001, dtype), torch.linspace(0.2, 2, 64)
    # bfloat16 has equals at the borders: which of them stay is not defined.
    tokens, got, policy, *_ = sample(logits, tau, **knobs)
    assert tokens.dtype == torch.int64 and got.dtype == policy.dtype == torch.float32
    at = tokens[:, None]
    expected = exact(logits, tau, **knobs).gather(1, at).squeeze(1)
    same = expected.isfinite() if dtype == torch.bfloat16 else torch.ones(64, dtype=torch.bool)
    assert same.double().mean() > 0.9
    torch.testing.assert_close(got[same].double(), expected[same], rtol=1e-5, atol=1e-5)
    ones = exact(logits, torch.ones(64)).gather(1, at).squeeze(1)
    torch.testing.assert_close(policy.double(), ones, rtol=1e-5, atol=1e-5)


MIXTURES = [
    {},
    {"top_k": 20},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 30, "top_p": 0.9},
    {"top_k": 50, "min_p": 0.02},
    {"top_p": 0.95, "min_p": 0.03},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"top_k": 5000, "min_p": 1e-30},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("knobs", MIXTURES, ids=str)
def test_the_log_of_what_truncation_kept(dtype: torch.dtype, knobs: dict[str, Any], backend: str) -> None:
    """Against the sum over the support, in float64; and what makes of the whole distribution the one drawn from."""
    torch.manual_seed(0)
    logits, tau = peaked(64, 3001, dtype), torch.linspace(0.2, 2, 64)
    tokens, sampling, _, kept, floor = sample(logits, tau, **knobs)
    support = exact(logits, tau, **knobs).isfinite()
    whole = (logits.double() / tau.double()[:, None]).log_softmax(1)
    expected = whole.masked_fill(~support, -math.inf).logsumexp(1)
    assert kept.dtype == torch.float32 and kept.max() <= 0
    told, likely = logits >= floor[:, None], whole > -30  # at the very end the sum in `exact` reaches 1
    assert floor.dtype == torch.float32 and torch.equal(told[likely], support[likely])
    torch.testing.assert_close(kept.double(), expected, rtol=1e-5, atol=1e-5)
    if not knobs:
        assert not kept.any() and (floor == -math.inf).all(), "exactly"
    at = token_logprobs(logits[:, None], tokens[:, None], temperature=tau)[0].squeeze(1)
    torch.testing.assert_close(sampling.double(), at.double() - kept.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_p", [0.5, 0.95, 0.9999])
def test_top_p_looks_as_far_as_it_has_to(monkeypatch: pytest.MonkeyPatch, top_p: float) -> None:
    """Flat rows need many more tokens than peaked ones; the answer is that of a sorted row."""
    logits = peaked(6, 2000) * torch.tensor([1, 1e-3, 1, 1e-3, 1, 0])[:, None]
    tau = torch.tensor([0.5, 1, 2, 3, 4, 1])
    whole = sampling._truncated(logits, tau, 0, top_p, 0.0)
    monkeypatch.setattr(sampling, "CANDIDATES", 4)
    z, ids, floor = sampling._truncated(logits, tau, 0, top_p, 0.0)
    torch.testing.assert_close(floor, whole[2])
    got = torch.full((6, 2000), -math.inf).scatter(1, ids, z).log_softmax(1)
    expected = torch.full((6, 2000), -math.inf).scatter(1, whole[1], whole[0]).log_softmax(1)
    assert torch.equal(got.isfinite().sum(1), expected.isfinite().sum(1)), "as many tokens stay"
    torch.testing.assert_close(got[:5], expected[:5])
    reference = exact(logits[:5], tau[:5], top_p=top_p)
    assert (reference.isfinite().sum(1) - got[:5].isfinite().sum(1)).abs().max() <= 1
    for i in range(5):
        both = reference[i].isfinite() & got[i].isfinite()
        torch.testing.assert_close(got[i, both].double(), reference[i, both], rtol=1e-3, atol=2e-3)


def test_top_k_keeps_k_of_equals(backend: str) -> None:
    torch.manual_seed(0)
    tokens, got, *_ = sample(torch.zeros(500, 40), torch.ones(500), top_k=4)
    assert len(set(tokens.tolist())) <= 4
    torch.testing.assert_close(got, torch.full((500,), -math.log(4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy(backend: str, dtype: torch.dtype) -> None:
    logits = peaked(9, 5000, dtype)
    logits[3] = logits[4] = 0.01
    logits[3, 4000] += 0.001
    logits[4, 4999] = torch.nextafter(logits[4, 0].float(), torch.tensor(1.0))  # the same number but in float32
    logits[5, 2047] = logits[5, 2048] = logits[5, 4096] = 60.0
    tokens, got, policy, kept, floor = sample(logits, None, top_k=3, top_p=0.1)
    assert torch.equal(tokens, logits.argmax(1)) and torch.equal(got, policy) and not kept.any()
    assert (floor == -math.inf).all()
    assert tokens[3:6].tolist() == [4000, 4999 if dtype == torch.float32 else 0, 2047], "the first of equals"
    torch.testing.assert_close(policy, logits.float().log_softmax(1).amax(1))


@pytest.mark.parametrize("vocab", [1, 7, 2047, 2049, 6000])
def test_the_cpu_kernel_draws_by_the_cumulative_sum(vocab: int) -> None:
    n, tau = 4001, 0.7
    logits = peaked(1, vocab)
    logits[:, 1::5] = -math.inf
    noise = (torch.linspace(0, 1, n, dtype=torch.float64) * (sampling.NOISE - 1)).long()
    tokens, *_ = sample(logits.expand(n, -1), torch.full((n,), tau), noise=noise)
    running = exact(logits, torch.tensor([tau]))[0].exp().cumsum(0)
    expected = (running[None] <= (noise.double() / sampling.NOISE * running[-1])[:, None]).sum(1)
    # Exponentials are rounded: noise that lies on a border may fall on its other side, past tokens of probability 0.
    assert (tokens == expected).double().mean() > 0.995 and (tokens - expected).abs().max() <= 2
    assert tokens.diff().min() >= 0 and logits[0, tokens].isfinite().all()
    assert tokens[0] == 0 and tokens[-1] >= vocab - 2


@pytest.mark.parametrize("knobs", [{}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_rows_that_hold_no_number(backend: str, knobs: dict[str, Any]) -> None:
    logits = peaked(4, 3000)
    logits[0, 7], logits[1], logits[2] = math.nan, math.nan, -math.inf
    for tau in (torch.ones(4), None):
        tokens, got, policy, *_ = sample(logits, tau, **knobs)
        assert got[:3].isnan().all() and policy[:3].isnan().all() and got[3].isfinite() and policy[3].isfinite()
        assert tokens.min() >= 0 and tokens.max() < 3000
    if not knobs:
        tokens, got, *_ = sample(logits, torch.tensor([1.0, 1.0, 1.0, -1.0]))
        assert got[3].isnan() and 0 <= tokens[3] < 3000


def test_masked_tokens_are_never_drawn(backend: str) -> None:
    torch.manual_seed(0)
    logits = peaked(2000, 900)
    logits[:, 10:] = -math.inf
    for knobs in ({}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 1e-6}):
        tokens, got, policy, kept, _ = sample(logits, torch.full((2000,), 5.0), **knobs)
        assert tokens.max() < 10 and all(x.isfinite().all() for x in (got, policy, kept)), knobs


def test_the_generator_decides(backend: str) -> None:
    logits, tau = peaked(50, 400), torch.ones(50)
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(sample(logits, tau)[0])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# ---- Triton ---------------------------------------------------------------------------------------------------------


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [x.to(DEVICE) for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [3, 128, 129, 5000])
def test_kernel_logprobs(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, tau = on_device(peaked(5, vocab, dtype), torch.tensor([0.1, 0.5, 1.0, 1.5, 4.0]))
    tokens, got, policy = sample_in_kernel(logits, tau)
    for name, x, at in (("sampling", got, tau), ("policy", policy, torch.ones_like(tau))):
        expected = exact(logits, at).gather(1, tokens[:, None]).squeeze(1)
        torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_kernel_reads_strided_rows() -> None:
    torch.manual_seed(0)
    wide, tau = on_device(peaked(6, 1001), torch.full((3,), 0.01))
    view = wide[::2, 1:900]
    tokens, _, policy = sample_in_kernel(view, tau)
    assert torch.equal(tokens, view.argmax(1))
    torch.testing.assert_close(policy, view.log_softmax(1).amax(1), rtol=1e-5, atol=1e-5)
    turned = view.T.contiguous().T
    assert torch.equal(sample_in_kernel(turned, None)[0], view.argmax(1))


def test_kernel_greedy() -> None:
    (logits,) = on_device(peaked(4, 300))
    logits[2, 17] = logits[2, 250] = 50.0
    tokens, got, policy = sample_in_kernel(logits, None)
    assert torch.equal(tokens, logits.argmax(1)) and tokens[2] == 17, "the first of equals"
    assert torch.equal(got, policy)
    torch.testing.assert_close(policy, logits.log_softmax(1).amax(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "vocab", [pytest.param(131, marks=pytest.mark.long, id="off 16 bytes"), pytest.param(136, id="on 16 bytes")]
)
def test_kernel_frequencies(vocab: int) -> None:
    torch.manual_seed(0)
    n = 250
    logits, taus = on_device(peaked(1, vocab), torch.tensor([0.6, 2.0]))
    tokens, _, _ = sample_in_kernel(logits.expand(2 * n, -1), taus.repeat(n))
    for slot, tau in enumerate(taus.cpu()):
        assert_drawn_from(tokens[slot::2], exact(logits.cpu(), tau[None])[0].exp())


def test_kernel_draws_anew_at_every_row_and_call_and_as_seeded() -> None:
    logits, tau = on_device(torch.zeros(40, 1000), torch.ones(40))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn += [sample_in_kernel(logits, tau)[0], sample_in_kernel(logits, tau)[0]]
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    for a, b in ((0, 1), (0, 4), (1, 5)):
        assert (drawn[a] == drawn[b]).double().mean() < 0.2
    assert len(set(drawn[0].tolist())) > 30


def test_kernel_masked_tokens_and_nan() -> None:
    torch.manual_seed(0)
    logits, tau = on_device(torch.full((30, 400), -math.inf), torch.full((30,), 3.0))
    logits[:, 200:203] = 0.0
    tokens, got, _ = sample_in_kernel(logits, tau)
    assert set(tokens.tolist()) == {200, 201, 202}
    torch.testing.assert_close(got, torch.full_like(got, -math.log(3)))
    logits[0, 5], logits[1] = math.nan, math.nan
    tokens, got, policy = sample_in_kernel(logits, tau)
    assert got[:2].isnan().all() and policy[:2].isnan().all() and got[2:].isfinite().all()
    assert tokens.min() >= 0 and tokens.max() < 400


def test_kernel_without_rows() -> None:
    logits, tau = on_device(torch.zeros(0, 10), torch.zeros(0))
    assert [x.shape for x in sample_in_kernel(logits, tau)] == [(0,)] * 3
