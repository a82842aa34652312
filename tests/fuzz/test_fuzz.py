"""A thousand inputs or so of every target of `make fuzz`, and those that have failed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from fuzz import kernels, targets

from mdpgrpo_fast.verifiers import verify

INPUTS = {"verifiers_beside_lm_eval": 400, "configuration": 60, "templates": 5, "data_reader": 150}


@pytest.fixture(scope="module")
def ready() -> Iterator[dict[str, targets.Target]]:
    with targets.ready() as found:
        yield found


def fails(target: Callable[[Any], object], inputs: Iterable[Any]) -> dict[Any, str]:
    """The inputs that a target raises for, and what."""
    found = {}
    for given in inputs:
        try:
            target(given)
        except Exception as e:
            found[given] = f"{type(e).__name__}: {e}"
    return found


@pytest.mark.parametrize(
    "name", ["verifiers_beside_lm_eval", "verifiers_of_all_rules", "arguments_of_verifiers", "data_reader",
             "configuration", "templates", "answers_of_vllm"],
)  # fmt: skip
def test_random_inputs(ready: dict[str, targets.Target], name: str) -> None:
    rng = random.Random(f"suite {name}")
    inputs = [rng.randbytes(rng.randrange(200)) for _ in range(INPUTS.get(name, 800))]
    assert fails(lambda data: targets.timed(ready[name], data), inputs) == {}


def test_kernels() -> None:
    assert fails(lambda seed: (kernels.token_loss if seed % 8 == 0 else kernels.logprobs)(seed), range(40)) == {}


@pytest.mark.parametrize("n", [2**63, 10**30])
def test_a_place_beyond_what_a_text_can_have(n: int) -> None:
    for instruction_id, kwargs in (
        ("words:keywords_specific_position", {"keyword": "a", "n": n, "m": 1}),
        ("words:keywords_specific_position", {"keyword": "a", "n": 1, "m": n}),
        ("sentence:keyword", {"word": "a", "N": n}),
    ):
        assert verify(instruction_id, "A bee. A sea.", kwargs, rules="ifbench") is False
