"""Instruction types of one's own: modules that register them, loaded by name."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from types import ModuleType

from ..config import ConfigError
from .registry import INSTRUCTIONS, Instruction, said


def load_instructions(specs: Iterable[str | os.PathLike[str]]) -> None:
    """Import each module, named as Python names it or by its .py file, so that its `@instruction` functions are known.

    Raises: ConfigError where one cannot be imported or registers no type.
    """
    for spec in absolute(specs):
        _load(spec)


def absolute(specs: Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    """The names of modules as they are, of files from the root: other processes, and a later working directory, find
    the same."""
    names = [os.fspath(spec) for spec in ([specs] if isinstance(specs, (str, os.PathLike)) else specs)]
    return tuple(os.path.abspath(name) if name.endswith(".py") else name for name in names)


@functools.cache
def _load(spec: str) -> None:
    before, known = dict(INSTRUCTIONS), spec in sys.modules
    try:
        _from_file(spec) if spec.endswith(".py") else importlib.import_module(spec)
    except (Exception, SystemExit) as error:  # whatever a user's module does when it is imported
        raise ConfigError(f"instructions {spec!r} cannot be loaded: {said(error)}") from error
    registered = any(before.get(id) is not entry for id, entry in INSTRUCTIONS.items())
    package = spec.split(".")[0]
    if not (registered or (known and any(e.check.__module__.split(".")[0] == package for e in own_types()))):
        raise ConfigError(f"instructions {spec!r} registers no type: functions under @instruction('group:name') do")


def _from_file(path: str) -> ModuleType:
    """The module of a file, under the file's path: no other module has that name."""
    found = importlib.util.spec_from_file_location(path, path)
    assert found is not None and found.loader is not None  # the name ends with .py
    module = importlib.util.module_from_spec(found)
    sys.modules[path] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[path]
        raise
    return module


def own_types() -> list[Instruction]:
    """The entries that are none of the library's."""
    return [entry for entry in INSTRUCTIONS.values() if entry.own]
