"""The objective on materialised logits, forward and gradient: ours, the reference eager and compiled, Liger, TRL.

`pytest benchmarks/bench_token_loss.py --benchmark-only`. All compute the same: one β, temperature 1, `grpo`
aggregation, k3, a KL not weighted by the ratio; but for `gemma`, with a temperature per completion and a soft-cap, and
the other losses, off-policy, with the aggregation that TRL gives them; `entropy` is on-policy with an entropy bonus,
`support` on-policy over the support of a truncated sampler.
Each is verified against the reference before it is timed. `copy` is the ceiling: the logits into memory that is there.
Bytes counted: one read and one write of the logits, whatever moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from harness import (
    CUDA,
    Candidate,
    Measured,
    Results,
    Unavailable,
    clock,
    own_backends,
    release,
    require_backend,
    require_gpu,
)
from problems.token_loss import Problem, Truth, peer, per_completion, problem, refuse_reference, shapes, trl_logprobs
from torch import Tensor

import mdpgrpo_fast
from mdpgrpo_fast import reference
from mdpgrpo_fast.config import MDPGRPOConfig

pytestmark = pytest.mark.filterwarnings("ignore")
BETA, EPSILON, SOFTCAP = 0.04, 0.2, 30.0
NAMES = [
    "copy",
    "reference",
    "compile",
    "liger",
    "trl",
    *own_backends(),
    *(f"{name} in place" for name in own_backends()),
]


# What TRL and Liger call a loss type; gmpo they do not have. cispo without a lower bound, as theirs.
LOSSES: dict[str, dict[str, Any]] = {
    "cispo": {"loss": "cispo", "aggregation": "dapo", "epsilon_low": 1.0},
    "sapo": {"loss": "sapo"},
    "gmpo": {"loss": "gmpo"},
    "luspo": {"loss": "luspo"},
    "vespo": {"loss": "vespo", "aggregation": "dapo"},
    "entropy": {"entropy_coef": 0.01},
    "support": {},
}
# Of logits with a deviation of 2: about one in forty is in the support.
FLOOR = 4.0


@dataclass(frozen=True)
class Case:
    name: str  # on-policy, off-policy, sequence, gemma, or of LOSSES
    tokens: int
    vocab: int
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.tokens}x{self.vocab}"

    @property
    def plain(self) -> bool:
        return self.name != "gemma"

    @property
    def off_policy(self) -> bool:
        return self.name not in ("on-policy", "gemma", "entropy", "support")

    @property
    def config(self) -> MDPGRPOConfig:
        if not self.plain:
            return MDPGRPOConfig(multi_temperature=False, temperature_objective="per_row")
        level = "sequence" if self.name == "sequence" else "token"
        return MDPGRPOConfig(
            multi_temperature=False, asymmetric_kl=False, kl_beta_pos=BETA, importance_level=level,
            **LOSSES.get(self.name, {}),
        )  # fmt: skip


def cases() -> list[Case]:
    found = []
    for i, (n_tokens, vocab) in enumerate(shapes()):
        # A compilation takes as long as all else: one size.
        found.append(Case("on-policy", n_tokens, vocab, compiled=i == 0))
        if i == 0:
            found += [Case(name, n_tokens, vocab) for name in ("off-policy", "sequence", *LOSSES)]
        if not CUDA or (n_tokens, vocab) == (8192, 256000):
            found.append(Case("gemma", n_tokens, vocab))
    return found


# ---- the arguments and the answer -----------------------------------------------------------------------------------


def knobs(p: Problem, case: Case) -> dict[str, Any]:
    """What all calls of ours have in common."""
    more: dict[str, Any] = {} if case.plain else {"temperature": p.temperature, "softcap": SOFTCAP}
    if case.name == "support":
        more["logit_floor"] = torch.full_like(p.old_logprobs, FLOOR)
    return {"old_logprobs": p.old_logprobs if case.off_policy else None, "ref_logprobs": p.ref_logprobs, **more}


def denominator_of(p: Problem, case: Case) -> float:
    lengths = p.mask.sum(1)
    return float(reference.default_denominator(lengths, case.config.aggregation, p.tokens.shape[1]))


def truth(p: Problem, case: Case) -> Truth:
    config = case.config
    adv = reference.advantages(p.rewards.double(), p.num_constraints, config)
    advantage, beta = adv.advantage.flatten(), adv.kl_beta.flatten()
    denominator = denominator_of(p, case)

    def loss(x: Tensor, i: int) -> Tensor:
        part = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in knobs(p, case).items()}
        return reference.token_loss(
            x, p.tokens[i : i + 1], None, config, advantage=advantage[i : i + 1], kl_beta=beta[i : i + 1],
            max_completion_length=p.tokens.shape[1], denominator=denominator, **part,
        ).loss  # fmt: skip

    values, gradients = per_completion(p, loss, lambda value, i: value)
    total = torch.stack(values).double().sum()
    # Advantages cancel in the sum: an error is one of the terms, not of what is left of them.
    return Truth(total, gradients, total.abs().item() + advantage.abs().mean().item())


# ---- candidates -----------------------------------------------------------------------------------------------------


def eager(p: Problem, case: Case, backend: str) -> Candidate:
    config, more = case.config, knobs(p, case)

    def run() -> tuple[Tensor, Tensor]:
        x = p.leaf()
        out = mdpgrpo_fast.token_loss(
            x, p.tokens, p.mask, config, rewards=p.rewards, num_constraints=p.num_constraints, backend=backend, **more
        )
        return out.loss, torch.autograd.grad(out.loss, x)[0]

    return Candidate(run)


def eager_reference(p: Problem, case: Case) -> Candidate:
    refuse_reference(p)
    return eager(p, case, "torch")


def own(p: Problem, case: Case, backend: str) -> Candidate:
    require_backend(backend)
    return eager(p, case, backend)


def copy(p: Problem) -> Candidate:
    """As many bytes as the logits have, into memory that has been written to before."""
    source = p.padded.flatten()[: p.logits.numel()]
    target = torch.empty_like(source).zero_()

    def run() -> None:
        target.copy_(source)

    return Candidate(run)


class _Head(torch.autograd.Function):
    """Logits as a model returns them, neither a leaf nor a view; their gradient is kept as it comes in."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: list[Tensor], caught: list[Tensor]) -> Tensor:
        ctx.caught = caught
        return logits[0].detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.caught.append(gradient)
        return None, None, None


def own_in_place(p: Problem, case: Case, backend: str) -> Candidate:
    """The gradient over the logits, which are put back before every call."""
    require_backend(backend)
    config, more = case.config, knobs(p, case)
    work, weight = torch.empty_like(p.padded), torch.zeros((), device=p.padded.device, requires_grad=True)

    def setup() -> None:
        work.copy_(p.padded)

    def run() -> tuple[Tensor, Tensor]:
        caught: list[Tensor] = []
        x = _Head.apply(weight, [work[:, :-1]], caught)
        out = mdpgrpo_fast.token_loss(
            x, p.tokens, p.mask, config, rewards=p.rewards, num_constraints=p.num_constraints, backend=backend,
            in_place=True, **more,
        )  # fmt: skip
        out.loss.backward()
        return out.loss, caught[0]

    return Candidate(run, setup)


def compiled_reference(p: Problem, case: Case) -> Candidate:
    if not case.compiled:
        raise Unavailable("compiled for one size only, as a compilation takes long")
    refuse_reference(p)
    torch._dynamo.reset()
    config, more = case.config, knobs(p, case)

    @partial(torch.compile, dynamic=False)
    def objective(x: Tensor) -> tuple[Tensor, ...]:
        adv = reference.advantages(p.rewards, p.num_constraints, config)
        out = reference.token_loss(
            x, p.tokens, p.mask, config, advantage=adv.advantage.flatten(), kl_beta=adv.kl_beta.flatten(),
            max_completion_length=p.tokens.shape[1], **more,
        )  # fmt: skip
        # All of it, so that nothing which ours computes is optimised away.
        return (out.loss, out.logprobs, out.entropy, out.kl, out.ratio, out.clipped_low, out.clipped_high,
                out.completion_kl, out.totals)  # fmt: skip

    def run() -> tuple[Tensor, Tensor]:
        x = p.leaf()
        loss, *_ = objective(x)
        return loss, torch.autograd.grad(loss, x)[0]

    return Candidate(run)


def given(p: Problem, case: Case) -> tuple[Tensor, float]:
    """Advantages (B,) and β as peers take them, computed outside of their time."""
    if not case.plain:
        raise Unavailable("has one temperature for all rows and no soft-cap")
    return reference.advantages(p.rewards, p.num_constraints, case.config).advantage.flatten().contiguous(), BETA


def liger(p: Problem, case: Case) -> Candidate:
    advantage, beta = given(p, case)
    require_gpu()
    if case.name in ("entropy", "gmpo", "support"):
        raise Unavailable("has no entropy bonus, no gmpo, no support")
    grpo = peer("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    loss_type = case.name if case.name in LOSSES else "grpo"
    high = 1 + EPSILON if case.name == "cispo" else EPSILON  # its bound is absolute
    mask, level = p.mask.long(), case.config.importance_level
    old = p.old_logprobs if case.off_policy else None

    def run() -> tuple[Tensor, Tensor]:
        x = p.padded.detach().requires_grad_()
        loss, _ = grpo(
            x, old, p.ref_logprobs, p.tokens, advantage, mask, temperature=1.0, beta=beta, eps_low=EPSILON,
            eps_high=high, inplace=False, loss_type=loss_type, importance_sampling_level=level, reduce=True,
        )  # fmt: skip
        return loss, torch.autograd.grad(loss, x)[0]

    return Candidate(run)


def trl(p: Problem, case: Case) -> Candidate:
    """TRL's log-probs of the logits, the rest in PyTorch on (B, L) as its trainer does."""
    advantage, beta = given(p, case)
    if case.name == "support":
        raise Unavailable("has no support")
    logprobs_of = trl_logprobs()
    config, layout, mask, denominator = case.config, reference.Layout(p.count), p.mask.float(), denominator_of(p, case)

    def run() -> tuple[Tensor, Tensor]:
        x = p.leaf()
        logprobs, entropy = logprobs_of(x, p.tokens, config.has_entropy_bonus)
        parts = reference.token_objective(
            logprobs, logprobs, entropy, p.mask, layout, config, advantage=layout.broadcast(advantage), kl_beta=beta,
            old_logprobs=p.old_logprobs if case.off_policy else None, ref_logprobs=p.ref_logprobs,
            sampling_logprobs=None, importance_weight=None, temperature=1.0, epsilon_low=config.epsilon_low,
            epsilon_high=config.epsilon_high, delta=None, entropy_coef=config.entropy_coef, entropy_floor=0.0,
        )  # fmt: skip
        loss = reference.aggregate(parts.per_token, mask, layout, config.aggregation, denominator)
        return loss, torch.autograd.grad(loss, x)[0]

    return Candidate(run)


def builders(p: Problem, case: Case) -> dict[str, Callable[[], Candidate]]:
    found: dict[str, Callable[[], Candidate]] = {
        "copy": partial(copy, p),
        "reference": partial(eager_reference, p, case),
        "compile": partial(compiled_reference, p, case),
        "liger": partial(liger, p, case),
        "trl": partial(trl, p, case),
    }
    for name in own_backends():
        found[name] = partial(own, p, case, name)
        found[f"{name} in place"] = partial(own_in_place, p, case, name)
    return found


@pytest.fixture(scope="module")
def results() -> Results:
    return Results("token_loss", "one read and one write of the logits", seconds=140)


@pytest.fixture(scope="module", params=cases(), ids=str)
def measured(request: Any, results: Results) -> Iterator[Measured]:
    case = request.param
    if results.late():
        yield results.skip(str(case), {"case": case.name, "tokens": case.tokens, "vocab": case.vocab}, NAMES)
        return
    p = problem(case.tokens, case.vocab)
    answer = truth(p, case)
    yield results.measure(
        str(case), p.row(case.name), builders(p, case), lambda out: {} if out is None else answer.check(*out, "loss"),
        n_bytes=2 * p.logits_bytes, logits_bytes=p.logits_bytes, poison=p.padded,
    )  # fmt: skip
    release()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(timer=clock)
def test_token_loss(benchmark: Any, results: Results, measured: Measured, name: str) -> None:
    results.replay(benchmark, measured, name)
