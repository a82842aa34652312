"""Log-probs of given tokens and entropies: one read of the logits (`scoring`), and with their gradient (`gradient`).

`pytest benchmarks/bench_logprobs.py --benchmark-only`. Ours, the reference eager and compiled, TRL's kernel, Liger's
(no entropy, no gradient), flash-attn's cross-entropy (no entropy; its loss is the negative log-prob). `gemma` has a
temperature per completion and a soft-cap. Bytes counted: scoring, one read of the logits; gradient, two reads and one
write, as the incoming gradient is known only after the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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

pytestmark = pytest.mark.filterwarnings("ignore")
SOFTCAP = 30.0
NAMES = ["reference", "compile", "liger", "trl", "flash_attn", *own_backends()]
Output = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Case:
    name: str  # scoring, gradient, gemma (with gradient)
    tokens: int
    vocab: int
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.tokens}x{self.vocab}"

    @property
    def plain(self) -> bool:
        return self.name != "gemma"

    @property
    def gradient(self) -> bool:
        return self.name != "scoring"


def cases() -> list[Case]:
    found = []
    for i, (n_tokens, vocab) in enumerate(
        shapes(only=((8192, 128256), (8192, 256000), (512, 128256), (65536, 128256)))
    ):
        found.append(Case("scoring", n_tokens, vocab))
        found.append(Case("gradient", n_tokens, vocab, compiled=i == 0))
        if not CUDA or (n_tokens, vocab) == (8192, 256000):
            found.append(Case("gemma", n_tokens, vocab))
    return found


def knobs(p: Problem, case: Case) -> dict[str, Any]:
    return {} if case.plain else {"temperature": p.temperature, "softcap": SOFTCAP}


def truth(p: Problem, case: Case) -> Truth:
    def logprobs(x: Tensor, i: int) -> Tensor:
        tau = 1.0 if case.plain else p.temperature[i : i + 1, None]
        return reference.token_logprobs(x, p.tokens[i : i + 1], tau, None if case.plain else SOFTCAP)[0]

    def weigh(value: Tensor, i: int) -> Tensor:
        return (value * p.weights[i : i + 1]).sum()

    values, gradients = per_completion(p, logprobs, weigh, case.gradient)
    value = torch.cat(values)
    return Truth(value, gradients, value.norm().item())


# ---- candidates -----------------------------------------------------------------------------------------------------


def candidate(
    case: Case, leaf: Callable[[], Tensor], weights: Tensor, function: Callable[[Tensor], Tensor]
) -> Candidate:
    """Of a function from logits to log-probs; with the gradient of their weighted sum where the case has one."""

    def run() -> Output:
        if not case.gradient:
            with torch.no_grad():
                return function(leaf().detach()), None
        x = leaf()
        logprobs = function(x)
        return logprobs, torch.autograd.grad(logprobs, x, weights)[0]

    return Candidate(run)


def eager(p: Problem, case: Case, backend: str) -> Candidate:
    more = knobs(p, case)

    def logprobs(x: Tensor) -> Tensor:
        return mdpgrpo_fast.token_logprobs(x, p.tokens, p.mask, backend=backend, **more)[0]

    return candidate(case, p.leaf, p.weights, logprobs)


def eager_reference(p: Problem, case: Case) -> Candidate:
    refuse_reference(p)
    return eager(p, case, "torch")


def own(p: Problem, case: Case, backend: str) -> Candidate:
    require_backend(backend)
    return eager(p, case, backend)


def compiled_reference(p: Problem, case: Case) -> Candidate:
    if not case.compiled:
        raise Unavailable("compiled for one size only, as a compilation takes long")
    refuse_reference(p)
    torch._dynamo.reset()

    @partial(torch.compile, dynamic=False)
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.token_logprobs(x, p.tokens)

    return candidate(case, p.leaf, p.weights, lambda x: both(x)[0])


def require_plain(case: Case) -> None:
    if not case.plain:
        raise Unavailable("has one temperature for all rows and no soft-cap")


def trl(p: Problem, case: Case) -> Candidate:
    require_plain(case)
    function = trl_logprobs()
    return candidate(case, p.leaf, p.weights, lambda x: function(x, p.tokens)[0])


def liger(p: Problem, case: Case) -> Candidate:
    require_plain(case)
    if case.gradient:
        raise Unavailable("Liger's fused_selective_log_softmax has no gradient")
    require_gpu()
    function = peer("liger_kernel.transformers.grpo_loss", "fused_selective_log_softmax")
    mask = p.mask.long()
    return candidate(case, lambda: p.padded, p.weights, lambda x: function(x, p.tokens, 1.0, mask))


def flash_attn(p: Problem, case: Case) -> Candidate:
    require_plain(case)
    require_gpu()
    function = peer("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    b, width, vocab = p.padded.shape
    labels = F.pad(p.tokens, (0, 1), value=-100).flatten()  # the last position of each completion is ignored

    def leaf() -> Tensor:
        return p.padded.detach().requires_grad_()

    def logprobs(x: Tensor) -> Tensor:
        return -function(x.view(b * width, vocab), labels)[0].view(b, width)[:, :-1]

    return candidate(case, leaf, p.weights, logprobs)


def builders(p: Problem, case: Case) -> dict[str, Callable[[], Candidate]]:
    return {
        "reference": partial(eager_reference, p, case),
        "compile": partial(compiled_reference, p, case),
        "liger": partial(liger, p, case),
        "trl": partial(trl, p, case),
        "flash_attn": partial(flash_attn, p, case),
        **{name: partial(own, p, case, name) for name in own_backends()},
    }


@pytest.fixture(scope="module")
def results() -> Results:
    return Results("logprobs", "scoring: one read of the logits; gradient: two reads and one write", seconds=40)


@pytest.fixture(scope="module", params=cases(), ids=str)
def measured(request: Any, results: Results) -> Iterator[Measured]:
    case = request.param
    if results.late():
        yield results.skip(str(case), {"case": case.name, "tokens": case.tokens, "vocab": case.vocab}, NAMES)
        return
    p = problem(case.tokens, case.vocab)
    answer = truth(p, case)
    yield results.measure(
        str(case), p.row(case.name), builders(p, case), lambda out: answer.check(*out, "logprobs"),
        n_bytes=(3 if case.gradient else 1) * p.logits_bytes, logits_bytes=p.logits_bytes,
        poison=p.padded if case.gradient else None,
    )  # fmt: skip
    release()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(timer=clock)
def test_token_logprobs(benchmark: Any, results: Results, measured: Measured, name: str) -> None:
    results.replay(benchmark, measured, name)
