"""Rewards of a completion's length, with the names, arguments and numbers of TRL's."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..config import ConfigError
from ..config.knobs import nearest, require, unknown_name
from ..data import Example
from .constraints import ConstraintReward
from .functions import RewardFunction, name_of

KINDS = "module:function, or the directory or hub id of a reward model"


def _length(name: str, value: Any, least: int = 1) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= least, name, value, f"a whole number of at least {least}")
    return int(value)


class LengthReward:
    """A reward function of TRL's signature that needs the tokens of a completion."""

    __name__ = "length"
    __call__: Callable[..., list[Any]]
    of_constraints = False  # whether it also asks which constraints hold

    def __init__(self, name: str, **arguments: Any) -> None:
        self.arguments = arguments
        self.spec = f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


class SoftOverlongPunishment(LengthReward):
    """0 up to L_max - L_cache tokens, -1 above L_max, a line between (DAPO, Eq. 13)."""

    __name__ = "soft_overlong_punishment_reward"

    def __init__(self, max_completion_len: int, soft_punish_cache: int) -> None:
        self.longest = _length("max_completion_len", max_completion_len)
        self.cache = _length("soft_punish_cache", soft_punish_cache, 0)
        require(
            self.cache <= self.longest, "soft_punish_cache", self.cache, f"at most max_completion_len = {self.longest}"
        )
        super().__init__("soft_overlong_punishment", max_completion_len=self.longest, soft_punish_cache=self.cache)

    def of(self, length: int) -> float:
        over = length - (self.longest - self.cache)
        return 0.0 if over <= 0 else -1.0 if length > self.longest else -over / self.cache

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [self.of(len(ids)) for ids in completion_ids]


class CosineScaledReward(LengthReward):
    """v_min + (v_max - v_min)(1 + cos(π min(|y|/L_max, 1)))/2: the shorter the better where a completion is correct,
    the longer the better where it is wrong ("Demystifying Long Chain-of-Thought Reasoning", App. C.1).

    Correct is a completion that satisfies all constraints of its prompt, strictly; a prompt without any has no such
    reward (None). correct: a reward function of TRL's signature to ask instead: correct where it gives 1 or more, and
    None where it gives None.
    """

    __name__ = "cosine_scaled_reward"

    def __init__(
        self, max_len: int, min_value_wrong: float = -1.0, max_value_wrong: float = -0.5,
        min_value_correct: float = 0.5, max_value_correct: float = 1.0, correct: RewardFunction | None = None,
    ) -> None:  # fmt: skip
        self.max_len = _length("max_len", max_len)
        values = {
            "min_value_wrong": min_value_wrong, "max_value_wrong": max_value_wrong,
            "min_value_correct": min_value_correct, "max_value_correct": max_value_correct,
        }  # fmt: skip
        for name, value in values.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(number and math.isfinite(value), name, value, "a finite number")
        require(correct is None or callable(correct), "correct", correct, "a reward function")
        # At the shortest and at the longest.
        self.ends = {True: (max_value_correct, min_value_correct), False: (min_value_wrong, max_value_wrong)}
        self.correct, self.of_constraints = correct, correct is None
        asked = {} if correct is None else {"correct": name_of(correct)}
        super().__init__("cosine_scaled", max_len=self.max_len, **values, **asked)

    def of(self, length: int, correct: bool) -> float:
        short, long = self.ends[correct]
        return float(long + 0.5 * (short - long) * (1 + math.cos(min(length / self.max_len, 1.0) * math.pi)))

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        if self.correct is None:
            right = _all_hold(completions, **columns)
        else:
            given = self.correct(completions=completions, completion_ids=completion_ids, **columns)
            right = [None if v is None else v >= 1 for v in given]
        pairs = zip(right, completion_ids, strict=True)
        return [None if correct is None else self.of(len(ids), bool(correct)) for correct, ids in pairs]


def _all_hold(
    completions: Sequence[Any], prompts: Sequence[Any] | None = None, instruction_id_list: Sequence[Any] | None = None,
    kwargs: Sequence[Any] | None = None, **_: Any,
) -> list[bool | None]:  # fmt: skip
    """Whether each completion satisfies all constraints of its row, of IFEval's columns; None where it has none.

    A Scorer does not come here: its workers have the verdict, by the run's rules.
    """
    reward, n = ConstraintReward(), len(completions)
    rows = zip(completions, prompts or [""] * n, instruction_id_list or [None] * n, kwargs or [None] * n, strict=True)
    found: list[bool | None] = []
    for completion, prompt, ids, given in rows:
        arguments = [{k: v for k, v in (a or {}).items() if v is not None} for a in given or [{}] * len(ids or [])]
        text = completion if isinstance(completion, str) else completion[0]["content"]
        found.append(all(reward.satisfied(Example(prompt, list(ids), arguments), text)) if ids else None)
    return found


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> SoftOverlongPunishment:
    """DAPO's soft punishment of completions longer than max_completion_len - soft_punish_cache tokens: from 0 down to
    -1 at max_completion_len, and -1 above. Raises ConfigError for lengths that do not fit."""
    return SoftOverlongPunishment(max_completion_len, soft_punish_cache)


def get_cosine_scaled_reward(
    max_len: int, min_value_wrong: float = -1.0, max_value_wrong: float = -0.5, min_value_correct: float = 0.5,
    max_value_correct: float = 1.0, correct: RewardFunction | None = None,
) -> CosineScaledReward:  # fmt: skip
    """A reward that is more for a shorter correct completion, and less for a shorter wrong one, by a cosine up to
    max_len tokens. Correct is one that satisfies all constraints of its prompt, or what the reward function `correct`
    gives 1. Raises ConfigError for a value that does not fit."""
    return CosineScaledReward(max_len, min_value_wrong, max_value_wrong, min_value_correct, max_value_correct, correct)


# ---- by name --------------------------------------------------------------------------------------------------------

NAMED: dict[str, Callable[..., LengthReward]] = {
    "soft_overlong_punishment": get_soft_overlong_punishment,
    "cosine_scaled": get_cosine_scaled_reward,
}


def named_reward(spec: str, max_completion_length: int | None) -> LengthReward | None:
    """The reward of `name` or `name(argument=value, ...)`; None where none is of that name. What is left out: of
    lengths the run's max_completion_length, and of the cache a fifth of it, as DAPO has it. Raises ConfigError for an
    argument that is unknown or does not fit."""
    name = spec.partition("(")[0].strip()
    if name not in NAMED:
        return None
    arguments = _arguments(spec, name)
    try:
        return NAMED[name](**_filled(name, arguments, max_completion_length))
    except ConfigError as e:
        raise ConfigError(f"reward {spec!r}: {e}") from None


def unknown_reward(spec: str) -> ConfigError:
    """What is said of a name that is none of a reward's."""
    known = ["constraints", *NAMED]
    near = nearest(spec.partition("(")[0].strip(), known)
    if near:
        return ConfigError(f"unknown reward {spec!r}; did you mean {near!r}?")
    return ConfigError(f"reward must be {', '.join(map(repr, known))}, {KINDS}; got {spec!r}")


def _arguments(spec: str, name: str) -> dict[str, Any]:
    """Those in the parentheses of a spec, by name."""
    try:
        call = ast.parse(spec.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            return {}
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        values = [ast.literal_eval(a) for a in call.args]
        named = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError, TypeError, MemoryError, RecursionError):
        raise ConfigError(f"reward {spec!r} must be {name}(argument=value, ...) with numbers as values") from None
    known = [n for n in inspect.signature(NAMED[name]).parameters if n != "correct"]
    if len(values) > len(known):
        raise ConfigError(f"reward {spec!r} has {len(values)} arguments; {name} takes {', '.join(known)}")
    for argument in named:
        if argument not in known:
            raise unknown_name(f"argument of {name}", argument, known)
        if argument in known[: len(values)]:
            raise ConfigError(f"reward {spec!r} gives {argument} twice")
    return {**dict(zip(known, values, strict=False)), **named}


def _filled(name: str, arguments: dict[str, Any], longest: int | None) -> dict[str, Any]:
    length = "max_len" if name == "cosine_scaled" else "max_completion_len"
    if arguments.get(length, longest) is None:
        raise ConfigError(f"{length} must be given: there is no max_completion_length to take")
    arguments = {length: longest, **arguments}
    if name == "soft_overlong_punishment" and isinstance(arguments[length], int):
        arguments = {"soft_punish_cache": max(arguments[length] // 5, 1), **arguments}
    return arguments
