"""Compiles what the benchmarks launch, in one process per core, and measures tiles: `python benchmarks/warm.py`.

Triton takes seconds for a variant and torch.compile half a minute for a function, one after the other minutes in which
a GPU waits. Here every candidate of every case runs once, on few rows where that makes the same kernels. What fails is
named; it fails again, with its reason, in the benchmark. Exit code 3 if a kernel of ours differs from the reference, or
hangs.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

VOCABULARIES = (128256, 256000, 32000)
MODULES = ("bench_token_loss", "bench_logprobs", "bench_linear_token_loss", "bench_linear_logprobs")
FEW = {"tokens": 64, "width": 64}
# Compiled for the shape itself.
COMPILED = {("bench_token_loss", "compile"), ("bench_logprobs", "compile"), ("bench_linear_token_loss", "liger")}
Job = tuple[str, int, str]  # module, case, candidate; or "tile", vocabulary, number; or what `whole` takes
WHOLE: list[Job] = [("generate", 0, ""), ("step", 0, "")]


def jobs() -> list[Job]:
    """Those that take longest first."""
    found = [(False, job) for job in WHOLE]
    seen = set()
    for module in map(importlib.import_module, MODULES):
        for i in range(len(module.cases())):
            for name in module.NAMES:
                key = module.__name__, few(module, i, name), name
                if key not in seen and name not in ("copy", "matmuls", "reference"):
                    seen.add(key)
                    found.append(((module.__name__, name) not in COMPILED, (module.__name__, i, name)))
    return [job for _, job in sorted(found, key=lambda x: x[0])]


def few(module: Any, index: int, name: str) -> Any:
    """A case on as few rows as make the same kernels."""
    case = module.cases()[index]
    if (module.__name__, name) in COMPILED:
        return case
    return dataclasses.replace(case, **{k: v for k, v in FEW.items() if hasattr(case, k)})


def problem_of(module: Any, case: Any) -> Any:
    return module.problem(*(getattr(case, n) for n in ("tokens", "vocab", "width") if hasattr(case, n)))


def run(job: Job) -> str | None:
    """What kept a job from running; None where it ran, or cannot run here by its own words."""
    import torch
    from harness import DEVICE, DTYPE, Unavailable

    kind, index, name = job
    try:
        if kind == "tile":
            from mdpgrpo_fast.kernels.triton.tiles import CANDIDATES, fit
            from mdpgrpo_fast.kernels.triton.token_loss import scratch_run

            scratch_run(index, DTYPE, DEVICE, 1)(fit(CANDIDATES[int(name)], index))
        elif job in WHOLE:
            whole(kind)
        else:
            module = importlib.import_module(kind)
            case = few(module, index, name)
            p = problem_of(module, case)
            candidate = module.builders(p, case)[name]()
            if candidate.setup is not None:
                candidate.setup()
            candidate.run()
        torch.cuda.synchronize()
        return None
    except Unavailable:
        return None
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        text = (str(e).strip().splitlines() or [""])[0]
        return f"{' '.join(map(str, job))}: {type(e).__name__}: {text[:200]} ({where.filename}:{where.lineno})"


def whole(kind: str) -> None:
    """A rollout, or a step, of a model of one small layer with the heads and the vocabulary of the benchmark's."""
    import torch
    from harness import DEVICE

    if kind == "generate":
        import bench_generate

        case = {**bench_generate.GPU_CASES["rows8"], "layers": 1}
        model = bench_generate.make_model(case)
        ids = torch.randint(1, case["vocab"], (1, case["prompt"]), device=DEVICE)
        bench_generate.candidates(model, ids, [1.0] * bench_generate.GROUP, case["completion"])["ours"]()
        return
    import bench_step
    from problems.step import SIZES, write_problem

    small = {"hidden": 256, "intermediate": 256, "layers": 1, "heads": 4, "kv_heads": 1, "prompts": 2}
    size = dataclasses.replace(SIZES["gpu"], **small)
    with tempfile.TemporaryDirectory() as folder:
        write_problem(size, bench_step.PROMPTS, Path(folder), DEVICE)
        with bench_step.our_steps(size, bench_step.CASES["kl"], Path(folder), 1) as step:
            step()


def all_of(pool: ProcessPoolExecutor, todo: list[Job], stop: float) -> None:
    start, failed = time.monotonic(), []
    futures = {pool.submit(run, job): job for job in todo}
    done = 0
    try:
        for future in as_completed(futures, timeout=max(1.0, stop - start)):
            done += 1
            try:
                if problem := future.result():
                    failed.append(problem)
            except Exception as e:  # a process died
                failed.append(f"{futures[future]}: {type(e).__name__}: {e}")
    except TimeoutError:
        for future in futures:
            future.cancel()
    print(f"{done} of {len(todo)} jobs in {time.monotonic() - start:.0f} s, {len(failed)} failed", flush=True)
    for problem in sorted(set(failed)):
        print(f"  {problem}", flush=True)


def tune() -> None:
    """The tile of each vocabulary, and what every candidate took."""
    from harness import DEVICE, DTYPE

    from mdpgrpo_fast.kernels.triton.tuning import tile_for

    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    for vocab in VOCABULARIES:
        print(f"V {vocab}: {tile_for(vocab, DTYPE, DEVICE)}", flush=True)


def look(folder: Path, builds: Path) -> int:
    """What is here, on the terminal; where results go, and which compiled parts do not load, in two files."""
    import torch
    from harness import results_folder

    import mdpgrpo_fast
    from mdpgrpo_fast.kernels.binaries import why_missing

    if not torch.cuda.is_available():
        print(f"{sys.executable} has no torch that sees a GPU", file=sys.stderr)
        return 1
    mdpgrpo_fast.backend_report()
    folder.write_text(str(results_folder()))
    builds.write_text("".join(f"{part}: {why}\n" for part in ("cpu", "cuda") if (why := why_missing(part))))
    return 0


def smoke() -> bool:
    """One small loss of each backend beside the reference."""
    import torch
    from harness import DEVICE, own_backends

    import mdpgrpo_fast
    from mdpgrpo_fast.config import MDPGRPOConfig
    from mdpgrpo_fast.ops import backends

    config, good = MDPGRPOConfig(num_generations=8, multi_temperature=False), True
    torch.manual_seed(0)
    # More rows than a device works on at once; a row of 128256 is shared by several multiprocessors.
    for vocab in (32000, 128256):
        x = (3 * torch.randn(8, 128, vocab, device=DEVICE)).bfloat16()
        tokens = torch.randint(0, vocab, (8, 128), device=DEVICE)
        given = {"rewards": torch.rand(1, 8, device=DEVICE), "num_constraints": torch.ones(1, device=DEVICE)}
        given |= {n: torch.full((8, 128), -10.0, device=DEVICE) for n in ("old_logprobs", "ref_logprobs")}

        def loss(backend: str, x: Any = x, tokens: Any = tokens, given: Any = given) -> list[Any]:
            leaf = x.detach().requires_grad_()
            out = mdpgrpo_fast.token_loss(leaf, tokens, tokens % 7 != 0, config, backend=backend, **given)
            return [out.loss, out.logprobs, torch.autograd.grad(out.loss, leaf)[0].float()]

        wanted = loss("torch")
        for name in own_backends():
            if reason := backends.refuses(name, DEVICE, torch.bfloat16):
                print(f"smoke {name}: not here: {reason}")
                continue
            gaps = [((a - b).norm() / b.norm()).item() for a, b in zip(loss(name), wanted, strict=True)]
            good &= all(gap <= 1e-2 for gap in gaps)
            shown = ", ".join(f"{n} {gap:.1e}" for n, gap in zip(("loss", "log-probs", "gradient"), gaps, strict=True))
            print(f"smoke {name}, V = {vocab}: {shown} from the reference", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--seconds", type=float, default=90, help="after that what is left is not waited for")
    parser.add_argument("--look", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="one small loss of each backend, nothing else")
    args = parser.parse_args()
    if args.look:
        return look(*args.look)
    if args.smoke:
        return 0 if smoke() else 1
    stop = time.monotonic() + args.seconds
    # By itself, so that a kernel that hangs or faults takes nothing else with it.
    first = subprocess.Popen([sys.executable, __file__, "--smoke"], env={**os.environ, "MDPGRPO_AUTOTUNE": "0"})
    from mdpgrpo_fast.kernels.triton.tiles import CANDIDATES

    os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        # The benchmarks' own kernels follow from the tiles that win, so those come first.
        all_of(pool, [("tile", v, str(i)) for v in VOCABULARIES for i in range(len(CANDIDATES))], stop)
        try:
            good = first.wait(timeout=max(1.0, min(30.0, stop - time.monotonic()))) == 0
        except subprocess.TimeoutExpired:
            first.kill()
            good = False
        tune()
        all_of(pool, jobs(), stop)
        for process in list(getattr(pool, "_processes", {}).values()):
            process.kill()
    return 0 if good else 3


if __name__ == "__main__":
    sys.exit(main())
