"""accelerate_trl trains as TRL does, on our kernels: every loss type and option, every metric."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.inputs import make_model, needed
from helpers.trl import assert_same_log, logged, make_trainer, ours, plain, reward, trl

from mdpgrpo_fast.integrations.trl.head import declared_shape, shape_of

pytestmark = pytest.mark.filterwarnings("ignore")
LEVELS = ("token", "sequence")
TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def same(path: str, tmp: Path, kernels: dict[str, Any] | None = None, tolerance: float = 1e-5, **given: Any) -> Any:
    """Both logs, compared: the same seed, sampling, steps."""
    theirs = logged(plain(path, tmp, **given))
    trainer = ours.accelerate_trl(plain(path, tmp, **given), **(kernels or {}))
    mine = logged(trainer)
    assert_same_log(mine, theirs, tolerance)
    return trainer, mine


@pytest.mark.parametrize(
    "level", [level if level == "token" else pytest.param(level, marks=pytest.mark.long) for level in LEVELS]
)
@pytest.mark.parametrize("loss_type", TYPES)
def test_ten_steps_of_every_loss_type(model_dirs: dict[str, str], tmp_path: Path, loss_type: str, level: str) -> None:
    correct = not (loss_type == "vespo" and level == "sequence")  # which is refused: see below
    # A gradient of norm 32 at the second step of vespo spreads what steps differ by in rounding.
    _, log = same(
        model_dirs["llama"], tmp_path, loss_type=loss_type, importance_sampling_level=level, max_steps=10,
        use_bias_correction_kl=correct, tolerance=5e-5 if loss_type == "vespo" else 1e-5,
    )  # fmt: skip
    assert len(log) == 10 and any(abs(row["loss"]) > 1e-4 for row in log) and log[-1]["kl"] > 0


OPTIONS: dict[str, dict[str, Any]] = {
    "on-policy": {"beta": 0.0, "num_iterations": 1},
    "delta": {"delta": 1.3},
    "bonus": {"entropy_coef": 0.1, "loss_type": "grpo"},
    "bonus of dapo": {"entropy_coef": 0.1},
    "adaptive bonus": {
        "use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 2.6, "entropy_coef_delta": 0.05,
    },
    "quantile": {"top_entropy_quantile": 0.4},
    "quantile and bonus": {"top_entropy_quantile": 0.4, "entropy_coef": 0.1, "loss_type": "grpo"},
    "off-policy mask": {"off_policy_mask_threshold": 0.001},
    "temperature": {"temperature": 0.7, "loss_type": "dr_grpo"},
    "truncated masked": {"mask_truncated_completions": True, "max_completion_length": 6},
    "several updates": {"steps_per_generation": 4, "num_iterations": 1},
    "reward scaled by batch": {"scale_rewards": "batch"},
    "cispo, bound": {"loss_type": "cispo", "epsilon_high": 1.5},
    "clip": {"epsilon": 0.01, "epsilon_high": 0.02, "learning_rate": 1e-2},
    "head in float32": {
        "cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}, "gradient_checkpointing": False,
    },
}  # fmt: skip


PACKED = ("on-policy", "quantile and bonus", "off-policy mask", "truncated masked", "several updates")


@pytest.mark.parametrize(("name", "packing"), [*((n, "off") for n in OPTIONS), *((n, "on") for n in PACKED)])
def test_every_option(model_dirs: dict[str, str], tmp_path: Path, name: str, packing: str) -> None:
    tolerance = 1e-4 if name == "clip" else 1e-5
    trainer, log = same(model_dirs["llama"], tmp_path, {"packing": packing}, tolerance, **OPTIONS[name])
    assert (trainer.packer is not None) == (packing == "on")
    if name == "clip":
        assert any(row["clip_ratio/region_mean"] > 0 for row in log)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen2"])
def test_other_models(model_dirs: dict[str, str], tmp_path: Path, family: str) -> None:
    """A soft-cap, a head with a bias in its body's style, and attention with biases."""
    _, log = same(model_dirs[family], tmp_path, max_steps=2)
    assert log[1]["kl"] > 0 and all(row["grad_norm"] > 0 for row in log)


def test_a_mixture_of_experts(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    path = tmp_path / "moe"
    MixtralForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    trainer, log = same(str(path), tmp_path, {"packing": "auto"}, max_steps=2)
    assert log[0]["aux_loss"] > 0 and trainer.packer is None
    with pytest.raises(ValueError, match="packing = on cannot be had for this model: the load-balancing loss"):
        ours.accelerate_trl(plain(str(path), tmp_path), packing="on")


@pytest.mark.parametrize("packing", ["off", "on"])
def test_lora(model_dirs: dict[str, str], tmp_path: Path, packing: str) -> None:
    lora = needed("peft").LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer, log = same(model_dirs["llama"], tmp_path, {"packing": packing}, lora=lora)
    assert (trainer.packer is not None) == (packing == "on") and log[-1]["kl"] > 0


def test_first_step_under_bfloat16_autocast(model_dirs: dict[str, str], tmp_path: Path) -> None:
    """TRL rounds logits to bfloat16, ours keeps a row's statistics in float32: near, and no further apart than that."""
    _, log = same(model_dirs["llama"], tmp_path, tolerance=5e-2, bf16=True, max_steps=1, num_iterations=1)
    assert log[0]["grad_norm"] > 0


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize("level", LEVELS)
def test_tokens_of_a_tool_do_not_count(model_dirs: dict[str, str], tmp_path: Path, level: str, packing: str) -> None:
    """They are seen by the model, and are in no loss, ratio or statistic; nor is a completion of a tool's alone."""
    losses, gradients, metrics = [], [], []
    for kernels in (False, True):
        trainer = plain(model_dirs["llama"], tmp_path, importance_sampling_level=level, loss_type="grpo")
        if kernels:
            ours.accelerate_trl(trainer, packing=packing)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer._generate_and_score_completions([{"prompt": p} for p in ("the sea", "wind") for _ in range(4)])
        tools = torch.ones_like(batch["completion_mask"])
        tools[0], tools[1, 0], tools[2:4, 2:4], tools[5, -2:] = 0, 0, 0, 0
        batch.pop("host_facts", None)  # which are of the masks before
        loss = trainer._compute_loss(trainer.model, {**batch, "tool_mask": tools})
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in trainer.model.parameters()])
        metrics.append({name: values[-1] for name, values in trainer._metrics["train"].items()})
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
    for name in ("kl", "entropy", "clip_ratio/region_mean"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], abs=1e-6)


@pytest.mark.parametrize("packing", ["off", "on"])
def test_log_probs_in_chunks_with_a_temperature_a_row(model_dirs: dict[str, str], tmp_path: Path, packing: str) -> None:
    """The rows of each chunk have their own; where nothing of a chunk can be packed it is padded."""
    trainer = ours.accelerate_trl(plain(model_dirs["llama"], tmp_path), packing=packing)
    batch = trainer._generate_and_score_completions([{"prompt": p} for p in ("the sea", "wind") for _ in range(4)])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].shape[1]
    attention[2:4, -width:] = 0  # completions that were cut off, a whole chunk of them
    taus = torch.tensor([0.5, 1.0, 0.7, 1.3, 0.9, 0.6, 1.1, 0.8])
    trainer.logprob_temperatures = lambda model: [taus]
    with torch.no_grad():
        found, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, width, batch_size=2, compute_entropy=True
        )
        logits = trainer.model(
            input_ids=ids, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0)
        ).logits
    logits = logits[:, -width - 1 : -1] / taus[:, None, None]
    mask, expected = attention[:, -width:], logits.log_softmax(-1)
    own = expected.gather(2, batch["completion_ids"][..., None])[..., 0] * mask
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1) * mask, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packing", ["off", "on"])
def test_clips_of_sequences(model_dirs: dict[str, str], tmp_path: Path, packing: str) -> None:
    _, log = same(
        model_dirs["llama"], tmp_path, {"packing": packing}, tolerance=1e-4, importance_sampling_level="sequence",
        epsilon=0.001, epsilon_high=0.001, learning_rate=1e-2,
    )  # fmt: skip
    assert any(row["clip_ratio/low_mean"] > 0 for row in log) and any(row["clip_ratio/high_max"] > 0 for row in log)


def test_skip_idle_changes_entropy_alone(model_dirs: dict[str, str], tmp_path: Path) -> None:
    theirs = logged(plain(model_dirs["llama"], tmp_path, beta=0.0))
    trainer = ours.accelerate_trl(plain(model_dirs["llama"], tmp_path, beta=0.0), skip_idle=True)
    mine = logged(trainer)
    for row in (*mine, *theirs):
        del row["entropy"]
    assert_same_log(mine, theirs)


def test_a_loss_of_ones_own_stays(model_dirs: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of such a trainer only the log-probs are ours, with their gradient."""

    class Own(trl.GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return 2 * super()._compute_loss(model, inputs)

    def make() -> Any:
        return make_trainer(Own, trl.GRPOConfig, model_dirs["llama"], tmp_path, beta=0.1, num_iterations=2)

    theirs, trainer = logged(make()), ours.accelerate_trl(make())
    assert isinstance(trainer, Own) and "Own._compute_loss is its own" in caplog.text
    assert_same_log(logged(trainer), theirs)


def test_what_cannot_be_had_is_refused(model_dirs: dict[str, str], tmp_path: Path) -> None:
    class Own(trl.GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    with pytest.raises(ValueError, match="trainer must have TRL's log-probs; Own"):
        ours.accelerate_trl(make_trainer(Own, trl.GRPOConfig, model_dirs["llama"], tmp_path))
    with pytest.raises(TypeError, match="trainer must be a GRPOTrainer of TRL; got dict"):
        ours.accelerate_trl({})
    given = {"loss_type": "vespo", "importance_sampling_level": "sequence", "use_bias_correction_kl": True}
    trainer = plain(model_dirs["llama"], tmp_path, **given)
    with pytest.raises(ValueError, match="importance_sampling_level must be token for loss_type = vespo"):
        ours.accelerate_trl(trainer)
    with pytest.raises(ValueError, match=r"loss_type must be one of grpo, .*; got 'reinforce'"):
        ours.accelerate_trl(plain(model_dirs["llama"], tmp_path, loss_type="reinforce"))
    with pytest.raises(ValueError, match="has them already"):
        ours.accelerate_trl(ours.accelerate_trl(plain(model_dirs["llama"], tmp_path)))
    with pytest.raises(ValueError, match="packing must be auto, on or off; got 'often'"):
        ours.accelerate_trl(plain(model_dirs["llama"], tmp_path), packing="often")
    with pytest.raises(ValueError, match="backend"):
        ours.accelerate_trl(plain(model_dirs["llama"], tmp_path), backend="gpu")
    with pytest.raises(ValueError, match="backend 'cuda' cannot run"):
        ours.accelerate_trl(plain(model_dirs["llama"], tmp_path), backend="cuda")
    with pytest.raises(ValueError, match="skip_idle"):
        ours.accelerate_trl(plain(model_dirs["llama"], tmp_path), skip_idle="no")


def test_a_head_that_is_not_linear_is_refused_and_nothing_changes(model_dirs: dict[str, str], tmp_path: Path) -> None:
    trainer = plain(model_dirs["llama"], tmp_path)
    kind, forward = type(trainer), trainer.model.forward
    trainer.model.lm_head.register_forward_hook(lambda module, args, out: out.clamp(max=0.01))
    with pytest.raises(ValueError, match="model cannot be trained through the fused head: it does more"):
        ours.accelerate_trl(trainer)
    assert type(trainer) is kind and trainer.model.forward == forward
    trainer.model.lm_head.register_forward_hook(lambda module, args, out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ours.accelerate_trl(trainer)
    assert type(trainer) is kind and trainer.model.forward == forward


def test_generation_and_other_calls_of_the_model_are_as_before(model_dirs: dict[str, str], tmp_path: Path) -> None:
    trainer = plain(model_dirs["llama"], tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    before = trainer.model(input_ids=ids, labels=ids)
    fused = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
    ours.accelerate_trl(trainer)
    after = trainer.model(input_ids=ids, labels=ids)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert torch.equal(fused.log_probs, trainer.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs)
    trainer.model.generate(ids, max_new_tokens=2, do_sample=False)  # which validates its arguments by the signature


@pytest.mark.parametrize(
    ("family", "members"),
    [("gemma2", {}), ("llama", {}), ("granite", {"logits_scaling": 4.0}), ("cohere", {"logit_scale": 0.25})],
)
def test_what_a_config_declares_is_what_a_trial_finds(family: str, members: dict[str, float]) -> None:
    """Under ZeRO-3 a model cannot be tried."""
    if family in ("gemma2", "llama"):
        model = make_model(family, 40)
    else:
        import transformers

        name = family.capitalize()
        config = getattr(transformers, f"{name}Config")(
            vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **members,
        )  # fmt: skip
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    assert declared_shape(model) == shape_of(model)


def test_versions_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    from mdpgrpo_fast.integrations.trl import versions

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    cases = itertools.chain([(lambda name: "1.15.2", "found 1.15.2"), (missing, "needs the package trl")])
    for version, message in cases:
        monkeypatch.setattr(importlib.metadata, "version", version)
        with pytest.raises(ImportError, match=message) as caught:
            versions.check()
        assert "pip install 'mdpgrpo-fast[trl]'" in str(caught.value)
    monkeypatch.undo()
    versions.check()
    monkeypatch.setattr(versions, "EXTENDED", (*versions.EXTENDED, "_gone"))
    with pytest.raises(ImportError, match="its GRPOTrainer has no _gone"):
        versions.check()


def test_reward_of_the_helper_has_levels() -> None:
    with warnings.catch_warnings():
        assert len(set(reward(["a", "a b", "a b c", "ab"]))) > 2
