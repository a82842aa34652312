"""Rows in chunks: their sizes, the matmuls and the memory of a call, and bits that do not depend on the cutting."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers.inputs import ROOT
from helpers.linear import BACKENDS, budget, call, make_linear, relative, run
from helpers.losses import DEVICE, EACH, config_for, gpu, to

from mdpgrpo_fast import linear_token_logprobs, linear_token_loss
from mdpgrpo_fast.kernels import onednn
from mdpgrpo_fast.ops.linear import chunks

NOTHING: dict[str, Any] = {}
backends = pytest.mark.parametrize("backend", BACKENDS)
levels = pytest.mark.parametrize("level", ["token", "sequence"])


# ---- sizes ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("fp32_logits", [False, True])
def test_rows_of_a_chunk_begin_on_16_bytes_on_a_gpu(fp32_logits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd vocabulary as an even one: in a wider buffer, with the same numbers."""
    made, real = [], chunks.new_rows

    def wider(n: int, vocab: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        with monkeypatch.context() as m:
            m.setattr(chunks.torch, "empty", lambda *size, dtype, device: torch.zeros(size, dtype=dtype))
            made.append(real(n, vocab, dtype, torch.device("cuda")))
        return made[-1]

    batch, head = make_linear(5, (5, 3, 7, 4), vocab=405, dtype="bfloat16")
    more = {"workspace_bytes": budget(head, 16, fp32_logits), "fp32_logits": fp32_logits, "temperature": EACH}
    plain = run("triton", batch, head, config_for(), **more)
    monkeypatch.setattr(chunks, "new_rows", wider)
    got = run("triton", batch, head, config_for(), **more)
    assert len(made) == 1 + fp32_logits and all(x.shape[1] == 405 and x.stride(0) == 416 for x in made)
    torch.testing.assert_close(got.out.logprobs, plain.out.logprobs, rtol=1e-5, atol=1e-5)
    assert set(got.grads) >= {"hidden", "weight"}
    for name, theirs in plain.grads.items():
        assert relative(got.grads[name], theirs.double().cpu()) < 5e-3, name


def test_the_workspace_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory, wanted in ((141 << 30, 1 << 30), (24 << 30, 384 << 20)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d, m=memory: type("P", (), {"total_memory": m}))
        assert chunks.default_workspace(torch.device("cuda")) == wanted
        assert chunks.default_workspace(torch.device("cuda"), split=True) == 256 << 20
    assert chunks.default_workspace(torch.device("cpu")) == 256 << 20


def test_plans_cover_every_row_once_and_divide_no_completion() -> None:
    assert chunks.plan(10, 4, None) == [(0, 4), (4, 8), (8, 10)]
    assert chunks.plan(0, 4, None) == chunks.plan(0, 4, []) == chunks.plan(0, 4, [0, 0]) == []
    assert chunks.plan(9, 4, [2, 0, 3, 1, 3]) == [(0, 2), (2, 6), (6, 9)]
    assert chunks.plan(8, 4, [4, 4]) == [(0, 4), (4, 8)]
    assert chunks.plan(5, 4, [5]) is None


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

    def count(
        frozen: bool, gradient: bool = True, level: Any = "token", config: dict[str, Any] = NOTHING, **more: Any
    ) -> float:  # fmt: skip
        leaves = head.leaves(frozen)

        def both() -> None:
            with torch.set_grad_enabled(gradient):
                knobs = config_for(importance_level=level, **config)
                out = call("torch", hidden, leaves, batch, knobs, **{**wide, **more})
            if gradient:
                out.loss.backward()

        return matmuls(both) / unit

    assert count(False) == 3 and count(True) == 2 and count(False, gradient=False) == 1
    assert count(False, level="sequence") == 3 and count(True, level="sequence") == 2
    assert count(False, temperature=EACH) == 3, "two temperatures are mixed in the workspace"
    assert count(False, level="sequence", old_logprobs=None, workspace_bytes=budget(head, 8)) == 3
    assert count(False, level="sequence", workspace_bytes=budget(head, 8)) == 4
    assert count(True, level="sequence", workspace_bytes=budget(head, 8)) == 2, "a frozen head's unit gradient waits"
    for loss in ("cispo", "sapo", "gmpo", "vespo"):
        assert count(False, config={"loss": loss}) == 3 and count(True, config={"loss": loss}) == 2, loss
    bonus, quantile = {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}
    assert count(False, config=bonus) == 3 and count(True, config=bonus) == 2, "the workspace is read twice"
    assert count(False, config=quantile, workspace_bytes=budget(head, 64)) == 3, "all rows are one chunk"
    assert count(False, config=quantile) == 4 and count(True, config=quantile) == 2
    half = {"advantage": batch.advantage * torch.tensor([1.0, 0, 1, 0]), "ref_logprobs": None}
    assert count(False, **half) == 1.5, "idle rows are not multiplied"


def test_without_gradients_nothing_is_kept_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "prefers_onednn", lambda: False)  # its op, one for one, has no flops in a trace
    batch, head = make_linear(11)
    hidden = batch.logits.requires_grad_()
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode, torch.profiler.profile(with_flops=True) as trace:
            ell, _ = linear_token_logprobs(hidden, head.weight, batch.tokens, batch.mask)
        flops = sum(e.flops for e in trace.key_averages() if e.key in ("aten::mm", "aten::addmm")) / 2
        assert flops >= 5 * 37 * 8 and (flops > 1.2 * 16 * 37 * 8) == ell.requires_grad


SCRIPT = """
import re, torch
from mdpgrpo_fast import linear_token_loss, linear_token_logprobs, token_loss
from mdpgrpo_fast.config import MDPGRPOConfig
torch.set_num_threads(1)
T, V, D = 1536, 32000, 16
hidden = torch.randn(4, T // 4, D, requires_grad=True)
weight = torch.nn.Parameter(torch.randn(V, D))
tokens = torch.randint(0, V, (4, T // 4))
configs = [MDPGRPOConfig(num_generations=2, multi_temperature=False, importance_level=x) for x in ("token", "sequence")]
more = dict(advantage=1.0, kl_beta=0.1, old_logprobs=torch.full((4, T // 4), -10.0),
            ref_logprobs=torch.full((4, T // 4), -10.0), temperature=torch.tensor([0.5, 0.7, 1.0, 1.2]))
# Not getrusage, whose peak a new process inherits from the one that started it.
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
(hidden @ weight[:64].t()).sum().backward()
before = peak()
if "WHAT" == "logits":
    token_loss(hidden @ weight.t(), tokens, None, configs[0], **more).loss.backward()
else:
    for config in configs:
        linear_token_loss(hidden, weight, tokens, None, config, workspace_bytes=32 << 20, **more).loss.backward()
    linear_token_logprobs(hidden, weight, tokens, workspace_bytes=32 << 20)[0].sum().backward()
print(peak() - before)
"""


def test_memory_is_bounded_on_the_cpu() -> None:
    """By the process's own peak: 32 MiB of workspace where the logits are 188 MiB, and their gradient as much again."""

    def peak(what: str) -> float:
        script = SCRIPT.replace("WHAT", what)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
        return int(done.stdout) / 2**20

    assert peak("linear") < 130 and peak("logits") > 350


@gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_memory_is_bounded_on_a_gpu(frozen: bool) -> None:
    """Beside gradients the workspace and 44 MiB at the most, at any T; T = 131072 at V = 256000 fits."""
    vocab, width, bound = 256000, 1024, chunks.default_workspace(torch.device("cuda")) + (44 << 20)
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
        assert peak - grads <= bound, f"T = {n}: {(peak - grads) / 2**20:.0f} MiB"
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
    if backend == "torch" and DEVICE == "cuda":
        pytest.skip("PyTorch's own sums over a row follow the batch on a GPU")
    batch, head = make_linear(17, lengths=(20, 20, 20), vocab=1001, width=64, dtype=dtype)
    batch.kwargs.clear()
    size, config = budget(head, 32), config_for(num_generations=3)
    whole = run(backend, batch, head, config, workspace_bytes=size).out
    flat = batch.logits.flatten(0, 1).to(DEVICE)
    for rows in ([5], [59], list(range(14, 31)), list(range(59, -1, -2)), [37, 3]):
        at = torch.tensor(rows)
        out = linear_token_loss(
            flat[at.to(DEVICE)], to(head.weight, DEVICE), batch.tokens.flatten()[at].to(DEVICE), None, config,
            advantage=1.0, kl_beta=0.0, completion=torch.zeros_like(at).to(DEVICE), num_completions=1, backend=backend,
            workspace_bytes=size,
        )  # fmt: skip
        assert torch.equal(out.logprobs, whole.logprobs.flatten()[at.to(DEVICE)]), rows
        assert torch.equal(out.entropy, whole.entropy.flatten()[at.to(DEVICE)]), rows
