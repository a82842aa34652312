"""The objective from hidden states and lm_head, forward and gradients: ours, through logits, Liger, TRL, bare matmuls.

`pytest benchmarks/bench_linear_token_loss.py --benchmark-only`. All compute the same: one β, temperature 1, `dapo`
aggregation, k3, a KL not weighted by the ratio. Cases: trained head, frozen head, ratio per completion (trained), all
off-policy; and with a temperature per completion (`two temperatures`), which only ours has. Each is verified before it
is timed, but for `matmuls`, which has no result: the multiplications that cannot be avoided, alone.
`logits` is `token_loss` on logits built as a whole. Peak MB is what a call allocates, its gradients included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from harness import CUDA, Candidate, Measured, Results, Unavailable, clock, release, require_backend, require_gpu
from problems.linear import (
    GPU_SHAPES,
    LinearProblem,
    LinearTruth,
    add_figures,
    bare_matmuls,
    problem,
    refuse_logits,
    shapes,
    truth,
)
from problems.token_loss import peer
from torch import Tensor

import mdpgrpo_fast
from mdpgrpo_fast import reference
from mdpgrpo_fast.config import MDPGRPOConfig
from mdpgrpo_fast.ops import backends
from mdpgrpo_fast.ops.linear.losses import linear_token_loss

pytestmark = pytest.mark.filterwarnings("ignore")
BETA, EPSILON = 0.04, 0.2
OWN = list(backends.NAMES)
# On a GPU the kernels with other workspaces too, by their GiB.
WORKSPACES = {f"triton {gib} GiB": int(gib * 2**30) for gib in ((0.25, 4) if CUDA else ())}
NAMES = ["matmuls", "logits", "liger", "liger logits", "trl", *OWN, *WORKSPACES]
PEER_TOKENS = 32768  # above it a peer takes seconds a call
Output = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Case:
    name: str  # trained, frozen, sequence, two temperatures
    tokens: int
    vocab: int
    width: int

    def __str__(self) -> str:
        return f"{self.name}-{self.tokens}x{self.vocab}x{self.width}"

    @property
    def frozen(self) -> bool:
        return self.name == "frozen"

    @property
    def matmuls(self) -> int:
        return 2 if self.frozen else 3

    @property
    def plain(self) -> bool:
        return self.name != "two temperatures"

    @property
    def config(self) -> MDPGRPOConfig:
        level = "sequence" if self.name == "sequence" else "token"
        objective = "paper" if self.plain else "per_row"
        return MDPGRPOConfig(
            multi_temperature=False, aggregation="dapo", importance_level=level, temperature_objective=objective
        )  # type: ignore[arg-type]  # fmt: skip


def cases() -> list[Case]:
    found = []
    for i, shape in enumerate(shapes(len(GPU_SHAPES))):
        names = ["trained", "frozen"] if not CUDA or i == 0 else ["trained"]
        names += (["two temperatures"] if CUDA else ["sequence", "two temperatures"]) if i == 0 else []
        found += [Case(name, *shape) for name in names]
    return found


def knobs(p: LinearProblem, case: Case) -> dict[str, Any]:
    more = {} if case.plain else {"temperature": p.temperature}
    recorded = {"old_logprobs": p.old_logprobs, "ref_logprobs": p.ref_logprobs}
    return {"advantage": p.advantage, "kl_beta": BETA, **recorded, **more}


def answer(p: LinearProblem, case: Case) -> LinearTruth | None:
    """None for what the log-probs at one temperature do not answer: it is proven in the tests."""
    if not case.plain:
        return None
    config, keep = case.config, torch.ones_like(p.tokens, dtype=torch.bool)
    layout = reference.Layout(len(p.tokens))

    def weigh(ell: Tensor) -> tuple[Tensor, Tensor, float]:
        parts = reference.token_objective(
            ell, ell, keep, layout, advantage=p.advantage[:, None], kl_beta=BETA, old_logprobs=p.old_logprobs,
            ref_logprobs=p.ref_logprobs, importance_weight=None, temperature=1.0, epsilon_low=EPSILON,
            epsilon_high=EPSILON, delta=None, importance_level=config.importance_level, kl_estimator="k3",
            rescale_per_row=False,
        )  # fmt: skip
        loss = parts.per_token.sum() / ell.numel()
        (c,) = torch.autograd.grad(loss, ell)
        return loss.detach(), c, p.advantage.abs().mean().item()

    return truth(p, weigh, True, case.frozen)


# ---- candidates -----------------------------------------------------------------------------------------------------


def finish(loss: Tensor, hidden: Tensor, weight: Tensor) -> Output:
    """Gradients of what is trained."""
    inputs = [hidden, weight] if weight.requires_grad else [hidden]
    found = torch.autograd.grad(loss, inputs)
    return loss, found[0], found[1] if len(found) > 1 else None


def own(p: LinearProblem, case: Case, backend: str, workspace_bytes: int | None = None) -> Candidate:
    if backend == "torch" and CUDA:
        raise Unavailable("torch: a GPU runs the kernels")
    if backend == "cuda":
        raise Unavailable("the same as triton here")
    require_backend(backend)

    def run() -> Output:
        hidden, weight = p.leaves(case.frozen)
        out = linear_token_loss(
            hidden, weight, p.tokens, None, case.config, backend=backend, workspace_bytes=workspace_bytes,
            **knobs(p, case),
        )  # fmt: skip
        return finish(out.loss, hidden, weight)

    return Candidate(run)


def through_logits(p: LinearProblem, case: Case) -> Candidate:
    refuse_logits(p, 3 if CUDA else 8)

    def run() -> Output:
        hidden, weight = p.leaves(case.frozen)
        out = mdpgrpo_fast.token_loss(hidden @ weight.t(), p.tokens, None, case.config, **knobs(p, case))
        return finish(out.loss, hidden, weight)

    return Candidate(run)


def require_peer(case: Case) -> None:
    if not case.plain:
        raise Unavailable("has one temperature for all rows")
    if CUDA and case.tokens > PEER_TOKENS:
        raise Unavailable(f"not run above {PEER_TOKENS} tokens, for its time")


def liger(p: LinearProblem, case: Case) -> Candidate:
    """Liger's chunked loss, which computes a frozen head's gradient too. Compiled on a GPU, as is its default."""
    require_peer(case)
    if CUDA and case.name != "trained":
        raise Unavailable("the same as with a trained head, and half a second a call")
    module = peer("liger_kernel.chunked_loss.grpo_loss", "LigerFusedLinearGRPOLoss")
    loss_of = module(
        beta=BETA, compiled=CUDA, use_ref_model=True, epsilon_low=EPSILON, epsilon_high=EPSILON, loss_type="dapo",
        importance_sampling_level=case.config.importance_level,
    )  # fmt: skip
    mask = torch.ones(p.tokens.shape, device=p.hidden.device)

    def run() -> Output:
        hidden, weight = p.leaves(case.frozen)
        loss, _ = loss_of(
            hidden, weight, p.tokens, mask, p.advantage, ref_per_token_logps=p.ref_logprobs,
            old_per_token_logps=p.old_logprobs,
        )  # fmt: skip
        return finish(loss, hidden, weight)

    return Candidate(run)


def liger_logits(p: LinearProblem, case: Case) -> Candidate:
    """Liger's Triton loss on logits: it wants a position more, which costs nothing here."""
    require_peer(case)
    require_gpu()
    refuse_logits(p, 3)
    grpo = peer("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    mask = torch.ones_like(p.tokens)

    def run() -> Output:
        hidden, weight = p.leaves(case.frozen)
        padded = torch.cat([hidden, hidden[:, :1]], 1) @ weight.t()
        loss, _ = grpo(
            padded, p.old_logprobs, p.ref_logprobs, p.tokens, p.advantage, mask, temperature=1.0, beta=BETA,
            eps_low=EPSILON, eps_high=EPSILON, inplace=True, loss_type="dapo",
            importance_sampling_level=case.config.importance_level, reduce=True,
        )  # fmt: skip
        return finish(loss, hidden, weight)

    return Candidate(run)


def trl(p: LinearProblem, case: Case) -> Candidate:
    """TRL's fused head gives log-probs; the objective on them in PyTorch, as its trainer does. Its own chunk width."""
    require_peer(case)
    function = peer("trl.kernels", "ChunkedLogProbFunction")
    layout, mask = reference.Layout(len(p.tokens)), torch.ones(p.tokens.shape, device=p.hidden.device)

    def run() -> Output:
        hidden, weight = p.leaves(case.frozen)
        logprobs, *_ = function.apply(
            hidden.flatten(0, 1), weight, None, p.tokens.flatten(), 1.0, TRL_CHUNK, None, 1.0, ("entropy",)
        )
        logprobs = logprobs.view(p.tokens.shape)
        ratio = reference.importance_ratio(logprobs, p.old_logprobs, mask, layout, case.config.importance_level)
        objective, _, _ = reference.clipped_objective(ratio, layout.broadcast(p.advantage), EPSILON, EPSILON, None)
        kl, _ = reference.kl_penalty(logprobs, p.ref_logprobs, "k3")
        return finish((BETA * kl - objective).sum() / mask.sum(), hidden, weight)

    return Candidate(run)


TRL_CHUNK = 32768  # what its trainer passes (trl.trainer.utils)


def builders(p: LinearProblem, case: Case) -> dict[str, Callable[[], Candidate]]:
    return {
        "matmuls": partial(bare_matmuls, p, case.matmuls),
        "logits": partial(through_logits, p, case),
        "liger": partial(liger, p, case),
        "liger logits": partial(liger_logits, p, case),
        "trl": partial(trl, p, case),
        **{name: partial(own, p, case, name) for name in OWN},
        **{name: partial(own, p, case, "triton", n) for name, n in WORKSPACES.items()},
    }


@pytest.fixture(scope="module")
def results() -> Results:
    return Results("linear_token_loss", "none: TFLOP/s of the matmuls that are needed", seconds=120)


@pytest.fixture(scope="module", params=cases(), ids=str)
def measured(request: Any, results: Results) -> Iterator[Measured]:
    case = request.param
    sizes = {"case": case.name, "tokens": case.tokens, "vocab": case.vocab, "width": case.width}
    if results.late():
        yield results.skip(str(case), sizes, NAMES)
        return
    p = problem(case.tokens, case.vocab, case.width)
    expected = answer(p, case)

    def check(out: Any) -> dict[str, float]:
        return {} if out is None or expected is None else expected.check(out[0], out[1:], "loss")

    found = results.measure(str(case), p.row(case.name), builders(p, case), check)
    add_figures(results, found, p, case.matmuls)
    yield found
    release()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(timer=clock)
def test_linear_token_loss(benchmark: Any, results: Results, measured: Measured, name: str) -> None:
    results.replay(benchmark, measured, name)
