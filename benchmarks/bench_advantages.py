"""Advantages: the op alone, and what they cost inside the objective.

`pytest benchmarks/bench_advantages.py --benchmark-only`. `alone` is P groups of 8 rewards. `inside` is `token_loss`
with rewards= against the same with advantage= and kl_beta= computed before, timed in turn: `share_percent` is the
difference of the medians, `scatter_percent` the distance from the 10th to the 90th percentile of the calls.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import bench_token_loss as objective
import pytest
import torch
from harness import (
    CUDA,
    DEVICE,
    VALUE_TOLERANCE,
    Candidate,
    Measured,
    Results,
    Unavailable,
    auto_candidate,
    clock,
    own_backends,
    relative_error,
    release,
    require_backend,
    require_close,
)
from problems.token_loss import Problem, problem, shapes
from torch import Tensor

import mdpgrpo_fast
from mdpgrpo_fast import reference
from mdpgrpo_fast.config import MDPGRPOConfig

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = (8, 4096)
GROUP = 8
NAMES = ["reference", "compile", "liger", "trl", *own_backends()]


@pytest.fixture(scope="module")
def results() -> Results:
    return Results("advantages", "none: launches, not bytes", seconds=20)


# ---- alone ----------------------------------------------------------------------------------------------------------


def builders(rewards: Tensor, constraints: Tensor, config: MDPGRPOConfig) -> dict[str, Callable[[], Candidate]]:
    def on(backend: str) -> Candidate:
        if backend != "torch":
            require_backend(backend)
        return Candidate(lambda: mdpgrpo_fast.advantages(rewards, constraints, config, backend=backend))

    def compiled() -> Candidate:
        torch._dynamo.reset()
        function = torch.compile(lambda r: reference.advantages(r, constraints, config), dynamic=False)
        return Candidate(lambda: function(rewards))

    def absent() -> Candidate:
        raise Unavailable("has no function for advantages: they are part of a trainer's step")

    own = {name: partial(on, name) for name in own_backends()}
    return {"reference": partial(on, "torch"), "compile": compiled, "liger": absent, "trl": absent, **own}


@pytest.fixture(scope="module", params=PROMPTS)
def alone(request: Any, results: Results) -> Iterator[Measured]:
    g = torch.Generator(device=DEVICE).manual_seed(request.param)
    rewards = torch.randint(0, 5, (request.param, GROUP), generator=g, device=DEVICE) / 4
    constraints = torch.randint(1, 5, (request.param,), generator=g, device=DEVICE)
    config = MDPGRPOConfig(num_generations=GROUP)
    truth = reference.advantages(rewards.double(), constraints, config)

    def check(out: Any) -> dict[str, float]:
        worst = max(relative_error(getattr(out, n), getattr(truth, n)) for n in ("advantage", "kl_beta", "mean", "std"))
        return {"advantages_error": require_close("advantages", worst, VALUE_TOLERANCE)}

    row = {"case": "alone", "prompts": request.param, "group": GROUP}
    yield results.measure(f"alone-{request.param}x{GROUP}", row, builders(rewards, constraints, config), check)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(timer=clock)
def test_alone(benchmark: Any, results: Results, alone: Measured, name: str) -> None:
    results.replay(benchmark, alone, name)


# ---- inside the objective -------------------------------------------------------------------------------------------


def with_advantages(p: Problem, case: objective.Case, backend: str) -> Candidate:
    config, more = case.config, objective.knobs(p, case)
    adv = reference.advantages(p.rewards, p.num_constraints, config)
    advantage, beta = adv.advantage.flatten().contiguous(), adv.kl_beta.flatten().contiguous()

    def run() -> tuple[Tensor, Tensor]:
        x = p.leaf()
        out = mdpgrpo_fast.token_loss(
            x, p.tokens, p.mask, config, advantage=advantage, kl_beta=beta, backend=backend, **more
        )  # fmt: skip
        return out.loss, torch.autograd.grad(out.loss, x)[0]

    return Candidate(run)


def share(ours: dict[str, Any]) -> dict[str, float]:
    """What rewards= costs beyond advantage=, in percent of the latter, and the scatter of both."""
    given, rewards = ours["advantage="], ours["rewards="]
    scatter = statistics.mean((e["ms_high"] - e["ms_low"]) / e["ms"] for e in (given, rewards))
    return {
        "share_percent": round(100 * (rewards["ms"] - given["ms"]) / given["ms"], 2),
        "scatter_percent": round(100 * scatter, 2),
    }


SHAPES = shapes(only=((8192, 128256), (512, 128256)))


@pytest.fixture(scope="module", params=SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def inside(request: Any, results: Results) -> Iterator[Measured]:
    case = objective.Case("on-policy", *request.param)
    names = ["advantage=", "rewards="]
    if results.late():
        yield results.skip(f"inside-{case}", {"case": "inside", "tokens": case.tokens, "vocab": case.vocab}, names)
        return
    p = problem(*request.param)
    answer = objective.truth(p, case)
    name = auto_candidate()
    backend = "torch" if name == "reference" else name
    calls = {
        "advantage=": partial(with_advantages, p, case, backend),
        "rewards=": partial(objective.eager, p, case, backend),
    }
    measured = results.measure(
        f"inside-{case}", p.row("inside"), calls, lambda out: answer.check(*out, "loss"),
        logits_bytes=p.logits_bytes, poison=p.padded, seconds=1.5 if CUDA else 0.5,
    )  # fmt: skip
    if all("ms" in e for e in measured.entries.values()):
        results.document["results"][-1] |= share(measured.entries)
        results.write()
    yield measured
    release()


@pytest.mark.parametrize("name", ["advantage=", "rewards="])
@pytest.mark.benchmark(timer=clock)
def test_inside(benchmark: Any, results: Results, inside: Measured, name: str) -> None:
    results.replay(benchmark, inside, name)
