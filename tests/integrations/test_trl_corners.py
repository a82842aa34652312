"""Inside TRL, what is rare: adapters of other kinds, images, NaN of a sampler, advantages of tokens, bad arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.inputs import needed
from helpers.trl import arguments, assert_same_log, logged, make_trainer, ours, plain, trl

pytestmark = pytest.mark.filterwarnings("ignore")


def method(path: str, tmp: Path, **given: Any) -> Any:
    return make_trainer(ours.MDPGRPOTrainer, ours.MDPGRPOConfig, path, tmp, **{"num_constraints": 3, **given})


def generation(trainer: Any) -> dict[str, Any]:
    """Of two prompts, with 4 completions of each."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [{"prompt": p} for p in ("the wind", "one two three four") for _ in range(4)]
    return trainer._generate_and_score_completions(rows)  # type: ignore[no-any-return]


def test_dropout_of_an_adapter_does_not_forbid_packing(model_dirs: dict[str, str], tmp_path: Path) -> None:
    lora = needed("peft").LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.3, init_lora_weights=False)
    trainer = ours.accelerate_trl(plain(model_dirs["llama"], tmp_path, lora=lora), packing="on")
    dropouts = [m for n, m in trainer.model.named_modules() if "lora_dropout.default" in n]
    assert dropouts and all(m.training for m in dropouts)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_learning_trains_as_in_trl_without_packing(
    model_dirs: dict[str, str], tmp_path: Path, kind: str
) -> None:
    given = {
        "lora": getattr(needed("peft"), kind)(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "learning_rate": 1e-1, "gradient_checkpointing": False, "max_steps": 2,
    }  # fmt: skip
    theirs = logged(plain(model_dirs["llama"], tmp_path, **given))
    trainer = ours.accelerate_trl(plain(model_dirs["llama"], tmp_path, **given), packing="auto")
    assert trainer.packer is None
    assert_same_log(logged(trainer), theirs)
    with pytest.raises(ValueError, match="packing = on cannot be had for this model: peft puts something"):
        ours.accelerate_trl(plain(model_dirs["llama"], tmp_path, **given), packing="on")


def test_the_reference_of_prompt_learning_is_at_the_kls_temperature(model_dirs: dict[str, str], tmp_path: Path) -> None:
    prompt = needed("peft").PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer = method(
        model_dirs["llama"], tmp_path, lora=prompt, temperature_objective="per_row", kl_temperature=0.5, packing="off"
    )
    own, found = trainer.logprob_temperatures, []
    trainer.logprob_temperatures = lambda model: found.append(own(model)) or found[-1]
    generation(trainer)
    assert found == [[0.5]]


def test_experts_that_only_tell_their_routes_are_not_packed(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, router_aux_loss_coef=0.0, output_router_logits=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    trainer = ours.accelerate_trl(plain(str(tmp_path / "moe"), tmp_path), packing="auto")
    assert trainer.packer is None


# ---- a sampler's log-probs ------------------------------------------------------------------------------------------


def sampled_elsewhere(trainer: Any, drift: float, unscored: bool) -> Any:
    """What the trainer samples is taken for vLLM's; log-probs are off by up to 2 drifts, or NaN here and there."""

    class Elsewhere(type(trainer)):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: Any, *others: Any, **more: Any) -> Any:
            self.use_vllm = False
            found, _ = super()._generate_single_turn(prompt_ids, *others, **more)
            self.use_vllm = True
            logprobs: list[list[float | None]] = []
            for row, (prompt, ids) in enumerate(zip(prompt_ids, found, strict=True)):
                tau = 1.0 if getattr(self, "_taus", None) is None else self._taus[row].item()
                with torch.no_grad():
                    logits = self.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / tau
                each = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
                logprobs.append([x + drift * ((row + i) % 5 - 2) for i, x in enumerate(each)])
                if unscored and row % 2 == 0 and len(ids) > 1:
                    logprobs[-1][1] = None
            return found, logprobs

    trainer.__class__, trainer.use_vllm, trainer.vllm_mode = Elsewhere, True, "colocate"
    return trainer


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize("correction", [False, True])
def test_tokens_that_vllm_has_not_scored(
    model_dirs: dict[str, str], tmp_path: Path, correction: bool, packing: str
) -> None:
    """They say nothing of how far off-policy a completion is; the others do."""
    given = {
        "off_policy_mask_threshold": 0.05, "vllm_importance_sampling_correction": correction, "loss_type": "grpo",
        "vllm_importance_sampling_mode": "token_truncate", "max_steps": 2, "learning_rate": 1e-4,
    }  # fmt: skip
    theirs = logged(sampled_elsewhere(plain(model_dirs["llama"], tmp_path, **given), 0.3, True))
    trainer = ours.accelerate_trl(
        sampled_elsewhere(plain(model_dirs["llama"], tmp_path, **given), 0.3, True), packing=packing
    )
    assert_same_log(logged(trainer), theirs)


@pytest.mark.parametrize("objective", ["paper", "per_row"])
def test_the_off_policy_mask_sees_the_sampler_and_not_its_temperature(
    model_dirs: dict[str, str], tmp_path: Path, objective: str
) -> None:
    for drift in (0.0, 0.2):
        trainer = method(
            model_dirs["llama"], tmp_path, temperature_objective=objective, off_policy_mask_threshold=0.1,
            vllm_importance_sampling_mode="token_truncate",
        )  # fmt: skip
        batch = generation(sampled_elsewhere(trainer, drift, False))
        gap = batch["sampling_per_token_logps"] - batch["old_per_token_logps"]
        rows, places = batch["completion_mask"].nonzero(as_tuple=True)
        expected = drift * ((rows + places) % 5 - 2)
        torch.testing.assert_close(gap[rows, places], expected.float(), rtol=0, atol=2e-4)


def test_an_off_policy_mask_that_only_sees_temperatures_is_refused(tmp_path: Path) -> None:
    given = {**arguments(tmp_path), "use_vllm": True, "off_policy_mask_threshold": 0.1}
    with pytest.raises(ValueError, match="temperature_objective must be per_row, or vllm_importance_sampling_corr"):
        ours.MDPGRPOConfig(**given, vllm_importance_sampling_correction=False)
    ours.MDPGRPOConfig(**given)
    ours.MDPGRPOConfig(**given, vllm_importance_sampling_correction=False, temperature_objective="per_row")


# ---- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_entropy_is_of_completions_that_are_not_left_out(
    model_dirs: dict[str, str], tmp_path: Path, adaptive: bool
) -> None:
    """Where it steers a bonus none is left out."""

    def half(prompts: list[str], **_: Any) -> list[float]:
        return [0.5 if p == prompts[0] else i / 8 for i, p in enumerate(prompts)]

    def run(skip_idle: bool) -> Any:
        given = {"entropy_coef": 0.01, "use_adaptive_entropy": adaptive, "entropy_target": 2.0} if adaptive else {}
        trainer = plain(model_dirs["llama"], tmp_path, beta=0.0, max_steps=1, num_iterations=1, **given)
        trainer.reward_funcs[0] = half
        ours.accelerate_trl(trainer, skip_idle=skip_idle)
        rows: list[Any] = []
        prepare = trainer._prepare_inputs
        trainer._prepare_inputs = lambda batch: rows.append(prepare(batch)) or rows[-1]
        (log,) = logged(trainer)
        return log, rows

    (whole, _), (part, rows) = run(False), run(True)
    assert any(bool((row["advantages"] == 0).any()) for row in rows)
    if adaptive:
        assert part["entropy"] == pytest.approx(whole["entropy"], abs=1e-5)
        assert part["entropy_coef"] == whole["entropy_coef"] < 0.01
    else:
        # As near as other completions are, and not as if those that are left out were certain.
        assert part["entropy"] > 0.8 * whole["entropy"]


@pytest.mark.parametrize(
    "given",
    [
        {"loss_type": "vespo"}, {"importance_sampling_level": "sequence", "learning_rate": 1e-2}, {"delta": 1.05},
        {"off_policy_mask_threshold": 1e-3},
    ],
    ids=["vespo", "sequence", "delta below the clip bound", "off-policy mask"],
)  # fmt: skip
@pytest.mark.parametrize("packing", ["off", "on"])
def test_advantages_of_tokens(model_dirs: dict[str, str], tmp_path: Path, given: dict[str, Any], packing: str) -> None:
    """(B, T), which TRL takes from subclasses."""

    class OfTokens(trl.GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batch = super()._generate_and_score_completions(inputs)
            slope = torch.linspace(0.5, -1.5, batch["completion_ids"].shape[1])
            batch["advantages"] = batch["advantages"][:, None] * slope
            return batch

    def make() -> Any:
        given_all = {"beta": 0.1, "num_iterations": 2, "max_steps": 2, **given}
        return make_trainer(OfTokens, trl.GRPOConfig, model_dirs["llama"], tmp_path, **given_all)

    theirs = logged(make())
    assert_same_log(logged(ours.accelerate_trl(make(), packing=packing)), theirs, tolerance=1e-4)


# ---- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [False, True])
def test_images_stay_with_their_completions_and_are_not_packed(
    model_dirs: dict[str, str], tmp_path: Path, grid: bool
) -> None:
    """Of a number of images that differs from one completion to the next."""
    trainer = method(model_dirs["llama"], tmp_path, packing="auto")
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    own = trainer._generate_and_score_completions

    def with_images(rows: Any) -> Any:
        batch = own(rows)
        counts = [1 + i % 2 for i in range(len(rows))]
        owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
        batch |= {"num_images": counts, "pixel_values": owner[:, None].float(), "row": torch.arange(len(rows))}
        if grid:
            batch["pixel_values"] = batch["pixel_values"].repeat_interleave(2, 0)
            batch["image_grid_thw"] = torch.tensor([[1, 1, 2]] * len(owner))
        return batch

    trainer._generate_and_score_completions = with_images
    rows = [{"prompt": p} for p in ("the wind", "one two three four") for _ in range(4)]
    trainer._prepare_inputs(rows)
    assert len(trainer._buffered_inputs) == 2
    for part in trainer._buffered_inputs:
        assert part["num_images"] == [1 + i % 2 for i in part["row"].tolist()]
        pixels = part["num_images"] if not grid else [2 * n for n in part["num_images"]]
        assert torch.equal(part["pixel_values"][:, 0].long(), part["row"].repeat_interleave(torch.tensor(pixels)))
    trainer.kernel_options = trainer.kernel_options._replace(packing="on")
    trainer._step = 0
    with pytest.raises(ValueError, match="packing must be auto or off for prompts with images"):
        trainer._prepare_inputs(rows)


def test_every_image_argument_of_trl_is_handed_on() -> None:
    from mdpgrpo_fast.integrations.trl.fused import IMAGES

    assert {"pixel_values", "num_images", "image_position_ids"} <= {*IMAGES}
    assert not {*IMAGES} & {"self", "model", "input_ids", "compute_entropy", "compute_aux_loss"}


# ---- the end of a run, and data -------------------------------------------------------------------------------------


def test_a_run_that_was_at_its_end_has_not_failed_to_learn(model_dirs: dict[str, str], tmp_path: Path) -> None:
    given = {"save_strategy": "steps", "save_steps": 8, "max_steps": -1, "num_train_epochs": 1}
    first = method(model_dirs["llama"], tmp_path, **given)
    first.train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    again = method(model_dirs["llama"], tmp_path, **given)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert first.has_learned is True and again.has_learned is None


def test_the_reward_names_the_columns_that_it_needs() -> None:
    with pytest.raises(ValueError, match="train_dataset must have the columns instruction_id_list and kwargs"):
        ours.constraint_reward(prompts=["a"], completions=["b"], completion_ids=[[1]])
