"""The code of docs/other_trainers.md, as it stands there, against the reference: loss and gradient of the logits."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import hooks
from helpers.inputs import LossInputs, make_inputs
from helpers.losses import config_for
from torch import Tensor

import mdpgrpo_fast
from mdpgrpo_fast.config import MDPGRPOConfig
from mdpgrpo_fast.reference import kl_coefficient, token_logprobs, token_loss

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "two-sided clip": {"epsilon_low": 0.1, "epsilon_high": 0.05, "delta": 1.1},
    "sequence": {"importance_level": "sequence"},
    "cispo": {"loss": "cispo"},
    "sapo": {"loss": "sapo"},
    "gmpo": {"loss": "gmpo"},
    "vespo": {"loss": "vespo"},
    "KL": {"kl_beta_pos": 0.3, "kl_beta_neg": 0.8, "kl_estimator": "k2", "kl_gradient": "unbiased"},
    "no KL": {"kl_beta_pos": 0.0, "kl_beta_neg": 0.0},
    "mask": {"off_policy_threshold": 0.05},
}


def expected(batch: LossInputs, config: MDPGRPOConfig) -> tuple[Tensor, Tensor]:
    logits = batch.logits.detach().clone().requires_grad_()
    more = {**batch.given(), "kl_beta": kl_coefficient(batch.advantage, *config.betas)}
    loss = token_loss(logits, batch.tokens, batch.mask, config, max_completion_length=99, **more).loss
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def test_advantages() -> None:
    """What the page says of them: of one group, and of a batch for each token."""
    of_a_group, of_a_batch = re.findall(r"`(advantages\(rewards.*?)`", hooks.page())
    config, rewards = config_for(num_generations=4), torch.rand(8, generator=torch.Generator().manual_seed(0))
    wanted = mdpgrpo_fast.advantages(rewards.view(2, 4), [3, 5], config).advantage
    given = {"advantages": mdpgrpo_fast.advantages, "CONFIG": config, "G": 4, "mask": torch.ones(8, 3)}
    for group, k in enumerate((3, 5)):
        found = eval(of_a_group, {**given, "rewards": rewards[4 * group :][:4], "k": k})
        torch.testing.assert_close(found, wanted[group])
    found = eval(of_a_batch, {**given, "rewards": rewards, "k": [3, 5]})
    torch.testing.assert_close(found, wanted.reshape(8, 1).expand(8, 3))


def assert_close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float = 1e-12) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert y.abs().max() > 0
        torch.testing.assert_close(x.double(), y.double(), rtol=tolerance, atol=tolerance * float(y.abs().max()))


# ---- prime-rl -------------------------------------------------------------------------------------------------------


@pytest.fixture
def prime_rl(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return hooks.run_block(monkeypatch, hooks.PRIME_RL)


def samples_of(batch: LossInputs) -> tuple[Tensor, list[hooks.LossInputs]]:
    """Logits (leaf), and of each completion a sample of L tokens, the last of which may not count."""
    logits = batch.logits.detach().clone().requires_grad_()
    logprobs, _ = token_logprobs(logits, batch.tokens)
    ref = batch.kwargs.get("ref_logprobs")
    samples = [
        hooks.LossInputs(
            logprobs[i],
            batch.kwargs["old_logprobs"][i],
            None if ref is None else ref[i],
            batch.advantage[i].expand(batch.tokens.shape[1]),
            batch.mask[i],
        )
        for i in range(len(batch.tokens))
    ]
    return logits, samples


@pytest.mark.parametrize("name", SETTINGS)
def test_prime_rl(prime_rl: dict[str, Any], name: str) -> None:
    batch, config = make_inputs(), config_for(aggregation="dapo", **SETTINGS[name])
    logits, samples = samples_of(batch)
    prime_rl["CONFIG"] = replace(config, aggregation="grpo")  # which has no say
    loss, metrics = hooks.prime_rl_loss(prime_rl["mdp_grpo"], samples)
    assert_close((loss.detach(), torch.autograd.grad(loss, logits)[0]), expected(batch, config))
    assert {k: v.shape for k, v in metrics.items()} == dict.fromkeys(("kl", "clip_low", "clip_high"), (4,))


def test_prime_rl_without_a_reference(prime_rl: dict[str, Any]) -> None:
    batch = make_inputs(1)
    del batch.kwargs["ref_logprobs"]
    logits, samples = samples_of(batch)
    loss, metrics = hooks.prime_rl_loss(prime_rl["mdp_grpo"], samples)
    assert_close((loss.detach(), torch.autograd.grad(loss, logits)[0]), expected(batch, config_for(aggregation="dapo")))
    assert not metrics["kl"].any()


def test_prime_rl_weights_of_a_component(prime_rl: dict[str, Any]) -> None:
    _, (sample, *_) = samples_of(make_inputs(2))
    weights = torch.linspace(0.5, 2, len(sample.advantages), dtype=torch.float64)
    alone = torch.stack([
        prime_rl["mdp_grpo"](replace(sample, loss_mask=sample.loss_mask & (torch.arange(len(weights)) == t))).loss
        for t in range(len(weights))
    ])  # fmt: skip
    weighted = prime_rl["mdp_grpo"](replace(sample, loss_weights=weights)).loss
    torch.testing.assert_close(weighted, (alone * weights).sum(), rtol=1e-12, atol=0)
    assert (weighted - alone.sum()).abs() > 1e-3


def test_prime_rl_sample_without_tokens(prime_rl: dict[str, Any]) -> None:
    logits, (sample, *_) = samples_of(make_inputs(3))
    out = prime_rl["mdp_grpo"](replace(sample, loss_mask=torch.zeros_like(sample.loss_mask)))
    assert out.loss == 0 and not torch.autograd.grad(out.loss, logits)[0].any()
    assert all(x == 0 for x in out.metrics.values())


# ---- NeMo-RL --------------------------------------------------------------------------------------------------------


@pytest.fixture
def nemo_rl(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return hooks.run_block(monkeypatch, hooks.NEMO_RL)


def data_of(batch: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, 1 + L) of a prompt's last token and the completion: logits (leaf), whose last row predicts nothing; data."""
    logits = torch.nn.functional.pad(batch.logits, (0, 0, 0, 1), value=0.5).requires_grad_()

    def behind_a_prompt(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (1, 0))

    data = {
        "input_ids": behind_a_prompt(batch.tokens),
        "token_mask": behind_a_prompt(batch.mask).long(),
        "sample_mask": torch.ones(len(batch.tokens), dtype=batch.advantage.dtype),
        "advantages": behind_a_prompt(batch.advantage[:, None].expand(batch.tokens.shape)),
        "prev_logprobs": behind_a_prompt(batch.kwargs["old_logprobs"]),
        "reference_policy_logprobs": behind_a_prompt(batch.kwargs["ref_logprobs"]),
    }
    return logits, data


def nemo_rl_call(
    block: dict[str, Any], config: MDPGRPOConfig, logits: Tensor, data: dict[str, Tensor], padding: int = 0,
    **changes: Any,
) -> tuple[Tensor, Tensor, list[Any]]:  # fmt: skip
    """Loss, gradient of the logits of completions, and metrics of each micro-batch."""
    block["CONFIG"] = config
    loss_fn = block["MDPGRPOLossFn"](hooks.nemo_rl_config(**changes))
    loss, metrics = hooks.nemo_rl_loss(loss_fn, logits, data, padding)
    (grad,) = torch.autograd.grad(loss, logits)
    assert not grad[:, -1].any()
    return loss.detach(), grad[:, :-1], metrics


def test_nemo_rl_divides_by_all_tokens(nemo_rl: dict[str, Any]) -> None:
    assert nemo_rl["CONFIG"] == MDPGRPOConfig(aggregation="dapo")


@pytest.mark.parametrize("aggregation", ["dapo", "grpo"])
@pytest.mark.parametrize("name", SETTINGS)
def test_nemo_rl(nemo_rl: dict[str, Any], name: str, aggregation: str) -> None:
    batch, config = make_inputs(), config_for(aggregation=aggregation, **SETTINGS[name])
    wanted = expected(batch, config)
    for padding in (0, 3):
        *found, metrics = nemo_rl_call(nemo_rl, config, *data_of(batch), padding)
        assert_close((found[0], found[1]), wanted)
        assert sum(m["loss"] for m in metrics) == pytest.approx(float(wanted[0]), rel=1e-12)
        assert sum(m["num_valid_samples"] for m in metrics) == 4


def test_nemo_rl_in_float32(nemo_rl: dict[str, Any]) -> None:
    """By the fused kernels, where there are any."""
    batch, config = make_inputs(dtype="float32"), config_for(aggregation="dapo")
    assert_close(nemo_rl_call(nemo_rl, config, *data_of(batch))[:2], expected(batch, config), 1e-4)


def test_nemo_rl_sample_that_does_not_count(nemo_rl: dict[str, Any]) -> None:
    batch, config = make_inputs(), config_for(aggregation="grpo")
    logits, data = data_of(batch)
    data["sample_mask"][1] = 0
    batch.mask = batch.mask & (torch.arange(4) != 1)[:, None]
    assert_close(nemo_rl_call(nemo_rl, config, logits, data)[:2], expected(batch, config))


def test_nemo_rl_log_probs_that_it_does_not_compute(nemo_rl: dict[str, Any]) -> None:
    """Zeros stand for old log-probs where the ratio is forced to 1, and for the reference's where there is none."""
    batch, config = make_inputs(), config_for(aggregation="dapo")
    logits, data = data_of(batch)
    zeros = torch.zeros_like(data["prev_logprobs"])
    data = {**data, "prev_logprobs": zeros, "reference_policy_logprobs": zeros}
    batch.kwargs = {}
    changes = {"force_on_policy_ratio": True, "reference_policy_kl_penalty": 0}
    assert_close(nemo_rl_call(nemo_rl, config, logits, data, **changes)[:2], expected(batch, config))
