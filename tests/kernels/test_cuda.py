"""The Hopper kernel of csrc/cuda: its text run with fibers in place of a GPU's threads, and its machine code.

On a Hopper GPU the tests of the operations run it for real; here nothing says how fast it is.
"""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.inputs import ROOT
from helpers.losses import (
    DEVICE,
    GIVEN,
    OPTIONS,
    REWARDS,
    assert_matches,
    call,
    config_for,
    levels_of,
    make_batch,
    packed,
    pick_options,
)

from mdpgrpo_fast.ops import backends

emulated = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(DEVICE == "cuda", reason="here the kernel itself runs in the tests of the operations"),
]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("fibers") / "cuda_on_fibers.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    source = str(ROOT / "tests" / "helpers" / "cuda_on_fibers.cpp")
    subprocess.run(
        ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
         source, "-o", str(target), f"-L{torch_libraries}", "-ltorch_cpu"],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(target))


@pytest.fixture(autouse=True)
def on_fibers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="cuda" on the CPU, where a slice is small: a row of 1001 columns takes a whole cluster."""
    if request.node.get_closest_marker("code"):
        return
    request.getfixturevalue("library")
    monkeypatch.setitem(backends._REFUSES, "cuda", lambda device: None)
    monkeypatch.setenv("HOPPER_SLICE_BYTES", "512")
    backends.library("cuda")


def check(batch: Any, config: Any, **more: Any) -> Any:
    return assert_matches("cuda", batch, config, **more)


class TestOnFibers:
    pytestmark = emulated

    @pytest.mark.parametrize("option", OPTIONS)
    def test_every_option_at_both_levels(self, option: str) -> None:
        knobs, more = (dict(x) for x in OPTIONS[option])
        for level in levels_of(option):
            batch = make_batch(3, vocab=301)
            if "tokens" in more:
                batch.tokens = batch.tokens.to(more["tokens"])
            if "mask" in more:
                batch.mask = more["mask"]
            given = {k: v for k, v in more.items() if k not in ("tokens", "mask")}
            check(batch, config_for(importance_level=level, **knobs), **given)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("vocab", [1, 3, 17, 255, 256, 257, 1023, 2049])
    def test_clusters_of_every_size_and_rows_that_begin_anywhere(self, vocab: int, dtype: str) -> None:
        """One to eight blocks a row, some of them with nothing to hold; an odd vocabulary moves each row's start."""
        batch = make_batch(4, vocab=vocab, dtype=dtype, scale=3.0)
        batch.tokens = torch.where(torch.arange(batch.tokens.numel()).view_as(batch.tokens) % 2 == 0, vocab - 1, 0)
        check(batch, config_for(), temperature=torch.tensor([0.5, 0.7, 1.0, 1.3]))

    @pytest.mark.parametrize("seed", range(16))
    def test_mixtures_of_options(self, seed: int) -> None:
        batch, config, more = pick_options(seed)
        check(batch, config, **more)

    def test_over_the_logits(self) -> None:
        """In place, in a strided view whose surroundings stay as they are."""
        batch = make_batch(5, vocab=301)
        plain = check(batch, config_for())
        b, width, v = batch.logits.shape
        storage = torch.full((b, width + 1, v + 5), 7.0)
        storage[:, :-1, 2:-3] = batch.logits
        leaf = torch.zeros((), requires_grad=True)
        view = (storage.add_(leaf))[:, :-1, 2:-3]
        call("cuda", type(batch)(view, *list(batch)[1:], kwargs=batch.kwargs), config_for(), in_place=True)
        torch.testing.assert_close(view.detach(), plain.grad, atol=1e-7, rtol=2e-6)
        assert (storage[:, -1] == 7).all() and (storage[..., :2] == 7).all() and (storage[..., -3:] == 7).all()

    def test_rewards_in_any_order(self) -> None:
        batch = make_batch(6, vocab=301)
        groups = {"rewards": REWARDS["rewards"].flatten(), "groups": torch.tensor([1, 0, 1, 0])}
        check(batch, config_for(), **GIVEN, **{**REWARDS, **groups})
        check(packed(batch), config_for(), **GIVEN, **REWARDS)

    def test_bad_tokens_temperatures_and_logits_give_nan(self) -> None:
        batch = make_batch(7, vocab=301)
        for change in ("token", "temperature", "logit"):
            logits, tokens, tau = batch.logits.clone(), batch.tokens.clone(), torch.ones(4)
            if change == "token":
                tokens[0, 0] = 301
            elif change == "temperature":
                tau[0] = 0
            else:
                logits[0, 0, 3] = torch.nan
            one = type(batch)(logits, tokens, *list(batch)[2:], kwargs=batch.kwargs)
            out = call("cuda", one, config_for(), temperature=tau, check_values=False)
            assert out.loss.isnan() and out.logprobs[0, 0].isnan() and not out.logprobs[1:].isnan().any(), change

    @pytest.mark.parametrize("softcap", [None, 30.0])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_rows_far_from_zero(self, dtype: str, softcap: float | None) -> None:
        """A logit costs one multiply-add, whose offset rounds: rows of any size and order keep their precision."""
        batch = make_batch(9, lengths=(2, 2), vocab=701, dtype=dtype, scale=3.0)
        x, ramp, lowest = batch.logits.float(), torch.linspace(-300, 300, 701), torch.finfo(batch.logits.dtype).min
        banned = torch.rand(x.shape, generator=torch.Generator().manual_seed(9)) < 0.8
        rows = {
            "1e4": 1e4 + x, "-1e4": x - 1e4, "signs": 1e4 * x.sign(), "up": ramp + x, "down": x - ramp,
            "1e9": 1e9 * x.sign(), "1e12": 1e12 * x,
            "banned": x.masked_fill(banned, -torch.inf), "lowest banned": x.masked_fill(banned, lowest),
            "first banned": torch.where(torch.arange(701) < 600, lowest, x),
        }  # fmt: skip
        for name, logits in rows.items():
            batch.logits = logits.to(batch.logits.dtype)
            batch.tokens = batch.logits.argmax(-1)
            got = check(batch, config_for(), temperature=torch.tensor([0.5, 1.3]), softcap=softcap)
            assert got.out.logprobs.max() <= 0, name
        for value in (lowest, 3e38, -1e12):  # of all logits alike: a reference that adds to them has lost the sum
            batch.logits = torch.full_like(batch.logits, value)
            out = call("cuda", batch, config_for(), temperature=torch.tensor([0.5, 1.3]), softcap=softcap)
            assert (out.logprobs + math.log(701)).abs().max() < 1e-6 > (out.entropy - math.log(701)).abs().max(), value

    @pytest.mark.parametrize("softcap", [None, 30.0])
    def test_an_entropy_bonus_of_banned_logits(self, softcap: float | None) -> None:
        """What has probability 0 has no part in it, and 0 times -inf is not met; nor has a row of equals."""
        batch = make_batch(13, lengths=(2, 2), vocab=701, scale=3.0)
        x = batch.logits
        x[0, 0, 300:], x[0, 1, :500], x[1, 0, 100:650], x[1, 1] = -torch.inf, -torch.inf, -torch.inf, 7.0
        batch.tokens = x.argmax(-1)
        config = config_for(entropy_coef=0.3, kl_temperature=0.8, temperature_objective="per_row")
        check(batch, config, temperature=torch.tensor([0.3, 1.0]), softcap=softcap)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_a_certain_token_has_no_gradient(self, dtype: str) -> None:
        """Where every other logit rounds away, the log-probability and the whole gradient are 0 to the bit."""
        batch = make_batch(10, lengths=(2, 2), vocab=301, dtype=dtype)
        batch.logits[..., 77] = 600.3
        batch.tokens[:] = 77
        given = {"advantage": 1.0, "kl_beta": 0.0, "old_logprobs": None, "ref_logprobs": None}
        for tau in (0.37, 1.0, 1.9):
            leaf = batch.logits.clone().requires_grad_()
            one = type(batch)(leaf, *list(batch)[1:], kwargs=batch.kwargs)
            out = call("cuda", one, config_for(), temperature=tau, **given)
            (gradient,) = torch.autograd.grad(out.loss, leaf)
            assert (out.logprobs == 0).all() and (gradient == 0).all() and out.entropy.abs().max() < 1e-6

    def test_a_row_that_no_cluster_holds_is_refused(self) -> None:
        batch = make_batch(8, lengths=(1, 1), vocab=460_000)
        with pytest.raises(RuntimeError, match=r"a row of 1840016 bytes does not fit 8 multiprocessors"):
            call("cuda", batch, config_for())


# ---- machine code ---------------------------------------------------------------------------------------------------


@pytest.mark.code
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the CUDA toolkit's nvcc")
def test_machine_code(tmp_path: Path) -> None:
    """No spill and no local memory on either architecture; bulk copies, barriers, clusters, 128-bit accesses."""
    script, output = ROOT / "benchmarks" / "compiled" / "cuda_resources.py", tmp_path / "resources.json"
    command = [sys.executable, str(script), "--output", str(output)]
    library, sources = ROOT / "mdpgrpo_fast" / "kernels" / "_cuda.abi3.so", (ROOT / "csrc").rglob("*.*")
    if library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        command += ["--library", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    kernels = json.loads(output.read_text())["kernels"]
    assert {k["sm"] for k in kernels} == {"90a", "100a"} and len(kernels) == 48
    for k in kernels:
        assert k["spilled"] == k["local"] == 0, k
        assert k["registers"] * 256 * 3 <= 65536, "three blocks on a multiprocessor"
        assert k["bulk_copies"] and k["cluster_barriers"] and k["loads"]["128"] and k["stores"]["128"], k
        assert "128" not in k["global_loads"], "logits are read by bulk copies alone"
        # Memory has to be the limit and not the issue of instructions: see csrc/cuda/token_loss.cuh.
        work, extended = k["instructions_per_element"], "extended" in k["kernel"]
        assert set(work) == {"read", "write", *(["bonus"] if extended else [])}, k
        options = k["kernel"].count(",") - extended  # soft-cap, two temperatures
        assert work["read"] + work["write"] <= 15 * (1, 1.7, 2)[options], k
        assert work.get("bonus", 0) <= work["write"] + 2, k


# ---- where `auto` takes it ------------------------------------------------------------------------------------------


@pytest.mark.code
def test_auto_goes_by_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the Hopper kernel won at every length from some length on, on the GPU that was measured; nowhere else."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "compiled"))
    import crossovers

    def row(vocab: int, tokens: int, cuda: float, triton: float, case: str = "on-policy") -> dict[str, Any]:
        candidates = {"cuda": {"ms": cuda}, "triton": {"ms": triton}}
        return {"case": case, "dtype": "bfloat16", "vocab": vocab, "tokens": tokens, "candidates": candidates}

    rows = [
        row(128256, 512, 1.0, 0.9),
        row(128256, 2048, 1.0, 1.2),
        row(128256, 8192, 4.0, 4.9),
        row(32000, 8192, 2, 2),
    ]
    rows += [row(32000, 8192, 1.0, 9.0, "sequence"), {**row(256000, 8192, 1, 2), "candidates": {"triton": {"ms": 2}}}]
    (tmp_path / "h200").mkdir()
    document = {"device": "h200", "machine": "NVIDIA H200, 132 multiprocessors", "results": rows}
    (tmp_path / "h200" / "token_loss.json").write_text(json.dumps(document))
    found = crossovers.table(tmp_path)
    assert found == {"NVIDIA H200": [{"dtype": "bfloat16", "vocab": 128256, "rows": 2048}]}

    device, names = torch.device("cuda"), ["NVIDIA H200"]
    monkeypatch.setattr(backends, "_crossovers", lambda: found)
    monkeypatch.setattr(backends, "refuses", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: names[0])
    wins = backends.hopper_wins
    assert wins(device, torch.bfloat16, 128256, 2048) and wins(device, torch.bfloat16, 151936, 4096)
    assert not wins(device, torch.bfloat16, 128256, 2047) and not wins(device, torch.float32, 128256, 4096)
    assert not wins(device, torch.bfloat16, 32000, 4096)
    names[0] = "NVIDIA H100"
    assert not wins(device, torch.bfloat16, 128256, 4096)


@pytest.mark.code
def test_the_table_is_that_of_the_result_files() -> None:
    """Committed results and what `auto` does cannot part."""
    done = subprocess.run(
        [sys.executable, "-c", "import crossovers, json; print(json.dumps(crossovers.table(crossovers.RESULTS)))"],
        capture_output=True, text=True, cwd=ROOT / "benchmarks" / "compiled",
    )  # fmt: skip
    assert json.loads(done.stdout) == json.loads((ROOT / "mdpgrpo_fast" / "kernels" / "crossovers.json").read_text())
