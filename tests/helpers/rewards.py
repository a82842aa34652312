"""Reward functions of TRL's signature that behave and misbehave; scoring processes import this module."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import sys
import time

from mdpgrpo_fast.rewards import per_completion


def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]


def column(prompts, completions, bonus, **columns):
    return [float(b) for b in bonus]


def chat(prompts, completions, **columns):
    return [float(len(c[0]["content"])) for c in completions]


def vowels(prompts, completions, **columns):
    return [sum(ch in "aeiou" for ch in c) / max(1, len(c)) for c in completions]


def rank(prompts, completions, **columns):
    """Known of the whole batch alone: the place of a completion by its length."""
    order = sorted(range(len(completions)), key=lambda i: len(completions[i]))
    return [order.index(i) / max(1, len(completions) - 1) for i in range(len(completions))]


async def slow_length(completions, **columns):
    await asyncio.sleep(0.01)
    return [len(c) for c in completions]


class Counter:
    """A callable with state."""

    def __init__(self):
        self.calls = 0

    def __call__(self, completions, **columns):
        self.calls += 1
        return [self.calls] * len(completions)


class AsyncVowels:
    async def __call__(self, completions, **columns):
        return vowels(None, completions)


counter = Counter()
scaled = functools.partial(lambda factor, completions, **columns: [factor * len(c) for c in completions], 0.5)


def logs(completions, trainer_state, log_metric, log_extra, completion_ids, **columns):
    log_metric("mean_length", sum(map(len, completions)) / len(completions))
    log_extra("first", [c[:1] for c in completions])
    return [trainer_state.global_step + len(ids) / 10 for ids in completion_ids]


def only_short(completions, **columns):
    return [None if len(c) > 3 else 1.0 for c in completions]


def only_long(completions, **columns):
    return [0.25 if len(c) > 3 else None for c in completions]


def none(prompts, completions, **columns):
    return [None if c == "bad" else 0.5 for c in completions]


def half(prompts, completions, **columns):
    return [0.5] * len(completions)


def minus_length(completions, **columns):
    """The reward of TRL's quickstart."""
    return [-abs(20.0 - len(c)) for c in completions]


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def hang(prompts, completions, **columns):
    if "hang" in completions:
        time.sleep(60)
    return [1.0] * len(completions)


def hang_and_swallow(completions, **columns):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


async def hang_async(completions, **columns):
    await asyncio.sleep(60)


async def block_async(completions, **columns):
    time.sleep(60)


def die(prompts, completions, **columns):
    if "die" in completions:
        os._exit(7)
    return [1.0] * len(completions)


def boom(prompts, completions, **columns):
    if "boom" in completions:
        raise KeyError("no such thing")
    return [1.0] * len(completions)


@per_completion
def boom_alone(completions, **columns):
    return boom(None, completions)


def always_boom(prompts, completions, **columns):
    raise KeyError("always")


def boom_later(completions, trainer_state, **columns):
    if trainer_state.global_step:
        raise KeyError("later")
    return [len(c) / 100 for c in completions]


def waits_after_two(completions, trainer_state, **columns):
    """Nothing for all; the third step waits for a file, where the environment names one."""
    file = os.environ.get("WAITS_FOR")
    while file and trainer_state.global_step == 2 and not os.path.exists(file):
        time.sleep(0.05)
    return [0.0 for _ in completions]


def leaves(completions, **columns):
    sys.exit("out of the loop")


def reads_json(completions, **columns):
    return [json.loads(c)["score"] for c in completions]


async def cancels(completions, **columns):
    raise asyncio.CancelledError


async def leaves_async(completions, **columns):
    sys.exit("out of the loop")


class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__(a)


def unpicklable(completions, **columns):
    raise Unpicklable("cannot be rebuilt", lambda: 0)


class Hangs(str):
    """Text that never unpickles."""

    def __reduce__(self):
        return time.sleep, (1000,)


class ShownAsHangs:
    def __str__(self):
        return Hangs("so")


class Unshowable(ValueError):
    def __str__(self):
        raise KeyError("no text")


def unshowable(completions, **columns):
    raise Unshowable


@per_completion
def logs_what_hangs(completions, log_extra, log_metric, **columns):
    log_extra(Hangs("said"), [ShownAsHangs()])
    log_metric(Hangs("number"), 2)
    return [1.0]


@per_completion
def takes_memory(completions, **columns):
    return [len(bytearray(int(completions[0]) * 2**20))]


def nan(prompts, completions, **columns):
    return [float("nan") if c == "bad" else 0.5 for c in completions]


def sometimes_nan(prompts, completions, **columns):
    return [float("nan") if sum(map(ord, c)) % 50 == 0 else 0.5 for c in completions]


def flaky(prompts, completions, **columns):
    if sum(map(ord, completions[0])) % 3 == 0:
        raise KeyError("flaky")
    return [0.5 + 0.5 * (len(completions[0]) % 2)]


def text(prompts, completions, **columns):
    return ["high"] * len(completions)


def numbers_as_text(completions, **columns):
    return ["0.9"] * len(completions)


def returns_text(completions, **columns):
    return "0.9"


def returns_number(completions, **columns):
    return 0.9


def returns_nothing(completions, **columns):
    pass


def returns_empty(completions, **columns):
    return []


def returns_three(completions, **columns):
    return [1.0, 2.0, 3.0]


def returns_dict(completions, **columns):
    return {"reward": 1.0}


def nan_elsewhere(completions, trainer_state, **columns):
    """From the second step on, and not on the first rank."""
    wrong = trainer_state.global_step > 0 and not trainer_state.is_world_process_zero
    return [float("nan") if wrong else len(c) / 100 for c in completions]


NOT_A_FUNCTION = 3
