"""A thousand inputs or so of every target of `make fuzz`, and those that have failed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from fuzz import kernels, targets

from mdpgrpo_fast.verifiers import verify

INPUTS = {"verifiers_beside_lm_eval": 400, "configuration": 60, "templates": 5, "data_reader": 150}


@pytest.fixture(scope="module")
def ready() -> Iterator[dict[str, targets.Target]]:
    with targets.ready() as found:
        yield found


@pytest.mark.parametrize(
    "name", ["verifiers_beside_lm_eval", "verifiers_of_all_rules", "arguments_of_verifiers", "data_reader",
             "configuration", "templates", "answers_of_vllm"],
)  # fmt: skip
def test_random_inputs(ready: dict[str, targets.Target], name: str) -> None:
    rng = random.Random(f"suite {name}")
    for _ in range(INPUTS.get(name, 800)):
        targets.timed(ready[name], rng.randbytes(rng.randrange(200)))


def test_kernels() -> None:
    for seed in range(40):
        (kernels.token_loss if seed % 8 == 0 else kernels.logprobs)(seed)


@pytest.mark.parametrize("n", [2**63, 10**30])
def test_a_place_beyond_what_a_text_can_have(n: int) -> None:
    for instruction_id, kwargs in (
        ("words:keywords_specific_position", {"keyword": "a", "n": n, "m": 1}),
        ("words:keywords_specific_position", {"keyword": "a", "n": 1, "m": n}),
        ("sentence:keyword", {"word": "a", "N": n}),
    ):
        assert verify(instruction_id, "A bee. A sea.", kwargs, rules="ifbench") is False
