"""What has no sign is exactly 0 on every backend: rewards that equal the mean, terms that cancel; and rows of logits
that are no distribution, or give the token no probability: NaN on all of them alike."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from helpers.linear import Head
from helpers.linear import call as call_linear
from helpers.losses import ALL_BACKENDS, DEVICE, config_for, make_batch, run, to

import mdpgrpo_fast
from mdpgrpo_fast import reference
from mdpgrpo_fast.config import preset

SIZES = (2, 3, 5, 6, 7, 12, 32, 128)
LEVELS = (1, 3, 6, 7, 10)


def draws(seed: int = 0) -> list[tuple[int, int, list[list[int]]]]:
    """G, K and counts of satisfied constraints of some groups, in which many a reward is the mean itself."""
    g, found = torch.Generator().manual_seed(seed), []
    for size in SIZES:
        for levels in LEVELS:
            counts = torch.randint(0, levels + 1, (12, size), generator=g)
            counts[::2, size // 2 :] = levels - counts[::2, : size - size // 2]
            counts[::2, 0] = levels // 2
            found.append((size, levels, counts.tolist()))
    return found


@pytest.mark.parametrize("backend", ["reference", *ALL_BACKENDS])
def test_the_sign_of_z_is_that_of_exact_arithmetic(backend: str) -> None:
    """At the mean, A = 0 and β₊ in every preset of a z alone, whatever a sum of float rewards leaves."""
    zeros = 0
    for size, levels, counts in draws():
        counts = counts[: 2 if backend == "triton" and DEVICE == "cpu" else None]
        exact = [[Fraction(x) - Fraction(sum(row), size) for x in row] for row in counts]
        sign = torch.tensor([[(x > 0) - (x < 0) for x in row] for row in exact])
        zeros += int((sign == 0).sum())
        for dtype in (torch.float64, torch.float32) if backend in ("reference", "torch") else (torch.float32,):
            rewards = (torch.tensor(counts, dtype=torch.float64) / levels).to(dtype)
            for config in (
                preset("grpo", num_generations=size, kl_beta_neg=0.5, asymmetric_kl=True),
                preset("paper", num_generations=size, multi_temperature=False, goal_mean="mean"),
                preset("rloo", num_generations=size),
            ):
                k = torch.full((len(counts),), levels)
                if backend == "reference":
                    got = reference.advantages(rewards, k, config)
                else:
                    got = mdpgrpo_fast.advantages(rewards.to(DEVICE), k.to(DEVICE), config, backend=backend)
                where = (backend, size, levels, dtype)
                assert torch.equal(got.advantage.cpu().sign().long(), sign), where
                negative = got.kl_beta.cpu() == torch.tensor(config.betas[1], dtype=dtype)
                assert config.betas[0] == config.betas[1] or torch.equal(negative, sign < 0), where
    assert zeros > 10


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_terms_that_cancel_are_zero(backend: str) -> None:
    config = config_for(num_generations=4, prospect=False, dual_anchor_alpha=0.5, goal_std="binomial")
    # r = 0, 1/4, 1/2, 1/4 has μ = 1/4 and σ = √2/8, and 1/4 has no z; its δ is -1/4 over √(1/4K): A < 0 there.
    got = mdpgrpo_fast.advantages([[0.0, 0.25, 0.5, 0.25]], [4], config, backend=backend)
    assert got.z[0].sign().tolist() == [-1, 0, 1, 0] and got.advantage[0, 1] < 0
    # With z = ±1 and δ = ∓1 the two halves are each other's negatives: μ = 0.3, σ = 0.1, 0.4 = 0.5 - s for K = 25.
    got = mdpgrpo_fast.advantages([[0.4, 0.2, 0.4, 0.2]], [25], config, backend=backend)
    assert got.advantage[0].tolist()[::2] == [0.0, 0.0] and (got.advantage[0, 1::2] < -1.9).all()
    assert got.kl_beta[0, 0] == torch.tensor(config.kl_beta_pos), "A = 0 takes β₊"


INF = float("inf")
ROWS = {
    "own -inf": ([0.3, -INF, 2.0, 0.5], -INF),
    "all -inf": ([-INF] * 4, float("nan")),
    "another +inf": ([0.3, 1.0, INF, 0.5], float("nan")),
    "own +inf": ([0.3, INF, 2.0, 0.5], float("nan")),
    "NaN": ([0.3, 1.0, float("nan"), 0.5], float("nan")),
}


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("loss", ["ppo_clip", "cispo", "sapo", "gmpo", "vespo"])
def test_a_row_that_cannot_have_been_drawn_from_is_nan_and_no_other(backend: str, loss: str) -> None:
    config, batch = config_for(loss=loss), make_batch(0, (1, 1), vocab=4)
    batch.tokens[:] = 1
    for old in (True, False):
        for name, (row, logprob) in ROWS.items():
            batch.logits[1, 0] = torch.tensor(row)
            got = run(backend, batch, config, **({} if old else {"old_logprobs": None}))
            assert got.out.loss.isnan() and got.grad[1].isnan().all() and got.grad[0].isfinite().all(), (name, old)
            assert str(got.out.logprobs[1].item()) == str(logprob), (name, old)
            alone, _ = mdpgrpo_fast.token_logprobs(batch.logits.to(DEVICE), to(batch.tokens, DEVICE), backend=backend)
            assert str(alone[1].item()) == str(logprob) and alone[0].isfinite(), name
            # The same logits, of a head: the bias is what has them.
            hidden = torch.zeros(1, 1, 2, device=DEVICE).requires_grad_()
            one = batch.rows(slice(1, 2))
            one.kwargs = {k: v for k, v in one.kwargs.items() if old or k != "old_logprobs"}
            head = Head(torch.ones(4, 2, device=DEVICE), torch.tensor(row, device=DEVICE))
            out: Any = call_linear(backend, hidden, head, one, config)
            assert out.loss.isnan() and str(out.logprobs[0].item()) == str(logprob), (name, old, "linear")
            assert torch.autograd.grad(out.loss, hidden)[0].isnan().all(), (name, old, "linear")
    batch.logits[1, 0] = torch.tensor([0.3, 1.0, -INF, 0.5])
    got = run(backend, batch, config)
    assert got.out.loss.isfinite() and got.grad.isfinite().all() and got.grad[1, 0, 2] == 0, "of no probability"
