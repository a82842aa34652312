"""Imports go down only, and importing the package or a scoring worker stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "mdpgrpo_fast"
HEAVY = ("torch", "transformers", "triton", "vllm", "matplotlib", "accelerate", "trl", "verl", "liger_kernel", "nltk")

# From the bottom up; a layer may import from lower ones, never from higher ones. A module that is in none of them
# (helpers of one of these) is held to the same rule through what it imports and what imports it.
LAYERS = [
    {"config", "verifiers"},
    {"reference"},
    {"kernels"},
    {"ops"},
    {"data", "rollout", "rewards", "models", "packing", "lora", "metrics"},
    {"evaluate"},
    {"trainer"},
    {"train", "report", "explain", "integrations"},
]


@cache
def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file; "" is the package itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@cache
def imports(name: str, top_level: bool = False) -> frozenset[str]:
    """Absolute names of the modules that a module imports; with top_level, only those that its own import runs.

    Names under `if TYPE_CHECKING:` are not imports.
    """
    path, found, queue = modules()[name], set(), [ast.parse(modules()[name].read_text(encoding="utf-8"))]
    here = ["mdpgrpo_fast", *name.split(".")] if name else ["mdpgrpo_fast"]
    package = here if path.name == "__init__.py" else here[:-1]
    while queue:
        node = queue.pop()
        if is_type_checking(node) or (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            continue
        queue += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            found.add(".".join(base))
            found.update(".".join([*base, alias.name]) for alias in node.names)
    return frozenset(found)


@cache
def inside(name: str) -> frozenset[str]:
    """Modules of the package that a module imports."""
    ours = {x.removeprefix("mdpgrpo_fast").lstrip(".") for x in imports(name) if x.split(".")[0] == "mdpgrpo_fast"}
    return frozenset(ours & set(modules()) - {name, ""})


def outside(name: str, top_level: bool = False) -> set[str]:
    """Other packages that a module imports."""
    return {x.split(".")[0] for x in imports(name, top_level)} - {"mdpgrpo_fast"}


def reach(name: str) -> set[str]:
    """Everything of the package that a module leads to."""
    seen, queue = set(), [name]
    while queue:
        for other in inside(queue.pop()) - seen:
            seen.add(other)
            queue.append(other)
    return seen


def top(name: str) -> str:
    return name.split(".")[0]


def under(*names: str) -> list[str]:
    return [m for m in modules() if top(m) in names]


def test_the_scan_sees_the_imports() -> None:
    assert {"config", "reference"} <= inside("ops")
    assert {"torch", "transformers"} <= outside("models") and "torch" not in outside("config")
    assert "transformers" in outside("cli") and "transformers" not in outside("cli", top_level=True)


@pytest.mark.parametrize("level", range(len(LAYERS)), ids=lambda i: "+".join(sorted(LAYERS[i])))
def test_imports_go_down_only(level: int) -> None:
    higher = set().union(*LAYERS[level + 1 :])
    for name in under(*LAYERS[level]):
        wrong = {m for m in reach(name) if top(m) in higher}
        assert not wrong, f"{name} leads up to {sorted(wrong)}"


def test_no_import_cycles() -> None:
    # A package's own __init__ re-exports its modules.
    for name in modules():
        cycle = {m for m in reach(name) if name in reach(m) and top(m) != top(name)}
        assert not cycle, f"{name} and {sorted(cycle)} import each other"


def test_reference_is_plain_torch() -> None:
    assert inside("reference") == {"config"}
    assert not outside("reference") & {"triton", "transformers", "numpy"}


def test_config_stands_alone() -> None:
    assert not inside("config") and not outside("config") & set(HEAVY)


def test_verifiers_are_free_of_torch() -> None:
    for name in under("verifiers"):
        assert not outside(name) & {"torch", "numpy", "transformers"}, name
        assert all(top(m) in ("verifiers", "config") for m in reach(name)), name


def test_kernels_know_no_config_and_no_transformers() -> None:
    for name in under("kernels"):
        assert "config" not in inside(name) and "transformers" not in outside(name), name


def test_only_integrations_import_other_trainers() -> None:
    for name in modules():
        if top(name) != "integrations":
            assert not outside(name) & {"trl", "verl", "liger_kernel"}, name


def test_triton_is_imported_by_kernels_alone() -> None:
    for name in modules():
        if top(name) != "kernels":
            assert "triton" not in outside(name, top_level=True), name


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import mdpgrpo_fast") & set(HEAVY)


@pytest.mark.parametrize("module", ["rewards", "verifiers", "config", "data", "cli"])
def test_scoring_workers_do_not_load_torch(module: str) -> None:
    """Every worker process imports these: a second copy of torch in each would cost seconds and gigabytes."""
    assert not loaded_by(f"import mdpgrpo_fast.{module}") & set(HEAVY)


def test_the_loss_needs_torch_alone() -> None:
    loaded = loaded_by("import mdpgrpo_fast.ops")
    assert "torch" in loaded and not loaded & {"transformers", "accelerate", "matplotlib", "trl"}
