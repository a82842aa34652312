"""The reference against TRL's own GRPOTrainer, run as it is, wherever options overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.inputs import LossInputs, make_inputs
from helpers.losses import MAX_LENGTH, Result, config_for, equal_beta
from helpers.losses import run as run_on

import mdpgrpo_fast
from mdpgrpo_fast.config import MDPGRPOConfig, preset
from mdpgrpo_fast.models.load import load
from mdpgrpo_fast.models.policy import completion_logits

AGGREGATIONS = ("grpo", "dapo", "dr_grpo", "bnpo")


def run(batch: LossInputs, config: MDPGRPOConfig, **more: Any) -> Result:
    """In float64, as TRL is run here."""
    return run_on("torch", batch, config, "cpu", **more)


class TRL:
    """TRL's GRPOTrainer, run as it is on a small model; only what a test sets is different from a user's run."""

    def __init__(self, peer: Callable[[str], Any], tmp: Path) -> None:
        self.trl, self.utils = peer("trl"), peer("trl.trainer.utils")
        self.datasets, self.tmp = peer("datasets"), tmp

    def trainer(self, path: str, rewards: list[float | None] | None = None, **args: Any) -> Any:
        def reward(completions: list[str], **_: Any) -> list[float | None]:
            return rewards or [0.0] * len(completions)

        defaults = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": MAX_LENGTH}
        config = self.trl.GRPOConfig(
            output_dir=str(self.tmp), use_cpu=True, bf16=False, report_to=[], **{**defaults, **args}
        )
        prompts = self.datasets.Dataset.from_list([{"prompt": "write about the sea"}, {"prompt": "the wind"}])
        trainer = self.trl.GRPOTrainer(model=path, reward_funcs=reward, args=config, train_dataset=prompts)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        return trainer


@pytest.fixture(scope="module")
def trl(peer: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TRL]:
    yield TRL(peer, tmp_path_factory.mktemp("trl"))
    # Its precision and device are global state, which would hold for every later test.
    peer("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def trl_trainer(trl: TRL, model_dirs: dict[str, str]) -> Any:
    return trl.trainer(model_dirs["llama"], beta=0.1)


@pytest.fixture
def trl_loss(trl: TRL, trl_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`GRPOTrainer._compute_loss` on given logits: (loss, gradient of the logits, its logged metrics)."""

    def compute(
        batch: LossInputs, tau: float = 1.0, weight: Any = None, differentiable_entropy: bool = False, **knobs: Any
    ) -> Any:
        logits = batch.logits.detach().requires_grad_()
        logps, entropy = trl.utils.selective_log_softmax_and_entropy(logits, batch.tokens, temperature=tau)
        t = trl_trainer
        if not differentiable_entropy:
            entropy = entropy.detach()
        monkeypatch.setattr(t, "_get_per_token_logps_and_entropies", lambda *a, **k: (logps, entropy, None))
        for name, value in {"use_bias_correction_kl": False, **knobs}.items():
            monkeypatch.setattr(t.args if name in ("delta", "use_bias_correction_kl") else t, name, value)
        monkeypatch.setattr(t, "use_vllm", weight is not None)
        monkeypatch.setattr(t, "vllm_importance_sampling_correction", weight is not None)
        mask = batch.mask.to(logits.dtype)
        inputs = {
            "prompt_ids": batch.tokens[:, :1],
            "prompt_mask": mask[:, :1],
            "completion_ids": batch.tokens,
            "completion_mask": mask,
            "advantages": batch.advantage,
            "num_items_in_batch": mask.sum(),
            "importance_sampling_ratio": weight,
            **{k.replace("_logprobs", "_per_token_logps"): v for k, v in batch.kwargs.items()},
        }
        t._metrics["train"].clear()
        loss = t._compute_loss(t.model, inputs)
        (grad,) = torch.autograd.grad(loss, logits)
        return loss, grad, {k: v[0] for k, v in t._metrics["train"].items()}

    return compute


@pytest.mark.parametrize("delta", [None, 1.4])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_trl_loss(trl_loss: Callable[..., Any], aggregation: Any, level: Any, delta: float | None) -> None:
    batch = equal_beta(make_inputs(30, lengths=(5, 3, 1, 4, 5, 2)))
    config = config_for(aggregation=aggregation, importance_level=level, delta=delta, epsilon_low=0.1, epsilon_high=0.3)
    loss, grad, metrics = trl_loss(
        batch, loss_type=aggregation, importance_sampling_level=level, delta=delta, epsilon_low=0.1, epsilon_high=0.3
    )
    out, ours = run(batch, config)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(ours, grad, rtol=1e-10, atol=1e-13)
    tokens = batch.mask.sum().item()
    assert metrics["kl"] == pytest.approx(out.kl.sum().item() / tokens, rel=1e-6)
    assert metrics["entropy"] == pytest.approx(out.entropy.sum().item() / tokens, rel=1e-6)
    low, high = out.clipped_low, out.clipped_high
    share = [x[:, 0].float().mean() if level == "sequence" else x.sum() / tokens for x in (low, high)]
    assert metrics["clip_ratio/low_mean"] == pytest.approx(share[0].item(), abs=1e-6)
    assert metrics["clip_ratio/high_mean"] == pytest.approx(share[1].item(), abs=1e-6)


@pytest.mark.parametrize("tau", [0.4, 1.3])
def test_trl_temperature_and_importance_weight(trl_loss: Callable[..., Any], tau: float) -> None:
    """TRL's one temperature is ours for policy and KL alike; its vLLM correction weighs the policy term alone."""
    batch = equal_beta(make_inputs(31))
    weight = make_inputs(32).kwargs["ref_logprobs"].exp().clamp(max=2.0)
    loss, grad, _ = trl_loss(batch, tau=tau, weight=weight, loss_type="dapo")
    config = config_for(aggregation="dapo", kl_temperature=tau, temperature_objective="per_row")
    out, ours = run(batch, config, temperature=tau, importance_weight=weight)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(ours, grad, rtol=1e-10, atol=1e-13)


def test_trl_without_kl_and_on_policy(trl_loss: Callable[..., Any]) -> None:
    batch = make_inputs(33)
    batch.kwargs.clear()
    loss, grad, _ = trl_loss(batch, loss_type="grpo", beta=0.0)
    out, ours = run(batch, config_for())
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(ours, grad, rtol=1e-10, atol=1e-13)


# TRL's loss_type is a loss and an aggregation.
LOSSES: dict[str, dict[str, Any]] = {
    **{name: {"aggregation": name} for name in AGGREGATIONS},
    "cispo": {"loss": "cispo", "aggregation": "dapo", "epsilon_low": 1.0},
    "sapo": {"loss": "sapo"},
    "luspo": {"loss": "luspo"},
    "vespo": {"loss": "vespo", "aggregation": "dapo"},
}


@pytest.mark.parametrize("correct", [False, True], ids=["plain", "unbiased"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_trl_loss_types(trl_loss: Callable[..., Any], loss_type: str, weighted: bool, correct: bool) -> None:
    """Every loss of TRL with and without its sampler correction and its unbiased KL, at every level that it has."""
    levels = {"luspo": ["sequence"], "vespo": ["token"]}.get(loss_type, ["token", "sequence"])
    for level in levels:
        batch = equal_beta(make_inputs(35, lengths=(5, 3, 1, 4, 5, 2)))
        weight = make_inputs(36, lengths=(5, 3, 1, 4, 5, 2)).kwargs["ref_logprobs"].exp().clamp(min=0.2, max=2.0)
        weight = torch.where(batch.mask, weight, 1.0) if weighted else None
        clip = {"epsilon_high": 1.3} if loss_type == "cispo" else {}
        loss, grad, metrics = trl_loss(
            batch, weight=weight, loss_type=loss_type, importance_sampling_level=level, use_bias_correction_kl=correct,
            epsilon_low=0.2, **(clip or {"epsilon_high": 0.2}),
        )  # fmt: skip
        knobs = {"importance_level": level, "kl_gradient": "unbiased" if correct else "plain", **LOSSES[loss_type]}
        knobs |= {"epsilon_high": clip["epsilon_high"] - 1} if clip else {}  # its bound is absolute, ours above 1
        out, ours = run(batch, config_for(**knobs), importance_weight=weight)
        exact = 1e-12 if loss_type not in ("sapo", "vespo") else 1e-6  # whose constants TRL rounds to float32
        assert out.loss.item() == pytest.approx(loss.item(), rel=exact, abs=exact), level
        torch.testing.assert_close(ours, grad, rtol=1e-10 if exact < 1e-6 else 1e-5, atol=0.1 * exact)
        assert metrics["kl"] == pytest.approx(out.kl.sum().item() / batch.mask.sum().item(), rel=1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("quantile", [1.0, 0.4])
def test_trl_entropy(trl_loss: Callable[..., Any], loss_type: str, quantile: float) -> None:
    """TRL's bonus is a mean over the tokens that it acts on, ours is aggregated as the loss: a knob a row says how."""
    batch = equal_beta(make_inputs(37, lengths=(5, 3, 1, 4)))
    knobs = {"entropy_coef": 0.3, "_entropy_bonus_enabled": True, "top_entropy_quantile": quantile}
    loss, grad, _ = trl_loss(batch, loss_type=loss_type, differentiable_entropy=True, **knobs)
    tokens, lengths = batch.mask.sum().double(), batch.mask.sum(1).double()
    config = config_for(aggregation=loss_type, top_entropy_quantile=quantile)
    kept = tokens
    if quantile < 1:
        _, entropy = mdpgrpo_fast.token_logprobs(batch.logits, batch.tokens)
        kept = (entropy[batch.mask] >= torch.quantile(entropy[batch.mask], 1 - quantile)).sum().double()
    share = 1 / kept / (1 / tokens if loss_type == "dapo" else 1 / (lengths * 4))  # TRL's share of a row over ours
    out, ours = run(batch, config, entropy_coef=0.3 * share * torch.ones(4, dtype=torch.float64))
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(ours, grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("threshold", [0.01, 0.2])
def test_trl_off_policy_mask(trl_loss: Callable[..., Any], threshold: float) -> None:
    for name in ("old_logprobs", "sampling_logprobs"):
        batch = equal_beta(make_inputs(38, lengths=(5, 3, 1, 4, 5, 2)))
        if name == "sampling_logprobs":
            batch.kwargs[name] = batch.kwargs["old_logprobs"] - make_inputs(39, (5, 3, 1, 4, 5, 2)).logits[..., 0] / 20
        loss, grad, _ = trl_loss(batch, loss_type="dapo", off_policy_mask_threshold=threshold)
        out, ours = run(batch, config_for(aggregation="dapo", off_policy_threshold=threshold))
        assert out.loss.item() == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(ours, grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("aggregation", "factor"), [("grpo", 3 / 4), ("dr_grpo", 3 / 4), ("dapo", 1), ("bnpo", 1)])
def test_trl_counts_empty_completions(trl_loss: Callable[..., Any], aggregation: Any, factor: float) -> None:
    """By design: TRL's B counts a completion that is masked out, ours does not (trl#6439), and that is all."""
    batch = equal_beta(make_inputs(34))
    batch.mask[2] = False
    loss, grad, _ = trl_loss(batch, loss_type=aggregation)
    out, ours = run(batch, config_for(aggregation=aggregation))
    assert out.loss.item() * factor == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(ours * factor, grad, rtol=1e-10, atol=1e-13)


REWARDS: list[float | None] = [0.0, 0.5, 0.5, 1.0, 0.25, 0.0, 0.75, 1.0]


def trl_advantages(trl: TRL, path: str, rewards: list[float | None]) -> torch.Tensor:
    trainer = trl.trainer(path, rewards)
    rows = [{"prompt": "write about the sea"}] * 4 + [{"prompt": "the wind"}] * 4
    return trainer._generate_and_score_completions(rows)["advantages"].view(2, 4)


@pytest.mark.filterwarnings("ignore")
def test_trl_advantages(trl: TRL, model_dirs: dict[str, str]) -> None:
    """The preset `grpo` is what TRL computes; a reward of None leaves the sample out on both sides."""
    config = preset("grpo", num_generations=4)
    theirs = trl_advantages(trl, model_dirs["llama"], REWARDS)
    ours = mdpgrpo_fast.advantages(torch.tensor(REWARDS).view(2, 4), torch.ones(2), config)
    torch.testing.assert_close(ours.advantage, theirs, rtol=1e-5, atol=1e-6)
    lost: list[float | None] = [None, *REWARDS[1:]]
    theirs = trl_advantages(trl, model_dirs["llama"], lost)
    valid = torch.tensor([r is not None for r in lost]).view(2, 4)
    ours = mdpgrpo_fast.advantages(
        torch.tensor([r or 0.0 for r in lost]).view(2, 4), torch.ones(2), config, valid=valid
    )
    torch.testing.assert_close(ours.advantage, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_trl_constant_group_is_zero_up_to_noise(trl: TRL, model_dirs: dict[str, str]) -> None:
    """By design: ours is 0 exactly, TRL's may be the rounding of its mean over 1e-4."""
    theirs = trl_advantages(trl, model_dirs["llama"], [0.7] * 4 + [0.1 + 0.2] * 4)
    ours = mdpgrpo_fast.advantages(
        torch.tensor([[0.7] * 4, [0.3] * 4]), torch.ones(2), preset("grpo", num_generations=4)
    )
    assert (ours.advantage == 0).all() and theirs.abs().max() < 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.filterwarnings("ignore")
def test_trl_step_end_to_end(trl: TRL, model_dirs: dict[str, str], family: str) -> None:
    """TRL samples, scores and computes its fused loss; ours on the same completions gives the same parameter gradient.

    Proves left padding, the soft-cap of gemma2 and the temperature on both sides' own forward passes.
    """
    trainer = trl.trainer(model_dirs[family], REWARDS, beta=0.1, temperature=0.7, loss_type="dapo")
    rows = [{"prompt": "write about the sea"}] * 4 + [{"prompt": "the wind"}] * 4
    inputs = trainer._generate_and_score_completions(rows)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()

    model, _ = load(model_dirs[family])
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    ids, prompt_mask, tokens, mask = (inputs[n] for n in names)
    logits = completion_logits(model, ids, prompt_mask.bool(), tokens, mask.bool())
    config = preset(
        "grpo",
        num_generations=4,
        aggregation="dapo",
        temperature_objective="per_row",
        kl_temperature=0.7,
        kl_beta_pos=0.1,
    )
    adv = mdpgrpo_fast.advantages(torch.tensor(REWARDS).view(2, 4), torch.ones(2), config)
    with torch.no_grad():
        ref, _ = mdpgrpo_fast.token_logprobs(logits, tokens, temperature=0.7)
    torch.testing.assert_close(ref * mask, inputs["ref_per_token_logps"] * mask, rtol=1e-4, atol=1e-4)
    out = mdpgrpo_fast.token_loss(
        logits,
        tokens,
        mask,
        config,
        advantage=adv.advantage.flatten(),
        kl_beta=adv.kl_beta.flatten(),
        ref_logprobs=ref,
        temperature=0.7,
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    theirs = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=2e-3, atol=2e-4 * expected.abs().max().item() + 1e-7)
