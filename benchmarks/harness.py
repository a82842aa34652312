"""What the operation benchmarks share: device, clocks, alternating medians, peak memory, verification, result files.

Times on a GPU are of the device alone: events around a call whose launches are queued behind a spin, with the L2 cache
emptied by a read before. `wall_ms` is pytest-benchmark's own, between two synchronisations, the host's share included.
Candidates of one case are timed in turn, in another order each round, and ratios are those of medians.

Results go to benchmarks/results/<device>/<op>.json. For a trial: BENCH_SHAPES=64x500 (tokens x vocabulary) with
BENCH_RESULTS=<folder>. BENCH_COMMIT names the commit where there is no repository; BENCH_SECONDS ends a benchmark.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mdpgrpo_fast
from mdpgrpo_fast.kernels import binaries
from mdpgrpo_fast.ops import backends

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
SPIN_CYCLES = 2_000_000  # about 1 ms: the host issues a whole call meanwhile
MIN_ROUNDS, MAX_ROUNDS = 5, 40
# Of these, one that raises is recorded and skipped; of ours, it fails.
PEERS = ("reference", "compile", "liger", "trl", "flash_attn")
PACKAGES = ("torch", "triton", "liger_kernel", "trl", "flash_attn", "transformers")

# Relative norm error of a gradient in the dtype of the logits: bfloat16 rounds it by 1e-3. Values are float32.
GRADIENT_TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3, torch.float32: 1e-4}
VALUE_TOLERANCE = 1e-4


class Unavailable(Exception):
    """Why a candidate has no number here."""


class Wrong(AssertionError):
    """A candidate's output differs from the reference."""


@dataclass
class Candidate:
    run: Callable[[], Any]  # one call; what it returns is what gets verified
    setup: Callable[[], None] | None = None  # before every call, not timed


@dataclass
class Measured:
    """One case: an entry per candidate, of numbers or of the reason for none, and the candidates that can run."""

    title: str
    entries: dict[str, dict[str, Any]]
    ready: dict[str, Candidate]


# ---- where we are ---------------------------------------------------------------------------------------------------


def cpu_name() -> str:
    """The processor as the system names it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_slug() -> str:
    """`cpu`, or the GPU's name: NVIDIA H200 is `h200`."""
    if not CUDA:
        return "cpu"
    name = torch.cuda.get_device_name(0).lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\b(nvidia|geforce|tesla)\b", "", name)).strip("-")


def results_folder() -> Path:
    trial = os.environ.get("BENCH_RESULTS")
    if os.environ.get("BENCH_SHAPES") and not trial:
        raise RuntimeError("BENCH_SHAPES needs BENCH_RESULTS: a trial must not replace a result")
    return Path(trial or ROOT / "benchmarks" / "results") / device_slug()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> str:
    if not CUDA:
        compiled = binaries.variant("cpu") if binaries.why_missing("cpu") is None else "no compiled kernels"
        return f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {compiled}"
    p = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    return (
        f"{p.name}, {p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.0f} GiB, "
        f"{p.L2_cache_size / 2**20:.0f} MiB L2, driver {driver.splitlines()[0]}"
    )


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Their versions."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def versions() -> dict[str, str]:
    ours = {"python": platform.python_version(), "mdpgrpo_fast": mdpgrpo_fast.__version__}
    return ours | installed(PACKAGES)


def provenance(command: str) -> dict[str, Any]:
    commit, changes = os.environ.get("BENCH_COMMIT") or _output("git", "rev-parse", "HEAD"), None
    if "BENCH_COMMIT" not in os.environ:
        changes = _output("git", "status", "--porcelain", "--", "mdpgrpo_fast", "csrc", "benchmarks/*.py")
    commit = (commit or "unknown") + (" with changes" if changes else "")
    return {"command": command, "commit": commit, "machine": machine(), "versions": versions()}


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def short(x: float) -> float:
    return float(f"{x:.4g}")


# ---- our backends ---------------------------------------------------------------------------------------------------


def own_backends() -> list[str]:
    """All but `torch`, which is the reference itself."""
    return [name for name in backends.NAMES if name != "torch"]


def auto_candidate() -> str:
    """The candidate that `auto` is here."""
    name = backends.choose("auto", DEVICE, DTYPE)
    return "reference" if name == "torch" else name


def require_backend(name: str) -> None:
    try:
        backends.choose(name, DEVICE, DTYPE)
    except ValueError as e:
        raise Unavailable(str(e)) from None


def require_gpu(kind: str = "Triton kernels") -> None:
    if not CUDA:
        raise Unavailable(f"{kind}: need a GPU")


# ---- time and memory ------------------------------------------------------------------------------------------------


def clock() -> float:
    """For pytest-benchmark: waits for the device first."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


@functools.cache
def _larger_than_cache() -> Tensor:
    return torch.ones(4 * torch.cuda.get_device_properties(0).L2_cache_size // 4, device=DEVICE)


def milliseconds(candidate: Candidate) -> float:
    """One call, from cold caches on a GPU."""
    if candidate.setup is not None:
        candidate.setup()
    if not CUDA:
        start = time.perf_counter()
        candidate.run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # A read leaves clean lines: a write would be paid for by the call that evicts it.
    _larger_than_cache().sum()
    torch.cuda._sleep(SPIN_CYCLES)
    begin.record()
    candidate.run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def alternate(candidates: dict[str, Candidate], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every candidate, in rounds of one call each, after two that do not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(2 if CUDA else 1):
        for candidate in candidates.values():
            milliseconds(candidate)
    names, order = list(candidates), random.Random(0)
    stop = time.perf_counter() + seconds
    for i in range(MAX_ROUNDS):
        late = time.perf_counter() - stop
        # Of calls that take long, three rounds are enough.
        if late > 0 and i >= (3 if late > 2 else MIN_ROUNDS):
            break
        # Another order each time: what ran before decides how warm the device is.
        order.shuffle(names)
        for name in names:
            times[name].append(milliseconds(candidates[name]))
    return times


def release() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def _peak_on_the_cpu(run: Callable[[], Any]) -> int:
    """Bytes that a call's tensors take at their peak, from the allocator's events in the profiler's trace."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return max(itertools.accumulate(sizes, initial=0))


def peak_mb(candidate: Candidate) -> float:
    """What one call allocates at its peak, beyond what is there before it."""
    if candidate.setup is not None:
        candidate.setup()
    if not CUDA:
        return _peak_on_the_cpu(candidate.run) / 1e6
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    candidate.run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def copy_gb_s(n_bytes: int) -> float:
    """GB/s of a copy within the device's memory, bytes read and written, median."""
    source = torch.empty(n_bytes // 4, dtype=torch.float32, device=DEVICE).normal_()
    target = torch.empty_like(source)
    copy = Candidate(lambda: target.copy_(source))
    return 2 * n_bytes / statistics.median(alternate({"copy": copy}, 2.0)["copy"]) / 1e6


COPY_BYTES = (4 << 30) if CUDA else (256 << 20)


@functools.cache
def ceiling_gb_s() -> float:
    """The measured copy of `roofline.py`; measured now where its file is missing."""
    path = results_folder() / "roofline.json"
    return json.loads(path.read_text(encoding="utf-8"))["copy_gb_s"] if path.exists() else copy_gb_s(COPY_BYTES)


# ---- verification ---------------------------------------------------------------------------------------------------


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖."""
    return ((got.to(expected.dtype) - expected).norm() / expected.norm()).item()


def require_close(what: str, error: float, tolerance: float) -> float:
    if not error <= tolerance:  # a NaN is no agreement
        raise Wrong(f"{what} differs from the reference by {error:.2e}, {tolerance:.0e} is allowed")
    return short(error)


def _poison(like: Tensor | None) -> None:
    """What the allocator hands out next is NaN, so that an output nobody wrote is seen."""
    if like is not None and CUDA:
        torch.full_like(like, float("nan"))


# ---- one case -------------------------------------------------------------------------------------------------------


def _prepare(
    name: str, build: Callable[[], Candidate], check: Callable[[Any], dict[str, float]], poison: Tensor | None
) -> tuple[Candidate | None, dict[str, Any]]:
    """A verified candidate with its errors and its peak memory; or none, with the reason."""
    try:
        candidate = build()
        _poison(poison)
        if candidate.setup is not None:
            candidate.setup()
        entry: dict[str, Any] = check(candidate.run())
        release()
        peak = peak_mb(candidate)
        return candidate, entry | {"peak_mb": short(peak)}
    except Unavailable as e:
        return None, {"skipped": str(e)}
    except Exception as e:  # a peer that cannot run must not keep the others from running
        own = name not in PEERS
        lines = str(e).strip().splitlines() or [""]
        return None, {"failed" if own or isinstance(e, Wrong) else "skipped": f"{type(e).__name__}: {lines[0][:300]}"}
    finally:
        release()


class Results:
    """The result file of one op, written after every case. After `seconds` on a GPU, cases are skipped and say so."""

    def __init__(self, op: str, bytes_counted: str, seconds: float | None = None) -> None:
        if backends.interpreting():
            raise RuntimeError("TRITON_INTERPRET is set: times of the interpreter mean nothing")
        self.path = results_folder() / f"{op}.json"
        # `release` collects garbage after every candidate, 0.3 s each time unless it passes over what was imported.
        gc.collect()
        gc.freeze()
        limit = os.environ.get("BENCH_SECONDS")
        self.started, self.seconds = time.monotonic(), float(limit) if limit else seconds if CUDA else None
        self.document: dict[str, Any] = {
            "op": op,
            **provenance(f"pytest benchmarks/bench_{op}.py --benchmark-only"),
            "device": device_slug(),
            "bytes_counted": bytes_counted,
            "copy_gb_s": short(ceiling_gb_s()),
            "results": [],
        }

    def late(self) -> bool:
        return self.seconds is not None and time.monotonic() - self.started > self.seconds

    def measure(
        self,
        title: str,
        row: dict[str, Any],
        builders: dict[str, Callable[[], Candidate]],
        check: Callable[[Any], dict[str, float]],
        *,
        n_bytes: int | None = None,
        logits_bytes: int | None = None,
        poison: Tensor | None = None,
        seconds: float = 0.5 if CUDA else 5.0,
    ) -> Measured:
        """Verifies every candidate, times those that pass in turn, and adds the row to the file."""
        entries, ready = {}, {}
        for name, build in builders.items():
            candidate, entries[name] = _prepare(name, build, check, poison)
            if candidate is not None:
                ready[name] = candidate
        times = alternate(ready, seconds)
        middle = {name: statistics.median(t) for name, t in times.items()}
        for name, t in times.items():
            entry, ms = entries[name], middle[name]
            tenths = statistics.quantiles(t, n=10, method="inclusive")
            entry |= {"ms": short(ms), "ms_low": short(tenths[0]), "ms_high": short(tenths[-1]), "rounds": len(t)}
            if n_bytes is not None:
                # A copy that was measured in turn is a fairer ceiling than one of another minute.
                ceiling = n_bytes / middle["copy"] / 1e6 if "copy" in middle else ceiling_gb_s()
                gb_s = n_bytes / ms / 1e6
                entry |= {"gb_s": short(gb_s), "percent_of_copy": short(100 * gb_s / ceiling)}
            if logits_bytes is not None:
                entry["peak_over_logits"] = short(1e6 * entry["peak_mb"] / logits_bytes)
            if "reference" in middle:
                entry["x_reference"] = short(middle["reference"] / ms)
        return self.add(title, row, entries, ready)

    def skip(self, title: str, row: dict[str, Any], names: list[str]) -> Measured:
        reason = f"the time of this benchmark, {self.seconds:.0f} s, was used up before this case"
        return self.add(title, row, {name: {"skipped": reason} for name in names}, {})

    def add(
        self, title: str, row: dict[str, Any], entries: dict[str, dict[str, Any]], ready: dict[str, Candidate]
    ) -> Measured:
        self.document["results"].append({**row, "auto": auto_candidate(), "candidates": entries})
        self.write()
        return Measured(title, entries, ready)

    def write(self) -> None:
        write_json(self.path, self.document)

    def replay(self, benchmark: Any, measured: Measured, name: str) -> None:
        """One candidate through pytest-benchmark, for the time between synchronisations; the rest in `extra_info`."""
        entry = measured.entries[name]
        if "skipped" in entry:
            pytest.skip(entry["skipped"])
        if "failed" in entry:
            pytest.fail(entry["failed"])
        candidate = measured.ready[name]

        def run() -> None:
            candidate.run()

        benchmark.group = measured.title
        benchmark.extra_info.update(entry)
        # On a GPU the device's own time is what counts, and that has been measured.
        rounds = int(min(20, max(3, (50 if CUDA else 200) / entry["ms"])))
        benchmark.pedantic(run, setup=candidate.setup, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is not None:
            entry["wall_ms"] = benchmark.extra_info["wall_ms"] = short(1e3 * benchmark.stats.stats.median)
            self.write()
