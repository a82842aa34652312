"""Instruction types of one's own: modules that register them, loaded by name."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from ..config import ConfigError
from .registry import INSTRUCTIONS, Instruction


def load_instructions(specs: Iterable[str]) -> None:
    """Import each module, named as Python names it or by its .py file, so that its `@instruction` functions are known.

    Raises: ConfigError where one cannot be imported or registers no type.
    """
    for spec in specs:
        _load(spec)


@functools.cache
def _load(spec: str) -> None:
    try:
        module = _from_file(Path(spec)) if spec.endswith(".py") else importlib.import_module(spec)
    except (Exception, SystemExit) as error:  # whatever a user's module does when it is imported
        said = " ".join(str(error).split()) or "no message"
        raise ConfigError(f"instructions {spec!r} cannot be loaded: {type(error).__name__}: {said}") from error
    if not any(entry.check.__module__.split(".")[0] == module.__name__.split(".")[0] for entry in own_types()):
        raise ConfigError(f"instructions {spec!r} registers no type: functions under @instruction('group:name') do")


def _from_file(path: Path) -> ModuleType:
    """The module of a file, under the file's name, as an import finds it where its folder is on the path."""
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path.resolve():
        return known
    if known is not None:
        raise ImportError(f"a module {name!r} is there already; another file name is needed")
    found = importlib.util.spec_from_file_location(name, path.resolve())
    if found is None or found.loader is None:
        raise ImportError("no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def own_types() -> list[Instruction]:
    """The entries that are none of the library's."""
    return [entry for entry in INSTRUCTIONS.values() if entry.own]
