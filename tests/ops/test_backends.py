"""Which backend runs and why, its tiles, its ops under torch.library and torch.compile, its machine code, its GPU."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import triton.language as tl
from helpers.inputs import ROOT, LossInputs
from helpers.losses import (
    BACKENDS,
    DEVICE,
    GIVEN,
    GPU,
    arguments,
    call,
    config_for,
    gpu,
    loss_of,
    make_batch,
    packed,
    run,
)
from torch._dynamo.testing import CompileCounterWithBackend

import mdpgrpo_fast
from mdpgrpo_fast import reference
from mdpgrpo_fast.config import ConfigError, MDPGRPOConfig
from mdpgrpo_fast.kernels import schemas
from mdpgrpo_fast.kernels.triton import (
    advantages,
    completions,
    logprobs,
    method,
    objective,
    sampling,
    tiles,
    token_loss,
    tuning,
)
from mdpgrpo_fast.kernels.triton import rows as row_kernels
from mdpgrpo_fast.kernels.triton.decode import attention, blocks
from mdpgrpo_fast.ops import backends, fused

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
each_backend = pytest.mark.parametrize("backend", BACKENDS)

# ---- the choice -----------------------------------------------------------------------------------------------------


def test_an_explicit_choice_runs_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"^backend 'triton' cannot run: .* CPU.* interpreter \(TRITON_INTERPRET=1\)$"):
        backends.choose("triton", CPU, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert backends.choose("triton", CPU, dtype) == "triton"
    with pytest.raises(ValueError, match=r"cannot run: it takes bfloat16, float16, float32, not float64$"):
        backends.choose("triton", CPU, torch.float64)
    for backend, where in (("triton", "CUDA devices"), ("cuda", "CUDA devices"), ("cpu", "the CPU")):
        with pytest.raises(ValueError, match=rf"cannot run: it runs on {where}, not on meta$"):
            backends.choose(backend, torch.device("meta"), torch.float32)
    with pytest.raises(ValueError, match=r"^backend 'cuda' cannot run: it runs on CUDA devices, not on the CPU$"):
        backends.choose("cuda", CPU, torch.float32)
    assert backends.choose("torch", torch.device("meta"), torch.float64) == "torch"
    with pytest.raises(ConfigError, match="unknown backend 'tirton'; did you mean 'triton'"):
        backends.choose("tirton", CPU, torch.float32)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(ValueError, match=r"cannot run: it needs compute capability 8.0 or above, not \(7, 5\)"):
        backends.choose("triton", CUDA, torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert backends.choose("auto", CUDA, torch.float16) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (12, 0))
    with pytest.raises(ValueError, match=r"'cuda' .* needs compute capability 9.0 or 10.0, not \(12, 0\)"):
        backends.choose("cuda", CUDA, torch.float16)


def test_kernels_that_cannot_be_imported_are_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mdpgrpo_fast.kernels.triton", None)
    monkeypatch.delitem(sys.modules, "mdpgrpo_fast.kernels.triton.library")
    reason = backends._missing.__wrapped__("triton")
    assert reason.startswith("its kernels cannot be imported: ModuleNotFoundError")


def test_auto_says_once_what_it_takes_and_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent fallback is how a user runs the slow path for a month."""
    backends.say_once.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with caplog.at_level(logging.INFO, logger="mdpgrpo_fast"):
        for _ in range(3):
            assert backends.choose("auto", CPU, torch.float32) == "cpu", "the interpreter is never chosen unasked"
            assert backends.choose("auto", CPU, torch.float64) == "torch"
        backends.choose("torch", CPU, torch.float32)
        backends.choose("triton", CPU, torch.float32)
        monkeypatch.setattr(backends, "_missing", lambda backend: "no compiler")
        assert backends.choose("auto", CPU, torch.float32) == "torch"
        said = [(r.levelname, r.message) for r in caplog.records]
        assert said == [
            ("INFO", "backend cpu: the tensors are torch.float32 on cpu"),
            ("INFO", "backend torch, not cpu: it takes bfloat16, float16, float32, not float64"),
            ("WARNING", "backend torch, not cpu: no compiler"),
        ]
        monkeypatch.undo()
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        caplog.clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        for dtype in (torch.bfloat16, torch.float64) * 2:
            backends.choose("auto", CUDA, dtype)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "backend triton: the tensors are torch.bfloat16 on cuda"),
        ("WARNING", "backend torch, not triton: it takes bfloat16, float16, float32, not float64"),
    ]


def test_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backends.backend_report()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"torch {torch.__version__}, triton ")
    assert lines[1] == "CPU:" and lines[2].startswith("  torch   ready")
    assert re.match(r"  triton  not here: .*TRITON_INTERPRET=1", lines[3])
    assert re.match(r"  cpu     ready: compiled kernels \((avx512|avx2|plain)\)", lines[4])
    assert re.match(r"  cuda    not here: ", lines[5])
    assert lines[6].startswith("  auto    takes cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends.backend_report()
    assert "  triton  ready" in capsys.readouterr().out


def test_constants_of_kernels_and_reference_agree() -> None:
    assert method.KL_EXPONENT_MAX.value == reference.KL_EXPONENT_MAX
    assert method.RATIO_EXPONENT_MAX.value == reference.RATIO_EXPONENT_MAX
    assert len(reference.TOTALS) == schemas.NUM_TOTALS
    estimators = {method.K1: "k1", method.K2: "k2", method.K3: "k3", method.ABS: "abs"}
    assert [schemas.ESTIMATORS[k.value - 1] for k in estimators] == list(estimators.values())
    losses = {method.CISPO: "cispo", method.SAPO: "sapo", method.GMPO: "gmpo", method.VESPO: "vespo"}
    assert [schemas.LOSSES[k.value] for k in losses] == list(losses.values())
    scales = [schemas.SCALES[k.value] for k in (method.SCALE_BATCH, method.SCALE_NONE)]
    assert scales == ["batch", "none"]
    assert method.VESPO_LOG_MIN.value == reference.losses.VESPO_LOG_MIN
    assert method.VESPO_LOG_MAX.value == reference.losses.VESPO_LOG_MAX
    assert method.MEAN_OF_MEANS.value == schemas.GRPO
    assert list(schemas.AGGREGATION) == list(get_args(get_type_hints(MDPGRPOConfig)["aggregation"]))
    goals = (method.HALF.value, method.MAX_HALF_MEAN.value, method.MEAN.value)
    assert [schemas.GOAL_MEAN[i] for i in goals] == ["half", "max_half_mean", "mean"]


# ---- tiles ----------------------------------------------------------------------------------------------------------


def test_tiles_fit_the_row() -> None:
    for tile in tiles.CANDIDATES:
        for vocab in (1, 2, 100, 128, 129, 4096, 4097, 128256):
            fitted = tiles.fit(tile, vocab)
            assert 128 <= fitted.block <= max(tile.block, 128) and fitted.block & (fitted.block - 1) == 0
            assert fitted.block >= min(vocab, tile.block) and 1 <= fitted.warps <= tile.warps
            assert fitted.block >= 32 * fitted.warps, "no thread without a column"
    assert tiles.grid_for(tiles.CANDIDATES[0], 70_000, CPU) == (70_000,), "one dimension: y and z end at 65535"
    assert tuning.tile_for(4097, torch.float32, CPU) == tiles.fit(tiles.CANDIDATES[0], 4097)


def test_the_first_tile_stays_unless_another_clearly_wins() -> None:
    some = list(tiles.CANDIDATES[:3])
    assert tuning.choose(some, dict(zip(some, (1.0, 0.98, 1.2), strict=True)).__getitem__) == some[0]
    assert tuning.choose(some, dict(zip(some, (1.0, 0.90, 0.8), strict=True)).__getitem__) == some[2]

    def first_does_not_fit(tile: tiles.Tile) -> float:
        if tile == some[0]:
            raise tuning.triton.runtime.OutOfResources(300_000, 200_000, "shared memory")
        return float(some.index(tile))

    assert tuning.choose(some, first_does_not_fit) == some[1]


def test_measured_tiles_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole or not at all: an unreadable file, an unwritable folder or another process's tiles do no harm."""
    monkeypatch.setenv("MDPGRPO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_tuned", {})
    monkeypatch.setattr(tuning, "_key", lambda vocab, dtype, device: f"gpu, V {vocab}, {dtype}")
    assert tuning.cache_file() == tmp_path / "cache" / "tiles.json"
    assert tuning._known(32000, torch.float32, CUDA) is None
    tile, other = tiles.CANDIDATES[1], tiles.CANDIDATES[2]
    tuning._save(tuning._key(32000, torch.float32, CUDA), tile)
    tuning._save(tuning._key(64000, torch.float32, CUDA), other)
    assert tuning._known(32000, torch.float32, CUDA) == tile and tuning._known(64000, torch.float32, CUDA) == other
    assert [p.name for p in tuning.cache_file().parent.iterdir()] == ["tiles.json"]
    key = tuning._key(32000, torch.float32, CUDA)
    for junk in ("{", "[]", json.dumps({key: [1, 2]}), json.dumps({key: [3000, 8, 1, 0]})):
        tuning.cache_file().write_text(junk)
        monkeypatch.setattr(tuning, "_tuned", {})
        assert tuning._known(32000, torch.float32, CUDA) is None, junk
    monkeypatch.setenv("MDPGRPO_CACHE_DIR", str(tuning.cache_file() / "no folder"))
    tuning._save("key", tile)


# ---- torch.library --------------------------------------------------------------------------------------------------

REWARDS = {"rewards": torch.tensor([[0.25, 1.0]]), "num_constraints": torch.tensor([4]), **GIVEN}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every op that runs, with a copy of its arguments."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    find = fused._op

    def record(backend: str, name: str) -> Any:
        op = find(backend, name)

        def run_it(*args: Any) -> Any:
            calls.append((op.default, tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)))
            return op(*args)

        return run_it

    monkeypatch.setattr(fused, "_op", record)
    return calls


@each_backend
def test_opcheck(backend: str, recorded: list[tuple[Any, tuple[Any, ...]]]) -> None:
    """Schemas, fake implementations and what each op mutates, for a lean and a full call of every op."""
    batch = make_batch(17, lengths=(1, 1))
    full = {"temperature": torch.ones(2), "epsilon_low": torch.ones(2) / 5, "denominator": torch.tensor(3.0), **REWARDS}
    for one, more in ((batch, {}), (packed(batch), full)):
        run(backend, one, config_for(importance_level="sequence"), **more)
        call(backend, LossInputs(one.logits.to(DEVICE), *list(one)[1:], kwargs=one.kwargs), config_for(), **more)
    leaf = batch.logits.to(DEVICE).requires_grad_()
    call(backend, LossInputs(leaf * 1, *list(batch)[1:], kwargs=batch.kwargs), config_for(), in_place=True)
    at, _ = mdpgrpo_fast.token_logprobs(leaf, batch.tokens.to(DEVICE), batch.mask.to(DEVICE), backend=backend)
    torch.autograd.grad(at.sum(), leaf)
    rewards, k = (REWARDS[n].to(DEVICE) for n in ("rewards", "num_constraints"))
    mdpgrpo_fast.advantages(rewards, k, config_for(), backend=backend)
    assert {op._schema.name for op, _ in recorded} == {f"mdpgrpo_fast::{backend}_{name}" for name in schemas.SCHEMAS}
    for op, args in list(recorded):
        torch.library.opcheck(op, args)


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILERS = ["eager", "aot_eager", pytest.param("inductor", marks=GPU)]


@each_backend
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.usefixtures("fresh_dynamo")
def test_token_loss_compiles_without_graph_breaks(backend: str, compiler: str) -> None:
    """Liger#1366: no float64 scalar, no look at a value and no Python of the launch is in the way."""
    batch = make_batch(18, lengths=(2, 1))
    taus, rewards = {"temperature": torch.tensor([0.5, 1.2])}, {**REWARDS, "softcap": 9.0}
    quantile: dict[str, Any] = {"top_entropy_quantile": 0.5, "loss": "gmpo"}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"importance_level": "sequence"}, taus), ({}, rewards), (quantile, {"entropy_coef": torch.tensor(0.1)}),
    ]  # fmt: skip
    for knobs, more in cases:
        plain = loss_of(backend, **knobs)
        grads = []
        for f in (plain, torch.compile(plain, fullgraph=True, backend=compiler)):
            args, options = arguments(batch, **more)
            grads.append(torch.autograd.grad(3 * f(*args, **options), args[0])[0])
        assert torch.equal(*grads)


@each_backend
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_loss_keeps_its_graph(backend: str, compiler: str) -> None:
    """With retain_graph the first gradient is neither scaled again nor the memory of the second."""
    args, options = arguments(make_batch(19, lengths=(2, 1)))
    plain = loss_of(backend)
    (expected,) = torch.autograd.grad(3 * plain(*args, **options), args[0])
    loss = 3 * torch.compile(plain, fullgraph=True, backend=compiler)(*args, **options)
    first, second = (torch.autograd.grad(loss, args[0], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, expected) and torch.equal(second, expected)


@each_backend
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.usefixtures("fresh_dynamo")
def test_token_logprobs_compiles_without_graph_breaks(backend: str, compiler: str) -> None:
    batch, tau = make_batch(20), torch.tensor([0.5, 0.7, 1.0, 1.2], device=DEVICE)

    def total(x: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mdpgrpo_fast.token_logprobs(x, tokens, mask, temperature=tau, backend=backend)[0].square().sum()

    grads = []
    for f in (total, torch.compile(total, fullgraph=True, backend=compiler)):
        args, _ = arguments(batch)
        grads.append(torch.autograd.grad(f(*args), args[0])[0])
    assert torch.equal(*grads)


@each_backend
@pytest.mark.usefixtures("fresh_dynamo")
def test_new_lengths_and_new_knobs_do_not_recompile(backend: str) -> None:
    """Lengths are dynamic, knobs given as tensors are data: a guard on either would compile in each step."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of(backend), fullgraph=True, backend=counter)
    for i, (longest, tau, beta) in enumerate(((4, 0.5, 0.1), (3, 0.7, 0.2), (5, 0.9, 0.3))):
        batch = make_batch(i, lengths=(longest, 2))
        args, options = arguments(batch, temperature=torch.tensor([tau, 1.0]), kl_beta=torch.tensor(beta))
        for x in (*args, options["old_logprobs"], options["ref_logprobs"]):
            torch._dynamo.mark_dynamic(x, 1)
        torch.autograd.grad(compiled(*args, **options), args[0])
    assert counter.frame_count == 1


# ---- the kernels themselves -----------------------------------------------------------------------------------------

KERNELS = [
    token_loss._token_loss_kernel, token_loss._scale_kernel, logprobs._logprobs_kernel, completions._totals_kernel,
    logprobs._logprobs_backward_kernel, completions._completions_kernel, advantages._advantages_kernel,
    objective._objective_kernel, sampling._sample_kernel,
]  # fmt: skip


SPECIALISATIONS = """
import kernel_resources as k, torch
from mdpgrpo_fast.kernels.schemas import Groups, Rows, Settings
tile, found = k.tiles.fit(k.tiles.CANDIDATES[0], 64), []
# Another batch in every respect that may change from step to step; the second begins off 16 bytes.
for b, length, number, shift in ((2, 3, 0.5, 0), (3, 17, 0.7, 1), (16, 16, 1.0, 0)):
    n, settings = b * length, Settings(*[number] * 3, 2 * number, *[number] * 6, group_size=2)
    # How advantages would be made, where they are given.
    other = settings._replace(group_size=2 + b, goal_mean=b % 3, sample_std=b % 2, binomial=b % 2, prospect=b % 2)
    def row(size=n, dtype=torch.float32):
        return torch.zeros(size + shift, dtype=dtype)[shift:]
    rows = Rows(row(dtype=torch.int64), row(dtype=torch.uint8), old_logprobs=row(), ref_logprobs=row(),
                importance_weight=row(), temperature=row(b), epsilon_low=row(b), epsilon_high=row())
    groups = Groups(row(4 * b), row(2 * b), row(4 * b, torch.uint8), row(b, torch.int64))
    logits, statistics = torch.empty(b, length, 64), torch.zeros(5, n)
    per_row = rows._replace(advantage=row(), kl_beta=row(), completion=row(dtype=torch.int64))
    def run():
        for level in (0, 1):
            at = settings._replace(sequence=level)
            k.token_loss.launch_token_loss(logits, logits, rows, groups, at, row(1)[0], b, length, tile_of=lambda: tile)
        k.logprobs.launch_logprobs_backward(logits, row(), rows, settings, b, statistics, row(), tile_of=lambda: tile)
        chunk = per_row._replace(temperature=row(), epsilon_low=row(), epsilon_high=row())
        k.objective.launch_objective(statistics, row(), chunk, other._replace(sequence=1), row(b), row(1)[0], b)
        x = logits.view(1, n, 64)
        k.token_loss.launch_token_loss(x, x, per_row, Groups(), other, None, b, length, tile_of=lambda: tile)
        k.token_loss.launch_scale(logits, row(1)[0], tile_of=lambda: tile)
        k.sampling.launch_sample(logits.view(n, 64), row(), tile_of=lambda: tile)
        k.advantages.launch_advantages(groups, settings)
    launches = k.record("", run)
    found.append([(x.kernel.fn.__name__, str((x.signature, x.constants, x.attributes, x.options))) for x in launches])
for one, *others in zip(*found, strict=True):
    assert all(x == one for x in others), "\\n".join([one[0], one[1], *(x[1] for x in others)])
print(*sorted({name for name, _ in found[0]}))
"""


def test_a_new_batch_compiles_no_new_kernel() -> None:
    """Neither lengths, temperatures and coefficients nor where a vector begins in memory are compiled in."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks" / "compiled")))
    done = subprocess.run([sys.executable, "-c", SPECIALISATIONS], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) == {k.fn.__name__ for k in KERNELS}


def compiled(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The kernels compiled for real GPUs, which needs none; the interpreter must not be chosen there."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    output, script = folder / "resources.json", ROOT / "benchmarks" / "compiled" / "kernel_resources.py"
    command = [sys.executable, str(script), *arguments, "--dtype", "bfloat16", "--output", str(output)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(output.read_text())["kernels"]


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of Hopper; an odd vocabulary has rows that are not aligned, and code of its own."""
    folder, hopper = tmp_path_factory.mktemp("resources"), ("--sm", "90")
    return compiled(folder, "--vocab", "32000", *hopper) + compiled(folder, "--vocab", "32001", *hopper, "--rows-only")


@pytest.fixture(scope="module")
def other_machine_code(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compiled(tmp_path_factory.mktemp("resources"), "--vocab", "32000", "--sm", "80", "100", "120")


@pytest.mark.parametrize(
    ("found", "architectures"),
    [("machine_code", {90}), pytest.param("other_machine_code", {80, 100, 120}, marks=pytest.mark.long)],
)
def test_kernels_compile_without_spills(found: str, architectures: set[int], request: pytest.FixtureRequest) -> None:
    machine_code: list[dict[str, Any]] = request.getfixturevalue(found)
    kernels = (*KERNELS, attention._attention_kernel, attention._combine_kernel, blocks._rms_norm_kernel,
               blocks._rotate_kernel, blocks._append_kernel, blocks._gated_kernel)  # fmt: skip
    names = [k.fn.__name__.strip("_").removesuffix("_kernel") for k in kernels]
    assert {(r["kernel"], r["sm"]) for r in machine_code} == {(n, sm) for n in names for sm in architectures}
    most = {"full, entropy bonus": 32, "per row, two temperatures, support": 32, "gmpo, off-policy": 24}
    allowed = [most.get(r["case"].split(", ", 1)[1], 0) for r in machine_code]
    assert [r for r, n in zip(machine_code, allowed, strict=True) if r["spilled"] > n] == []
    assert all(r["kernel"] == "completions" for r in machine_code if r["spilled"] and "gmpo" in r["case"])


def test_a_logit_costs_few_instructions(machine_code: list[dict[str, Any]]) -> None:
    """Both sweeps together, on sm_90: at 23 a GPU of this size is bound by its instructions and not by its memory."""
    most = {
        "V=32000": {
            "on-policy, rewards": 17, "on-policy, two temperatures": 29, "unit gradient": 29, "full, token level": 37,
            "entropy bonus": 19, "full, entropy bonus": 39, "cispo, off-policy": 17, "sapo, off-policy": 17,
            "sampling": 46, "sampling, greedy": 12,
        },
        "V=32001": {"on-policy, rewards": 18, "sampling": 46, "sampling, greedy": 14},
    }  # fmt: skip
    for vocab, limits in most.items():
        rows = {r["case"].split(", ", 1)[1]: r for r in machine_code if r["sm"] == 90 and f"{vocab} " in r["case"]
                and r["kernel"] != "completions" and r["sweeps"]}  # fmt: skip
        cost = {case: sum(sweep["instructions"] for sweep in rows[case]["sweeps"].values()) for case in limits}
        assert {case: n for case, n in cost.items() if n > limits[case]} == {}


@pytest.mark.parametrize("sm", [90, *(pytest.param(sm, marks=pytest.mark.long) for sm in (80, 100, 120))])
def test_rows_are_read_and_written_in_128_bit_pieces(sm: int, request: pytest.FixtureRequest) -> None:
    machine_code = request.getfixturevalue("machine_code" if sm == 90 else "other_machine_code")
    sweeping = {"token_loss", "logprobs", "logprobs_backward", "scale", "sample"}
    rows = [r for r in machine_code if r["sm"] == sm and r["kernel"] in sweeping and "V=32000 " in r["case"]]
    assert {r["kernel"] for r in rows} == sweeping
    for r in rows:
        assert r["loads"].get("128", 0) > 0, r["case"]
        writes = r["kernel"] not in ("logprobs", "sample") or "unit gradient" in r["case"]
        assert (r["stores"].get("128", 0) > 0) == writes, r["case"]


@pytest.mark.long
def test_rows_of_wider_buffers_are_read_and_written_in_128_bit_pieces(tmp_path: Path) -> None:
    """As of a chunk of an odd vocabulary; and of strides that are multiples of 8 elements, but not of 16."""
    for vocab, stride in ((32001, 32016), (32008, 32008)):
        found = compiled(tmp_path, "--vocab", str(vocab), "--stride", str(stride), "--sm", "90", "--rows-only")
        rows = [r for r in found if r["sweeps"]]
        assert {r["kernel"] for r in rows} == {"token_loss", "logprobs", "logprobs_backward", "sample"}
        for r in rows:
            into_new_rows = "log-probs backward" in r["case"] and stride != vocab
            writes = "write" in r["sweeps"] and not into_new_rows
            assert r["loads"].get("128", 0) > 0 and (r["stores"].get("128", 0) > 0) == writes, r
        cost = {r["case"].split(", ", 1)[1]: sum(s["instructions"] for s in r["sweeps"].values()) for r in rows}
        assert cost["on-policy, rewards"] <= 17 and cost["unit gradient"] <= 29 and cost["sampling"] <= 46, cost


def test_rows_of_an_odd_vocabulary_are_written_in_128_bit_pieces(machine_code: list[dict[str, Any]]) -> None:
    """From a row's first whole 16 bytes on."""
    rows = [r for r in machine_code if "V=32001 " in r["case"] and "write" in r["sweeps"]]
    assert {r["kernel"] for r in rows} == {"token_loss", "logprobs", "logprobs_backward"}
    for r in rows:
        assert r["loads"].get("128", 0) > 0 and r["stores"].get("128", 0) > 0, r["case"]


# ---- rows off 16 bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_off_16_bytes_are_written_as_any(
    dtype: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From where a row is aligned, around its end: rows that begin anywhere, targets at every border, several tiles."""
    from mdpgrpo_fast.kernels.triton import library

    monkeypatch.setattr(library, "tile_for", lambda vocab, dtype, device: tiles.Tile(128, 1, 1, 0))
    vocab, taken, real = 3 * 128 + 21, [], tiles.row_tile
    batch = make_batch(4, lengths=(9, 9, 9, 9), vocab=vocab, dtype=dtype)
    borders = [0, 1, 6, 7, 8, 127, 128, 135, 255, 256, 382, 383, 384, vocab - 8, vocab - 7, vocab - 1]
    batch.tokens.flatten()[: len(borders)] = torch.tensor(borders)
    batch.mask[3, 2:] = 0  # rows of zeros
    config = config_for()
    found = []

    class Language:
        """triton.language, where what the compiler is told must be so."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tl, name)

        def multiple_of(self, x: Any, size: int) -> Any:
            assert (x.handle.data % size == 0).all()
            hints.append(x)
            return x

    hints: list[Any] = []
    if DEVICE == "cpu":
        # Once with the real one, which the interpreter looks for when it first sees a function.
        run("triton", batch, config, softcap=softcap)
        monkeypatch.setattr(row_kernels, "tl", Language())
    for write_axis in (1, 0):

        def chosen(*args: Any) -> Any:
            taken.append(real(*args))
            plain = taken[-1]._replace(write_axis=taken[-1].axis, wraps=tl.constexpr(False))
            return plain if write_axis == 0 else taken[-1]  # noqa: B023

        for module in (token_loss, logprobs):
            monkeypatch.setattr(module, "row_tile", chosen)
        got = run("triton", batch, config, softcap=softcap)
        logits = batch.logits.detach().to(DEVICE).requires_grad_()
        scores, _ = mdpgrpo_fast.token_logprobs(logits, batch.tokens.to(DEVICE), backend="triton", softcap=softcap)
        found.append((got.out.logprobs, got.grad, torch.autograd.grad(scores.sum(), logits)[0]))
    assert {(x.axis.value, x.write_axis.value) for x in taken if x.vocab.value == vocab} == {(0, 1)}
    assert torch.equal(found[0][0], found[1][0]), "log-probs do not know"
    assert hints or DEVICE != "cpu"
    assert not found[0][1][3, 2:].any(), "masked rows"
    for ours, plain in zip(found[0][1:], found[1][1:], strict=True):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(ours, plain, rtol=1e-5 if dtype == "float32" else 2e-2, atol=1e-7)


def test_which_rows_are_written_from_where_they_are_aligned() -> None:
    """Where the gradient's rows begin as the logits' do, and the end of a row has room for its beginning."""

    def axes(x: torch.Tensor, gradient: torch.Tensor | None = None) -> tuple[int, int]:
        found = tiles.row_tile(tiles.Tile(128, 1, 1, 0), x, gradient)
        assert found.wraps.value == (found.write_axis.value > found.axis.value)
        return found.axis.value, found.write_axis.value

    x = torch.empty(2, 5, 405, dtype=torch.bfloat16)
    assert axes(x, torch.empty_like(x)) == (0, 1) and axes(x, torch.empty(x.shape)) == (0, 1), "float32 of 16 bits"
    assert axes(torch.empty(x.shape), torch.empty_like(x)) == (0, 0), "16 bits of float32"
    assert axes(x[:, :-1], torch.empty(2, 4, 405)) == (0, 0), "the second completion begins elsewhere"
    assert axes(x[:, 1:], torch.empty(2, 4, 405)) == (0, 0)
    assert axes(x[:, :-1]) == (0, 1), "over the logits"
    assert axes(torch.empty(4, 3, 387, dtype=torch.bfloat16)) == (0, 0), "3 columns after the last whole tile"
    assert axes(torch.empty(4, 3, 387)) == (0, 0) and axes(torch.empty(4, 3, 389)) == (0, 1)
    assert axes(x[..., :400]) == (0, 1) and axes(torch.empty(2, 5, 408)) == (1, 1)
    assert axes(torch.empty(2, 5, 408)[..., :405]) == (1, 1), "an odd vocabulary in a wider buffer"
    assert axes(torch.empty(2, 5, 408)[..., :405], torch.empty(2, 5, 405)) == (1, 0), "sums as without a gradient"


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@each_backend
@gpu
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """Offsets of rows and the size of the gradient pass int32: the last rows are those of the same rows alone."""
    batch, count = make_batch(50, lengths=(3, 2), vocab=256000, dtype="bfloat16"), 2**31 // 256000 + 100
    logits, tokens = batch.logits.flatten(0, 1)[None].to(DEVICE), batch.tokens.flatten()[None].to(DEVICE)
    n = tokens.numel()
    big = torch.zeros(1, count, logits.shape[2], dtype=torch.bfloat16, device=DEVICE)
    big[0, -n:] = logits[0]
    all_tokens, mask = (torch.zeros(1, count, dtype=torch.long, device=DEVICE) for _ in range(2))
    all_tokens[0, -n:], mask[0, -n:] = tokens[0], 1
    args = {"advantage": 1.0, "kl_beta": 0.0, "denominator": 6.0, "backend": backend}
    out = mdpgrpo_fast.token_loss(big.requires_grad_(), all_tokens, mask, config_for(aggregation="dapo"), **args)
    small = mdpgrpo_fast.token_loss(logits.requires_grad_(), tokens, None, config_for(aggregation="dapo"), **args)
    (grad,), (expected,) = torch.autograd.grad(out.loss, big), torch.autograd.grad(small.loss, logits)
    assert torch.equal(out.logprobs[0, -n:], small.logprobs[0]) and torch.equal(grad[0, -n:], expected[0])
    torch.testing.assert_close(out.loss, small.loss)
    assert not grad[0, :-n].any()


@each_backend
@gpu
def test_memory_is_one_gradient_and_none_in_place(backend: str) -> None:
    tokens = torch.zeros(4, 256, dtype=torch.long, device=DEVICE)
    leaf = torch.randn(4, 256, 32000, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    size = leaf.numel() * leaf.element_size()
    for in_place, factor in ((False, None), (False, 1.0), (True, 0.0)):  # the first call measures tiles
        logits = leaf * 1
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        given = {"advantage": 1.0, "kl_beta": 0.0, "backend": backend, "in_place": in_place}
        torch.autograd.grad(mdpgrpo_fast.token_loss(logits, tokens, None, config_for(), **given).loss, logits)
        assert factor is None or torch.cuda.max_memory_allocated() - before <= (factor + 0.02) * size


@each_backend
@gpu
def test_no_wait_for_the_device(backend: str) -> None:
    """Neither the checks nor a loss scale look at a value."""
    (x, *rest), options = arguments(make_batch(51), temperature=torch.ones(4))
    for mode in ("default", "error"):  # the first pass compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for level in ("token", "sequence"):
                loss = mdpgrpo_fast.token_loss(
                    x, *rest, config_for(importance_level=level), backend=backend, **options
                ).loss
                torch.autograd.grad(loss * 0.5, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@each_backend
@gpu
def test_new_shapes_and_knobs_compile_no_new_kernel(backend: str) -> None:
    counts = []
    for i, lengths in enumerate(((3, 2), (17, 5), (1, 33), (16, 16), (7, 1, 2, 4))):
        batch = make_batch(i, lengths=lengths, vocab=64)
        run(backend, batch, config_for(), temperature=0.5 + 0.1 * i, kl_beta=0.1 * i)
        counts.append(sum(len(cache[0]) for cache in token_loss._token_loss_kernel.device_caches.values()))
    assert counts[-1] == counts[0] > 0
