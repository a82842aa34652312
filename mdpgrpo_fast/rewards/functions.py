"""Reward functions of TRL's signature: loaded by name, their arguments, what they return and what they raise."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..config import ConfigError
from ..data import Example

RewardFunction = Callable[..., Any]
F = TypeVar("F", bound=Callable[..., Any])
MOST = 1e6  # of a reward and of a weighted sum of them, either way
PACKAGE = str(Path(__file__).resolve().parents[1])
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
# What TRL passes by these names is made by the trainer, whatever columns a row has.
RESERVED = (
    "prompt",
    "completion",
    "completion_ids",
    "prompts",
    "completions",
    "trainer_state",
    "log_extra",
    "log_metric",
)


class RewardError(RuntimeError):
    """A reward that cannot be used; the message shows the row, `trace` the traceback inside the user's code."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


@dataclass
class TrainerState:
    """What a reward function sees of the run as `trainer_state`, under the names of transformers' TrainerState."""

    global_step: int = 0  # optimiser batches that are done
    max_steps: int = 1
    epoch: float = 0.0
    num_train_epochs: float = 1.0
    is_world_process_zero: bool = True
    log_history: list[dict[str, Any]] = field(default_factory=list)


def per_completion(function: F) -> F:
    """Marks a reward function to be called with one completion at a time, each in a worker process with a time limit:
    one that hangs, raises or dies costs its own sample. For untrusted code and for answers checked by running them."""
    function.per_completion = True  # type: ignore[attr-defined]
    return function


def load_reward(spec: str) -> RewardFunction:
    """The function named by `module:function`; a class is made without arguments. Raises ConfigError where it cannot be
    imported or called."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise ConfigError(
            f"reward must be 'constraints', module:function, or the directory or hub id of a reward model; got {spec!r}"
        )
    try:
        function = getattr(importlib.import_module(module), name)
        if inspect.isclass(function):
            function = function()
    except (Exception, SystemExit) as e:  # whatever a user's module does when it is imported
        raise ConfigError(f"reward {spec!r} cannot be loaded: {describe(e)}") from None
    if not callable(function):
        raise ConfigError(f"reward {spec!r} is not a function")
    found: RewardFunction = function
    return found


def _unwrapped(function: RewardFunction) -> RewardFunction:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def name_of(function: RewardFunction) -> str:
    """The name that TRL logs a reward function under."""
    function = _unwrapped(function)
    return str(getattr(function, "__name__", type(function).__name__))


def is_async(function: RewardFunction) -> bool:
    function = _unwrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  the method is what may be a coroutine function
    )


@dataclass
class Arguments:
    """What a reward function is called with, and what it logs."""

    examples: Sequence[Example]
    completions: Sequence[str]
    completion_ids: Sequence[list[int]]
    state: TrainerState
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def keywords(self) -> dict[str, Any]:
        """As GRPOTrainer passes them: lists of one item per completion; completions of chat prompts are messages."""
        names = {k: None for e in self.examples for k in e.columns if k not in RESERVED}
        return {
            **{name: [e.columns.get(name) for e in self.examples] for name in names},
            "prompts": [e.prompt for e in self.examples],
            "completions": [
                text if isinstance(e.prompt, str) else [{"role": "assistant", "content": text}]
                for e, text in zip(self.examples, self.completions, strict=True)
            ],
            "completion_ids": list(self.completion_ids),
            "trainer_state": self.state,
            "log_metric": lambda name, value: self.metrics.setdefault(_plain(name), []).append(float(value)),
            "log_extra": lambda column, values: self.extra.setdefault(_plain(column), []).extend(map(_plain, values)),
        }


def _plain(value: Any) -> Any:
    """As JSON has it, and as other processes can take it: of these types themselves, as others are unpickled by code of
    their own."""
    if value is None or isinstance(value, bool):
        return value
    base: Any = next((t for t in (int, float, str) if isinstance(value, t)), None)
    return text_of(value) if base is None else base.__add__(value, base())


def spec_of(function: RewardFunction) -> str:
    """`module:function` of a function that workers can import. Raises ConfigError for any other callable."""
    module, name = str(getattr(function, "__module__", "")), str(getattr(function, "__qualname__", ""))
    if module == "__main__" or getattr(sys.modules.get(module), name, None) is not function:
        raise ConfigError(
            f"reward {name_of(function)!r} is called in worker processes, which need a function at the top of a module "
            "that they can import, and not of the main script"
        )
    return f"{module}:{name}"


def check_values(returned: Any, count: int) -> list[float | None]:
    """What a reward function returned, as one number or None ("not mine") per completion. Raises ValueError."""
    wanted = f"a list with a number or None for each completion ({count})"
    if isinstance(returned, (str, bytes, dict, set)) or not isinstance(returned, Iterable):
        raise ValueError(f"returned {_shown(returned)} in place of {wanted}")
    try:
        values = list(returned)
    except TypeError:  # a tensor without dimensions
        raise ValueError(f"returned {_shown(returned)} in place of {wanted}") from None
    if len(values) != count:
        raise ValueError(
            f"returned {len(values)} value{'s' * (len(values) != 1)} for {count} completion{'s' * (count != 1)}"
        )
    return [None if v is None else _number(v, i) for i, v in enumerate(values)]


def _number(value: Any, place: int) -> float:
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise ValueError(f"returned {_shown(value)} as value {place + 1}, which is no number")


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {text_of(value, repr)[:80]}" if value is not None else "None"


def text_of(value: Any, how: Callable[[Any], str] = str) -> str:
    try:
        return str.__add__(how(value), "")  # of str itself, whatever __str__ gave
    except Exception:  # a __repr__ of the user's
        return "that cannot be shown"


def describe(e: BaseException) -> str:
    """An exception in one line: type, message, and the line of the user's code that it came from."""
    text, where = " ".join(text_of(e).split())[:300], place_of(e)
    where = f" ({where})" if where else ""
    return f"{type(e).__name__}: {text}{where}" if text else f"{type(e).__name__}{where}"


def place_of(e: BaseException) -> str:
    """The innermost line of the user's own code, not of a library that it calls; "" where there is none."""
    frames = user_frames(e)
    own = [f for f in frames if not f.filename.startswith(LIBRARIES)] or frames[:1]
    return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if own else ""


def user_frames(e: BaseException) -> list[traceback.FrameSummary]:
    """The traceback's frames from the first outside of this package."""
    frames = traceback.extract_tb(e.__traceback__)
    ours = [f.filename.startswith((PACKAGE, "<frozen importlib")) or f.filename == importlib.__file__ for f in frames]
    return list(frames[next((i for i, x in enumerate(ours) if not x), len(frames)) :])


def trace_of(e: BaseException) -> str:
    """The traceback inside the user's code."""
    frames = "".join(traceback.format_list(user_frames(e)))
    return f"Traceback (most recent call last):\n{frames}{type(e).__name__}: {text_of(e)[:2000]}" if frames else ""


def is_usable(value: float | None) -> bool:
    """Whether advantages can be made of it in float32: 1e39 is infinite there."""
    return value is None or abs(value) <= MOST
