"""verl's own trainer on two ranks: with the method it learns, and what is sampled follows the weights."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.verl_runs import RANKS, json_lines, overrides, run, two_nodes

STEPS, PROMPTS, PER_PROMPT, HELD_OUT = 8, 16, 4, 64
TEMPERATURES = (0.1, 0.4, 0.7, 1.0)


class Run:
    """A run of verl's trainer and what it left: the evaluation before it, and the metrics of each step."""

    def __init__(self, folder: Path, steps: int, config: str = "one_node", **changes: Any) -> None:
        self.folder, self.number = folder, steps
        settings = overrides(folder, steps=steps, prompts=PROMPTS, per_prompt=PER_PROMPT, held_out=HELD_OUT)
        self.before, *self.steps = run(folder, settings | changes, config)

    def ranks(self) -> list[list[dict[str, Any]]]:
        return [json_lines(self.folder / "record" / f"rank{rank}.jsonl") for rank in range(RANKS)]

    def sampled(self) -> Counter[tuple[int, float]]:
        """How many completions were drawn with the weights of a step at a temperature."""
        batches = json_lines(self.folder / "record" / "server.jsonl")
        return Counter((batch["steps"], tau) for batch in batches for tau in batch["temperatures"])


@pytest.fixture(scope="module")
def method(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """As our configs have it, but for the sizes: preset paper, our loss, agent loop, reward and head."""
    return Run(tmp_path_factory.mktemp("method"), STEPS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps of GRPO, sampled from the whole vocabulary at the temperature of the loss, on verl's head."""
    rollout, model = "actor_rollout_ref.rollout", "actor_rollout_ref.model"
    changes = {
        "algorithm.mdp_grpo.preset": "grpo", f"{rollout}.top_p": 1.0, f"{rollout}.top_k": -1,
        f"{model}.use_fused_kernels": False,
    }  # fmt: skip
    return Run(tmp_path_factory.mktemp("plain"), 2, **changes)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps of the paper's config, merged for the sampler, at a rate that two steps show."""
    changes = {"actor_rollout_ref.model.lora.merge": True, "actor_rollout_ref.actor.optim.lr": 5e-3}
    return Run(tmp_path_factory.mktemp("lora"), 2, "paper", **changes)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A step of the cluster's config on two Ray nodes, a rank on each."""
    folder = tmp_path_factory.mktemp("cluster")
    with two_nodes(folder) as changes:
        return Run(folder, 1, "ray_cluster", **changes)


def test_both_ranks_train_their_shards(method: Run) -> None:
    ranks = method.ranks()
    assert [len(rank) for rank in ranks] == [STEPS] * RANKS == [len(method.steps)] * RANKS
    for step, records in zip(method.steps, zip(*ranks, strict=True), strict=True):
        assert {r["world"] for r in records} == {RANKS} and all(r["fuses_head"] for r in records)
        assert {r["grad_norm"] for r in records} == {step["actor/grad_norm"]}
        assert sum(r["numbers"] for r in records) == records[0]["whole"]
        assert all(0.4 < r["numbers"] / r["whole"] < 0.6 for r in records)


def test_each_completion_is_drawn_at_its_temperature_with_the_last_weights(method: Run) -> None:
    trained = {(step, tau): PROMPTS for step in range(STEPS) for tau in TEMPERATURES}
    assert method.sampled() == trained | {(0, 0.0): HELD_OUT, (STEPS, 0.0): HELD_OUT}
    assert {step["training/off_policy/trajectory_staleness/max"] for step in method.steps} == {0}


def test_the_kl_is_asymmetric_and_inside_the_loss(method: Run) -> None:
    kl = [step["actor/ref_kl"] for step in method.steps]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 2 * kl[1] > 1e-3
    # A mean of both coefficients, tokens with A >= 0 and below: neither alone.
    assert all(0.0101 < step["actor/ref_kl_beta"] < 0.0249 for step in method.steps)
    assert all(step["actor/kl_coef"] == 0 for step in method.steps)  # verl's own


def test_it_learns(method: Run) -> None:
    shares = [step["critic/score/mean"] for step in method.steps]
    assert statistics.mean(shares[-3:]) > statistics.mean(shares[:2]) + 0.05
    held_out = [row["val-core/mdpgrpo_fast/reward/mean@1"] for row in (method.before, method.steps[-1])]
    assert held_out[1] > held_out[0] + 0.05


def test_the_trainer_and_the_sampler_agree_on_every_token(plain: Run) -> None:
    assert all(step["training/rollout_probs_diff_max"] < 1e-4 for step in plain.steps)
    assert {tau for _, tau in plain.sampled()} == {0.0, 1.0}
    assert not any(r["fuses_head"] for rank in plain.ranks() for r in rank)
    assert all(step["actor/ref_kl_beta"] == pytest.approx(0.01) for step in plain.steps)
    assert plain.steps[1]["actor/ref_kl"] > 1e-4


def test_under_lora_the_reference_is_the_policy_without_its_adapter(lora: Run) -> None:
    first, second = lora.steps
    assert first["actor/ref_kl"] == pytest.approx(0, abs=1e-6) and second["actor/ref_kl"] > 1e-4
    trained = {r["trained"] for rank in lora.ranks() for r in rank}
    assert all(0 < share < 0.5 for share in trained), trained
    assert all(r["fuses_head"] for rank in lora.ranks() for r in rank)


def test_a_ray_cluster_trains_a_rank_on_each_node(cluster: Run) -> None:
    records = [record for rank in cluster.ranks() for record in rank]
    assert len({record["node"] for record in records}) == RANKS == len(records)
    assert {record["world"] for record in records} == {RANKS} and all(record["fuses_head"] for record in records)
    assert {record["grad_norm"] for record in records} == {cluster.steps[0]["actor/grad_norm"]}
