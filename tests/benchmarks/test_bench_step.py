"""The benchmark of a training step: equal work for all trainers, and a result that adds up."""

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


def test_all_trainers_take_their_steps(tmp_path: Path, peer: Any) -> None:
    peer("trl")
    write_problem(SMALL, bench_step.PROMPTS, tmp_path)
    timed = bench_step.run_alone("time", bench_step.WAYS, "small", "kl", tmp_path, 2)
    memory = bench_step.run_alone("memory", ["ours"], "small", "kl", tmp_path, 2)["peak_mb"]
    row = bench_step.compare("kl", timed, {way: 2 * memory if way == "trl" else memory for way in timed})
    assert list(row["steps"]) == list(bench_step.WAYS)
    assert memory > 100, "MB, torch included"
    trl = row["steps"]["trl"]
    for way, step in row["steps"].items():
        assert {"generate", "score", "other"} <= step["stages"].keys() and len(step["all_seconds"]) == 2
        assert sum(s["share"] for s in step["stages"].values()) == pytest.approx(1, abs=2e-3)
        assert step["seen"]["shortest"] == step["seen"]["longest"] == SMALL.completion_length
        assert step["ratio"] == pytest.approx(trl["seconds"] / step["seconds"], rel=2e-3)
        assert step["memory_ratio"] == (1 if way == "trl" else 2)
        assert all(step["stages"][name]["seconds"] > 0 for name in ("reference", "forward", "backward", "optimizer"))
        for each in timed[way]:
            assert sum(each["stages"].values()) == pytest.approx(each["seconds"]), "no time is left out"
        assert way in bench_step.table(row)
    assert "kl (beta 0.01)" in bench_step.table(row)


@pytest.mark.parametrize(
    ("way", "shapes"),
    [
        ("trl", []),
        ("trl_kernels", [(4, 12, 64)] * 2),  # (B, L, D) of two passes a step
        ("trl_packed", [(4 * 12, 64)] * 2),  # of a group each, which has its prompt once
    ],
    ids=["trl", "trl_kernels", "trl_packed"],
)
def test_a_way_of_trl_computes_what_it_is_named_for(
    way: str, shapes: list[tuple[int, ...]], tmp_path: Path, peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer("trl")
    from mdpgrpo_fast.integrations.trl import fused

    seen, loss = [], fused.linear_token_loss

    def linear_token_loss(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(hidden.shape))
        return loss(hidden, *args, **kwargs)

    monkeypatch.setattr(fused, "linear_token_loss", linear_token_loss)
    write_problem(SMALL, bench_step.PROMPTS, tmp_path)
    with bench_step.trl_steps(way, SMALL, bench_step.CASES["kl"], tmp_path) as step:
        step()
        assert seen == shapes
        step()
    assert seen == 2 * shapes, "a second train() goes on in the same way"
