"""Imports go down only, nothing goes in a circle, and importing the package or a scoring worker stays cheap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.imports import PACKAGE, Graph, first
from helpers.inputs import ROOT

GRAPH = Graph(PACKAGE)
HEAVY = set("torch transformers triton vllm matplotlib jinja2 accelerate trl verl liger_kernel nltk".split())

# From the bottom up: files and folders of the first level. None imports from a higher layer.
LAYERS = [
    {"version", "log", "config", "durable", "verifiers", "demo"},
    {"reference", "cli"},
    {"kernels"},
    {"ops"},
    {"data", "rewards"},
    {"models"},
    {"rollout"},
    {"evaluation"},
    {"training"},
    {"evaluate", "report", "explain", "doctor"},
    {"api"},
    {"train", "integrations"},
    {"__main__"},
]
MOST_LEVELS, MOST_FILES, MOST_MODULES, MOST_LINES = 9, 12, 12, 400


def under(*names: str) -> list[str]:
    return [m for m in GRAPH.files if first(m) in names]


def wrong(graph: Graph, layers: list[set[str]]) -> list[str]:
    """Every rule on the direction of imports that a package breaks."""
    found = [f"circle: {sorted(c)}" for c in graph.circles()]
    found += [f"upward: {a} imports {b or 'the package root'}" for a, b in graph.upward(layers)]
    try:
        graph.levels()
    except ValueError as e:
        found.append(f"folders: {e}")
    return found


def test_imports_go_down_only_and_in_no_circle() -> None:
    assert not wrong(GRAPH, LAYERS)
    assert max(GRAPH.levels().values()) <= MOST_LEVELS


def planted(root: Path, **files: str) -> Graph:
    """A package of two layers, low and high, with files of this text in it."""
    clean = {
        "__init__": "from .version import __version__",
        "version": "__version__ = '1'",
        "low/__init__": "",
        "low/a": "from ..version import __version__",
        "low/b": "from .a import __version__",
        "high": "from .low import b\nfrom .low.a import __version__",
    }
    for name, text in {**clean, **files}.items():
        path = root / "package" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Graph(root / "package")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"low/a": "from .b import __version__"}, "circle: ['low.a', 'low.b']"),
        ({"low/a": "def f():\n    from . import b"}, "circle: ['low.a', 'low.b']"),
        ({"low/a": "from ..high import b"}, "upward: low.a imports high"),
        ({"low/a": "import package.high"}, "upward: low.a imports high"),
        ({"low/a": "from .. import __version__"}, "upward: low.a imports the package root"),
        ({"low/a": "from package import high"}, "upward: low.a imports high"),
        ({"new": "from .high import b", "low/a": "from ..new import b"}, "upward: low.a imports new"),
        ({"high": "from .low import b\nfrom .new import x", "new": "from .high import b"}, "folders: circle between"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, files: dict[str, str], expected: str | None) -> None:
    found = wrong(planted(tmp_path, **files), [{"version"}, {"low"}, {"high"}])
    assert any(f.startswith(expected) for f in found) if expected else not found, found


def test_every_file_and_folder_has_a_layer() -> None:
    assert {first(m) for m in GRAPH.files} - {""} <= set().union(*LAYERS)


def test_a_reader_finds_the_way() -> None:
    """Few modules at the first level, few files in a folder, no long module."""
    folders: dict[Path, int] = {}
    for path in GRAPH.files.values():
        folders[path.parent] = folders.get(path.parent, 0) + 1
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MOST_LINES, f"{path.relative_to(ROOT)} has {lines} lines"
    assert folders[PACKAGE] - 1 <= MOST_MODULES  # beside __init__
    for folder, count in folders.items():
        assert count <= MOST_FILES, f"{folder.relative_to(ROOT)} has {count} modules"


def test_reference_is_plain_torch() -> None:
    for name in under("reference"):
        assert {first(m) for m in GRAPH.edges[name]} <= {"config", "reference"}, name
        assert not GRAPH.outside(name) & {"triton", "transformers", "numpy"}, name


def test_config_stands_alone() -> None:
    for name in under("config"):
        assert all(first(m) == "config" for m in GRAPH.edges[name]) and not GRAPH.outside(name) & HEAVY, name


def test_verifiers_are_free_of_torch() -> None:
    for name in under("verifiers"):
        assert not GRAPH.outside(name) & {"torch", "numpy", "transformers"}, name
        assert all(first(m) in ("verifiers", "config", "log") for m in GRAPH.reach(name)), name


def test_kernels_know_no_config_and_no_transformers() -> None:
    for name in under("kernels"):
        assert not any(first(m) == "config" for m in GRAPH.reach(name)) and "transformers" not in GRAPH.outside(name), (
            name
        )


def test_only_integrations_import_other_trainers() -> None:
    for name in GRAPH.files:
        if first(name) != "integrations":
            assert not GRAPH.outside(name) & {"trl", "verl", "ray", "tensordict", "omegaconf", "liger_kernel"}, name


def test_triton_is_imported_by_its_kernels_alone() -> None:
    for name in GRAPH.files:
        if not name.startswith("kernels.triton"):
            assert "triton" not in GRAPH.outside(name, top_level=True), name


def test_the_vllm_folder_imports_nothing_by_itself() -> None:
    # vLLM's workers import `rollout.vllm.worker` by name.
    for name in ("", "rollout", "rollout.vllm"):
        assert GRAPH.edges[name] <= {"version"} and not GRAPH.outside(name, top_level=True) & HEAVY, name


def test_verl_is_imported_by_what_it_loads_alone() -> None:
    """The command and the folder of configs serve who has no verl."""
    for name in ("", ".__main__", ".data", ".method", ".plugin"):
        assert not GRAPH.outside(f"integrations.verl{name}", top_level=True) & (HEAVY | {"ray", "omegaconf"}), name


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import mdpgrpo_fast") & HEAVY


@pytest.mark.parametrize("module", ["rewards", "verifiers", "config", "data", "cli"])
def test_scoring_workers_do_not_load_torch(module: str) -> None:
    """Every worker process imports these: a second copy of torch in each would cost seconds and gigabytes."""
    assert not loaded_by(f"import mdpgrpo_fast.{module}") & HEAVY


def test_the_loss_needs_torch_alone() -> None:
    loaded = loaded_by("from mdpgrpo_fast import token_loss, linear_token_loss")
    assert "torch" in loaded and not loaded & {"transformers", "accelerate", "matplotlib", "trl"}
