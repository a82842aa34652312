"""The objective from hidden states and a head, against the reference in float64 on logits that are built."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.inputs import ROOT
from helpers.linear import BACKENDS, assert_agrees, assert_matches, budget, call, make_linear, materialised, run
from helpers.losses import (
    DEVICE,
    EACH,
    GIVEN,
    LENGTHS,
    OPTIONS,
    REWARDS,
    SIZE,
    config_for,
    gpu,
    packed,
    packed_order,
    pick_options,
    to,
)

from mdpgrpo_fast.kernels import onednn
from mdpgrpo_fast.ops.linear import chunks, select
from mdpgrpo_fast.ops.linear.losses import linear_token_loss

LEVELS = ["token", "sequence"]
AGGREGATIONS = ["grpo", "dapo", "dr_grpo", "bnpo"]
backends = pytest.mark.parametrize("backend", BACKENDS)
levels = pytest.mark.parametrize("level", LEVELS)


def rows_of(batch: Any) -> int:
    return batch.tokens.numel()


# ---- the same numbers as the reference ------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_at_both_levels(backend: str, option: str) -> None:
    """In chunks of one row, of three, and in one: the same within the budget."""
    knobs, more = OPTIONS[option]
    batch, head = make_linear(1, bias=option == "plain")
    batch.mask = more.get("mask", batch.mask)
    batch.tokens = batch.tokens.to(more.get("tokens", torch.int64))
    more = {k: v for k, v in more.items() if k not in ("mask", "tokens")}
    for level in LEVELS:
        for rows in (1, 3, 100):
            config = config_for(importance_level=level, **knobs)
            assert_matches(backend, batch, head, config, workspace_bytes=budget(head, rows), **more)


@backends
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fp32_logits", [False, True])
def test_precisions(backend: str, dtype: str, fp32_logits: bool) -> None:
    """Bias, scale and soft-cap too. Logits in float32 give log-probs as good as float32's."""
    batch, head = make_linear(2, dtype=dtype, bias=True, logit_scale=0.5)
    for temperature in (1.0, EACH):
        more = {"temperature": temperature, "softcap": 6.0, "fp32_logits": fp32_logits}
        for rows in (2, 100):
            size = budget(head, rows, fp32_logits)
            assert_matches(backend, batch, head, config_for(), workspace_bytes=size, **more)


@backends
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@levels
def test_aggregations_and_denominators(backend: str, aggregation: Any, level: Any) -> None:
    batch, head = make_linear(3)
    config = config_for(aggregation=aggregation, importance_level=level)
    for denominator in (None, 7.0, torch.tensor(7.0), 0.25):
        assert_matches(backend, batch, head, config, denominator=denominator, workspace_bytes=budget(head, 2))


@backends
@pytest.mark.parametrize("seed", range(10))
def test_mixtures_of_options(backend: str, seed: int) -> None:
    """Everything `token_loss` takes at once, both layouts, every dtype, bias and scale, and chunks of any size."""
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
    size = budget(head, [1, 2, 3, 5, 100][seed % 5])
    assert_matches(backend, batch, head, config, workspace_bytes=size, skip_idle=False, **more)


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
    for rows in (*range(1, rows_of(batch) + 1), 1000):
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


# ---- rows that cannot contribute ------------------------------------------------------------------------------------


@backends
@levels
def test_idle_rows_are_left_out_exactly(backend: str, level: Any) -> None:
    """A = 0 without a KL term: no row of it is multiplied, and nothing but its statistics is missing."""
    batch, head = make_linear(12, lengths=(2, 2, 1, 2))
    advantage = batch.advantage * torch.tensor([1.0, 0.0, 1.0, 0.0])
    idle = (advantage == 0)[:, None] & batch.mask
    config = config_for(importance_level=level, aggregation="grpo")
    for more in ({"ref_logprobs": None}, {"kl_beta": batch.kl_beta * (advantage != 0)}):
        skipped = run(backend, batch, head, config, advantage=advantage, **more)
        kept = run(backend, batch, head, config, advantage=advantage, skip_idle=False, **more)
        torch.testing.assert_close(skipped.out.loss, kept.out.loss, rtol=2e-6, atol=1e-7)
        for name, g in skipped.grads.items():
            torch.testing.assert_close(g, kept.grads[name], rtol=1e-5, atol=1e-7)
        assert (skipped.out.logprobs.cpu()[idle] == 0).all() and (kept.out.logprobs.cpu()[idle] != 0).all()
        assert skipped.out.total("tokens") == 3 and kept.out.total("tokens") == 7
    with_kl = run(backend, batch, head, config, advantage=advantage)
    assert (with_kl.out.logprobs.cpu()[batch.mask] != 0).all(), "A = 0 with a KL term contributes"


@backends
@pytest.mark.parametrize("layout", ["padded", "packed"])
@levels
def test_lengths_known_on_the_host(
    backend: str, layout: str, level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """As on a GPU, where nothing is looked at: without lengths under a mask, with them compacted, wrong ones NaN."""
    batch, head = make_linear(13, lengths=(2, 1, 0, 2))
    batch = batch if layout == "padded" else packed(batch, 13, drop_masked=False)
    config, size = config_for(importance_level=level), budget(head, 3)
    looked = run(backend, batch, head, config, workspace_bytes=size)
    monkeypatch.setattr(select, "may_look", lambda device: False)
    seen: list[int] = []
    take = chunks.Head.take
    monkeypatch.setattr(chunks.Head, "take", lambda self, a, b: seen.append(b - a) or take(self, a, b))
    for lengths, rows in ((None, rows_of(batch)), ([2, 1, 0, 2], 5)):
        seen.clear()
        got = run(backend, batch, head, config, workspace_bytes=size, lengths=lengths)
        # Packed rows at sequence level whose extents nobody knows are scored first.
        twice = level == "sequence" and lengths is None and layout == "packed"
        assert sum(seen) == rows * (1 + twice)
        for name in ("loss", "logprobs", "entropy", "kl", "ratio", "completion_kl", "totals"):
            torch.testing.assert_close(getattr(got.out, name), getattr(looked.out, name), rtol=2e-6, atol=1e-6)
        for name, g in got.grads.items():
            torch.testing.assert_close(g, looked.grads[name], rtol=1e-5, atol=1e-6)


@backends
def test_lengths_that_are_not_the_masks_give_nan(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, head = make_linear(13, lengths=(2, 1, 1, 2))
    with pytest.raises(ValueError, match=r"lengths must be what mask keeps of each completion, \[2, 1, 1, 2\], or 0"):
        run(backend, batch, head, config_for(), "cpu", lengths=[2, 2, 1, 1])
    monkeypatch.setattr(select, "may_look", lambda device: False)
    monkeypatch.setattr("mdpgrpo_fast.ops.linear.checks.look", lambda x, check: False)
    for lengths in ([2, 2, 1, 1], [2, 1, 0, 2], [1, 1, 1, 2]):
        got = run(backend, batch, head, config_for(), lengths=lengths)
        assert got.out.loss.isnan() and got.grads["weight"].isnan().any(), lengths
    idle = run(backend, batch, head, config_for(), lengths=[2, 1, 0, 2], ref_logprobs=None,
               advantage=batch.advantage * torch.tensor([1.0, 1.0, 0.0, 1.0]))  # fmt: skip
    assert idle.out.loss.isfinite() and idle.grads["weight"].isfinite().all()


# ---- work and memory ------------------------------------------------------------------------------------------------


def matmuls(function: Any) -> float:
    """Multiply-adds of a call's matmuls, in units of rows x V x D, from the profiler's trace."""
    with torch.profiler.profile(with_flops=True) as trace:
        function()
    names = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    return sum(e.flops for e in trace.key_averages() if e.key in names) / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_matmul_more_than_needed(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three with a trained head, two with a frozen one, one to score; a fourth where a completion is too long."""
    monkeypatch.setattr(onednn, "prefers_onednn", lambda: False)  # its op, one for one, has no flops in a trace
    lengths = (16, 16, 16, 16)
    batch, head = make_linear(14, lengths=lengths, vocab=64, width=16, dtype=dtype)
    unit, hidden = 64 * 64 * 16, batch.logits.requires_grad_()
    wide = {"workspace_bytes": budget(head, 32), "fp32_logits": False}

    def count(frozen: bool, gradient: bool = True, level: Any = "token", **more: Any) -> float:
        leaves = head.leaves(frozen)

        def both() -> None:
            with torch.set_grad_enabled(gradient):
                out = call("torch", hidden, leaves, batch, config_for(importance_level=level), **{**wide, **more})
            if gradient:
                out.loss.backward()

        return matmuls(both) / unit

    assert count(False) == 3 and count(True) == 2 and count(False, gradient=False) == 1
    assert count(False, level="sequence") == 3 and count(True, level="sequence") == 2
    assert count(False, temperature=EACH) == 3, "two temperatures are mixed in the workspace"
    assert count(False, level="sequence", old_logprobs=None, workspace_bytes=budget(head, 8)) == 3
    assert count(False, level="sequence", workspace_bytes=budget(head, 8)) == 4
    half = {"advantage": batch.advantage * torch.tensor([1.0, 0, 1, 0]), "ref_logprobs": None}
    assert count(False, **half) == 1.5, "idle rows are not multiplied"


def test_frozen_parts_get_no_gradient_and_no_memory() -> None:
    batch, head = make_linear(15, bias=True)
    both = run("torch", batch, head, config_for())
    frozen = run("torch", batch, head, config_for(), frozen=True)
    assert set(frozen.grads) == {"hidden"} and torch.equal(frozen.grads["hidden"], both.grads["hidden"])
    leaves = head.leaves()
    out = call("torch", batch.logits, leaves, batch, config_for())
    g = torch.autograd.grad(out.loss, leaves.weight)[0]
    assert torch.equal(g, both.grads["weight"]) and torch.equal(out.loss, both.out.loss)
    with torch.no_grad():
        assert torch.equal(call("torch", batch.logits, leaves, batch, config_for()).loss, both.out.loss)


SCRIPT = """
import re, torch
from mdpgrpo_fast import linear_token_loss, linear_token_logprobs, token_loss
from mdpgrpo_fast.kernels import onednn
from mdpgrpo_fast.config import MDPGRPOConfig
torch.set_num_threads(1)
T, V, D = 3072, 32000, 16
hidden = torch.randn(4, T // 4, D, requires_grad=True)
weight = torch.nn.Parameter(torch.randn(V, D))
tokens = torch.randint(0, V, (4, T // 4))
config = MDPGRPOConfig(num_generations=2, multi_temperature=False, importance_level="LEVEL")
more = dict(advantage=1.0, kl_beta=0.1, old_logprobs=torch.full((4, T // 4), -10.0),
            ref_logprobs=torch.full((4, T // 4), -10.0), temperature=torch.tensor([0.5, 0.7, 1.0, 1.2]))
# Not getrusage, whose peak a new process inherits from the one that started it.
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
(hidden @ weight[:64].t()).sum().backward()
before = peak()
if "WHAT" == "logits":
    token_loss(hidden @ weight.t(), tokens, None, config, **more).loss.backward()
else:
    linear_token_loss(hidden, weight, tokens, None, config, workspace_bytes=32 << 20, **more).loss.backward()
    linear_token_logprobs(hidden, weight, tokens, workspace_bytes=32 << 20)[0].sum().backward()
print(peak() - before)
"""


@pytest.mark.parametrize("level", LEVELS)
def test_memory_is_bounded_on_the_cpu(level: str) -> None:
    """By the process's own peak: 32 MiB of workspace where the logits are 375 MiB, and their gradient as much again."""

    def peak(what: str) -> float:
        script = SCRIPT.replace("LEVEL", level).replace("WHAT", what)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
        return int(done.stdout) / 2**20

    assert peak("linear") < 130 and peak("logits") > 700


@gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_memory_is_bounded_on_a_gpu(frozen: bool) -> None:
    """Beside gradients 300 MiB at the most, at any T; T = 131072 at V = 256000 fits."""
    vocab, width = 256000, 1024
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16).mul_(0.02).requires_grad_(not frozen)
    for n in (4096, 131072):
        hidden = torch.randn(8, n // 8, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        tokens = torch.randint(0, vocab, (8, n // 8), device="cuda")
        given = {"advantage": torch.linspace(-1, 1, 8, device="cuda"), "kl_beta": 0.1}
        for _ in range(2):  # the first call also makes the matmul library's own workspace
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = linear_token_loss(hidden, weight, tokens, None, config_for(), **given)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            del out
        # d hidden; d weight in float32 and its copy in the dtype of the weight.
        grads = hidden.numel() * 2 + (0 if frozen else weight.numel() * 6)
        assert peak - grads <= 300 << 20, f"T = {n}: {(peak - grads) / 2**20:.0f} MiB"
        del hidden


@gpu
@levels
def test_no_wait_for_the_device(level: Any) -> None:
    """Rows are left out, chunks cut and gradients summed without the host ever asking the GPU for a number."""
    batch, head = make_linear(15, lengths=(3, 2, 0, 4), bias=True)
    hidden, leaves = batch.logits.cuda().requires_grad_(), head.to("cuda").leaves()
    options = {k: to(v, "cuda") for k, v in batch.given().items()} | {"lengths": [3, 2, 0, 4], "temperature": 0.7}
    tokens, mask, config = batch.tokens.cuda(), batch.mask.cuda(), config_for(importance_level=level)

    def loss() -> Any:
        return linear_token_loss(hidden, leaves.weight, tokens, mask, config, bias=leaves.bias, denominator=7.0,
                                 workspace_bytes=budget(head, 4), **options).loss  # fmt: skip

    expected = loss()
    expected.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = loss()
        again.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, expected)


# ---- bits -----------------------------------------------------------------------------------------------------------


@backends
@levels
def test_the_same_bits_every_time(backend: str, level: Any) -> None:
    if backend == "torch" and DEVICE == "cuda":
        pytest.skip("PyTorch's own sums over completions are atomic on a GPU")
    batch, head = make_linear(16, lengths=(5, 3, 1, 4), vocab=130)
    more = {"temperature": EACH, "workspace_bytes": budget(head, 16)}
    one, two = (run(backend, batch, head, config_for(importance_level=level), **more) for _ in range(2))
    assert torch.equal(one.out.loss, two.out.loss) and torch.equal(one.out.totals, two.out.totals)
    assert all(torch.equal(one.grads[k], two.grads[k]) for k in one.grads)


@backends
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_log_prob_does_not_depend_on_its_company(backend: str, dtype: str) -> None:
    """verl#6280: alone, first, last, in another chunk or among others, a row has the same bits."""
    batch, head = make_linear(17, lengths=(40, 40, 40), vocab=1001, width=64, dtype=dtype)
    batch.kwargs.clear()
    size, config = budget(head, 32), config_for(num_generations=3)
    whole = run(backend, batch, head, config, workspace_bytes=size).out
    flat = batch.logits.flatten(0, 1).to(DEVICE)
    for rows in ([5], [119], list(range(30, 47)), list(range(119, -1, -2)), [77, 3]):
        at = torch.tensor(rows)
        out = linear_token_loss(
            flat[at.to(DEVICE)], to(head.weight, DEVICE), batch.tokens.flatten()[at].to(DEVICE), None, config,
            advantage=1.0, kl_beta=0.0, completion=torch.zeros_like(at).to(DEVICE), num_completions=1, backend=backend,
            workspace_bytes=size,
        )  # fmt: skip
        assert torch.equal(out.logprobs, whole.logprobs.flatten()[at.to(DEVICE)]), rows
        assert torch.equal(out.entropy, whole.entropy.flatten()[at.to(DEVICE)]), rows


# ---- chunks ---------------------------------------------------------------------------------------------------------


def test_chunks_follow_the_budget_and_whole_tiles() -> None:
    cpu = torch.device("cpu")
    assert chunks.chunking(8, 128000, 256 << 20, cpu) == (2096, 16)
    assert chunks.chunking(8, 128000, 128000, cpu) == (1, 1), "a row is always held"
    assert chunks.chunking(8, 128000, 7 * 128000, cpu) == (7, 7)
    assert chunks.bytes_per_row(100, torch.bfloat16, False) == 200
    assert chunks.bytes_per_row(100, torch.bfloat16, True) == 600
    assert chunks.bytes_per_row(100, torch.float32, True) == 400


@pytest.mark.parametrize(
    ("vocab", "width", "rows", "call"),
    [(128256, 3072, 1024, 512), (256000, 2304, 512, 512), (151936, 2048, 768, 384), (32000, 4096, 4096, 512)],
)
def test_chunks_on_a_gpu_fill_it(
    vocab: int, width: int, rows: int, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """132 multiprocessors, bf16, 256 MiB: thousands of rows, not Liger's hundreds, and calls of one size."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: type("P", (), {"multi_processor_count": 132}))
    assert chunks.chunking(width, 2 * vocab, 256 << 20, torch.device("cuda")) == (rows, call)


def test_plans_cover_every_row_once_and_divide_no_completion() -> None:
    assert chunks.plan(10, 4, None) == [(0, 4), (4, 8), (8, 10)]
    assert chunks.plan(0, 4, None) == chunks.plan(0, 4, []) == chunks.plan(0, 4, [0, 0]) == []
    assert chunks.plan(9, 4, [2, 0, 3, 1, 3]) == [(0, 2), (2, 6), (6, 9)]
    assert chunks.plan(8, 4, [4, 4]) == [(0, 4), (4, 8)]
    assert chunks.plan(5, 4, [5]) is None


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
