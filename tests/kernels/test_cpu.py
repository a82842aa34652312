"""What the tests of the operations cannot say of the compiled CPU kernels: their ABI, checks, variants and edges."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.inputs import ROOT
from helpers.losses import assert_matches, config_for, make_batch, run
from torch import Tensor

import mdpgrpo_fast
from mdpgrpo_fast.kernels import binaries
from mdpgrpo_fast.kernels.binaries import inputs
from mdpgrpo_fast.kernels.schemas import KNOBS, LOSSES, SCALES, Rows, Settings
from mdpgrpo_fast.reference import losses

CSRC = ROOT / "csrc"
VARIANT = "from mdpgrpo_fast.kernels import binaries as b; print(b.why_missing('cpu') or b.variant('cpu'))"
needs_cpu = pytest.mark.skipif(binaries.why_missing("cpu") is not None, reason=str(binaries.why_missing("cpu")))


def test_the_cpu_part_is_built_here() -> None:
    """Every other test of it would be left out in silence."""
    assert binaries.why_missing("cpu") is None


# ---- ABI ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_our_declarations_are_those_of_torch(tmp_path: Path) -> None:
    """Both in one file: a function declared with two types does not compile, and every name must be torch's."""
    include = Path(torch.__file__).parent / "include"
    ours = (CSRC / "torch_abi.h").read_text()
    used = re.findall(r"\b((?:aoti_)?torch_\w+)\(", ours[ours.index('extern "C"') : ours.index("namespace mdpgrpo")])
    assert len(used) > 20
    theirs = f'#define USE_CUDA\n#include "{include}/torch/csrc/stable/c/shim.h"\n'
    source = theirs + f'#include "{CSRC}/torch_abi.h"\n' + "".join(f"auto* const use_{n} = &{n};\n" for n in used)
    (tmp_path / "both.cpp").write_text(source)
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{include}", str(tmp_path / "both.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    declared = subprocess.run(["g++", "-std=c++17", "-E", f"-I{include}", "-x", "c++", "-"], input=theirs, text=True,
                              capture_output=True).stdout  # fmt: skip
    assert not [n for n in used if not re.search(rf"\b{n}\(", declared)], "not a function of torch"


@needs_cpu
def test_only_what_is_meant_is_exported() -> None:
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(binaries.file_of("cpu"))], capture_output=True, text=True
    )
    names = {line.split()[-1] for line in listing.stdout.splitlines()}
    assert {n for n in names if "mdpgrpo" in n} == {"mdpgrpo_error", "mdpgrpo_variant"}
    needed = subprocess.run(["objdump", "-p", str(binaries.file_of("cpu"))], capture_output=True, text=True).stdout
    assert "libtorch_cpu.so" in needed and "libpython" not in needed and "libc10" not in needed
    sections = subprocess.run(["objdump", "-h", str(binaries.file_of("cpu"))], capture_output=True, text=True).stdout
    assert ".text" in sections and ".debug_info" not in sections, "six times the size of the code"


def test_why_a_part_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = binaries.why_missing.__wrapped__
    monkeypatch.setattr(binaries, "file_of", lambda part: tmp_path / f"{part}.so")
    assert "not there: the package was built without a C++ compiler, or with MDPGRPO_BUILD=none" in missing("cpu")
    (tmp_path / "cpu.so").write_text("no library")
    assert re.search(r"cannot be loaded: .*cpu.so: (file too short|invalid ELF header)", missing("cpu"))
    if torch.version.cuda is None:
        (tmp_path / "cuda.so").write_text("")
        assert re.search(r"needs a torch that is built with CUDA, not \S+\+cpu$", missing("cuda"))
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert missing("cpu") == "its compiled part needs torch 2.10 or newer, not 2.9.1+cu128"
    assert binaries.torch_version("2.13.0a0+git1") == (2, 13)


# ---- checks ---------------------------------------------------------------------------------------------------------


FOUR = Rows(torch.zeros(4, dtype=torch.int64), completion=torch.zeros(4, dtype=torch.int64))


TWO = Settings(two_temperatures=1)


def totals_arguments(**more: Any) -> dict[str, Any]:
    per_row = torch.zeros(5, 4)
    return {
        "per_row": per_row, "marks": torch.zeros(3, 4, dtype=torch.bool), **inputs(per_row, Settings(), FOUR),
        "num_completions": 1, "loss": torch.empty(()), "completion_kl": torch.empty(1), "totals": torch.empty(8),
        **more,
    }  # fmt: skip


def logprobs_arguments(settings: Settings = Settings(), **more: Any) -> dict[str, Any]:  # noqa: B008
    logits = torch.zeros(1, 4, 8)
    return {
        "logits": logits, "gradient": torch.empty(0), **inputs(logits, settings, FOUR._replace(completion=None)),
        "num_completions": 0, "logprobs": torch.empty(4), "statistics": torch.empty(5, 4), **more,
    }  # fmt: skip


@needs_cpu
def test_nothing_wrong_reaches_a_pointer() -> None:
    """Whoever calls the raw ops past the public door gets a sentence, not a crash."""
    totals, logprobs = torch.ops.mdpgrpo_fast._cpu_totals, torch.ops.mdpgrpo_fast._cpu_logprobs
    totals(**totals_arguments())
    logprobs(**logprobs_arguments())
    wide = torch.zeros(5, 8)[:, ::2]
    for op, arguments, message in (
        (totals, totals_arguments(per_row=torch.zeros(5, 4).double()), "per_row must be float32, not float64"),
        (totals, totals_arguments(per_row=wide), "per_row must be contiguous"),
        (totals, totals_arguments(totals=torch.empty(7)), "totals must have 8 elements, not 7"),
        (totals, totals_arguments(completion=torch.zeros(4)), "completion must be int64, not float32"),
        (logprobs, logprobs_arguments(logits=torch.zeros(4, 8)), "logits must have 3 dimensions, not 2"),
        (logprobs, logprobs_arguments(logits=torch.zeros(1, 4, 8).int()), "logits must be float32, bfloat16 or"),
        (logprobs, logprobs_arguments(logits=torch.zeros(1, 8, 4).mT), "logits must have unit stride in the vocab"),
        (logprobs, logprobs_arguments(gradient=torch.zeros(1, 4, 7)), "gradient must have the shape of the logits"),
        (logprobs, logprobs_arguments(TWO, gradient=torch.zeros(1, 4, 8)), "gradient of two temperatures needs"),
        (logprobs, logprobs_arguments(tokens=torch.empty(0)), "tokens must be int64, not float32"),
        (logprobs, logprobs_arguments(temperature=torch.zeros(3)), "temperature must have 4 elements, not 3"),
        (logprobs, logprobs_arguments(flags=torch.zeros(3).long()), "flags must have 16 elements, not 3"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"^mdpgrpo_fast: .*{message}"):
            op(**arguments)
    with pytest.raises((RuntimeError, NotImplementedError)):
        totals(**totals_arguments(per_row=torch.zeros(5, 4, device="meta")))


# ---- edges ----------------------------------------------------------------------------------------------------------


@needs_cpu
@pytest.mark.parametrize("vocab", [1, 3, 17, 2047, 2048, 2049, 31999])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shift", [0, 1])
def test_vocabularies_and_unaligned_rows(vocab: int, dtype: str, shift: int) -> None:
    """Every tail of a block and of a register, and rows that begin anywhere; the storage around them stays as it is."""
    batch = make_batch(31, vocab=vocab, dtype=dtype)
    config, more = config_for(), {"softcap": 20.0 if shift else None, "temperature": torch.tensor([0.5, 0.7, 1.0, 1.3])}
    assert_matches("cpu", batch, config, **more)
    flat = torch.full((batch.logits.numel() + shift + 1,), 7.0, dtype=batch.logits.dtype)
    logits = flat[shift:-1].view(batch.logits.shape).copy_(batch.logits)
    plain = run("cpu", batch, config, **more)
    given = {k: v for k, v in {**batch.given(), **more}.items() if v is not None}
    leaf = torch.zeros((), dtype=flat.dtype, requires_grad=True)
    if dtype == "float16":
        return
    rows = flat.add_(leaf)[shift:-1].view(logits.shape)
    given |= {"max_completion_length": 5, "backend": "cpu"}
    out = mdpgrpo_fast.token_loss(rows, batch.tokens, batch.mask, config, in_place=True, **given)
    assert torch.equal(out.logprobs, plain.out.logprobs)
    assert torch.equal(flat[shift:-1].view(logits.shape), plain.grad), "over the logits: the same gradient"
    assert flat[-1] == 7 and (flat[:shift] == 7).all()


@needs_cpu
def test_a_gradient_beyond_the_caches() -> None:
    """Written past them, in rows that begin anywhere: the same bits as over the logits, within 1e-5 of the truth."""
    rows, vocab = 72, 31999
    assert rows * vocab * 4 > 8 << 20
    g = torch.Generator().manual_seed(0)
    logits, tokens = 3 * torch.randn(rows, vocab, generator=g), torch.randint(0, vocab, (rows,), generator=g)
    tokens[::2] = logits[::2].argmax(-1)
    old, ref = (torch.full((rows,), x) for x in (-9.0, -11.0))
    config = config_for(kl_temperature=0.8)
    more = {"advantage": 0.7, "kl_beta": 0.1, "completion": torch.arange(rows) // 8, "num_completions": 9,
            "max_completion_length": 8, "temperature": torch.linspace(0.3, 1.2, 9)}  # fmt: skip

    def grad(backend: str, dtype: torch.dtype, in_place: bool = False) -> tuple[Tensor, Tensor]:
        leaf = logits.to(dtype).requires_grad_()
        x, given = leaf * 1 if in_place else leaf, {"old_logprobs": old.to(dtype), "ref_logprobs": ref.to(dtype)}
        out = mdpgrpo_fast.token_loss(x, tokens, None, config, backend=backend, in_place=in_place, **given, **more)
        return out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]

    loss, found = grad("cpu", torch.float32)
    truth, exact = grad("torch", torch.float64)
    assert torch.equal(grad("cpu", torch.float32, in_place=True)[1], found)
    assert (loss - truth).abs() < 1e-5 * truth.abs() and (found - exact).norm() / exact.norm() < 1e-5
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


@needs_cpu
def test_bfloat16_is_rounded_once_and_to_nearest() -> None:
    batch = make_batch(5, vocab=1001, dtype="bfloat16")
    wide = run("cpu", replace(batch, logits=batch.logits.float()), config_for())
    assert torch.equal(run("cpu", batch, config_for()).grad, wide.grad.bfloat16())


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for factor in (0.5, 0.3, 3.0, -1.0):
        got = everything.clone().view(1, 1, -1)
        torch.ops.mdpgrpo_fast._cpu_scale(gradient=got, scale=torch.tensor(factor))
        expected = (everything.float() * factor).to(dtype)
        torch.testing.assert_close(got.flatten(), expected, atol=0, rtol=0, equal_nan=True)


@needs_cpu
def test_more_threads_than_rows_and_one_thread() -> None:
    batch, config = make_batch(11, vocab=40000), config_for()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            found.append(run("cpu", batch, config))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0].grad, x.grad) and torch.equal(found[0].out.loss, x.out.loss) for x in found[1:])


@needs_cpu
def test_infinite_and_missing_logits() -> None:
    """-inf has probability 0; a row of it, +inf and NaN give NaN, and nothing plausible."""
    x = torch.randn(1, 6, 3000)
    x[0, 0, 5:] = -torch.inf
    x[0, 1, 2040:2060] = -torch.inf
    x[0, 2, :2048] = -torch.inf
    x[0, 3] = -torch.inf
    x[0, 4, 2999], x[0, 5, 7] = torch.inf, torch.nan
    x.requires_grad_()
    found, entropy = mdpgrpo_fast.token_logprobs(x, torch.full((1, 6), 2999), backend="cpu")
    truth, exact = mdpgrpo_fast.token_logprobs(x.double(), torch.full((1, 6), 2999), backend="torch")
    assert found[0, 0] == -torch.inf and found[0, 3:].isnan().all()
    torch.testing.assert_close(found[0, 1:3].double(), truth[0, 1:3], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy[0, :3].double(), exact[0, :3], atol=1e-5, rtol=0)


@needs_cpu
@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("level", [0.0, -25.0, -200.0])
def test_blocks_without_probability_have_no_gradient(level: float, tau: float) -> None:
    """A factor of such a block must not overflow on its way to 0, wherever the peak of the row lies."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 6000, generator=g) + level
    x[0, 0, 2048:], x[0, 1, :4096], x[0, 2, 1000:5000] = -torch.inf, -torch.inf, -torch.inf
    x[0, 3] = -torch.inf
    tokens = torch.tensor([[5, 5000, 5999, 3]])
    found = {}
    for backend, dtype in (("cpu", torch.float32), ("torch", torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        logprobs, _ = mdpgrpo_fast.token_logprobs(leaf, tokens, temperature=tau, backend=backend)
        found[backend] = torch.autograd.grad(logprobs.sum(), leaf)[0].double()
    assert found["cpu"][0, 3].isnan().all()
    torch.testing.assert_close(found["cpu"][0, :3], found["torch"][0, :3], atol=1e-5 / tau, rtol=0)


@needs_cpu
@pytest.mark.parametrize("tau", [0.3, 1.0])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_an_entropy_bonus_of_banned_logits(softcap: float | None, tau: float) -> None:
    """What has probability 0 has no part in it, and 0 times -inf is not met; nor has a row of equals."""
    batch = make_batch(13, lengths=(2, 2), vocab=6000, scale=3.0)
    x = batch.logits
    x[0, 0, 2048:], x[0, 1, :4096], x[1, 0, 1000:5000], x[1, 1] = -torch.inf, -torch.inf, -torch.inf, 7.0
    x[1, 0, :1000] -= 200
    batch.tokens = x.argmax(-1)
    config = config_for(entropy_coef=0.3, kl_temperature=0.8, temperature_objective="per_row")
    assert_matches("cpu", batch, config, temperature=tau, softcap=softcap)


@needs_cpu
def test_the_first_call_may_be_traced() -> None:
    """What a tracing mode makes of a small tensor must not be kept for real calls."""
    code = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from mdpgrpo_fast import token_logprobs
import mdpgrpo_fast.ops.backends as b
b.refuses("cpu", torch.device("cpu"), torch.float32)
with FakeTensorMode():
    token_logprobs(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), backend="cpu", check_values=False)
print(token_logprobs(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), backend="cpu")[0].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "torch.Size([1, 2])", done.stderr[-1500:]


@needs_cpu
def test_rows_without_completions_are_refused() -> None:
    for backend in ("cpu", "torch"):
        with pytest.raises(ValueError, match=r"^num_completions must be at least 1, as there are 4 rows; got 0$"):
            mdpgrpo_fast.token_loss(
                torch.randn(4, 50), torch.zeros(4).long(), None, config_for(), advantage=1.0, kl_beta=0.0,
                completion=torch.zeros(4).long(), num_completions=0, check_values=False, backend=backend,
            )  # fmt: skip


@needs_cpu
def test_defaults_of_torch_do_not_matter() -> None:
    batch = make_batch(3)
    plain = run("cpu", batch, config_for())
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            out = mdpgrpo_fast.token_loss(
                batch.logits, batch.tokens, batch.mask, config_for(), backend="cpu", max_completion_length=5,
                **batch.given(),
            )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out.loss, plain.out.loss)


# ---- variants -------------------------------------------------------------------------------------------------------


def below(best: str) -> list[str]:
    order = ["avx512", "avx2", "plain"]
    return order[order.index(best) + 1 :]


@needs_cpu
@pytest.mark.parametrize("variant", below(binaries.variant("cpu")) if binaries.why_missing("cpu") is None else [])
def test_every_instruction_set_passes_the_op_tests(variant: str) -> None:
    """The tests of the operations again, in a process that takes a lesser instruction set."""
    files = [str(ROOT / "tests" / "ops" / f"test_{op}.py") for op in ("token_loss", "logprobs", "advantages")]
    edges = ("vocabularies_and_unaligned_rows", "a_gradient_beyond_the_caches", "infinite_and_missing_logits",
             "blocks_without_probability_have_no_gradient",
             "every_16_bit_number_is_read_and_rounded_as_torch_does")  # fmt: skip
    own = [f"{__file__}::test_{name}" for name in edges]
    command = [sys.executable, "-m", "pytest", "-k", "cpu", "-p", "no:cacheprovider", *files, *own]
    env = {**os.environ, "MDPGRPO_CPU": variant}
    env = {k: v for k, v in env.items() if not k.startswith("PYTEST_")}
    seen = subprocess.run(
        [sys.executable, "-c", VARIANT],
        capture_output=True, text=True, env=env, cwd=ROOT,
    )  # fmt: skip
    assert seen.stdout.strip() == variant
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 150  # type: ignore[union-attr]


@needs_cpu
def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    code = "from mdpgrpo_fast.kernels import binaries; print(binaries.why_missing('cpu'))"
    env = {**os.environ, "MDPGRPO_CPU": "avx1024"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert re.search(
        r"cannot be used: .*MDPGRPO_CPU=avx1024 is not what this CPU has; it has \w+ and below", done.stdout
    )


def test_constants_of_csrc_and_reference_agree() -> None:
    header = (CSRC / "method.h").read_text()
    for name in ("KL_EXPONENT_MAX", "RATIO_EXPONENT_MAX", "VESPO_LOG_MIN", "VESPO_LOG_MAX"):
        assert float(re.search(rf"{name} = ([-\d.]+)", header).group(1)) == getattr(losses, name)  # type: ignore
    for enum, names in (("Loss", LOSSES), ("Scale", ("by_group", "by_batch", "unscaled"))):
        assert f"enum {enum} : int32_t {{ {', '.join(names).upper()} }};" in header
    assert SCALES == ("group", "batch", "none")
    settings = Settings()
    assert f"NUM_NUMBERS = {len(settings.numbers)}, NUM_FLAGS = {len(settings.flags)};" in header
    text = {name: body for name, body in re.findall(r"#define MDPGRPO_(\w+)\(X\)((?:.*\\\n)*.*)\n", header)}
    places = {n: int(at) for part in ("KNOBS", "NUMBERS") for n, at in re.findall(r"X\((\w+), (-?\d+)\)", text[part])}
    numbers = {n: i for i, n in enumerate(Settings._fields[: len(settings.numbers)])}
    del numbers["top_entropy_quantile"]  # kernels are given the floor that follows from it
    assert places == {**{n: -1 for n in KNOBS if n not in numbers}, **numbers}
    flags = {n: int(place) for n, place in re.findall(r"X\(\w+, (\w+), (\d+)\)", text["FLAGS"])}
    assert flags == {n: i for i, n in enumerate(Settings._fields[len(settings.numbers) :])}
    per_row = re.findall(r"X\((\w+)\)", text["PER_ROW"])
    assert {"tokens", "mask", "completion", *KNOBS, *per_row} == set(Rows._fields)
