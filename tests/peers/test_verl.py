"""The reference against numbers that verl's functions gave in float64 (tests/data/verl_losses.json says which)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.inputs import make_inputs
from helpers.losses import config_for, run

import mdpgrpo_fast
from mdpgrpo_fast.config import preset

DATA = json.loads((Path(__file__).parents[1] / "data" / "verl_losses.json").read_text(encoding="utf-8"))
AGGREGATIONS = {
    "token-mean": "dapo",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
}
KNOBS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "norm horizon": {},
    "cispo": {"loss": "cispo"},
    "gspo": {"importance_level": "sequence"},
    "sapo": {"loss": "sapo"},
    "geo_mean": {"loss": "gmpo"},
}
ESTIMATORS = {"kl": "k1", "abs": "abs", "mse": "k2", "low_var_kl": "k3"}


def inputs() -> Any:
    seed, lengths = DATA["inputs"]["make_inputs"]
    return make_inputs(seed, tuple(lengths))


def through_logits(batch: Any, gradient: Any) -> torch.Tensor:
    """The gradient of the logits from that of each token's log-prob."""
    hot = torch.nn.functional.one_hot(batch.tokens, batch.logits.shape[-1])
    return torch.tensor(gradient, dtype=torch.float64)[..., None] * (hot - batch.logits.softmax(-1))


@pytest.mark.parametrize("case", DATA["losses"], ids=lambda c: f"{c['name']}-{c['aggregation']}-{c['weighted']}")
def test_losses(case: dict[str, Any]) -> None:
    batch = inputs()
    del batch.kwargs["ref_logprobs"]
    aggregation, more = AGGREGATIONS[case["aggregation"]], {}
    if case["weighted"]:
        weight = torch.tensor(DATA["inputs"]["weight"], dtype=torch.float64)
        more["importance_weight"] = weight[:, None].expand(batch.tokens.shape)
    if aggregation == "dr_grpo":
        # verl divides by the horizon alone, and not by the number of completions.
        horizon = case["config"].get("global_batch_info", {}).get("loss_scale_factor", batch.tokens.shape[1])
        more["denominator"] = float(horizon)
    dual = {"delta": case["config"]["clip_ratio_c"]} if "clip_ratio_c" in case["config"] else {}
    clip = {} if case["name"] == "sapo" else {"epsilon_low": 0.1, "epsilon_high": 0.3}
    config = config_for(aggregation=aggregation, **KNOBS[case["name"]], **clip, **dual)
    got = run("torch", batch, config, "cpu", **more)
    assert got.out.loss.item() == pytest.approx(case["loss"], rel=1e-6)  # it adds 1e-8 to lengths, 1e-10 to weights
    torch.testing.assert_close(got.grad, through_logits(batch, case["gradient"]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl(estimator: str) -> None:
    batch, theirs = inputs(), DATA["kl"][estimator]
    batch.advantage, batch.kl_beta = torch.zeros_like(batch.advantage), torch.ones_like(batch.kl_beta)
    config = config_for(kl_estimator=ESTIMATORS[estimator], aggregation="dapo")
    got = run("torch", batch, config, "cpu", denominator=1.0)
    torch.testing.assert_close(got.out.kl, torch.tensor(theirs["value"], dtype=torch.float64))
    expected = through_logits(batch, theirs["gradient"]) * batch.mask[..., None]
    torch.testing.assert_close(got.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("groups", "size"), [("two", 2), ("four", 4)])
def test_advantages(groups: str, size: int) -> None:
    """RLOO, GRPO without its deviation, and GRPO with TRL's epsilon."""
    rewards = torch.tensor(DATA["advantages"]["rewards"], dtype=torch.float64).view(-1, size)
    for name, knobs in (("rloo", {}), ("dr_grpo", {}), ("grpo", {})):
        config = preset(name, num_generations=size, **knobs)
        ours = mdpgrpo_fast.advantages(rewards, torch.ones(len(rewards)), config, backend="torch").advantage
        expected = torch.tensor(DATA["advantages"][f"{name}_{groups}"], dtype=torch.float64)
        torch.testing.assert_close(ours.flatten(), expected, rtol=1e-6, atol=1e-9, msg=name)
