"""The objective from hidden states and a head, against the reference in float64 on logits that are built."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.inputs import LossInputs
from helpers.linear import (
    BACKENDS,
    Head,
    Result,
    assert_agrees,
    assert_matches,
    budget,
    call,
    make_linear,
    materialised,
    run,
    truths,
)
from helpers.losses import (
    DEVICE,
    EACH,
    GIVEN,
    LENGTHS,
    OPTIONS,
    REWARDS,
    SIZE,
    config_for,
    levels_of,
    packed,
    packed_order,
    pick_options,
    to,
)

from mdpgrpo_fast import linear_token_logprobs
from mdpgrpo_fast.config import MDPGRPOConfig

LEVELS = ["token", "sequence"]
backends = pytest.mark.parametrize("backend", BACKENDS)
levels = pytest.mark.parametrize("level", LEVELS)
Case = tuple[LossInputs, Head, MDPGRPOConfig, dict[str, Any], tuple[Result, Result]]


# ---- the same numbers as the reference ------------------------------------------------------------------------------


@functools.cache
def option_case(option: str, level: Any) -> Case:
    knobs, more = OPTIONS[option]
    batch, head = make_linear(1, bias=option == "plain")
    batch.mask = more.get("mask", batch.mask)
    batch.tokens = batch.tokens.to(more.get("tokens", torch.int64))
    more = {k: v for k, v in more.items() if k not in ("mask", "tokens")}
    config = config_for(importance_level=level, **knobs)
    return batch, head, config, more, truths(batch, head, config, **more)


@backends
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_at_both_levels(backend: str, option: str) -> None:
    """In chunks of one row, of three, and in one: the same within the budget."""
    for level in levels_of(option):
        batch, head, config, more, expected = option_case(option, level)
        # Row by row is slow in Triton's interpreter: there where it is another path, with completions divided.
        slow = backend == "triton" and DEVICE == "cpu"
        for rows in ((1,) if level == "sequence" else (3,)) if slow else (1, 3, 100):
            size = budget(head, rows)
            assert_matches(backend, batch, head, config, expected, workspace_bytes=size, **more)


@backends
@pytest.mark.parametrize(("dtype", "fp32_logits"), [("float32", False), ("bfloat16", False), ("bfloat16", True),
                                                    ("float16", False), ("float16", True)])  # fmt: skip
def test_precisions(backend: str, dtype: str, fp32_logits: bool) -> None:
    """Bias, scale and soft-cap too. Logits in float32 give log-probs as good as float32's."""
    batch, head = make_linear(2, dtype=dtype, bias=True, logit_scale=0.5)
    for temperature in (1.0, EACH):
        more = {"temperature": temperature, "softcap": 6.0}
        expected = truths(batch, head, config_for(), **more)
        for rows in (2, 100):
            more |= {"workspace_bytes": budget(head, rows, fp32_logits), "fp32_logits": fp32_logits}
            assert_matches(backend, batch, head, config_for(), expected, **more)


@backends
@pytest.mark.parametrize(
    ("aggregation", "level"), [("grpo", "token"), ("dapo", "sequence"), ("dr_grpo", "token"), ("bnpo", "sequence")]
)
def test_aggregations_and_denominators(backend: str, aggregation: Any, level: Any) -> None:
    batch, head = make_linear(3)
    config = config_for(aggregation=aggregation, importance_level=level)
    for denominator in (None, 7.0, torch.tensor(7.0), 0.25):
        assert_matches(backend, batch, head, config, denominator=denominator, workspace_bytes=budget(head, 2))


@functools.cache
def mixed_case(seed: int) -> Case:
    given, config, more = pick_options(seed)
    lengths = tuple(given.mask.bool().sum(1).tolist()) if given.tokens.ndim == 2 else LENGTHS
    if given.tokens.ndim == 1:
        lengths = tuple(given.kwargs["completion"].bincount(minlength=given.kwargs["num_completions"]).tolist())
    dtype = str(given.logits.dtype).removeprefix("torch.")
    batch, head = make_linear(seed, lengths, vocab=[37, 130][seed % 2], dtype=dtype, bias=seed % 3 == 0,
                              logit_scale=[1.0, 0.5][seed % 2])  # fmt: skip
    keep = set(given.kwargs) & {"old_logprobs", "ref_logprobs"}
    batch.kwargs = {k: v for k, v in batch.kwargs.items() if k in keep}
    more |= {k: given.kwargs[k] for k in ("denominator", "softcap") if k in given.kwargs}
    for k in ("temperature", "epsilon_low", "epsilon_high"):
        value = given.kwargs.get(k)
        if value is not None and getattr(value, "ndim", 0) < 2 and given.tokens.ndim == 2:
            more[k] = value
    batch = packed(batch, seed, drop_masked=seed % 4 == 1) if given.tokens.ndim == 1 else batch
    return batch, head, config, more, truths(batch, head, config, **more)


@backends
@pytest.mark.parametrize("seed", range(10))
def test_mixtures_of_options(backend: str, seed: int) -> None:
    """Everything `token_loss` takes at once, both layouts, every dtype, bias and scale, and chunks of any size."""
    batch, head, config, more, expected = mixed_case(seed)
    size = budget(head, [1, 2, 3, 5, 100][seed % 5])
    assert_matches(backend, batch, head, config, expected, workspace_bytes=size, skip_idle=False, **more)


@backends
@levels
def test_packed_rows_in_any_order(backend: str, level: Any) -> None:
    batch, head = make_linear(4)
    config = config_for(importance_level=level)
    whole = run(backend, batch, head, config)
    for drop in (True, False):
        rows = packed(batch, seed=4, drop_masked=drop)
        got = assert_matches(backend, rows, head, config, workspace_bytes=budget(head, 3))
        order = packed_order(batch, seed=4, drop_masked=drop).to(DEVICE)
        torch.testing.assert_close(got.out.loss, whole.out.loss, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(got.out.logprobs, whole.out.logprobs.flatten()[order], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            got.grads["hidden"], whole.grads["hidden"].flatten(0, 1)[order], rtol=1e-4, atol=1e-6
        )


@backends
@levels
def test_as_many_rows_as_completions(backend: str, level: Any) -> None:
    """Then a knob is per completion, and recorded log-probs are per row all the same."""
    batch, head = make_linear(5, lengths=(3, 0, 1))
    rows = packed(batch, seed=2)
    assert rows.tokens.numel() == 4
    rows.kwargs["num_completions"] = 4
    given = {"advantage": torch.tensor([0.5, -0.3, 0.8, 1.0]), "temperature": EACH}
    for old in (rows.kwargs["old_logprobs"], None):
        more = {**given, "old_logprobs": old, "importance_weight": torch.tensor([0.5, 2.0, 1.0, 1.5])}
        config = config_for(importance_level=level)
        assert_matches(backend, rows, head, config, kl_beta=0.1, workspace_bytes=budget(head, 3), **more)


@backends
@levels
def test_rewards(backend: str, level: Any) -> None:
    batch, head = make_linear(5)
    assert_matches(backend, batch, head, config_for(importance_level=level), **GIVEN, **REWARDS)


@levels
@pytest.mark.parametrize("option", ["plain", "kl_at_another_temperature", "corrected", "softcap", "delta", "on_policy"])
def test_gradcheck(option: str, level: Any) -> None:
    """By finite differences in float64, chunk by chunk; the noise of the batch keeps ratios off the clip's corners."""
    knobs, more = OPTIONS[option]
    batch, head = make_linear(6, lengths=(2, 1), vocab=5, width=3, dtype="float64", bias=True)
    more = {k: v[:2] if getattr(v, "ndim", 0) else v for k, v in more.items()}
    config = config_for(importance_level=level, **knobs)
    if option == "on_policy":
        # Its gradient at ρ = 1 is not that of a constant ρ: fix ℓ_old where it is.
        with torch.no_grad():
            more["old_logprobs"] = call("torch", batch.logits, head, batch, config, **more).logprobs
        config = replace(config, epsilon_low=0.5, epsilon_high=0.5)

    def loss(hidden: Any, weight: Any, bias: Any) -> Any:
        size = 2 * 5 * 8
        return call("torch", hidden, replace(head, weight=weight, bias=bias), batch, config, workspace_bytes=size,
                    **more).loss  # fmt: skip

    leaves = head.leaves()
    assert torch.autograd.gradcheck(loss, (batch.logits.requires_grad_(), leaves.weight, leaves.bias), atol=1e-6)


@levels
def test_float64_is_exact_in_every_chunking(level: Any) -> None:
    batch, head = make_linear(7, lengths=(5, 3, 1, 4), dtype="float64", bias=True)
    config = config_for(importance_level=level, delta=1.5)
    truth = materialised(batch, head, config, temperature=EACH.double(), softcap=4.0)
    for rows in (*range(1, batch.tokens.numel() + 1), 1000):
        size = budget(head, rows)
        got = run("torch", batch, head, config, "cpu", temperature=EACH.double(), softcap=4.0, workspace_bytes=size)
        torch.testing.assert_close(got.out.loss, truth.out.loss, rtol=1e-12, atol=1e-13)
        for name, g in got.grads.items():
            torch.testing.assert_close(g, truth.grads[name], rtol=1e-10, atol=1e-13)


@backends
def test_shapes_at_the_edges(backend: str) -> None:
    """A vocabulary of one, of a tile and one column more, a width of one, a single row (verl#2656, verl#2899)."""
    for vocab, width in ((1, 4), (2, 1), (129, 5), (1025, 3)):
        batch, head = make_linear(8, lengths=(2, 1), vocab=vocab, width=width)
        assert_matches(backend, batch, head, config_for(), workspace_bytes=budget(head, 2))
    batch, head = make_linear(8, lengths=(1, 0))
    assert_matches(backend, batch, head, config_for())


@backends
@levels
def test_nothing_counts(backend: str, level: Any) -> None:
    """No unmasked token, no row, no completion: loss 0, gradients 0, no NaN."""
    for batch, head in (make_linear(9), make_linear(9, lengths=(1, 1))):
        batch.mask = torch.zeros_like(batch.mask)
        if batch.tokens.shape[0] == 2:
            batch = replace(batch.rows(slice(0, 0)), kwargs={k: v[:0] for k, v in batch.kwargs.items()})
        got = run(backend, batch, head, config_for(importance_level=level))
        assert got.out.loss == 0 and got.out.totals.isfinite().all()
        assert all((g == 0).all() for g in got.grads.values()) and set(got.grads) == {"hidden", "weight"}


@backends
def test_masked_rows_may_hold_anything(backend: str) -> None:
    batch, head = make_linear(10)
    clean = run(backend, batch, head, config_for())
    batch.logits = batch.logits.masked_fill(~batch.mask[..., None], math.nan)
    for name in ("old_logprobs", "ref_logprobs"):
        batch.kwargs[name] = batch.kwargs[name].masked_fill(~batch.mask, math.nan)
    got = run(backend, batch, head, config_for())
    assert torch.equal(got.out.loss, clean.out.loss) and torch.equal(got.grads["weight"], clean.grads["weight"])
    assert torch.equal(got.grads["hidden"], clean.grads["hidden"])


@backends
def test_strided_states(backend: str) -> None:
    """A model's hidden states without their last position are a view (trl's `[:, :-1]`), and so may a weight be."""
    batch, head = make_linear(11)
    wide = torch.full((SIZE[0], SIZE[1] + 1, 16), math.nan, device=DEVICE)
    wide[:, :-1, :8] = batch.logits.to(DEVICE)
    wide.requires_grad_()
    weight = torch.full((37, 12), math.nan, device=DEVICE)
    weight[:, :8] = head.weight.to(DEVICE)
    plain = run(backend, batch, head, config_for())
    view = replace(head, weight=weight[:, :8].requires_grad_())
    out = call(backend, wide[:, :-1, :8], view, batch, config_for())
    g, gw = torch.autograd.grad(out.loss, (wide, view.weight))
    torch.testing.assert_close(out.loss, plain.out.loss)
    torch.testing.assert_close(g[:, :-1, :8], plain.grads["hidden"])
    torch.testing.assert_close(gw, plain.grads["weight"])
    assert (g[:, -1] == 0).all() and (g[..., 8:] == 0).all()


def test_frozen_parts_get_no_gradient_and_no_memory() -> None:
    batch, head = make_linear(15, bias=True)
    both = run("torch", batch, head, config_for())
    frozen = run("torch", batch, head, config_for(), frozen=True)
    assert set(frozen.grads) == {"hidden"} and torch.equal(frozen.grads["hidden"], both.grads["hidden"])
    leaves = head.leaves()
    out = call("torch", batch.logits, leaves, batch, config_for())
    g = torch.autograd.grad(out.loss, leaves.weight)[0]
    torch.testing.assert_close(g, both.grads["weight"].cpu())
    torch.testing.assert_close(out.loss, both.out.loss.cpu())
    with torch.no_grad():
        assert torch.equal(call("torch", batch.logits, leaves, batch, config_for()).loss, out.loss)


@backends
@pytest.mark.parametrize("option", ["top_entropy", "gmpo", "unbiased"])
def test_a_frozen_heads_unit_gradient_waits_for_the_weights(backend: str, option: str) -> None:
    """In chunks of three rows, all of which have to be scored before one of them has a weight."""
    knobs, more = OPTIONS[option]
    batch, head = make_linear(16, lengths=(5, 3, 1, 4))
    for index in (None, torch.tensor([True, False, True, True])):
        batch.mask = batch.mask if index is None else batch.mask & index[:, None]
        config = config_for(**{"importance_level": levels_of(option)[-1], **knobs})
        truth, own = truths(batch, head, config, **more)
        got = run(backend, batch, head, config, frozen=True, workspace_bytes=budget(head, 3), **more)
        assert_agrees(got, Result(truth.out, {"hidden": truth.grads["hidden"]}), own, torch.float32)


# ---- values that nobody looked at -----------------------------------------------------------------------------------


@backends
def test_a_nan_is_never_lost(backend: str) -> None:
    """In a hidden state, a weight or a knob that is not looked at: the loss says so."""
    batch, head = make_linear(11, lengths=(2, 2))
    spoilt = batch.logits.clone()
    spoilt[0, 0, 0] = math.nan
    for old in (batch.kwargs["old_logprobs"], None):
        got = run(backend, replace(batch, logits=spoilt), head, config_for(), old_logprobs=old, ref_logprobs=None)
        assert got.out.loss.isnan() and got.grads["weight"].isnan().any()
    for name, value in (("temperature", torch.tensor([1.0, -1.0])), ("advantage", torch.tensor([math.nan, 1.0])),
                        ("epsilon_low", torch.tensor([math.nan, 0.2]))):  # fmt: skip
        if backend == "torch" and name != "advantage":
            continue  # the reference's own way with them
        got = run(backend, batch, head, config_for(), **{name: value}, check_values=False)
        assert got.out.loss.isnan(), name


@backends
@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")
def test_bad_indices_that_are_not_looked_at_give_nan(backend: str) -> None:
    """A token or a completion that does not exist: a NaN loss, not a plausible number and not a crash."""
    batch, head = make_linear(11, lengths=(2, 2))
    for token in (37, -1):
        wrong = replace(batch, tokens=batch.tokens.clone().index_fill_(1, torch.tensor([1]), token))
        got = run(backend, wrong, head, config_for(), check_values=False)
        assert got.out.loss.isnan() and got.out.logprobs[:, 1].isnan().all()
        scored = linear_token_logprobs(to(batch.logits, DEVICE), to(head.weight, DEVICE), to(wrong.tokens, DEVICE),
                                       to(batch.mask, DEVICE), backend=backend, check_values=False)  # fmt: skip
        assert scored[0][:, 1].isnan().all()
    for completion in (2, -1):
        rows = packed(batch, seed=3)
        rows.kwargs["num_completions"] = 2
        rows.kwargs["completion"] = rows.kwargs["completion"].index_fill(0, torch.tensor([1]), completion)
        assert run(backend, rows, head, config_for(), check_values=False).out.loss.isnan()


def test_agreement_is_not_vacuous() -> None:
    """A gradient off by one part in a hundred, or a flag turned, is seen by the checks above."""
    batch, head = make_linear(19)
    truth = materialised(batch, head, config_for())
    wrong = truth._replace(grads={k: 1.01 * v for k, v in truth.grads.items()})
    with pytest.raises(AssertionError, match="gradient of hidden"):
        assert_agrees(wrong, truth, truth, torch.float32)
    flipped = truth._replace(out=replace(truth.out, clipped_low=~truth.out.clipped_low))
    with pytest.raises(AssertionError, match="clipped_low"):
        assert_agrees(flipped, truth, truth, torch.float32)
