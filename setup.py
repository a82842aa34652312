"""Builds csrc/: the CPU kernels with any C++17 compiler, the Hopper kernel with a CUDA toolkit. See pyproject.toml too.

MDPGRPO_BUILD=auto (default) builds what the tools here allow and leaves out the rest; cpu and cuda (cpu too) fail where
they cannot; none builds nothing. Nothing of torch, of Python's headers or of a GPU is needed: the libraries bind to
libtorch's stable C ABI when they are loaded.
"""

import os
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
FLAGS = "-std=c++17 -O3 -ffp-contract=fast -fvisibility=hidden -Wall -Wextra".split()
CXXFLAGS = os.environ.get("MDPGRPO_CXXFLAGS", "").split()
FLAGS += CXXFLAGS
ARCHITECTURES = ("90a", "100a")
wish = os.environ.get("MDPGRPO_BUILD", "auto")


def cuda_compiler() -> str | None:
    """nvcc of the toolkit that CUDA_HOME names, or that is on the path; whether there is a GPU does not matter."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)


def extensions() -> list[Extension]:
    if wish not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"MDPGRPO_BUILD must be auto, cpu, cuda or none, not {wish!r}")
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    # A free-threaded Python takes no limited ABI.
    possible = sys.platform in ("linux", "darwin") and not sysconfig.get_config_var("Py_GIL_DISABLED")
    if wish == "none" or (wish == "auto" and not (possible and shutil.which(compiler))):
        return []
    found = [("cpu", CSRC.glob("cpu/*.cpp"))]
    if wish == "cuda" or (wish == "auto" and cuda_compiler()):
        found.append(("cuda", CSRC.glob("cuda/*.cu")))
    headers = sorted(map(str, [*CSRC.rglob("*.h"), *CSRC.rglob("*.inl"), *CSRC.rglob("*.cuh")]))
    common = {"depends": headers, "py_limited_api": True, "optional": wish == "auto"}
    return [Extension(f"mdpgrpo_fast.kernels._{part}", sorted(map(str, files)), **common) for part, files in found]


def stripped() -> list[str]:
    """Link flags: Python's own flags for compilers hold -g, whose tables are six times the code."""
    if any(flag.startswith("-g") for flag in CXXFLAGS):
        return []
    return ["-Wl,-x" if sys.platform == "darwin" else "-Wl,-s"]


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.build_cuda(ext, target) if ext.name.endswith("cuda") else self.build_cpu(ext, target)
        except Exception as e:  # a compiler that is missing, too old or refuses: the package works without this part
            if wish != "auto":
                raise
            target.unlink(missing_ok=True)
            print(f"\nmdpgrpo_fast: {ext.name} is left out, it could not be built: {e}\n", file=sys.stderr)

    def torch_libraries(self, *names: str) -> list[str]:
        """Link flags against empty libraries of torch's names: when ours is loaded, torch's own are there already."""
        if sys.platform == "darwin":
            return ["-undefined", "dynamic_lookup"]
        folder = Path(self.build_temp).absolute() / "torch"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "empty.c").write_text("")
        compiler, empty = self.compiler.compiler_so, str(folder / "empty.c")
        for name in names:
            file = f"lib{name}.so"
            self.spawn([*compiler, "-shared", f"-Wl,-soname,{file}", "-o", str(folder / file), empty])
        return [f"-L{folder}", "-Wl,--no-as-needed", *(f"-l{name}" for name in names)]

    def build_cpu(self, ext: Extension, target: Path) -> None:
        def compiled(source: str) -> list[str]:
            return self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=FLAGS, depends=ext.depends
            )

        # A file on each core: those of the wide instruction sets take longest.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [x for found in pool.map(compiled, ext.sources) for x in found]
        link = [*FLAGS, *stripped(), *self.torch_libraries("torch_cpu")]
        self.compiler.link_shared_object(objects, str(target), extra_postargs=link, target_lang="c++")

    def build_cuda(self, ext: Extension, target: Path) -> None:
        nvcc = cuda_compiler()
        if nvcc is None:
            raise RuntimeError("there is no nvcc; CUDA_HOME has to name a CUDA toolkit")
        # nvcc knows no -Wl.
        link = [*stripped(), *self.torch_libraries("torch_cpu", "torch_cuda")]
        link = [x for flag in link for x in (["-Xlinker", flag[4:]] if flag.startswith("-Wl,") else [flag])]
        codes = [x for a in ARCHITECTURES for x in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
        host = ["-Xcompiler", ",".join(["-fPIC,-fvisibility=hidden,-Wall,-Wextra", *CXXFLAGS])]
        # An architecture on each core.
        strict = ["-Werror", "all-warnings"] if "-Werror" in CXXFLAGS else []
        command = [nvcc, "-std=c++17", "-O3", "-shared", "--threads", "0", *codes, *strict, *host, *ext.sources]
        self.spawn([*command, "-o", str(target), *link])


ext_modules = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass={"build_ext": Build},
    # No symbol of Python is used at all: one wheel serves them all.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
