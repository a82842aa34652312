"""What has no sign is exactly 0 on every backend: rewards that equal the mean, terms that cancel; and rows of logits
that are no distribution, or give the token no probability: NaN on all of them alike."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from helpers.linear import Head
from helpers.linear import call as call_linear
from helpers.losses import ALL_BACKENDS, DEVICE, config_for, make_batch, run

import mdpgrpo_fast
from mdpgrpo_fast import reference
from mdpgrpo_fast.config import preset

SIZES = (2, 3, 5, 6, 7, 12, 32, 128)
LEVELS = (1, 3, 6, 7, 10)


def draws(count: int, seed: int = 0) -> list[tuple[int, list[tuple[int, list[int]]]]]:
    """G, and K and counts of satisfied constraints of as many groups of each K, in which many a reward is the mean."""
    g, found = torch.Generator().manual_seed(seed), []
    for size in SIZES:
        groups: list[tuple[int, list[int]]] = []
        for levels in LEVELS:
            counts = torch.randint(0, levels + 1, (count, size), generator=g)
            counts[::2, size // 2 :] = levels - counts[::2, : size - size // 2]
            counts[::2, 0] = levels // 2
            groups += [(levels, row) for row in counts.tolist()]
        found.append((size, groups))
    return found


@pytest.mark.parametrize("backend", ["reference", *ALL_BACKENDS])
def test_the_sign_of_z_is_that_of_exact_arithmetic(backend: str) -> None:
    """At the mean, A = 0 and β₊ in every preset of a z alone, whatever a sum of float rewards leaves."""
    zeros = 0
    for size, groups in draws(2 if backend == "triton" and DEVICE == "cpu" else 12):
        exact = [[Fraction(x) - Fraction(sum(row), size) for x in row] for _, row in groups]
        sign = torch.tensor([[(x > 0) - (x < 0) for x in row] for row in exact])
        zeros += int((sign == 0).sum())
        k, counts = torch.tensor([k for k, _ in groups]), torch.tensor([row for _, row in groups])
        for dtype in (torch.float64, torch.float32) if backend in ("reference", "torch") else (torch.float32,):
            rewards = (counts.double() / k[:, None]).to(dtype)
            for config in (
                preset("grpo", num_generations=size, kl_beta_neg=0.5, asymmetric_kl=True),
                preset("paper", num_generations=size, multi_temperature=False, goal_mean="mean"),
                preset("rloo", num_generations=size),
            ):
                if backend == "reference":
                    got = reference.advantages(rewards, k, config)
                else:
                    got = mdpgrpo_fast.advantages(rewards.to(DEVICE), k.to(DEVICE), config, backend=backend)
                where = (backend, size, dtype)
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
    batch = make_batch(0, (1, *(2,) * len(ROWS)), vocab=4)
    batch.tokens[:] = 1
    batch.logits[1:, 0] = torch.tensor([row for row, _ in ROWS.values()])
    own, logprobs = "own -inf", [str(x) for _, x in ROWS.values()]
    for old in (True, False):
        config = config_for(loss=loss, kl_gradient="plain" if old else "unbiased")
        more: dict[str, Any] = {} if old else {"old_logprobs": None}
        got, truth = run(backend, batch, config, **more), run("torch", batch, config, "cpu", **more)
        assert got.out.loss.isnan() and got.grad[1:, 0].isnan().all() and got.grad[:2].isnan().sum() == 4, old
        assert [str(x) for x in got.out.logprobs[1:, 0].tolist()] == logprobs, old
        for name in ("ratio", "kl"):
            assert torch.equal(getattr(got.out, name).isnan().cpu(), getattr(truth.out, name).isnan()), (name, old)
        assert got.out.ratio[1].isfinite().all() and not got.out.kl[1].isnan().any(), old
    # The same logits, of a head: the bias is what has them.
    for i, (row, logprob) in enumerate(ROWS.values()) if loss == "ppo_clip" else [(0, ROWS[own])]:
        hidden = torch.zeros(1, 2, 2, device=DEVICE).requires_grad_()
        head, one = Head(torch.ones(4, 2), torch.tensor(row)).to(DEVICE), batch.rows(slice(i + 1, i + 2))
        out: Any = call_linear(backend, hidden, head, one, config_for(loss=loss))
        assert out.loss.isnan() and str(out.logprobs[0, 0].item()) == str(logprob), (row, "linear")
        assert torch.autograd.grad(out.loss, hidden)[0].isnan().all(), (row, "linear")


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_log_probs_of_such_rows(backend: str) -> None:
    logits = torch.tensor([*(row for row, _ in ROWS.values()), [0.3, 1.0, -INF, 0.5]], device=DEVICE)
    found, _ = mdpgrpo_fast.token_logprobs(logits, torch.ones(6, dtype=torch.long, device=DEVICE), backend=backend)
    assert [str(x) for x in found[:-1].tolist()] == [str(x) for _, x in ROWS.values()] and found[-1].isfinite()
    batch = make_batch(0, (1, 1), vocab=4)
    batch.tokens[:], batch.logits[1, 0] = 1, logits[-1]
    got = run(backend, batch, config_for())
    assert got.out.loss.isfinite() and got.grad.isfinite().all() and got.grad[1, 0, 2] == 0, "of no probability"
