"""Loading: what cannot be loaded says why in one line, and no part of a model is lost in silence."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers.inputs import make_model, make_tokenizer
from helpers.runs import run_small

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.demo import SEED_POLICY
from mdpgrpo_fast.log import reason_of
from mdpgrpo_fast.models.heads import find_head, other_parts
from mdpgrpo_fast.models.load import load

VOCAB = 300
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 256, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
IDS = torch.arange(3, 11)[None]


def gemma3() -> Any:
    """Loaded whole by transformers; its vision tower has layers of the names of its text layers."""
    images = {"mm_tokens_per_image": 4, "image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297}
    config = tf.Gemma3Config(text_config=TEXT | {"sliding_window": 8}, vision_config=VISION, **images)
    return tf.Gemma3ForConditionalGeneration(config)


def qwen3_5() -> Any:
    """Its text part alone is loaded by transformers."""
    linear = {
        f"linear_{n}": 2 if "num" in n else 8
        for n in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    }
    text = TEXT | linear | {"layer_types": ["linear_attention", "full_attention"]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
              "num_position_embeddings": 16, "patch_size": 8}  # fmt: skip
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: VOCAB - 1 - i for i, name in enumerate(names)}
    return tf.Qwen3_5ForConditionalGeneration(tf.Qwen3_5Config(text_config=text, vision_config=vision, **ids))


def llama4() -> Any:
    """The same, its text part under another prefix, with routers that are linear layers by their class."""
    experts = {"intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 8}
    vision = VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    config = tf.Llama4Config(text_config=TEXT | experts | {"interleave_moe_layer_step": 1}, vision_config=vision)
    return tf.Llama4ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Directories of composite models by their families."""
    made: dict[str, str] = {}

    def folder(family: str) -> str:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            torch.manual_seed(3)
            {"gemma3": gemma3, "qwen3_5": qwen3_5, "llama4": llama4}[family]().save_pretrained(path)
            make_tokenizer().save_pretrained(path)
            made[family] = str(path)
        return made[family]

    return folder


def stored(folder: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def train(tmp_path: Path, model: str, **knobs: Any) -> Any:
    data = tmp_path / "p.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"number {i}"}) for i in range(4)) + "\n")
    more = {"reward": ["helpers.rewards:vowels"], "max_prompt_length": 64, "prompts_per_step": 1, "save_model": True}
    more["cpu_linear"] = "torch"  # as the models that it is compared with to the bit
    return run_small(tmp_path, **{"model": model, "train_file": str(data), "steps": 1, **more, **knobs})


# ---- composite models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_5", "llama4"])
def test_a_part_that_a_save_would_lose_is_named(family: str, composite: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"other parts than text \(vision\).*text_only \(--text-only\) trains") as e:
        load(composite(family))
    assert "\n" not in str(e.value)
    whole = logits(load(composite(family), text_only=None)[0].eval())
    assert torch.equal(logits(load(composite(family), text_only=True)[0].eval()), whole), "evaluation loses nothing"
    trainer = train(tmp_path, composite(family), text_only=True)
    saved, _ = load(str(trainer.out.path / "model"))
    assert torch.equal(logits(saved.eval()), logits(trainer.lm)) and not torch.equal(logits(saved), whole)
    assert not any("vision" in name for name in stored(trainer.out.path / "model"))


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_parts_that_are_loaded_too_survive_the_save(
    with_lora: bool, composite: Any, tmp_path: Path, peer: Callable[[str], Any]
) -> None:
    if with_lora:
        peer("peft")
    trainer = train(tmp_path, composite("gemma3"), lora=with_lora, save_every=1, learning_rate=1e-2, weight_decay=0.1)
    before, after = stored(composite("gemma3")), stored(trainer.out.path / "model")
    assert before.keys() == after.keys()
    changed = {n for n, x in before.items() if not torch.equal(x, after[n])}
    vision = {n for n in before if "vision_tower" in n or "multi_modal_projector" in n}
    assert len(vision) > 10 and changed and not changed & vision
    if with_lora:
        assert not any("vision_tower" in n for n, p in trainer.lm.named_parameters() if p.requires_grad)
    saved = tf.AutoModelForCausalLM.from_pretrained(trainer.out.path / "model").eval()
    torch.testing.assert_close(logits(saved), logits(trainer.lm), rtol=1e-4, atol=1e-4)
    folder = str(trainer.out.path / "checkpoints" / "checkpoint_1")
    checkpoint, _ = load(folder)
    torch.testing.assert_close(logits(checkpoint.eval()), logits(trainer.lm), rtol=1e-4, atol=1e-4)
    if with_lora:
        adapted, _ = load(folder, keep_adapter=True)
        assert not any("vision_tower" in n for n, p in adapted.named_parameters() if p.requires_grad)


def test_the_text_part_of_one_that_is_loaded_whole(composite: Any, tmp_path: Path) -> None:
    """transformers itself would draw its weights at random."""
    whole, _ = load(composite("gemma3"))
    assert other_parts(whole) == ["model.vision_tower", "model.multi_modal_projector"]
    trained = {n for n, p in whole.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in whole.named_parameters() if "vision" not in n and "multi_modal" not in n}
    text, _ = load(composite("gemma3"), text_only=True)
    assert type(text) is tf.Gemma3ForCausalLM and not other_parts(text)
    assert torch.equal(logits(text), logits(whole.eval()))
    text.save_pretrained(tmp_path)
    again, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(text) and not any(info.values()) and torch.equal(logits(again), logits(text))
    assert len(stored(tmp_path)) == sum(
        "vision" not in n and "multi_modal" not in n for n in stored(composite("gemma3"))
    )


def test_llama4_trains(composite: Any, tmp_path: Path, peer: Callable[[str], Any]) -> None:
    peer("peft")
    model, _ = load(composite("llama4"), text_only=True)
    assert find_head(model.eval()).body is model.model
    trainer = train(tmp_path, composite("llama4"), text_only=True, lora=True)
    adapted = {n.split(".")[-4] for n, p in trainer.lm.named_parameters() if p.requires_grad}
    assert {"q_proj", "o_proj"} <= adapted and "router" not in adapted
    assert trainer.done == 1


# ---- errors ---------------------------------------------------------------------------------------------------------


def edit(folder: Path, name: str = "config.json", **changed: Any) -> None:
    settings = {**json.loads((folder / name).read_text()), **changed}
    (folder / name).write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def as_classifier(folder: Path) -> None:
    config = make_model("llama", VOCAB).config
    tf.LlamaForSequenceClassification(config).save_pretrained(folder)


def as_vision_model(folder: Path) -> None:
    config = tf.ViTConfig(**VISION)
    tf.ViTModel(config).save_pretrained(folder)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "model .*: Unrecognized model in .* have a `model_type`"),
    "unknown type": (lambda f: edit(f, model_type="llamax"), "has model type `llamax` but Transformers does not"),
    "half a config": (lambda f: (f / "config.json").write_text("{"), "model .* is not a valid JSON file"),
    "odd value": (lambda f: edit(f, hidden_size="wide"), "model .* cannot be loaded: .*hidden_size"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model .* no file named model.safetensors"),
    "corrupt weights": (lambda f: (f / "model.safetensors").write_bytes(b"nonsense" * 9), "header too large"),
    "half the weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:9999]),
        "deserializing header: incomplete metadata",
    ),
    "other shapes": (lambda f: edit(f, intermediate_size=16), r"must have shape \(.*16.*\) by its config.json; got"),
    "classifier": (as_classifier, "as a LlamaForCausalLM it needs 1 more weights .* first of them lm_head.weight"),
    "vision model": (as_vision_model, "Unrecognized configuration class .*ViTConfig.*AutoModelForCausalLM"),
    "own code": (
        lambda f: edit(f, model_type="mine", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}),
        r"brings Python code along, which trust_remote_code \(--trust-remote-code\) lets run",
    ),
    "no tokenizer": (no_tokenizer, r"tokenizer of model .*\(tokenizer names another\): .*You need to have"),
    "odd tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer of .* KeyError: 'added_tokens'"),
    "tokenizer of own code": (
        lambda f: edit(f, "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["t.T", None]}),
        r"tokenizer of model .* trust_remote_code \(--trust-remote-code\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BROKEN))
def test_one_line_says_why(case: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("llama", VOCAB).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load(str(tmp_path))
    spoil, said = BROKEN[case]
    spoil(tmp_path)

    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "n")
    with pytest.raises(ConfigError, match=said) as e:
        load(str(tmp_path))
    assert "\n" not in str(e.value) and len(str(e.value)) < 300 + 3 * len(str(tmp_path))
    assert not asked, "nothing is asked on stdin"


def test_random_weights_are_allowed_by_name(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    as_classifier(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"first of them lm_head.weight \(--allow-random-weights trains it with random"
    ):
        load(str(tmp_path))
    assert logits(load(str(tmp_path), allow_random=True)[0]).isfinite().all()
    assert "1 weights are random, which the files lack: lm_head.weight" in caplog.text


def test_a_run_directory_names_its_model(tmp_path: Path) -> None:
    make_model("llama", VOCAB).save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(ConfigError, match=r"it is a run directory; its model is '.*run/model'$"):
        load(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"path": "nobody/nothing-here"}, "model 'nobody/nothing-here' cannot be loaded: We couldn't connect to"),
        ({"path": "/no/such/model"}, "model '/no/such/model' cannot be loaded: there is no such directory"),
        ({"path": "./nothing"}, "cannot be loaded: there is no such directory"),
        ({"path": None, "tokenizer": "/no/tokenizer"}, "^tokenizer '/no/tokenizer' cannot be loaded: there is no such"),
        ({"path": None, "attention": "fast"}, "cannot be loaded with attention = fast: .*attn_implementation"),
    ],
)
def test_what_is_not_there_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as e:
        load(**given)
    assert "\n" not in str(e.value) and "of: " not in str(e.value)[-5:]


def test_code_that_is_trusted_runs(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "cache")])
    folder = tmp_path / "own"
    make_model("llama", VOCAB).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig):\n    model_type = 'own'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
    )
    edit(folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    model, _ = load(str(folder), trust_remote_code=True)
    assert type(model).__name__ == "M" and "own" in type(model).__module__
    assert torch.equal(logits(model), logits(make_model("llama", VOCAB)))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("no file\n\nmore on that"), "no file more on that"),
        (ValueError("one of:\n (1) a\n (2) b\nYou need   c."), r"one of: \(1\) a \(2\) b You need c\."),
        (ValueError("a " * 300 + "\nlast"), r"(a )+a … .*"),
        (ValueError("why it is\n" + "b " * 300), "why it is"),
        (ValueError("one of:\n" + "b " * 300 + "\nYou need c."), r"one of: (b )+b … (b )+You need c\."),
        (ValueError("x" * 900), "x+ …"),
        (
            ValueError(f"should be one of {', '.join(f'C{i}' for i in range(99))}."),
            r"should be one of \(a long list\)\.",
        ),
        (KeyError("name"), "KeyError: 'name'"),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError(" \n "), "RuntimeError"),
    ],
)
def test_reasons_are_one_line(error: Exception, said: str) -> None:
    found = reason_of(error)
    assert re.fullmatch(said, found) and len(found) <= 300, found


class _Executed:
    """What writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("files", [("pytorch_model.bin",), ("adapter_config.json", "adapter_model.bin")])
def test_weights_that_are_a_pickle_are_never_executed(tmp_path: Path, files: tuple[str, ...]) -> None:
    place, executed = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(SEED_POLICY, place)
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(SEED_POLICY), "r": 8, "target_modules": ["q_proj"]}
    for name in files:
        data = json.dumps(settings).encode() if name.endswith(".json") else pickle.dumps({"a": _Executed(executed)})
        (place / name).write_bytes(data)
    (place / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*Weights only load failed") as e:
        load(str(place))
    assert "\n" not in str(e.value) and not executed.exists()


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "null", '{"a": ' + "9" * 5000 + "}", '"\\ud800"'])
def test_an_adapter_config_from_anywhere_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(
        ConfigError, match=r"adapter_config\.json of .* (cannot be read: |must hold an object; got )"
    ) as e:
        load(str(tmp_path))
    assert "\n" not in str(e.value)
