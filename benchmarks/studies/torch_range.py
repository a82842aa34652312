"""`python benchmarks/studies/torch_range.py VERSION ... --output FILE`: the package with other versions of torch.

Each goes alone, with its own Triton, into a fresh environment that shares this one's other packages; the package runs
from this checkout: backend_report, one loss on what `auto` takes and on each backend, two steps of training. A build
for CUDA brings gigabytes of libraries that a CPU never calls: but for the two that are called when torch is loaded,
empty functions of their names stand in. For Linux, with gcc and binutils. Exits 1 where a version fails: a backend that
is here has to give the right loss, but for errors of Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import ROOT, provenance, write_json

REAL = ("cudart", "cupti")
TRITON = (
    "On a CPU Triton's kernels are tried in Triton's interpreter only; an InterpreterError is of the interpreter, and "
    "says nothing about the kernels on a GPU."
)
OTHERS = re.compile(r"(mdpgrpo|__editable__|pip|setuptools|_distutils_hack|torch|functorch|nvidia|triton)")
TRIAL = """
import runpy, torch
from mdpgrpo_fast import MDPGRPOConfig, token_loss
from mdpgrpo_fast.ops.backends import refuses
runpy.run_path(".ci/one_loss.py")
config = MDPGRPOConfig(num_generations=2, multi_temperature=False)
for name in ("torch", "cpu", "triton"):
    logits = torch.zeros(2, 3, 5, requires_grad=True)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    if name != "torch" and (reason := refuses(name, logits.device, logits.dtype)):
        print(f"backend {name!r} is not here: {reason}")
        continue
    try:
        token_loss(logits, tokens, None, config, advantage=1.0, kl_beta=0.0, backend=name).loss.backward()
    except Exception as e:
        if (name, type(e).__name__) != ("triton", "InterpreterError"):
            raise
        print(f"backend {name!r} does not run in Triton's interpreter: {e}")
        continue
    assert abs(logits.grad[0, 0, 0].item() + (1 - 0.2) / 6) < 1e-6, name
    print(f"backend {name!r}: its loss is right")
"""


def run(*command: str | Path, **kwargs: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    return str(done.stdout)


def stand_in(torch: Path, stubs: Path) -> None:
    """Libraries of the names, symbols and versions that torch's ask of CUDA's, of functions that do nothing."""
    owner: dict[str, str] = {}  # of a version of symbols, the library
    needed: set[str] = set()
    symbols: dict[str, set[tuple[str, str]]] = defaultdict(set)
    files = [*torch.glob("lib/*.so")]
    for file in files:
        header = run("objdump", "-p", file)
        needed |= set(re.findall(r"NEEDED\s+(lib(?:cu|nv|nccl)\S+)", header))
        for library, versions in re.findall(r"required from (\S+):\n((?:\s+0x.*\n)+)", header):
            owner |= {line.split()[-1]: library for line in versions.splitlines()}
    needed -= {f.name for f in files} | {n for n in needed if any(r in n for r in REAL)}
    for file in files:
        for name, version in re.findall(r"U (\w+)@?(\S*)", run("nm", "-D", "--undefined-only", file)):
            of = owner.get(version) or next(
                (n for n in needed if name.lower().startswith(n[3:].lower().split(".")[0])), None
            )
            if of in needed:
                symbols[of].add((name, version))
    stubs.mkdir()
    for library in needed:
        names = {name for name, _ in symbols[library]}
        source, versions = stubs / "source.c", stubs / "versions"
        source.write_text("\n".join(f"void {name}(void) {{}}" for name in sorted(names)))
        nodes = defaultdict(list)
        for name, version in symbols[library]:
            nodes[version].append(name)
        script = [f"{v} {{ global: {'; '.join(sorted(n))}; }};" for v, n in nodes.items() if v]
        versions.write_text("\n".join(script))
        flags = [f"-Wl,--version-script={versions}"] if script else []
        run(
            "gcc",
            "-w",
            "-fno-builtin",
            "-shared",
            "-fPIC",
            *flags,
            f"-Wl,-soname,{library}",
            "-o",
            stubs / library,
            source,
        )


def tried(version: str, folder: Path) -> dict[str, object]:
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "venv", folder)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", f"torch=={version}")
    asked = run(python, "-c", "from importlib.metadata import requires; print(*requires('torch'), sep='\\n')")
    home = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    extra = [r.split(";")[0] for r in asked.splitlines() if r.startswith("triton") and "extra ==" not in r]
    extra += [r.split(";")[0] for r in asked.splitlines() if re.match(r"nvidia-cuda-(runtime|cupti)", r)]
    toolkit = re.search(r"cuda-toolkit\[.*\](==[\d.]+)", asked)
    if toolkit:
        run(python, "-m", "pip", "install", "--quiet", f"cuda-toolkit[cudart,cupti]{toolkit[1]}")
    if extra:
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", *extra)
    shared = folder / "shared"
    shared.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not OTHERS.match(entry.name) and entry.suffix != ".pth":
            (shared / entry.name).symlink_to(entry)
    (home / "shared.pth").write_text(str(shared))
    stand_in(home / "torch", folder / "stubs")
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder / "stubs"),
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "1",
    }
    said = run(python, "-c", TRIAL, env=environment, cwd=ROOT).splitlines()
    train = ["-m", "mdpgrpo_fast.train", "--steps", "2", "--output-dir", folder / "run"]
    run(python, *train, env={**environment, "TRITON_INTERPRET": "0"}, cwd=folder)
    return {"torch": version, "auto": said[0], "said": [*said[1:], "two steps of the demonstration: done"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    results: list[dict[str, object]] = []
    for version in options.versions:
        with tempfile.TemporaryDirectory() as folder:
            try:
                results.append(tried(version, Path(folder) / "venv"))
            except RuntimeError as e:
                results.append({"torch": version, "failed": str(e)})
        print(results[-1], flush=True)
    command = f"python benchmarks/studies/torch_range.py {' '.join(options.versions)} --output {options.output}"
    write_json(options.output, {**provenance(command), "triton": TRITON, "tried": results})
    return int(any("failed" in r for r in results))


if __name__ == "__main__":
    sys.exit(main())
