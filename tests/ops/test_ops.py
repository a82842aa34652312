"""The public doors: what they refuse, and agreement with TRL's and Liger's own code wherever options overlap."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.inputs import ROOT, LossInputs, make_inputs

import mdpgrpo_fast
from mdpgrpo_fast import reference
from mdpgrpo_fast.config import ConfigError, MDPGRPOConfig, preset
from mdpgrpo_fast.models.load import load
from mdpgrpo_fast.models.policy import completion_logits
from mdpgrpo_fast.ops import fused
from mdpgrpo_fast.ops.linear.losses import linear_token_loss

AGGREGATIONS = ("grpo", "dapo", "dr_grpo", "bnpo")
MAX_LENGTH = 7


def config_for(**knobs: Any) -> MDPGRPOConfig:
    return MDPGRPOConfig(num_generations=2, multi_temperature=False, **knobs)


def run(batch: LossInputs, config: MDPGRPOConfig, **more: Any) -> tuple[Any, torch.Tensor]:
    logits = batch.logits.detach().requires_grad_()
    out = mdpgrpo_fast.token_loss(
        logits, batch.tokens, batch.mask, config, **{"max_completion_length": MAX_LENGTH, **batch.given(), **more}
    )
    (grad,) = torch.autograd.grad(out.loss, logits)
    return out, grad


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that must not be reached."""

    def work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the check came after the work began")

    for module in (reference, fused):
        for op in ("advantages", "token_loss", "token_logprobs"):
            monkeypatch.setattr(module, op, work)


GOOD_REWARDS = {"rewards": torch.zeros(2, 4), "num_constraints": torch.tensor([1, 3])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(4)}, r"rewards must be of shape \(P, G\); got shape \(4,\)"),
        ({"rewards": torch.zeros(2, 4, dtype=torch.long)}, "rewards must be floating point; got torch.int64"),
        ({"rewards": torch.zeros(2, 3)}, r"rewards must be \(P, G\) with G = num_generations = 4; got G = 3"),
        ({"rewards": torch.tensor([[0, 1, math.nan, 0]] * 2)}, "rewards must be finite .*; got NaN or infinity"),
        ({"rewards": torch.tensor([[0, 1, math.inf, 0]] * 2)}, "rewards must be finite"),
        ({"num_constraints": torch.tensor([1])}, r"num_constraints must be of shape \(2,\); got shape \(1,\)"),
        ({"num_constraints": torch.tensor([1, 0])}, r"num_constraints must be at least 1; got \[1, 0\]"),
        ({"valid": torch.ones(2, 3, dtype=torch.bool)}, r"valid must be of shape \(2, 4\); got shape \(2, 3\)"),
        ({"valid": torch.ones(2, 4)}, "valid must be bool; got torch.float32"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_advantages_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        mdpgrpo_fast.advantages(config=MDPGRPOConfig(num_generations=4), **{**GOOD_REWARDS, **change})


@pytest.mark.usefixtures("no_work")
def test_half_a_group_is_refused() -> None:
    """Statistics over part of a group are wrong: a group cannot be split over two calls."""
    with pytest.raises(ValueError, match=r"rewards must be .* num_generations = 8; got G = 4"):
        mdpgrpo_fast.advantages(torch.zeros(4, 4), torch.ones(4), MDPGRPOConfig())


LOSS_REFUSALS = [
    ("logits", lambda x: x[0, 0], r"of shape \(B, L, V\), or .*; got shape \(11,\)"),
    ("logits", lambda x: x.long(), "floating point; got torch.int64"),
    ("tokens", lambda x: x[:, 1:], r"of shape \(4, 5\); got shape \(4, 4\)"),
    ("tokens", lambda x: x.float(), "int32 or int64; got torch.float32"),
    ("tokens", lambda x: x - 1, r"in \[0, 11\); got range -1 to"),
    ("tokens", lambda x: x + 11, r"in \[0, 11\); got range 11 to"),
    ("temperature", lambda x: torch.ones(3), r"of shape \(4,\) or \(4, 5\); got shape \(3,\)"),
    ("temperature", lambda x: torch.tensor([1.0, 0.0, 1.0, 1.0]), r"above 0 in every row; got \[1.0, 0.0"),
    ("temperature", lambda x: 0.0, "above 0; got 0.0"),
    ("temperature", lambda x: math.nan, "above 0; got nan"),
    ("softcap", lambda x: 0.0, "above 0, or None; got 0.0"),
]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        *LOSS_REFUSALS,
        ("mask", lambda x: x[:, 0], r"of shape \(4, 5\); got shape \(4,\)"),
        ("advantage", lambda x: x[:, None], r"of shape \(4,\) or \(4, 5\); got shape \(4, 1\)"),
        ("kl_beta", lambda x: x[:2], r"of shape \(4,\) or \(4, 5\); got shape \(2,\)"),
        ("old_logprobs", lambda x: x[:, :4], r"of shape \(4, 5\); got shape \(4, 4\)"),
        ("ref_logprobs", lambda x: x[0], r"of shape \(4, 5\); got shape \(5,\)"),
        ("importance_weight", lambda x: torch.ones(4), r"of shape \(4, 5\); got shape \(4,\)"),
        ("max_completion_length", lambda x: 0, "at least 1; got 0"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_token_loss_refuses(name: str, change: Callable[[Any], Any], message: str) -> None:
    batch = make_inputs()
    names = ("logits", "tokens", "mask", "advantage", "kl_beta")
    arguments = {**dict(zip(names, batch, strict=True)), **batch.kwargs}
    arguments[name] = change(arguments.get(name))
    with pytest.raises(ValueError, match=f"^{name} must be {message}"):
        mdpgrpo_fast.token_loss(config=config_for(), **arguments)


@pytest.mark.parametrize(("name", "change", "message"), LOSS_REFUSALS)
@pytest.mark.usefixtures("no_work")
def test_token_logprobs_refuses(name: str, change: Callable[[Any], Any], message: str) -> None:
    batch = make_inputs()
    arguments = {"logits": batch.logits, "tokens": batch.tokens}
    arguments[name] = change(arguments.get(name))
    with pytest.raises(ValueError, match=f"^{name} must be {message}"):
        mdpgrpo_fast.token_logprobs(**arguments)


@pytest.mark.usefixtures("no_work")
def test_corrected_needs_its_weight() -> None:
    """An option that a code path would not consume raises."""
    with pytest.raises(ConfigError, match="importance_weight is required by temperature_objective = corrected"):
        batch = make_inputs()
        mdpgrpo_fast.token_loss(*list(batch)[:3], config_for(temperature_objective="corrected"), **batch.given())


def test_unknown_backend_is_an_error_and_not_a_fallback() -> None:
    batch = make_inputs()
    for call in (
        lambda: mdpgrpo_fast.token_logprobs(batch.logits, batch.tokens, backend="torhc"),
        lambda: mdpgrpo_fast.token_loss(*list(batch)[:3], config_for(), backend="torhc", **batch.given()),
        lambda: mdpgrpo_fast.advantages(torch.zeros(1, 2), torch.ones(1), config_for(), backend="torhc"),
    ):
        with pytest.raises(ConfigError, match="unknown backend 'torhc'; did you mean 'torch'"):
            call()
    auto, named = (
        mdpgrpo_fast.token_loss(*list(batch)[:3], config_for(), backend=b, **batch.given()).loss
        for b in ("auto", "torch")
    )
    assert torch.equal(auto, named)


def test_inputs_are_left_alone() -> None:
    batch = make_inputs()
    before = [x.clone() for x in (*batch, *batch.kwargs.values())]
    run(batch, config_for())
    rewards, valid = torch.tensor([[0.0, math.nan]]), torch.tensor([[True, False]])
    mdpgrpo_fast.advantages(rewards, torch.tensor([2]), config_for(), valid=valid)
    assert all(torch.equal(a, b) for a, b in zip(before, (*batch, *batch.kwargs.values()), strict=True))
    assert rewards[0, 1].isnan()


# ---- TRL ------------------------------------------------------------------------------------------------------------


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

    def compute(batch: LossInputs, tau: float = 1.0, weight: Any = None, **knobs: Any) -> Any:
        logits = batch.logits.detach().requires_grad_()
        logps, entropy = trl.utils.selective_log_softmax_and_entropy(logits, batch.tokens, temperature=tau)
        t = trl_trainer
        monkeypatch.setattr(t, "_get_per_token_logps_and_entropies", lambda *a, **k: (logps, entropy.detach(), None))
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


def equal_beta(batch: LossInputs, beta: float = 0.1) -> LossInputs:
    """TRL and Liger have one KL coefficient for all."""
    batch.kl_beta = torch.full_like(batch.kl_beta, beta)
    return batch


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


def test_trl_bias_corrected_kl(trl_loss: Callable[..., Any]) -> None:
    """By design: TRL 1.16's default multiplies the KL by the ratio, the method does not: β KL (ρ - 1) a token."""
    batch = equal_beta(make_inputs(35))
    loss, grad, _ = trl_loss(batch, loss_type="grpo", use_bias_correction_kl=True)
    batch.logits.requires_grad_()
    out = mdpgrpo_fast.token_loss(*list(batch)[:3], config_for(), **batch.given())
    at, _ = mdpgrpo_fast.token_logprobs(batch.logits, batch.tokens)
    gap = batch.kwargs["ref_logprobs"] - at
    ratio = (at - batch.kwargs["old_logprobs"]).exp()
    extra = 0.1 * (gap.exp() - gap - 1) * (ratio - 1) * batch.mask
    loss_with = out.loss + (extra.sum(1) / batch.mask.sum(1)).mean()
    assert loss_with.item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss_with, batch.logits)[0], grad, rtol=1e-10, atol=1e-13)


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


# ---- Liger ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def head() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(40)
    return torch.randn(4, 5, 16, generator=g), torch.randn(37, 16, generator=g) * 0.7


@pytest.fixture
def liger(peer: Callable[[str], Any], head: tuple[torch.Tensor, torch.Tensor]) -> Callable[..., Any]:
    """`LigerFusedLinearGRPOLoss` of some rows: (loss, gradient of hidden, gradient of the head's weight)."""
    fused = peer("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss

    def compute(batch: LossInputs, rows: Any = slice(None), weight: Any = None, items: Any = None, **knobs: Any) -> Any:
        hidden, matrix = (x.clone().requires_grad_() for x in (head[0][rows], head[1]))
        batch = batch.rows(rows)
        loss_fn = fused(compiled=False, max_completion_length=MAX_LENGTH, epsilon_low=0.2, epsilon_high=0.2, **knobs)
        loss, _ = loss_fn(
            hidden,
            matrix,
            batch.tokens,
            batch.mask.float(),
            batch.advantage,
            ref_per_token_logps=batch.kwargs.get("ref_logprobs"),
            old_per_token_logps=batch.kwargs.get("old_logprobs"),
            vllm_is_ratio=None if weight is None else weight[rows],
            num_items_in_batch=items,
        )
        return loss, *torch.autograd.grad(loss, (hidden, matrix))

    return compute


def head_inputs(head: tuple[torch.Tensor, torch.Tensor], tau: Any = 1.0) -> LossInputs:
    """A batch whose old and reference log-probs are near those of hidden @ weight.T at τ."""
    hidden, weight = head
    batch, noise = make_inputs(41, vocab=37, dtype="float32"), make_inputs(42, scale=0.1).logits
    at, _ = mdpgrpo_fast.token_logprobs(hidden @ weight.T, batch.tokens, temperature=tau)
    batch.kwargs = {"old_logprobs": at + 2 * noise[..., 0].float(), "ref_logprobs": at + 4 * noise[..., 1].float()}
    return equal_beta(batch)


def run_head(head: tuple[torch.Tensor, torch.Tensor], batch: LossInputs, config: MDPGRPOConfig, **more: Any) -> Any:
    """Our loss and its gradients, through logits; from the head it is the same."""
    hidden, weight = (x.clone().requires_grad_() for x in head)
    rest = {"max_completion_length": MAX_LENGTH, **batch.given(), **more}
    out = mdpgrpo_fast.token_loss(hidden @ weight.T, batch.tokens, batch.mask, config, **rest)
    found = out.loss, *torch.autograd.grad(out.loss, (hidden, weight))
    fused = linear_token_loss(hidden, weight, batch.tokens, batch.mask, config, workspace_bytes=4 * 37 * 6, **rest)
    assert_same((fused.loss, *torch.autograd.grad(fused.loss, (hidden, weight))), found)
    return found


def assert_same(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("delta", [None, 1.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_liger_chunked_loss(head: Any, liger: Any, aggregation: Any, level: Any, delta: float | None) -> None:
    for tau in (1.0, 0.6):
        batch = head_inputs(head, tau)
        theirs = liger(
            batch, loss_type=aggregation, importance_sampling_level=level, temperature=tau, beta=0.1, delta=delta
        )
        config = config_for(
            aggregation=aggregation,
            importance_level=level,
            delta=delta,
            kl_temperature=tau,
            temperature_objective="per_row",
        )
        assert_same(run_head(head, batch, config, temperature=tau), theirs)


def test_liger_importance_weight_multiplies_the_policy_term_only(head: Any, liger: Any) -> None:
    batch, weight = head_inputs(head), torch.linspace(0.2, 2, 20).view(4, 5)
    theirs = liger(batch, weight=weight, loss_type="grpo", beta=0.1)
    assert_same(run_head(head, batch, config_for(), importance_weight=weight), theirs)


def test_liger_rows_of_two_temperatures_and_two_coefficients(head: Any, liger: Any) -> None:
    """Liger has one temperature and one β a call: one call of ours is the sum of its calls per temperature and sign."""
    taus = torch.tensor([0.5, 0.5, 1.0, 1.0])
    batch = head_inputs(head, taus)
    betas = batch.kl_beta = torch.where(batch.advantage < 0, 0.25, 0.1)
    tokens = batch.mask.sum()
    loss, d_hidden, d_weight = torch.zeros(()), torch.zeros_like(head[0]), torch.zeros_like(head[1])
    for i in range(4):
        # In Liger both policy and KL are at the row's temperature; ours has one temperature for the KL of all rows.
        only = batch.rows(slice(None))
        del only.kwargs["ref_logprobs"]
        row = slice(i, i + 1)
        at = {"loss_type": "dapo", "items": tokens, "temperature": taus[i].item()}
        part = liger(only, row, beta=0.0, use_ref_model=False, **at)
        kl = batch.rows(slice(None))
        kl.advantage = torch.zeros(4)
        extra = liger(kl, row, beta=betas[i].item(), **{**at, "temperature": 1.0})
        loss += part[0] + extra[0]
        d_hidden[row] += part[1] + extra[1]
        d_weight += part[2] + extra[2]
    config = config_for(aggregation="dapo", temperature_objective="per_row")
    assert_same(run_head(head, batch, config, temperature=taus), (loss, d_hidden, d_weight))


@pytest.mark.parametrize(("aggregation", "factor"), [("grpo", 3 / 4), ("dr_grpo", 3 / 4), ("dapo", 1), ("bnpo", 1)])
def test_liger_counts_empty_completions(head: Any, liger: Any, aggregation: Any, factor: float) -> None:
    """By design, as with TRL: the normaliser follows the mask."""
    batch = head_inputs(head)
    batch.mask[2] = False
    loss, d_hidden, _ = liger(batch, loss_type=aggregation, beta=0.1)
    ours, ours_hidden, _ = run_head(head, batch, config_for(aggregation=aggregation))
    assert_same((ours * factor, ours_hidden * factor), (loss, d_hidden))


TRITON_CASES: list[dict[str, Any]] = [
    {"aggregation": "grpo", "importance_level": "token", "tau": 0.7, "delta": None},
    {"aggregation": "dapo", "importance_level": "sequence", "tau": 1.0, "delta": 1.3},
]
TRITON_SCRIPT = """
import json, sys, torch
from liger_kernel.transformers.grpo_loss import triton_grpo_loss
from helpers.inputs import make_inputs
from tests.ops.test_ops import TRITON_CASES, equal_beta
for case in TRITON_CASES:
    batch = equal_beta(make_inputs(43, dtype="float32", vocab=37))
    x = torch.cat([batch.logits, torch.zeros(4, 1, 37)], 1).requires_grad_()
    loss, _ = triton_grpo_loss(
        x, batch.kwargs["old_logprobs"], batch.kwargs["ref_logprobs"], batch.tokens, batch.advantage,
        batch.mask.long(), temperature=case["tau"], beta=0.1, eps_low=0.2, eps_high=0.2, inplace=False,
        loss_type=case["aggregation"], importance_sampling_level=case["importance_level"], reduce=True,
        delta=case["delta"])
    loss.backward()
    print("RESULT", json.dumps([loss.item(), x.grad[:, :-1].tolist()]))
"""


def test_liger_triton_loss(peer: Callable[[str], Any]) -> None:
    """Liger's kernel on logits, in Triton's interpreter, which has to be chosen before Triton is imported."""
    peer("liger_kernel")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", TRITON_SCRIPT], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    for case, (loss, grad) in zip(TRITON_CASES, results, strict=True):
        config = config_for(
            aggregation=case["aggregation"],
            importance_level=case["importance_level"],
            delta=case["delta"],
            kl_temperature=case["tau"],
            temperature_objective="per_row",
        )
        out, ours = run(equal_beta(make_inputs(43, dtype="float32", vocab=37)), config, temperature=case["tau"])
        assert out.loss.item() == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(ours, torch.tensor(grad), rtol=1e-4, atol=1e-6)
