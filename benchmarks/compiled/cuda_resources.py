"""What csrc/cuda compiles to, without a GPU: registers, spills, local memory, and the instructions that matter.

    python benchmarks/compiled/cuda_resources.py          # a table, and results/compiled/cuda_resources.json

With --library it reads what setup.py has built, and compiles nothing, which takes a minute an architecture.
Exit code 1 if a kernel spills or uses local memory.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "compiled" / "cuda_resources.json"
ARCHITECTURES = ("90a", "100a")
ELEMENTS = {"BFloat16": "bf16", "Float16": "fp16", "Float32": "fp32"}
IN_16_BYTES = {"bf16": 8, "fp16": 8, "fp32": 4}


def tool(name: str) -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("cuda_resources.py: there is no nvcc; it needs a CUDA toolkit")
    beside = Path(nvcc).parent / name
    if beside.exists():
        return str(beside)
    import triton.backends.nvidia  # brings the tools that a part of the toolkit lacks

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout + done.stderr


def name_of(mangled: str) -> str:
    """token_loss bf16, two temperatures, soft-cap, extended: from the template arguments."""
    elements = re.findall(r"\d(BFloat16|Float16|Float32)E", mangled)
    chosen = re.findall(r"Lb([01])E", mangled)[:3]
    names = ("two temperatures", "soft-cap", "extended")
    options = [name for name, on in zip(names, chosen, strict=True) if on == "1"]
    return ", ".join([f"token_loss {ELEMENTS[elements[0]]}", *options])


def widths(lines: list[str], instruction: str) -> dict[str, int]:
    """Bits of a memory instruction -> how many there are."""
    found: collections.Counter[str] = collections.Counter()
    for line in lines:
        if opcode := re.search(rf"\b{instruction}(\.[A-Z0-9.]+)?\b", line):
            width = re.search(r"\.[US]?(128|64|16|8)\b", opcode[0])
            found[width[1] if width else "32"] += 1
    return dict(sorted(found.items(), key=lambda x: int(x[0])))


def loops(lines: list[str]) -> list[list[str]]:
    """One iteration of every loop: its instructions on the shortest way from its start to its branch back."""
    found = (re.search(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", line) for line in lines)
    code = [(int(x[1], 16), x[2]) for x in found if x]
    place = {address: i for i, (address, _) in enumerate(code)}
    branches = {i: int(x[1], 16) for i, (_, text) in enumerate(code) if (x := re.search(r"\bBRA\b.* 0x(\w+)", text))}
    iterations = []
    for last, target in branches.items():
        first = place.get(target, last)
        if first >= last:
            continue
        ways: dict[int, list[str]] = {first: [code[first][1]]}
        for i in range(first, last):
            if i not in ways:
                continue
            always = re.match(r"(BRA|EXIT|RET)\b", code[i][1])
            for j in (place.get(branches.get(i, -1), -1), -1 if always else i + 1):
                if i < j <= last and (j not in ways or len(ways[j]) > len(ways[i]) + 1):
                    ways[j] = [*ways[i], code[j][1]]
        if last in ways:
            iterations.append(ways[last])
    return iterations


def per_element(lines: list[str], elements: str, extended: bool) -> dict[str, float]:
    """Instructions per logit of the loop that sums a row up and of the one that writes its gradient, 16 bytes a time.

    The shortest way leaves out what happens seldom: a reference that moves. The loop for a gradient that does not lie
    on 16 bytes has no 128-bit store. What takes every loss has a loop of its own for rows with an entropy bonus.
    """
    found: dict[str, set[float]] = {"read": set(), "write": set()}
    for iteration in loops(lines):
        text = "\n".join(iteration)
        loads, stores = text.count("LDS.128"), widths(iteration, "STG")
        if loads and text.count("MUFU.EX2") >= IN_16_BYTES[elements] and (not stores or "128" in stores):
            found["write" if stores else "read"].add(len(iteration) / loads / IN_16_BYTES[elements])
    reads, writes = sorted(found["read"]), sorted(found["write"])  # loops around a loop are longer
    return {"read": reads[0], "write": writes[0], **({"bonus": writes[1]} if extended else {})}


def compiled(sm: str, folder: Path) -> Path:
    """The machine code of csrc/cuda for an architecture."""
    cubin = folder / f"{sm}.cubin"
    source = ROOT / "csrc" / "cuda" / "token_loss.cu"
    run("nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_{sm},code=sm_{sm}", "-cubin", "-Werror=all-warnings",
        str(source), "-o", str(cubin))  # fmt: skip
    return cubin


def taken_out(library: Path, sm: str, folder: Path) -> Path:
    """The same, from a library that setup.py has built: of its parts the largest, the others link it."""
    subprocess.run([tool("cuobjdump"), "-xelf", f"sm_{sm}", str(library.resolve())], cwd=folder, check=True)
    found = list(folder.glob(f"*.sm_{sm}.cubin"))
    if not found:
        sys.exit(f"cuda_resources.py: {library} has nothing for sm_{sm}")
    return max(found, key=lambda path: path.stat().st_size)


def resources(sm: str, cubin: Path) -> list[dict[str, Any]]:
    usage = run(tool("cuobjdump"), "-res-usage", str(cubin))
    code = run(tool("cuobjdump"), "-sass", str(cubin))
    functions = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", code, re.S))
    found = []
    for mangled, registers, stack, shared, local in re.findall(
        r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
    ):
        lines, name = functions[mangled].splitlines(), name_of(mangled)
        found.append(
            {
                "kernel": name,
                "sm": sm,
                "registers": int(registers),
                "spilled": int(stack),
                "local": int(local) + sum(bool(re.search(r"\b(LDL|STL)\b", x)) for x in lines),
                "shared": int(shared),
                "bulk_copies": sum("UBLKCP" in x for x in lines),
                "cluster_barriers": sum("UCGABAR" in x for x in lines),
                "loads": widths(lines, "LDS"),
                "global_loads": widths(lines, "LDG"),
                "stores": widths(lines, "STG"),
                "instructions_per_element": per_element(lines, name.split()[1].strip(","), "extended" in name),
            }
        )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, help="where the JSON goes")
    parser.add_argument("--library", type=Path, help="built already, in place of compiling: _cuda.abi3.so")
    args = parser.parse_args(argv)
    output, library = args.output, args.library
    with tempfile.TemporaryDirectory() as name:
        folder, kernels = Path(name), []
        for sm in ARCHITECTURES:
            cubin = compiled(sm, folder) if library is None else taken_out(library, sm, folder)
            kernels += resources(sm, cubin)
    version = re.search(r"release ([\d.]+)", run("nvcc", "--version"))
    document = {
        "command": "python benchmarks/compiled/cuda_resources.py",
        "nvcc": version and version[1],
        "kernels": kernels,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    numbers = ("registers", "spilled", "local", "bulk_copies")
    names = " ".join(f"{n:>11}" for n in numbers)
    print(f"{'kernel':55} {'sm':>5} {names}  per element          bits of shared loads, of stores")
    for k in kernels:
        counts = " ".join(f"{k[n]:>11}" for n in numbers)
        read, *writes = k["instructions_per_element"].values()
        work = f"{read:.1f} + {' or '.join(f'{x:.1f}' for x in writes)}"
        print(f"{k['kernel']:55} {k['sm']:>5} {counts}  {work:19}  {k['loads']} {k['stores']}")
    return int(any(k["spilled"] or k["local"] for k in kernels))


if __name__ == "__main__":
    sys.exit(main())
