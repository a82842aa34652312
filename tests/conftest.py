"""Fixtures of all tests: shared data, peers, small random models with a tokenizer."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.inputs import SHARED_DATA, make_model, make_tokenizer, needed, unavailable

# Small shapes are faster on one thread, and nothing here may reach out.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for child processes: this one has loaded OpenMP with torch
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    # The interpreter patches triton.language again at every call of a device function: half of its time. Once for the
    # functions of a module is enough, as it never takes those patches back.
    with contextlib.suppress(ImportError):
        from triton.runtime import interpreter

        _patched: set[int] = set()

        def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
            if id(self.fn.__globals__) not in _patched:
                _patched.add(id(self.fn.__globals__))
                interpreter._patch_lang(self.fn)
            return self.rewrite()(*args, **kwargs)

        interpreter.InterpretedFunction.__call__ = _call_device_function

        # Before Triton 3.9 its fma rounds twice, which at logits of 1e4 is not what a GPU does.
        def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
            exact = x.data.astype("float64") * y.data + z.data
            return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

        if not hasattr(interpreter._interpreter, "fma_fp32"):
            interpreter.InterpreterBuilder.create_fma = _fma


# Files that take minutes, begun first: a long one that begins last keeps the other workers waiting.
LONG = (
    "test_distributed.py", "test_two_hosts.py", "test_trl_ranks.py", "test_loop.py", "test_api.py", "test_train.py",
    "test_processes.py", "test_readme.py",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that are marked long, too")


def pytest_unconfigure() -> None:
    """xdist may end a worker before its handlers at exit: what coverage.py has seen of it is written now."""
    coverage = sys.modules.get("coverage")
    if coverage is not None and (running := coverage.Coverage.current()) is not None:
        running.save()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        long = {item for item in items if item.get_closest_marker("long")}
        config.hook.pytest_deselected(items=list(long))
        items[:] = [item for item in items if item not in long]
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Path of a file of shared/data, which lies beside the repository."""

    def find(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.exists():
            unavailable(f"shared data file {name} is missing")
        return path

    return find


@pytest.fixture(scope="session")
def peer() -> Callable[[str], Any]:
    """A module of a library that ours is compared with."""
    return needed


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_dirs(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """family -> directory with the model and its tokenizer, as `models.load` takes it."""
    dirs = {}
    for family in ("llama", "qwen2", "gemma2", "gpt2"):
        path = tmp_path_factory.mktemp(family)
        make_model(family, len(tokenizer)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        dirs[family] = str(path)
    return dirs
