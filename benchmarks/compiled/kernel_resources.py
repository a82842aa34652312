"""What the compiled kernels are made of, without a GPU: registers, spills, access width, instructions per logit.

    python benchmarks/compiled/kernel_resources.py              # a table, and results/compiled/kernel_resources.json
    python benchmarks/compiled/kernel_resources.py --all-tiles  # every tile that tuning may choose

The launchers run on CPU tensors with the launch itself replaced: what they would launch is compiled for each
architecture with exactly their arguments. Exit code 1 if a kernel spills (more than MAY_SPILL),
uses local memory, or does not compile.
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
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from mdpgrpo_fast.kernels.schemas import LOSSES, Groups, Rows, Settings
from mdpgrpo_fast.kernels.triton import advantages, logprobs, objective, sampling, tiles, token_loss
from mdpgrpo_fast.kernels.triton.decode import blocks
from mdpgrpo_fast.kernels.triton.decode.attention import launch_attention

ARCHITECTURES = (80, 90, 100, 120)
# Registers, shared memory (bytes) and threads of one multiprocessor (CUDA programming guide, compute capabilities).
MULTIPROCESSOR = {
    80: (65536, 164 << 10, 2048),
    90: (65536, 228 << 10, 2048),
    100: (65536, 228 << 10, 2048),
    120: (65536, 100 << 10, 1536),
}
# What an H200 does in a second, and 8192 rows of this vocabulary: enough to fill it.
CLOCK, MULTIPROCESSORS, COPY = 1.98e9, 132, 4.3e12
ROWS, VOCAB = 8192, 128256
ISSUED, SPECIAL = 128, 16  # lanes in a clock of a multiprocessor: instructions, and those among them that are MUFU
RESULT = Path(__file__).parents[1] / "results" / "compiled" / "kernel_resources.json"


@dataclass(frozen=True)
class Launch:
    """One recorded launch: a kernel with the signature, constants and options that its launcher gave it."""

    case: str
    kernel: JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


# Bytes per thread, of rows with more at once than three programs of a multiprocessor have registers for; and of the
# sums over a completion, which are not of logits.
MAY_SPILL = {"full, entropy bonus": 32, "per row, two temperatures, support": 32, "gmpo, off-policy": 24}


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
    sweeps: dict[str, dict[str, float]]  # "read" and "write" -> instructions per logit, and the MUFU among them
    issue_ms: float  # to issue the sweeps of ROWS rows, or for MUFU alone where that takes longer
    memory_ms: float  # to read these rows, and to write them where a sweep does


def describe(case: str, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """What Triton's own launch would specialise on, taken from its binder: alignment, ones, absent tensors."""
    backend = make_backend(GPUTarget("cuda", ARCHITECTURES[0], 32))
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **kwargs
    )
    kinds, marks = [x[0] for x in specialization], [x[1] for x in specialization]
    signature = dict(zip([p.name for p in kernel.params], kinds, strict=True))
    constants = find_paths_if(kinds, lambda _, kind: kind == "constexpr")
    attributes = find_paths_if(marks, lambda _, mark: isinstance(mark, str))
    values = list(bound.values())
    return Launch(
        case,
        kernel,
        signature,
        {path: get_iterable_path(values, path) for path in constants},
        {path: backend.parse_attr(get_iterable_path(marks, path)) for path in attributes},
        options,
    )


def record(case: str, run: Any) -> list[Launch]:
    """The launches of a function, none of which happens."""
    launches: list[Launch] = []

    def instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(describe(case, self, args, kwargs))

    with mock.patch.object(JITFunction, "run", instead):
        run()
    return launches


# MDP-GRPO as the paper has it, two completions a group.
PLAIN = Settings(
    epsilon_low=0.2, epsilon_high=0.2, alpha=0.2, prospect_beta=0.8, prospect_gain=1.25, prospect_loss=2.0,
    kl_beta_pos=0.01, kl_beta_neg=0.025, aggregation=0, group_size=2, prospect=1, prospect_on_goal=1,
)  # fmt: skip
FULL = PLAIN._replace(delta=2.0, softcap=30.0, two_temperatures=1)


def cases(vocab: int, dtype: torch.dtype, tile: tiles.Tile, stride: int | None = None) -> list[Launch]:
    """The leanest and the fullest objective, log-probs and their gradient, scaling, advantages.

    stride: elements from a row to the next; None: vocab.
    """
    b, length = 2, 4
    n = b * length
    logits, gradient = (torch.empty(b, length, stride or vocab, dtype=dtype)[..., :vocab] for _ in range(2))
    statistics = torch.zeros(5, n)
    row, each, one = torch.zeros(n), torch.zeros(b), torch.ones(1)
    name = f"V={vocab} {str(dtype).removeprefix('torch.')}"
    alone = Rows(torch.zeros(n, dtype=torch.long), temperature=row)
    rows = alone._replace(mask=torch.ones(n, dtype=torch.uint8), temperature=None)
    everything = {"old_logprobs": row, "ref_logprobs": row, "importance_weight": row}
    per_row = {"temperature": row, "epsilon_low": row, "epsilon_high": row, "delta": row}
    per_completion = {"temperature": each, "epsilon_low": each, "epsilon_high": each, "delta": each}
    packed = Rows(alone.tokens, rows.mask, alone.tokens, advantage=each, kl_beta=each, **everything, **per_row)
    groups = Groups(torch.zeros(b), torch.ones(1))
    all_groups = groups._replace(valid=torch.ones(b, dtype=torch.uint8), slots=torch.arange(b))

    def loss(rows: Rows, groups: Groups, settings: Settings, denominator: torch.Tensor | None) -> Callable[[], Any]:
        x, out = (t if rows.completion is None else t.flatten(0, 1)[None] for t in (logits, gradient))
        return lambda: token_loss.launch_token_loss(
            x, out, rows, groups, settings, denominator, b, length, tile_of=lambda: tile
        )

    sequence = FULL._replace(sequence=1, estimator=2, aggregation=1)
    chunk = packed._replace(mask=None, advantage=row, kl_beta=row)
    single = Settings(softcap=30.0)
    runs: dict[str, Callable[[], Any]] = {
        "on-policy, rewards": loss(rows._replace(ref_logprobs=row), groups, PLAIN, one),
        "on-policy, two temperatures": loss(
            rows._replace(ref_logprobs=row), groups, PLAIN._replace(kl_temperature=1.0, two_temperatures=1), one
        ),
        # With and without a support, as the unit gradient too: the difference is what a logit_floor costs.
        "per row, two temperatures": loss(
            rows._replace(ref_logprobs=row, temperature=each), groups, PLAIN._replace(two_temperatures=1), one
        ),
        "per row, two temperatures, support": loss(
            rows._replace(ref_logprobs=row, temperature=each, logit_floor=row),
            groups,
            PLAIN._replace(two_temperatures=1),
            one,
        ),
        "unit gradient, support": lambda: logprobs.launch_logprobs(
            logits, alone._replace(logit_floor=row), single, 0, logits, tile_of=lambda: tile
        ),
        "full, token level": loss(
            rows._replace(**everything, **per_completion), all_groups, FULL._replace(rescale=1), one
        ),
        "full, sequence level": loss(packed, Groups(), sequence, None),
        # What the other losses and terms cost beside these; coupled ones read the logits once more in a first pass.
        "entropy bonus": loss(rows._replace(ref_logprobs=row), groups, PLAIN._replace(entropy_coef=0.01), one),
        "full, entropy bonus": loss(
            rows._replace(**everything, **per_completion, entropy_coef=row, entropy_floor=each),
            all_groups,
            FULL._replace(rescale=1),
            one,
        ),
        **{
            f"{LOSSES[i]}, off-policy": loss(
                rows._replace(old_logprobs=row, ref_logprobs=row, importance_weight=row),
                groups,
                PLAIN._replace(loss=i),
                one,
            )
            for i in range(1, len(LOSSES))
        },
        "unbiased KL, off-policy gate": loss(
            rows._replace(old_logprobs=row, ref_logprobs=row, sampling_logprobs=row),
            groups,
            PLAIN._replace(sequence=1, unbiased_kl=1, masks_off_policy=1, entropy_floor=0.1),
            one,
        ),
        # The three of `linear_token_loss`, on a chunk's logits in place.
        "unit gradient": lambda: logprobs.launch_logprobs(logits, alone, single, 0, logits, tile_of=lambda: tile),
        "two temperatures": lambda: logprobs.launch_logprobs_backward(
            logits, row, alone, single, 0, statistics, row, logits, tile_of=lambda: tile
        ),
        "two temperatures, entropy bonus": lambda: logprobs.launch_logprobs_backward(
            logits, row, alone, single, 0, statistics, row, logits, grad_entropy=row, tile_of=lambda: tile
        ),
        "objective, sequence": lambda: objective.launch_objective(
            statistics, row, chunk, FULL._replace(sequence=1, rescale=1), each, one, b
        ),
        "sampling": lambda: sampling.launch_sample(logits.flatten(0, 1), row, tile_of=lambda: tile),
        "sampling, greedy": lambda: sampling.launch_sample(logits.flatten(0, 1), None, tile_of=lambda: tile),
        "log-probs": lambda: logprobs.launch_logprobs(
            logits, rows._replace(temperature=each), Settings(), b, tile_of=lambda: tile
        ),
        "log-probs backward": lambda: logprobs.launch_logprobs_backward(
            logits, row, rows._replace(temperature=each), single, b, statistics, tile_of=lambda: tile
        ),
        "scale": lambda: token_loss.launch_scale(gradient, one, tile_of=lambda: tile),
        "advantages": lambda: advantages.launch_advantages(
            Groups(torch.zeros(16), torch.ones(2)), PLAIN._replace(group_size=8)
        ),
    }
    return [launch for title, run in runs.items() for launch in record(f"{name}, {title}", run)]


def decode_cases(dtype: torch.dtype) -> list[Launch]:
    """Of decode steps: heads as of Llama 3.2 1B, and Gemma 2's, the widest, with all it has."""
    found = []
    for heads, kv_heads, size, *more in ((32, 8, 64), (8, 4, 256, 50.0, 4096)):
        query, cache = torch.empty(8, heads, size, dtype=dtype), torch.empty(8, kv_heads, 512, size, dtype=dtype)
        place = torch.zeros(8, dtype=torch.long)
        case = f"{heads} heads, {kv_heads} of keys, D={size} {str(dtype).removeprefix('torch.')}"
        found += record(case, lambda: launch_attention(query, cache, cache, place, place[:1], 1.0, *more))  # noqa: B023
        key = torch.empty(8, kv_heads, 1, size, dtype=dtype)
        turns = torch.empty(8, 1, size, dtype=dtype)
        found += record(case, lambda: blocks.rotate(query[:, :, None], key, turns, turns))  # noqa: B023
        found += record(case, lambda: blocks.append(key, key, cache, cache, place[:1]))  # noqa: B023
        found += record(case, lambda: blocks.gated(torch.empty(8, 1, 16384, dtype=dtype)))
        found += record(case, lambda: blocks.rms_norm(query.flatten(1), query[0].flatten(), 1e-5, True))  # noqa: B023
    return found


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


def loops(assembly: str) -> list[list[str]]:
    """The instructions of each innermost loop: from the target of a branch back to the branch."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in assembly.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1])
    found = []
    for end, text in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*\((\.L\w+)\)", text)
        if branch and labels.get(branch[1], end + 1) <= end:
            found.append((labels[branch[1]], end))
    inner = [(a, b) for a, b in found if not any(a <= c and d <= b for c, d in found if (c, d) != (a, b))]
    return [instructions[a : b + 1] for a, b in inner]


def sweeps(assembly: str, bits: int) -> dict[str, dict[str, float]]:
    """What a logit of so many bits costs in the loops over whole tiles: those with exponentials and loads."""
    found = {}
    for loop in loops(assembly):
        text = "\n".join(loop)
        logits = sum(int(w) * n for name in ("LDG", "LDGSTS") for w, n in widths(text, name).items()) / bits
        if logits and "MUFU.EX2" in text:
            cost = {"instructions": len(loop) / logits, "special": text.count("MUFU") / logits}
            found["write" if re.search(r"\bSTG\b", text) else "read"] = cost
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
    bits = int(re.sub(r"\D", "", launch.signature.get("logits_ptr", "*fp32")))
    found = sweeps(sass, bits) if "logits_ptr" in launch.signature else {}
    clocks = sum(max(x["instructions"] / ISSUED, x["special"] / SPECIAL) for x in found.values())
    passes = min(len(found), 1) + ("write" in found)
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
        found,
        1e3 * ROWS * VOCAB * clocks / (MULTIPROCESSORS * CLOCK),
        1e3 * ROWS * VOCAB * passes * bits / 8 / COPY,
    )


def measure(
    vocabs: list[int], dtypes: list[torch.dtype], chosen: list[tiles.Tile], sms: list[int], rows_only: bool,
    stride: int | None = None,
) -> list[Resources]:  # fmt: skip
    unique = {}
    for vocab in vocabs:
        for dtype in dtypes:
            for tile in dict.fromkeys(tiles.fit(t, vocab) for t in chosen):
                for launch in cases(vocab, dtype, tile, stride):
                    facts = (launch.signature, launch.constants, launch.attributes, launch.options)
                    key = (launch.kernel, *map(str, facts))
                    unique.setdefault(key, launch)
    for launch in (x for dtype in dtypes if not rows_only for x in decode_cases(dtype)):
        unique[launch.kernel, launch.case] = launch
    return [compile_for(launch, sm) for launch in unique.values() for sm in sms]


def main() -> int:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or ""))
    parser.add_argument("--vocab", type=int, nargs="+", default=[128256])
    parser.add_argument("--stride", type=int, help="elements from a row to the next; unset: the vocabulary")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--sm", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--all-tiles", action="store_true", help="every candidate of tuning, not its default alone")
    parser.add_argument("--rows-only", action="store_true", help="without the kernels of decode steps")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    chosen = list(tiles.CANDIDATES if args.all_tiles else tiles.CANDIDATES[:1])
    found = measure(args.vocab, [getattr(torch, d) for d in args.dtype], chosen, args.sm, args.rows_only, args.stride)
    head = f"{'kernel':22}{'sm':>4}{'warps':>6}{'regs':>6}{'spill':>6}{'shared':>8}{'occup.':>8}"
    head += f"{'per logit':>14}{'issue':>8}{'memory':>8}{'larger':>8}"  # ms of ROWS rows
    print(head + "  loads, stores (bits: count)")
    for r in found:
        cost = " + ".join(f"{sweep['instructions']:.1f}" for sweep in r.sweeps.values())
        print(f"{r.kernel:22}{r.sm:4}{r.warps:6}{r.registers:6}{r.spilled:6}{r.shared:8}{r.occupancy:8.2f}{cost:>14}"
              f"{r.issue_ms:8.2f}{r.memory_ms:8.2f}{max(r.issue_ms, r.memory_ms):8.2f}  {r.loads} {r.stores}  {r.case}"
              )  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    args.output.write_text(json.dumps({"versions": versions, "kernels": [asdict(r) for r in found]}, indent=1) + "\n")
    bad = [r for r in found if r.spilled > MAY_SPILL.get(r.case.split(", ", 1)[-1], 0)]
    print(f"{len(found)} compiled, {len(bad)} with spills or local memory -> {args.output}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
