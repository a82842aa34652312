"""LoRA adapter folders: trained on from where they are, merged, refused; their first values as the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.inputs import make_model
from helpers.runs import make_trainer, rows, run_small

import mdpgrpo_fast.train as train
from mdpgrpo_fast.config import ConfigError, TrainConfig
from mdpgrpo_fast.demo import SEED_POLICY
from mdpgrpo_fast.models import lora
from mdpgrpo_fast.models.adapters import (
    adapter_settings,
    adapter_values,
    adds_something,
    attach_adapter,
    resolve_adapter,
    with_adapter_values,
)
from mdpgrpo_fast.models.load import base_model, load

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True"),
]

TARGETS = {"llama": ["q_proj", "down_proj"], "gemma2": ["q_proj", "lm_head"], "gpt2": ["c_attn", "c_proj"]}
IDS = torch.arange(3, 11)[None]


@pytest.fixture(autouse=True)
def _peft(peer: Callable[[str], Any]) -> None:
    peer("peft")


def save_adapter(base: str, folder: Path, targets: list[str], seed: int = 2) -> Any:
    """A trained adapter over a model directory, in peft's form; the model that it makes."""
    model, _ = load(base)
    torch.manual_seed(seed)
    wrapped = lora.add_adapters(model.eval(), r=4, alpha=8, dropout=0.1, target_modules=targets)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    lora.save_adapters(wrapped, folder)
    return wrapped


def settings_of(folder: Path, **changed: Any) -> dict[str, Any]:
    """adapter_config.json, some of it changed."""
    file = folder / "adapter_config.json"
    settings = {**json.loads(file.read_text()), **changed}
    file.write_text(json.dumps(settings))
    return settings


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def seed_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Over the embedded seed policy."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(str(SEED_POLICY), folder, ["q_proj", "up_proj"])
    return folder


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(TARGETS))
def test_a_folder_is_merged_or_trained_on(family: str, model_dirs: dict[str, str], tmp_path: Path) -> None:
    wrapped = save_adapter(model_dirs[family], tmp_path / "a", TARGETS[family])
    merged, tokenizer = load(str(tmp_path / "a"))
    assert not getattr(merged, "peft_config", None) and all(p.requires_grad for p in merged.parameters())
    assert not any("lora" in n for n, _ in merged.named_modules()) and len(tokenizer) == 290
    torch.testing.assert_close(logits(merged.eval()), logits(wrapped), rtol=1e-4, atol=1e-4)
    again, _ = load(str(tmp_path / "a"), keep_adapter=True)
    assert torch.equal(logits(again), logits(wrapped)) and not again.training
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in again.named_parameters() if ".lora_" in n} and trained
    # A tied head that had an adapter of its own is saved apart from the embeddings.
    merged.save_pretrained(tmp_path / "m")
    plain = type(merged).from_pretrained(tmp_path / "m").eval()
    assert torch.equal(logits(plain), logits(merged))
    tied = family in ("gemma2", "gpt2") and "lm_head" not in TARGETS[family]
    assert plain.config.tie_word_embeddings == tied


def test_the_sum_is_that_of_the_export(model_dirs: dict[str, str], tmp_path: Path, tokenizer: Any) -> None:
    make_model("llama", 300).bfloat16().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    wrapped = save_adapter(str(tmp_path / "base"), tmp_path / "a", ["q_proj"])
    lora.save_merged(wrapped, tokenizer, tmp_path / "m")
    expected, found = load(str(tmp_path / "m"))[0].state_dict(), load(str(tmp_path / "a"))[0].state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(x, expected[n]) for n, x in found.items())
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    again, _ = load(str(tmp_path / "a"), keep_adapter=True)
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}


def test_an_adapter_over_an_adapter(model_dirs: dict[str, str], tmp_path: Path) -> None:
    """A new one over a merged one is saved as over that folder, and both come back."""
    first, second = tmp_path / "first", tmp_path / "second"
    save_adapter(model_dirs["llama"], first, ["q_proj"])
    wrapped = save_adapter(str(first), second, ["v_proj"], seed=3)
    assert json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"] == str(first)
    torch.testing.assert_close(logits(load(str(second))[0].eval()), logits(wrapped), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(load(str(second), keep_adapter=True)[0]), logits(wrapped))
    assert base_model(str(second)) == base_model(str(first)) == model_dirs["llama"]
    assert base_model(None) == str(SEED_POLICY)
    settings_of(first, base_model_name_or_path=str(second))
    with pytest.raises(ConfigError, match=r"base_model_name_or_path of the adapter .* leads back to itself"):
        load(str(second))


def test_the_tokenizer_is_the_adapters_own_where_it_has_one(
    model_dirs: dict[str, str], tmp_path: Path, tokenizer: Any
) -> None:
    save_adapter(model_dirs["llama"], tmp_path, ["q_proj"])
    assert load(str(tmp_path))[1].chat_template is None
    _, own = load(model_dirs["llama"])
    own.chat_template = "{{ messages }}"
    own.save_pretrained(tmp_path)
    assert load(str(tmp_path))[1].chat_template == "{{ messages }}"
    assert load(str(tmp_path), tokenizer=model_dirs["qwen2"])[1].chat_template is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"use_dora": True}, "adapter_config.json has use_dora"),
        ({"lora_bias": True}, "has lora_bias"),
        ({"bias": "all"}, "has bias = all"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"target_parameters": ["mlp.experts"]}, "has target_parameters"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights = pissa"),
        ({"loftq_config": {"bits": 4}}, "has loftq_config"),
        ({"peft_type": "IA3"}, "has peft_type = IA3, task_type = CAUSAL_LM"),
        ({"task_type": "SEQ_CLS"}, "has peft_type = LORA, task_type = SEQ_CLS"),
        ({"base_model_name_or_path": None}, "must name its base_model_name_or_path"),
        (
            {"base_model_name_or_path": "/gone"},
            "cannot be loaded: base_model_name_or_path '/gone' of its adapter_config.json: there is no such directory",
        ),
        ({"r": 8}, "adapter .* cannot be loaded: .*size mismatch"),
        ({"target_modules": ["nose"]}, "adapter .* cannot be loaded: Target modules .*not found"),
        ({"target_modules": ["q_proj", "v_proj"]}, "does not fit its model: it has 4 matrices .* takes 8"),
        ({"target_modules": ["v_proj"]}, "does not fit its model|size mismatch"),
        ({"layers_to_transform": [0]}, "does not fit its model: it has 4 matrices .* takes 2"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_an_adapter_of_another_kind_is_refused_in_one_line(
    changed: dict[str, Any], said: str, model_dirs: dict[str, str], tmp_path: Path
) -> None:
    save_adapter(model_dirs["llama"], tmp_path, ["q_proj"])
    load(str(tmp_path), keep_adapter=True)
    settings_of(tmp_path, **changed)
    with pytest.raises(ConfigError, match=said) as e:
        load(str(tmp_path), keep_adapter=True)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_other_harmless_settings_are_taken(model_dirs: dict[str, str], tmp_path: Path) -> None:
    wrapped = save_adapter(model_dirs["llama"], tmp_path, ["q_proj"])
    settings_of(tmp_path, use_rslora=True, init_lora_weights="gaussian", inference_mode=True, task_type=None)
    again, _ = load(str(tmp_path), keep_adapter=True)
    layer = again.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 4 and not torch.equal(logits(again), logits(wrapped))


# ---- the run's knobs ------------------------------------------------------------------------------------------------


def test_the_runs_lora_is_that_of_the_adapter(seed_adapter: Path, model_dirs: dict[str, str]) -> None:
    run = TrainConfig(model=str(seed_adapter))
    taken = resolve_adapter(run)
    assert taken == replace(run, lora=True, lora_r=4, lora_alpha=8.0, lora_target_modules=["q_proj", "up_proj"])
    assert resolve_adapter(taken) == taken, "a run's own config.yaml makes the same run"
    merged = replace(run, merge_adapter=True, lora_r=2)
    assert resolve_adapter(merged) == merged
    for model in (None, model_dirs["llama"], "no/where"):
        other = TrainConfig(model=model)
        assert resolve_adapter(other) == other
        with pytest.raises(ConfigError, match=r"merge_adapter needs a model that is a LoRA adapter; got"):
            resolve_adapter(replace(other, merge_adapter=True))
    with pytest.raises(ConfigError, match=r"lora_r must be that of the adapter .*, 4; got 8 \(merge_adapter"):
        resolve_adapter(replace(run, lora_r=8))
    assert adapter_settings(str(SEED_POLICY)) is None


# ---- training -------------------------------------------------------------------------------------------------------


def continued(tmp_path: Path, adapter: Path, **knobs: Any) -> Any:
    run = resolve_adapter(TrainConfig(model=str(adapter)))
    file = str(SEED_POLICY.parent / "train.jsonl")
    given = {n: getattr(run, n) for n in ("model", "lora", "lora_r", "lora_alpha", "lora_target_modules")}
    return {**given, "train_file": file, "learning_rate": 1e-2, "eval_samples": 0, "cpu_linear": "torch", **knobs}


def test_the_reference_is_the_adapter_that_the_run_began_with(tmp_path: Path, seed_adapter: Path) -> None:
    trainer = make_trainer(tmp_path, **continued(tmp_path, seed_adapter, steps=2))
    start = logits(trainer.lm)
    trainer.train()
    first, second = rows(trainer)
    assert first["kl"] == 0 < second["kl"] and trainer.reference.model is None
    moved = logits(trainer.lm)
    assert not torch.equal(moved, start)
    with with_adapter_values(trainer.model, trainer.reference.adapters):
        assert torch.equal(logits(trainer.lm), start)
    assert torch.equal(logits(trainer.lm), moved)
    with pytest.raises(KeyboardInterrupt), with_adapter_values(trainer.model, trainer.reference.adapters):
        raise KeyboardInterrupt
    assert torch.equal(logits(trainer.lm), moved)


def test_it_stays_the_reference_of_a_resumed_run(tmp_path: Path, seed_adapter: Path) -> None:
    knobs = continued(tmp_path, seed_adapter, steps=3, save_every=2)
    whole = run_small(tmp_path, name="whole", **knobs)
    expected = rows(whole)
    resumed = run_small(tmp_path, name="whole", resume=True, **knobs)
    assert resumed.reference.adapters.keys() == whole.reference.adapters.keys()
    assert all(torch.equal(x, whole.reference.adapters[n]) for n, x in resumed.reference.adapters.items())
    assert resumed.done == 3 and [r["kl"] for r in rows(resumed)] == [r["kl"] for r in expected]
    assert expected[0]["kl"] == 0 < expected[2]["kl"]
    assert torch.equal(logits(resumed.lm), logits(whole.lm))


def test_new_adapters_keep_no_copy(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lora=True, lora_r=2)
    assert trainer.reference.adapters is None and not adds_something(trainer.lm)
    assert adapter_values(trainer.model).keys() == {n for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_a_merged_adapter_is_a_full_model(tmp_path: Path, seed_adapter: Path) -> None:
    knobs = continued(tmp_path, seed_adapter, merge_adapter=True, lora=False, steps=1)
    trainer = make_trainer(tmp_path, **knobs)
    assert not hasattr(trainer.lm, "peft_config") and all(p.requires_grad for p in trainer.lm.parameters())
    expected = load(str(seed_adapter))[0].eval()
    assert torch.equal(logits(trainer.lm), logits(expected))
    trainer = make_trainer(tmp_path, **{**knobs, "lora": True})
    assert not adds_something(trainer.lm) and torch.equal(logits(trainer.lm), logits(expected))


def test_attaching_needs_a_model_that_fits(model_dirs: dict[str, str], tmp_path: Path) -> None:
    save_adapter(model_dirs["llama"], tmp_path, ["q_proj"])
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*not found in the base model"):
        attach_adapter(make_model("gpt2", 290), str(tmp_path))


def test_from_the_command_line(tmp_path: Path, seed_adapter: Path) -> None:
    out, file = tmp_path / "run", str(SEED_POLICY.parent / "train.jsonl")
    flags = ["--model", str(seed_adapter), "--train-file", file, "--steps", "1", "--prompts-per-step", "1"]
    flags += ["--max-completion-length", "6", "--output-dir", str(out), "--save-every", "1", "--log-completions", "0"]
    assert train.main(flags) == 0
    run = yaml.safe_load((out / "config.yaml").read_text())["run"]
    assert run["lora"] is True and run["lora_r"] == 4 and run["lora_target_modules"] == ["q_proj", "up_proj"]
    settings = json.loads((out / "checkpoints" / "checkpoint_1" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["base_model_name_or_path"] == str(SEED_POLICY)
    assert train.main([*flags, "--resume"]) == 0
    flags[1] = str(out / "checkpoints" / "checkpoint_1")  # which is an adapter folder too
    assert train.main([*flags, "--merge-adapter", "--output-dir", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "checkpoints" / "checkpoint_1" / "model.safetensors").exists()
