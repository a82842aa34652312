"""Log-probs and entropies from hidden states and lm_head: `scoring`, and with a gradient (`trained`, `frozen`).

`pytest benchmarks/bench_linear_logprobs.py --benchmark-only`. Ours, through logits, TRL's fused head, bare matmuls (one
to score, three with a trained head, two with a frozen one). Each is verified before it is timed, but for `matmuls`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from harness import CUDA, Candidate, Measured, Results, Unavailable, clock, release, require_backend
from problems.linear import LinearProblem, add_figures, bare_matmuls, problem, refuse_logits, shapes, truth
from problems.token_loss import peer
from torch import Tensor

import mdpgrpo_fast
from mdpgrpo_fast.ops import backends
from mdpgrpo_fast.ops.linear.losses import linear_token_logprobs

pytestmark = pytest.mark.filterwarnings("ignore")
OWN = list(backends.NAMES)
NAMES = ["matmuls", "logits", "trl", *OWN]
TRL_CHUNK = 32768  # what its trainer passes (trl.trainer.utils)
Output = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Case:
    name: str  # scoring, trained, frozen
    tokens: int
    vocab: int
    width: int

    def __str__(self) -> str:
        return f"{self.name}-{self.tokens}x{self.vocab}x{self.width}"

    @property
    def gradient(self) -> bool:
        return self.name != "scoring"

    @property
    def frozen(self) -> bool:
        return self.name != "trained"

    @property
    def matmuls(self) -> int:
        return {"scoring": 1, "frozen": 2, "trained": 3}[self.name]


def cases() -> list[Case]:
    found = []
    for i, shape in enumerate(shapes(2)):
        found += [Case(name, *shape) for name in (["scoring", "trained", "frozen"] if i == 0 else ["scoring"])]
    return found


def candidate(p: LinearProblem, case: Case, function: Callable[[Tensor, Tensor], Tensor]) -> Candidate:
    """Of a function from hidden states and weight to log-probs (B, L)."""

    def run() -> Output:
        hidden, weight = p.leaves(case.frozen)
        if not case.gradient:
            with torch.no_grad():
                return function(hidden.detach(), weight.detach()), None, None
        logprobs = function(hidden, weight)
        inputs = [hidden] if case.frozen else [hidden, weight]
        found = torch.autograd.grad((logprobs * p.incoming).sum(), inputs)
        return logprobs, found[0], found[1] if len(found) > 1 else None

    return Candidate(run)


def own(p: LinearProblem, case: Case, backend: str) -> Candidate:
    if backend == "torch" and CUDA:
        raise Unavailable("torch: a GPU runs the kernels")
    if backend == "cuda":
        raise Unavailable("the same as triton here")
    require_backend(backend)
    return candidate(p, case, lambda h, w: linear_token_logprobs(h, w, p.tokens, backend=backend)[0])


def through_logits(p: LinearProblem, case: Case) -> Candidate:
    refuse_logits(p, 3 if CUDA else 8)
    return candidate(p, case, lambda h, w: mdpgrpo_fast.token_logprobs(h @ w.t(), p.tokens)[0])


def trl(p: LinearProblem, case: Case) -> Candidate:
    function = peer("trl.kernels", "ChunkedLogProbFunction")
    rest = (None, p.tokens.flatten(), 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
    return candidate(p, case, lambda h, w: function.apply(h.flatten(0, 1), w, *rest)[0].view(p.tokens.shape))


def builders(p: LinearProblem, case: Case) -> dict[str, Callable[[], Candidate]]:
    return {
        "matmuls": partial(bare_matmuls, p, case.matmuls),
        "logits": partial(through_logits, p, case),
        "trl": partial(trl, p, case),
        **{name: partial(own, p, case, name) for name in OWN},
    }


@pytest.fixture(scope="module")
def results() -> Results:
    return Results("linear_logprobs", "none: TFLOP/s of the matmuls that are needed", seconds=40)


@pytest.fixture(scope="module", params=cases(), ids=str)
def measured(request: Any, results: Results) -> Iterator[Measured]:
    case = request.param
    sizes = {"case": case.name, "tokens": case.tokens, "vocab": case.vocab, "width": case.width}
    if results.late():
        yield results.skip(str(case), sizes, NAMES)
        return
    p = problem(case.tokens, case.vocab, case.width)
    expected = truth(p, lambda ell: (ell.detach(), p.incoming, ell.norm().item()), case.gradient, case.frozen)

    def check(out: Any) -> dict[str, float]:
        return {} if out is None else expected.check(out[0], out[1:], "logprobs")

    found = results.measure(str(case), p.row(case.name), builders(p, case), check)
    add_figures(results, found, p, case.matmuls)
    yield found
    release()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(timer=clock)
def test_linear_token_logprobs(benchmark: Any, results: Results, measured: Measured, name: str) -> None:
    results.replay(benchmark, measured, name)
