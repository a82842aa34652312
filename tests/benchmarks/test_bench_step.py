"""The benchmark of a training step: equal work for both trainers, and a result that adds up."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_step  # noqa: E402
from problems.step import (  # noqa: E402
    EOS,
    SIZES,
    Wrong,
    even_share,
    make_model,
    make_prompts,
    make_tokenizer,
    must_move,
    verify,
    write_problem,
)

SMALL = SIZES["small"]
DONE = {"shortest": 12, "longest": 12, "loss": 0.0, "grad_norm": 0.1, "equal_groups": 0.5}


def test_prompts_have_one_length_and_no_completion_ends_early() -> None:
    tokenizer, model = make_tokenizer(SMALL.vocab), make_model(SMALL)
    ids = tokenizer(make_prompts(SMALL, 6)).input_ids
    assert {len(row) for row in ids} == {SMALL.prompt_length} and len({tuple(row) for row in ids}) == 6
    assert all(tokenizer.unk_token_id not in row for row in ids)
    with torch.no_grad():
        probabilities = model(input_ids=torch.tensor(ids)).logits.softmax(-1)
    assert (probabilities[..., tokenizer.convert_tokens_to_ids(EOS)] == 0).all()
    assert probabilities.amax() < 0.1, "all other tokens can be drawn"


def test_reward_counts_even_words() -> None:
    assert even_share(["p"] * 3, ["w4 w6 w7 w10", "w5", ""]) == [0.75, 0.0, 0.0]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"shortest": 11}, "shortest completion must have 12 tokens; got 11"),
        ({"loss": math.nan}, "loss must be finite; got nan"),
        ({"grad_norm": 0.0}, "without a gradient"),
        ({"equal_groups": 1.0}, "without a gradient"),
    ],
    ids=str,
)
def test_a_step_with_less_work_is_not_timed(what: dict[str, float], message: str) -> None:
    verify("ours", DONE, SMALL)
    with pytest.raises(Wrong, match=message):
        verify("ours", {**DONE, **what}, SMALL)


def test_weights_have_to_move() -> None:
    model = torch.nn.Linear(3, 2)
    still = pytest.raises(Wrong, match="1 of 1 weight matrices did not move, weight is one")
    with still, must_move("ours", model), torch.no_grad():
        model.bias += 1
    with must_move("ours", model), torch.no_grad():
        model.weight += 1


def test_both_trainers_take_their_steps(tmp_path: Path, peer: Any) -> None:
    peer("trl")
    write_problem(SMALL, bench_step.PROMPTS, tmp_path)
    timed = bench_step.run_alone("time", "small", "kl", tmp_path, 2)
    memory = bench_step.run_alone("memory_ours", "small", "kl", tmp_path, 2)["peak_mb"]
    row = bench_step.compare("kl", timed, {"ours": memory, "trl": 2 * memory})
    ours, trl = row["steps"]["ours"], row["steps"]["trl"]
    assert row["ratio"] == pytest.approx(trl["seconds"] / ours["seconds"], rel=2e-3) and row["memory_ratio"] == 2
    assert memory > 100, "MB, torch included"
    for step in (ours, trl):
        assert {"generate", "score", "other"} <= step["stages"].keys() and len(step["all_seconds"]) == 2
        assert sum(s["share"] for s in step["stages"].values()) == pytest.approx(1, abs=2e-3)
        assert step["seen"]["shortest"] == step["seen"]["longest"] == SMALL.completion_length
    assert all(trl["stages"][name]["seconds"] > 0 for name in ("reference", "forward", "backward", "optimizer"))
    for step in timed["ours"] + timed["trl"]:
        assert sum(step["stages"].values()) == pytest.approx(step["seconds"]), "no time is left out"
    assert "kl (beta 0.01)" in bench_step.table(row)
