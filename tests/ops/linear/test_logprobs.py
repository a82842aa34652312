"""Log-probs from hidden states and a head, against the reference in float64 on logits that are built."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from helpers.inputs import LossInputs
from helpers.linear import BACKENDS, Head, budget, make_linear, relative, run
from helpers.losses import DEVICE, EACH, ROWS, config_for, packed, to

import mdpgrpo_fast
from mdpgrpo_fast import linear_token_logprobs

backends = pytest.mark.parametrize("backend", BACKENDS)


def logprobs(
    backend: str, batch: LossInputs, head: Head, frozen: bool = False, **more: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """ℓ, entropy and the gradients under another incoming gradient in every row."""
    hidden = batch.logits.detach().to(DEVICE).requires_grad_()
    leaves = head.to(DEVICE).leaves(frozen)
    more = {k: v if k == "lengths" else to(v, DEVICE) for k, v in {"mask": batch.mask, **more}.items()}
    found, entropy = linear_token_logprobs(
        hidden, leaves.weight, to(batch.tokens, DEVICE), bias=leaves.bias, logit_scale=head.logit_scale,
        backend=backend, **more,
    )  # fmt: skip
    incoming = torch.linspace(-1, 2, found.numel(), device=DEVICE).view_as(found).to(found.dtype)
    inputs = {"hidden": hidden} | ({} if frozen else {"weight": leaves.weight})
    inputs |= {} if frozen or leaves.bias is None else {"bias": leaves.bias}
    grads = torch.autograd.grad((found * incoming).sum(), list(inputs.values()))
    return found.detach(), entropy, dict(zip(inputs, grads, strict=True))


def expected_logprobs(batch: LossInputs, head: Head, dtype: torch.dtype, **more: Any) -> Any:
    hidden, leaves = batch.logits.detach().to(dtype).requires_grad_(), head.to("cpu", dtype).leaves()
    more = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in more.items()}
    more = {"mask": batch.mask, **more}
    found, entropy = mdpgrpo_fast.token_logprobs(leaves.logits(hidden), batch.tokens, backend="torch", **more)
    incoming = torch.linspace(-1, 2, found.numel()).view_as(found).to(found.dtype)
    inputs = {"hidden": hidden, "weight": leaves.weight, "bias": leaves.bias}
    inputs = {k: x for k, x in inputs.items() if x is not None}
    grads = torch.autograd.grad((found * incoming).sum(), list(inputs.values()))
    return found.detach(), entropy, dict(zip(inputs, grads, strict=True))


OPTIONS: list[dict[str, Any]] = [
    {}, {"mask": None}, {"temperature": 0.6}, {"temperature": EACH, "softcap": 4.0}, {"logit_floor": 3 * ROWS - 1},
    {"logit_floor": ROWS, "temperature": EACH, "softcap": 4.0},
]  # fmt: skip


@functools.cache
def case(dtype: str, option: int) -> tuple[LossInputs, Head, Any, Any]:
    batch, head = make_linear(1, dtype=dtype, bias=True, logit_scale=0.5)
    exact = expected_logprobs(batch, head, torch.float64, **OPTIONS[option])
    return batch, head, exact, expected_logprobs(batch, head, batch.logits.dtype, **OPTIONS[option])


@backends
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("frozen", [False, True])
def test_log_probs_and_their_gradient(backend: str, dtype: str, frozen: bool) -> None:
    """With a frozen head the backward pass has no matmul; with a trained one the logits are built again."""
    for option, more in enumerate(OPTIONS):
        batch, head, exact, own = case(dtype, option)
        for rows in (1, 100) if dtype == "float32" else (3,):
            got = logprobs(backend, batch, head, frozen, workspace_bytes=budget(head, rows), **more)
            eps = torch.finfo(batch.logits.dtype).eps
            for i in (0, 1):
                assert relative(got[i], exact[i]) <= 2 * relative(own[i], exact[i]) + eps + 1e-6
            for name, g in got[2].items():
                assert g.dtype == batch.logits.dtype
                assert relative(g, exact[2][name]) <= 2 * relative(own[2][name], exact[2][name]) + 2 * eps + 1e-5, name


@backends
def test_log_probs_of_packed_rows(backend: str) -> None:
    batch, head = make_linear(2)
    rows = packed(batch, seed=1, drop_masked=False)
    where = {"completion": rows.kwargs["completion"], "num_completions": 4, "temperature": EACH}
    got = logprobs(backend, rows, head, workspace_bytes=budget(head, 2), **where)
    truth = expected_logprobs(rows, head, torch.float64, **where)
    torch.testing.assert_close(got[0].cpu().double(), truth[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[2]["weight"].cpu().double(), truth[2]["weight"], rtol=1e-4, atol=1e-5)
    alone = logprobs(backend, rows, head, temperature=EACH[where["completion"]])
    torch.testing.assert_close(alone[0], got[0])


def test_log_probs_gradcheck() -> None:
    batch, head = make_linear(3, lengths=(2, 1), vocab=5, width=3, dtype="float64", bias=True)
    leaves = head.leaves()

    def function(hidden: Any, weight: Any, bias: Any) -> Any:
        return linear_token_logprobs(hidden, weight, batch.tokens, batch.mask, bias=bias, softcap=3.0,
                                     temperature=EACH[:2].double(), workspace_bytes=2 * 5 * 8)[0]  # fmt: skip

    inputs = (batch.logits.requires_grad_(), leaves.weight, leaves.bias)
    assert torch.autograd.gradcheck(function, inputs)


def test_log_probs_are_those_of_the_objective() -> None:
    """To the bit: the old policy's and the new one's differ by nothing on-policy."""
    batch, head = make_linear(4, lengths=(40, 33), vocab=501, width=32, dtype="bfloat16")
    batch.kwargs.clear()
    for backend in BACKENDS:
        scored = linear_token_logprobs(
            batch.logits.to(DEVICE), to(head.weight, DEVICE), to(batch.tokens, DEVICE), to(batch.mask, DEVICE),
            backend=backend, workspace_bytes=budget(head, 16),
        )  # fmt: skip
        out = run(backend, batch, head, config_for(), workspace_bytes=budget(head, 16)).out
        assert torch.equal(scored[0], out.logprobs) and torch.equal(scored[1], out.entropy)


@backends
@pytest.mark.parametrize("frozen", [False, True])
def test_what_comes_in_at_a_masked_row_stays_out(backend: str, frozen: bool) -> None:
    batch, head = make_linear(11)
    hidden, leaves = batch.logits.to(DEVICE).requires_grad_(), head.to(DEVICE).leaves(frozen)
    mask = batch.mask.to(DEVICE)
    ell, _ = linear_token_logprobs(hidden, leaves.weight, batch.tokens.to(DEVICE), mask, backend=backend)
    (g,) = torch.autograd.grad(ell, hidden, torch.where(mask, 1.0, math.inf))
    assert g.isfinite().all() and (g[~mask] == 0).all() and (g[mask] != 0).any()
