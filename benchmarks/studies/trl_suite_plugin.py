"""A pytest plugin that runs the tests of one trainer class on another: `-p trl_suite_plugin --trainer MODULE:CLASS`.

In float32, where a test does not say otherwise: on a CPU bfloat16 takes ten times as long at these sizes.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def named(name: str) -> Any:
    """The object at `module:attribute`."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def available(name: str) -> Callable[[], bool]:
    """What `is_PACKAGE_available` of another TRL says, which its tests import and this TRL may lack."""
    package = re.fullmatch(r"is_(\w+)_available", name)
    if package is None:
        raise AttributeError(name)
    return lambda: importlib.util.find_spec(package[1]) is not None


importlib.import_module("trl.import_utils").__getattr__ = available  # type: ignore[method-assign]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--trainer", required=True, help="module:class that takes the place of GRPOTrainer")
    parser.addoption("--config", required=True, help="module:class that takes the place of GRPOConfig")
    parser.addoption("--settings", default="{}", help="JSON: more arguments for that config, where a test has none")


def cannot_run(item: pytest.Function) -> str | None:
    """Why a test cannot run here."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    body = inspect.getsource(item.function).partition("def ")[2]
    given = [value for value in params.values() if str(value).startswith("trl-internal-testing/")]
    for name in given or re.findall(r"trl-internal-testing/[\w.-]+", body):
        if not Path(name).exists():
            return "no stand-in: the processor needs torchvision"
    if not torch.cuda.is_available() and (params.get("use_liger_kernel") or (uses_liger(item) and ".train()" in body)):
        return "Liger's kernels need a GPU"
    return None


def uses_liger(item: pytest.Item) -> bool:
    return "liger" in item.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """The tests look both names up in their module when they run."""
    settings = {"bf16": False, **json.loads(config.getoption("settings"))}
    for module in {item.module for item in items}:
        module.GRPOTrainer = named(config.getoption("trainer"))
        module.GRPOConfig = functools.partial(named(config.getoption("config")), **settings)
    for item in items:
        if why := cannot_run(item):
            item.add_marker(pytest.mark.skip(reason=why))
    # Liger puts its kernels into the models' modules, where all tests after it find them.
    items.sort(key=uses_liger)
    # The tests collect garbage after each of them, a second each time unless it passes over what was imported.
    gc.collect()
    gc.freeze()
