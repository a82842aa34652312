"""What the compiled kernels are made of, without a GPU: registers, spills, shared memory, access width, occupancy.

    python benchmarks/compiled/kernel_resources.py              # a table, and results/compiled/kernel_resources.json
    python benchmarks/compiled/kernel_resources.py --all-tiles  # every tile that tuning may choose

The launchers run on CPU tensors with the launch itself replaced: what they would launch is compiled for each
architecture with exactly their arguments. Exit code 1 if a kernel spills, uses local memory, or does not compile.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mdpgrpo_fast.kernels.schemas import Flags, Numbers
from mdpgrpo_fast.kernels.triton import advantages, logprobs, objective, sampling, token_loss, tuning

ARCHITECTURES = (80, 90, 100, 120)
# Registers, shared memory (bytes) and threads of one multiprocessor (CUDA programming guide, compute capabilities).
MULTIPROCESSOR = {
    80: (65536, 164 << 10, 2048),
    90: (65536, 228 << 10, 2048),
    100: (65536, 228 << 10, 2048),
    120: (65536, 100 << 10, 1536),
}
RESULT = Path(__file__).parents[1] / "results" / "compiled" / "kernel_resources.json"


@dataclass(frozen=True)
class Launch:
    """One recorded launch: a kernel with the signature, constants and options that its launcher gave it."""

    case: str
    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    case: str
    kernel: str
    sm: int
    warps: int
    registers: int
    spilled: int  # bytes of stack or local memory per thread
    shared: int  # bytes
    occupancy: float  # resident threads over the most that a multiprocessor holds
    loads: dict[str, int]  # bits of a global load in the assembly -> how many such instructions
    stores: dict[str, int]


TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def describe(case: str, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """What Triton's own launch would specialise on: alignment, ones, absent tensors."""
    names = [p.name for p in kernel.params]
    options = {k: v for k, v in kwargs.items() if k not in names}
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(kernel.params):
        value = values[p.name]
        is_one = type(value) is int and value == 1 and not p.do_not_specialize
        if p.is_constexpr or value is None or is_one:
            signature[p.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[p.name] = f"*{TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0 and not p.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[p.name] = "fp32"
        else:
            signature[p.name] = "i64" if abs(value) >= 2**31 else "i32"
            if value % 16 == 0 and not p.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return Launch(case, kernel, signature, constants, attributes, options)


def record(case: str, run: Any) -> list[Launch]:
    """The launches of a function, none of which happens."""
    launches: list[Launch] = []

    def instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(describe(case, self, args, kwargs))

    with mock.patch.object(JITFunction, "run", instead):
        run()
    return launches


FLAGS = {
    "sequence": False,
    "estimator": 3,
    "aggregation": 0,
    "rescale": False,
    "two_temperatures": False,
    "group_size": 2,
    "sample_std": False,
    "goal_mean": 0,
    "binomial": False,
    "prospect": True,
    "prospect_on_goal": True,
}


def cases(vocab: int, dtype: torch.dtype, tile: tuning.Tile) -> list[Launch]:
    """The leanest and the fullest objective, log-probs and their gradient, scaling, advantages."""
    b, length = 2, 4
    logits = torch.empty(b, length, vocab, dtype=dtype)
    gradient, tokens = torch.empty_like(logits), torch.zeros(b * length, dtype=torch.long)
    mask, row, each = torch.ones(b * length, dtype=torch.uint8), torch.zeros(b * length), torch.zeros(b)
    completion, one, places = torch.zeros(b * length, dtype=torch.long), torch.ones(1), torch.arange(b)
    plain = Numbers(1.0, 0.2, 0.2, 0.0, 0.0, 1.0, 0.2, 0.8, 1.25, 2.0, 0.01, 0.025)
    full = plain._replace(delta=2.0, softcap=30.0)
    name = f"V={vocab} {str(dtype).removeprefix('torch.')}"

    def loss(*tensors: Any, completion: Any = None, numbers: Numbers = plain, **flags: bool | int) -> Callable[[], Any]:
        """tensors: rewards to kl_beta (six), old_logprobs to epsilon_high (six), denominator."""
        x, out = (t if completion is None else t.view(1, b * length, vocab) for t in (logits, gradient))
        rest = (length, numbers, Flags(**{**FLAGS, **flags}), tile)
        return lambda: token_loss.launch_token_loss(x, out, tokens, mask, completion, b, *tensors, *rest)

    none, six, statistics = (None,) * 4, (row,) * 6, torch.zeros(5, b * length)
    rewards, valid = (torch.zeros(b), torch.ones(1)), torch.ones(b, dtype=torch.uint8)
    everything = {"numbers": full, "two_temperatures": True}
    per_row = {**everything, "completion": completion, "sequence": True, "estimator": 2, "aggregation": 1}
    runs: dict[str, Callable[[], Any]] = {
        "on-policy, rewards": loss(*rewards, *none, None, row, *none, one),
        "full, token level": loss(
            *rewards, valid, places, None, None, row, row, row, each, each, each, one, rescale=True, **everything
        ),
        "full, sequence level": loss(*none, each, each, *six, None, **per_row),
        # The three of `linear_token_loss`, on a chunk's logits in place.
        "unit gradient": lambda: logprobs.launch_logprobs(
            logits, tokens, None, None, 0, row, 1.0, 1.0, 30.0, False, gradient=logits
        ),
        "two temperatures": lambda: logprobs.launch_logprobs_backward(
            row, logits, tokens, None, None, 0, row, 1.0, 30.0, statistics, row, 1.0, logits
        ),
        "objective, sequence": lambda: objective.launch_objective(
            statistics,
            row,
            None,
            completion,
            b,
            *six,
            row,
            row,
            each,
            one,
            (*full[:4], 1.0),
            True,
            3,
            True,
            True,
            True,
        ),
        "sampling": lambda: sampling.launch_sample(logits.view(-1, vocab), row),
        "sampling, greedy": lambda: sampling.launch_sample(logits.view(-1, vocab), None),
        "log-probs": lambda: logprobs.launch_logprobs(logits, tokens, mask, None, b, each, 1.0, 1.0, 0.0, False),
        "log-probs backward": lambda: logprobs.launch_logprobs_backward(
            row, logits, tokens, mask, None, b, each, 1.0, 30.0, statistics
        ),
        "scale": lambda: token_loss.launch_scale(gradient, one),
        "advantages": lambda: advantages.launch_advantages(
            torch.zeros(2, 8), torch.ones(2), None, list(plain[6:]), False, 0, False, True, True
        ),
    }
    with mock.patch.object(tuning, "CANDIDATES", (tile,)):
        return [launch for title, run in runs.items() for launch in record(f"{name}, {title}", run)]


def tool(name: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    assert path.exists(), f"{path} is missing: this Triton ships without {name}"
    return str(path)


def widths(assembly: str, instruction: str) -> dict[str, int]:
    """Bits of the global loads (LDG) or stores (STG) in SASS, and how many of each."""
    found: dict[str, int] = {}
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)\s", assembly):
        bits = next((b for b in ("256", "128", "64", "16", "8") if re.search(rf"\.[US]?{b}\b", modifiers)), "32")
        found[bits] = found.get(bits, 0) + 1
    return found


def compile_for(launch: Launch, sm: int) -> Resources:
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tool("cuobjdump"), "-res-usage", cubin.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([tool("nvdisasm"), "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    numbers = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    assert {"REG", "STACK", "LOCAL"} <= set(numbers), f"no resource usage in {usage.stdout!r}"
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    registers, memory, threads = MULTIPROCESSOR[sm]
    # Registers are handed out to a warp in units of 256; a block takes 1 KiB of shared memory for itself.
    per_block = -(-numbers["REG"] * 32 // 256) * 256 * warps
    blocks = min(registers // per_block, memory // (shared + 1024), threads // (32 * warps))
    return Resources(
        launch.case,
        launch.kernel.fn.__name__.strip("_").removesuffix("_kernel"),
        sm,
        warps,
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"] + 4 * local,
        shared,
        blocks * 32 * warps / threads,
        widths(sass, "LDG"),
        widths(sass, "STG"),
    )


def measure(vocabs: list[int], dtypes: list[torch.dtype], tiles: list[tuning.Tile], sms: list[int]) -> list[Resources]:
    unique = {}
    for vocab in vocabs:
        for dtype in dtypes:
            for tile in dict.fromkeys(tuning.fit(t, vocab) for t in tiles):
                for launch in cases(vocab, dtype, tile):
                    facts = (launch.signature, launch.constants, launch.attributes, launch.options)
                    key = (launch.kernel, *map(str, facts))
                    unique.setdefault(key, launch)
    return [compile_for(launch, sm) for launch in unique.values() for sm in sms]


def main() -> int:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or ""))
    parser.add_argument("--vocab", type=int, nargs="+", default=[128256])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--sm", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--all-tiles", action="store_true", help="every candidate of tuning, not its default alone")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    tiles = list(tuning.CANDIDATES if args.all_tiles else tuning.CANDIDATES[:1])
    found = measure(args.vocab, [getattr(torch, d) for d in args.dtype], tiles, args.sm)
    head = f"{'kernel':22}{'sm':>4}{'warps':>6}{'regs':>6}{'spill':>6}{'shared':>8}{'occup.':>8}"
    print(head + "  loads, stores (bits: count)")
    for r in found:
        print(f"{r.kernel:22}{r.sm:4}{r.warps:6}{r.registers:6}{r.spilled:6}{r.shared:8}{r.occupancy:8.2f}  "
              f"{r.loads} {r.stores}  {r.case}")  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    args.output.write_text(json.dumps({"versions": versions, "kernels": [asdict(r) for r in found]}, indent=1) + "\n")
    bad = [r for r in found if r.spilled]
    print(f"{len(found)} compiled, {len(bad)} with spills or local memory -> {args.output}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
