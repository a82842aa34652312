"""Reward functions of TRL's signature that behave and misbehave; scoring processes import this module."""

from __future__ import annotations

import os
import time


def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]


def column(prompts, completions, bonus, **columns):
    return [float(b) for b in bonus]


def chat(prompts, completions, **columns):
    return [float(len(c[0]["content"])) for c in completions]


def hang(prompts, completions, **columns):
    if completions[0] == "hang":
        time.sleep(60)
    return [1.0]


def die(prompts, completions, **columns):
    if completions[0] == "die":
        os._exit(7)
    return [1.0]


def boom(prompts, completions, **columns):
    if completions[0] == "boom":
        raise KeyError("no such thing")
    return [1.0]


def none(prompts, completions, **columns):
    return [None if completions[0] == "bad" else 0.5]


def nan(prompts, completions, **columns):
    return [float("nan") if completions[0] == "bad" else 0.5]


def vowels(prompts, completions, **columns):
    return [sum(ch in "aeiou" for ch in c) / max(1, len(c)) for c in completions]


def flaky(prompts, completions, **columns):
    if sum(map(ord, completions[0])) % 3 == 0:
        raise KeyError("flaky")
    return [0.5 + 0.5 * (len(completions[0]) % 2)]


def always_boom(prompts, completions, **columns):
    raise KeyError("always")


NOT_A_FUNCTION = 3


def sometimes_nan(prompts, completions, **columns):
    return [float("nan") if sum(map(ord, completions[0])) % 50 == 0 else 0.5]


def text(prompts, completions, **columns):
    return ["high"]


def none_for_bad(prompts, completions, **columns):
    return [None]
