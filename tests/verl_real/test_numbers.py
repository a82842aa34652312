"""What verl calls of ours, through verl's own functions on its own batches, against our reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl import DataProto
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from mdpgrpo_fast import MDPGRPOConfig, advantages, preset
from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.integrations.verl import plugin
from mdpgrpo_fast.integrations.verl.actor import MDPGRPOActorConfig, check_beside
from mdpgrpo_fast.integrations.verl.method import method_of
from mdpgrpo_fast.integrations.verl.policy_loss import reference_logprobs
from mdpgrpo_fast.reference import token_loss

GOLDEN = Path(__file__).parents[1] / "data" / "method_golden.jsonl"
G, P, L, V = 4, 3, 7, 11


def test_every_part_is_registered() -> None:
    assert {plugin.register(what).problem for what in plugin.PARTS} == {None}


# ---- advantages -----------------------------------------------------------------------------------------------------


def batch_of(rewards: Tensor, uids: list[str], length: int = 5) -> DataProto:
    """Rows as verl's trainer has them when it asks for advantages: a reward stands at a completion's last token."""
    mask = torch.ones(len(rewards), length, dtype=torch.int64)
    mask[::3, length - 2 :] = 0
    at = torch.zeros(len(rewards), length, dtype=rewards.dtype)
    at[torch.arange(len(rewards)), mask.sum(1) - 1] = rewards
    tensors = {"token_level_rewards": at, "response_mask": mask}
    return DataProto.from_dict(tensors=tensors, non_tensors={"uid": np.array(uids, dtype=object)})


def algorithm(**options: Any) -> Any:
    return OmegaConf.create({"mdp_grpo": options})


def verls(data: DataProto, **options: Any) -> Tensor:
    """Advantages (B, L) by verl's own function for all estimators."""
    out = compute_advantage(data, adv_estimator="mdp_grpo", config=algorithm(**options))
    assert torch.equal(out.batch["advantages"], out.batch["returns"])
    return out.batch["advantages"]


def test_golden_groups_through_verls_function() -> None:
    rows = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 1500
    by_knobs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        knobs = {k: v for k, v in row.items() if k not in ("rewards", "expected")}
        by_knobs.setdefault(json.dumps([len(row["rewards"]), knobs]), []).append(row)
    for key, groups in by_knobs.items():
        size, knobs = json.loads(key)
        # Groups lie scattered over the batch, as verl balances it by length.
        order = torch.randperm(size * len(groups), generator=torch.Generator().manual_seed(size)).tolist()
        rewards = torch.tensor([r for g in groups for r in g["rewards"]], dtype=torch.float64)[order]
        uids = [f"prompt{i // size}" for i in order]
        data = batch_of(rewards, uids)
        found = verls(data, num_generations=size, multi_temperature=False, **knobs)
        expected = torch.tensor([a for g in groups for a in g["expected"]["advantage"]], dtype=torch.float64)[order]
        assert (found - expected[:, None] * data.batch["response_mask"]).abs().max() <= 1e-6, knobs


def test_a_group_that_lost_completions_and_rows_that_fill_a_batch() -> None:
    rewards, uids = torch.tensor([0.0, 0.5, 1.0, 0.5, 1.0] + [0.0] * 6), ["a"] * 3 + ["b"] * 2 + ["pad0"] * 6
    data = batch_of(rewards, uids)
    data.batch["response_mask"][5:] = 0
    found = verls(data, num_generations=G, num_constraints=2)
    config = preset("paper", num_generations=G)
    valid = torch.tensor([[True, True, True, False], [True, True, False, False]])
    known = torch.zeros(2, G).masked_scatter(valid, rewards[:5])
    expected = advantages(known, [2, 2], config, valid=valid).advantage[valid]
    assert torch.allclose(found[:5, 0], expected, atol=1e-6) and (expected != 0).any()
    assert (found[5:] == 0).all()


@pytest.mark.parametrize(
    ("options", "uids", "said"),
    [
        (
            {"num_generations": 2, "multi_temperature": False},
            ["a"] * 3,
            "the prompt a has 3 rows for num_generations = 2",
        ),
        ({}, ["a"] * 3, "num_generations must be set"),
        ({"num_generations": 4, "epsilon_high": 0.3}, ["a"], r"verl's own setting: .*clip_ratio_high"),
        ({"num_generations": 4, "preset": "dapo"}, ["a"], r"dapo sets aggregation \(.*loss_agg_mode\), epsilon_high"),
        ({"num_generations": 4, "preset": "exact"}, ["a"], "exact sets temperature_objective"),
        ({"num_generations": 4, "kl_beta_ngt": 1.0}, ["a"], "did you mean 'kl_beta_neg'"),
        ({"num_generations": 4, "min_p": 0.1}, ["a"], "min_p has no place in verl's loop"),
        ({"num_generations": 4, "goal_mean": "running"}, ["a"], "must not be running"),
        ({"num_generations": 4, "num_constraints": 0}, ["a"], "num_constraints must be a whole number of at least 1"),
        ({"num_generations": 4, "num_constraints": "three"}, ["a"], "at least 1; got 'three'"),
    ],
)
def test_what_cannot_be_used_is_named(options: dict[str, Any], uids: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        verls(batch_of(torch.rand(len(uids)), uids), **{"num_constraints": 2, **options})


def test_a_batch_without_counts_or_uids_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_constraints where all prompts have as many"):
        verls(batch_of(torch.rand(2), ["a", "a"]), num_generations=2, multi_temperature=False)
    mask = torch.ones(2, 3)
    with pytest.raises(ValueError, match="index is missing"):
        get_adv_estimator_fn("mdp_grpo")(mask, mask, config=algorithm(num_generations=2, multi_temperature=False))


# ---- policy loss ----------------------------------------------------------------------------------------------------


def actor(loss_agg_mode: str = "seq-mean-token-mean", clip: tuple[float, float] = (0.2, 0.28), **options: Any) -> Any:
    beta = {"kl_beta_pos": 0.3, "kl_beta_neg": 0.7}
    return MDPGRPOActorConfig(
        ppo_micro_batch_size_per_gpu=4, rollout_n=G, loss_agg_mode=loss_agg_mode, clip_ratio_low=clip[0],
        clip_ratio_high=clip[1], use_kl_loss=True, kl_loss_coef=0.0, policy_loss=PolicyLossConfig(loss_mode="mdp_grpo"),
        fsdp_config=FSDPEngineConfig(), mdp_grpo={"num_generations": G, **beta, **options},
    )  # fmt: skip


class Batch:
    """A micro-batch of B completions of unlike lengths, their logits, and what verl keeps beside them."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        b = G * P
        self.prompts = torch.randint(2, 5, (b,), generator=g)
        self.lengths = torch.randint(1, L + 1, (b,), generator=g)
        self.lengths[0] = L
        self.logits = (3 * torch.randn(b, L, V, generator=g)).requires_grad_()
        self.tokens = torch.randint(V, (b, L), generator=g)
        inside = torch.arange(L) < self.lengths[:, None]
        self.mask = inside & (torch.rand(b, L, generator=g) > 0.15)  # tokens of a tool are not the policy's
        self.old = self.logprobs().detach() + 0.4 * torch.randn(b, L, generator=g)
        self.ref = self.logprobs().detach() + 0.4 * torch.randn(b, L, generator=g)
        self.advantage = torch.randn(b, generator=g)
        self.advantage[1] = 0
        self.weights = torch.rand(b, L, generator=g) + 0.5

    def logprobs(self) -> Tensor:
        return self.logits.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]

    def nested(self, x: Tensor) -> Tensor:
        rows = [row[:n] for row, n in zip(x, self.lengths.tolist(), strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    def of_model(self) -> Tensor:
        """Log-probs as verl's engine gives them: of every position's next token, prompts included, without padding."""
        ones, found = torch.zeros(5), self.logprobs()
        rows = [
            torch.cat([ones[: p - 1], row[:n], ones[:1]])
            for p, n, row in zip(self.prompts.tolist(), self.lengths.tolist(), found, strict=True)
        ]
        return torch.nested.nested_tensor_from_jagged(
            torch.cat(rows), torch.cat([torch.zeros(1, dtype=torch.long), (self.prompts + self.lengths).cumsum(0)])
        )

    def data(self, weighed: bool, **info: Any) -> TensorDict:
        prompts = [torch.zeros(n, dtype=torch.long) for n in self.prompts.tolist()]
        fields = {
            "prompts": torch.nested.as_nested_tensor(prompts, layout=torch.jagged),
            "responses": self.nested(self.tokens),
            "response_mask": self.nested(self.mask.long()),
            "old_log_probs": self.nested(self.old),
            "ref_log_prob": self.nested(self.ref),
            "advantages": self.nested(self.advantage[:, None] * self.mask),
        }
        if weighed:
            fields["rollout_is_weights"] = self.nested(self.weights)
        data = TensorDict(fields, batch_size=[len(self.tokens)])
        tu.assign_non_tensor(data, **{"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, **info})
        return data


AGGREGATIONS = {
    "seq-mean-token-mean": "grpo",
    "token-mean": "dapo",
    "seq-mean-token-sum": "seq_mean_token_sum",
}
OBJECTIVES: list[dict[str, Any]] = [
    {},
    {"preset": "released_code"},
    {"preset": "grpo"},
    {"kl_estimator": "k1"},
    {"kl_gradient": "unbiased"},
    {"importance_level": "sequence"},
    {"delta": 1.5},
    {"loss": "cispo"},
    {"loss": "sapo"},
    {"loss": "gmpo"},
    {"loss": "vespo"},
    {"off_policy_threshold": 0.1},
    {"kl_beta_pos": 0.0, "kl_beta_neg": 0.0},
]


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("options", OBJECTIVES, ids=str)
def test_the_loss_of_verls_trainer_is_ours(options: dict[str, Any], mode: str, weighed: bool) -> None:
    batch = Batch()
    config = actor(mode, **options)
    data = batch.data(weighed)
    with reference_logprobs(data["ref_log_prob"]):
        loss, metrics = ppo_loss(config, {"log_probs": batch.of_model()}, data)
    (gradient,) = torch.autograd.grad(loss, batch.logits)

    knobs = {k: v for k, v in config.mdp_grpo.items() if k != "preset"}
    method = preset(
        config.mdp_grpo.get("preset", "paper"),
        **{**knobs, "aggregation": AGGREGATIONS[mode], "epsilon_low": 0.2, "epsilon_high": 0.28},
    )
    # verl's mean over completions leaves out those without a token.
    seen = batch.mask.any(1)
    denominator = {"grpo": seen.sum(), "dapo": batch.mask.sum(), "seq_mean_token_sum": seen.sum()}[method.aggregation]
    beta = torch.where(batch.advantage < 0, method.betas[1], method.betas[0])
    ours = token_loss(
        batch.logits, batch.tokens, batch.mask, method, advantage=batch.advantage, kl_beta=beta,
        max_completion_length=L, old_logprobs=batch.old, ref_logprobs=batch.ref if method.kl_in_loss else None,
        importance_weight=batch.weights if weighed else None, denominator=denominator,
    )  # fmt: skip
    (expected,) = torch.autograd.grad(ours.loss, batch.logits)
    assert abs(loss.item() - ours.loss.item()) <= 1e-6 * max(1.0, abs(ours.loss.item()))
    assert (gradient - expected).abs().max() <= 1e-6
    assert expected.abs().max() > 1e-3
    if method.kl_in_loss:
        assert metrics["actor/ref_kl"].aggregate() == pytest.approx((ours.kl.sum() / batch.mask.sum()).item(), abs=1e-6)


def test_micro_batches_on_two_ranks_sum_to_the_whole_batch() -> None:
    batch, config = Batch(), actor()
    whole_data = batch.data(False, dp_size=1, global_batch_size=G * P, batch_num_tokens=int(batch.mask.sum()))
    with reference_logprobs(whole_data["ref_log_prob"]):
        whole, _ = ppo_loss(config, {"log_probs": batch.of_model()}, whole_data)
    log_probs, total = batch.of_model().unbind(), 0.0
    for rows in (slice(0, 5), slice(5, 7), slice(7, 12)):
        data = batch.data(False, dp_size=2, global_batch_size=G * P, batch_num_tokens=int(batch.mask.sum()))
        part = TensorDict(
            {k: torch.nested.as_nested_tensor(list(v.unbind())[rows], layout=torch.jagged)
             for k, v in data.items() if isinstance(v, Tensor)},
            batch_size=[len(range(12)[rows])],
        )  # fmt: skip
        tu.assign_non_tensor(
            part, dp_size=2, global_batch_size=G * P, batch_num_tokens=int(batch.mask.sum())
        )  # fmt: skip
        with reference_logprobs(part["ref_log_prob"]):
            loss, _ = ppo_loss(
                config, {"log_probs": torch.nested.as_nested_tensor(list(log_probs)[rows], layout=torch.jagged)}, part
            )
        total += loss.item() / 2  # FSDP takes the mean over ranks
    assert total == pytest.approx(whole.item(), abs=1e-6)


def test_the_kl_is_not_left_out_in_silence() -> None:
    batch = Batch()
    with pytest.raises(ConfigError, match="VERL_ENGINE_VENDOR=mdpgrpo_fast"):
        ppo_loss(actor(), {"log_probs": batch.of_model()}, batch.data(False))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kl_loss_coef": 0.001}, "kl_loss_coef must be 0"),
        ({"use_kl_loss": False}, "use_kl_loss must be True"),
        ({"policy_loss": PolicyLossConfig(loss_mode="vanilla")}, "loss_mode must be mdp_grpo; got vanilla"),
        ({"rollout_n": 8}, "num_generations must be rollout.n = 8; got 4"),
        ({"mdp_grpo": {"num_generations": G, "loss": "luspo"}}, "loss_agg_mode must be seq-mean-token-sum"),
        ({"mdp_grpo": {"num_generations": G, "top_p": 0.9}}, r"verl's own setting: .*rollout.top_p"),
    ],
)
def test_an_actor_config_that_contradicts_itself(change: dict[str, Any], said: str) -> None:
    good = actor()
    settings = {
        "ppo_micro_batch_size_per_gpu": 4, "rollout_n": G, "use_kl_loss": True, "kl_loss_coef": 0.0,
        "policy_loss": PolicyLossConfig(loss_mode="mdp_grpo"), "mdp_grpo": dict(good.mdp_grpo),
    }  # fmt: skip
    MDPGRPOActorConfig(**settings)
    with pytest.raises(ConfigError, match=said):
        MDPGRPOActorConfig(**{**settings, **change})


BESIDE = {
    "temperature": 1.0, "top_p": 0.9, "top_k": 50, "val_kwargs": {"temperature": 0, "top_p": 1.0, "top_k": -1},
    "use_v1": True, "default_agent_loop": "mdp_grpo", "use_kl_in_reward": False, "bypass_mode": False,
    "engine_vendor": "mdpgrpo_fast",
}  # fmt: skip
ONE = {"multi_temperature": False}


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({"temperature": 0.7}, {}, "rollout.temperature must be 1 with multi_temperature"),
        ({"val_kwargs": BESIDE}, {}, "val_kwargs must differ from rollout"),
        ({"use_v1": False}, {}, "trainer.use_v1 must be True"),
        ({"use_v1": False}, {"num_constraints": 3}, "trainer.use_v1 must be True"),
        ({"use_v1": False}, ONE, "trainer.use_v1 must be True"),
        ({"default_agent_loop": "single_turn_agent"}, {}, "default_agent_loop must be mdp_grpo"),
        ({"use_kl_in_reward": True}, {}, "use_kl_in_reward must be False"),
        ({"bypass_mode": True}, {}, "bypass_mode must be False"),
        ({"bypass_mode": True}, ONE, "bypass_mode must be False"),
        ({"engine_vendor": None}, {}, "VERL_ENGINE_VENDOR must be mdpgrpo_fast"),
    ],
)
def test_settings_of_verl_that_would_be_wrong_in_silence(
    change: dict[str, Any], options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VERL_ENGINE_VENDOR", raising=False)

    def check(options: dict[str, Any], **change: Any) -> None:
        check_beside(method_of({"num_generations": G, **options}), {**BESIDE, **change}, options.get("num_constraints"))

    check(options)
    with pytest.raises(ConfigError, match=said):
        check(options, **change)
    whole = {"bypass_mode": True, "top_p": 1.0, "top_k": -1, "temperature": 0.7, "default_agent_loop": "other"}
    check({**ONE, "kl_beta_pos": 0.0, "kl_beta_neg": 0.0}, **whole, use_kl_in_reward=True, engine_vendor=None)
    check({**ONE, "num_constraints": 3}, use_v1=False)
    check({**ONE, "dual_anchor": False}, use_v1=False)


def test_an_entropy_bonus_is_refused_with_our_head_alone() -> None:
    config = actor()
    with_bonus = MDPGRPOActorConfig(
        ppo_micro_batch_size_per_gpu=4, rollout_n=G, use_kl_loss=True, kl_loss_coef=0.0, entropy_coeff=0.01,
        policy_loss=PolicyLossConfig(loss_mode="mdp_grpo"), mdp_grpo=dict(config.mdp_grpo),
    )  # fmt: skip
    ours = {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "mdpgrpo_fast"}}
    config.validate(1, 256, ours)
    with_bonus.validate(1, 256, {**ours, "use_fused_kernels": False})
    with pytest.raises(ConfigError, match="entropy_coeff must be 0 with impl_backend = mdpgrpo_fast"):
        with_bonus.validate(1, 256, ours)


def test_a_loss_without_kl_needs_no_reference() -> None:
    config = MDPGRPOActorConfig(
        ppo_micro_batch_size_per_gpu=4, rollout_n=G, policy_loss=PolicyLossConfig(loss_mode="mdp_grpo"),
        mdp_grpo={"num_generations": G, "kl_beta_pos": 0.0, "kl_beta_neg": 0.0},
    )  # fmt: skip
    batch = Batch()
    padded = (batch.old, batch.logprobs(), batch.advantage[:, None] * batch.mask, batch.mask)
    loss, metrics = get_policy_loss_fn("mdp_grpo")(*padded, "seq-mean-token-mean", config)
    method = MDPGRPOConfig(num_generations=G, kl_beta_pos=0.0, kl_beta_neg=0.0)
    ours = token_loss(
        batch.logits, batch.tokens, batch.mask, method, advantage=batch.advantage, kl_beta=0.0,
        max_completion_length=L, old_logprobs=batch.old, denominator=batch.mask.any(1).sum(),
    )  # fmt: skip
    assert loss.item() == pytest.approx(ours.loss.item(), abs=1e-6)
    assert set(metrics) == {"actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"}
