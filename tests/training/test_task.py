"""Models and prompts that are in memory, and a callback that ends a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.inputs import make_model, make_tokenizer
from helpers.prompts import GOOD
from helpers.runs import SMALL, make_trainer, rows
from transformers import AutoModelForCausalLM

from mdpgrpo_fast.config import ConfigError, PromptConfig, TrainConfig, preset
from mdpgrpo_fast.data import read_prompts
from mdpgrpo_fast.rewards import Scorer
from mdpgrpo_fast.training.loop import TrainingLoop
from mdpgrpo_fast.training.run_dir import RunDir
from mdpgrpo_fast.training.task import prepare

TEXTS = [f"number {i}" for i in range(4)]
SHORT = {**SMALL, "max_prompt_length": 64, "prompts_per_step": 1}


def small() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    return make_model("llama", len(tokenizer)), tokenizer


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_rows_in_memory_are_read_as_those_of_a_file() -> None:
    messages = [{"role": "user", "content": "Say hi."}]
    got = read_prompts(["Say hi.", GOOD, messages, {"prompt": "Say hi.", "answer": 3}])
    assert [e.prompt for e in got.examples] == ["Say hi.", "Say hi.", messages, "Say hi."]
    assert [e.where for e in got.examples] == [f"prompts row {i}" for i in range(1, 5)]
    assert got.examples[1].instruction_ids == ["punctuation:no_comma"] and got.examples[3].columns["answer"] == 3
    assert read_prompts(("one" for _ in range(1)), PromptConfig(prompt_column="text")).examples[0].columns == {
        "text": "one"
    }


def test_data_sets_and_tables_in_memory(peer: Any) -> None:
    datasets, pandas = peer("datasets"), peer("pandas")
    table = {"prompt": ["a", "b"], "answer": [1, 2]}
    whole = datasets.Dataset.from_dict(table)
    for source in (whole, whole.with_format("torch"), pandas.DataFrame(table), datasets.DatasetDict(train=whole)):
        assert [e.columns for e in read_prompts(source).examples] == whole.to_list(), type(source)
    several = datasets.DatasetDict(one=whole, two=whole.select([1]))
    assert len(read_prompts(several, PromptConfig(split="two")).examples) == 1
    with pytest.raises(ConfigError, match=r"data set 'prompts' has several splits .* it has one, two"):
        read_prompts(several)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "prompts must have at least one row; got none"),
        (7, "prompts must be a path, a hub id, a list of texts or rows, or a data set; got int"),
        ({"prompt": ["a"]}, "prompts must be a path, a hub id, a list of texts or rows, or a data set; got dict"),
        (["a", 3], "prompts row 2: a row must be a JSON object; got int"),
        (["a", ""], "prompts row 2: 'prompt' is empty"),
    ],
)
def test_rows_that_are_none_say_so(source: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        read_prompts(source)


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_a_model_in_memory_trains_in_place(tmp_path: Path, with_lora: bool, peer: Any) -> None:
    if with_lora:
        peer("peft")
    model, tokenizer = small()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = TrainConfig(**{**SHORT, "output_dir": str(tmp_path / "run"), "lora": with_lora, "learning_rate": 1e-2})
    AcceleratorState._reset_state(True)
    with Scorer(["helpers.rewards:vowels"], workers=1) as scorer:
        task = prepare(run, scorer, model=model, tokenizer=tokenizer, prompts=TEXTS, eval_prompts=TEXTS[:2])
        assert task.sources == {
            "model": "LlamaForCausalLM", "train_file": "rows in memory", "eval_file": "rows in memory"
        }  # fmt: skip
        loop = TrainingLoop(task, run, preset("exact", num_generations=4), RunDir(run.output_dir), scorer)
        loop.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    moved = [n for n, p in saved.named_parameters() if not torch.equal(p, before[n])]
    assert moved and task.held_out[0].where == "eval_prompts row 1"
    own = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if ".lora_" not in n}
    assert with_lora == all(torch.equal(p, before[n]) for n, p in own.items())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["model"] == "LlamaForCausalLM" and summary["reward_before"] is not None


def test_what_a_model_in_memory_comes_without_is_named(tmp_path: Path, model_dirs: dict[str, str], peer: Any) -> None:
    peer("peft")
    from mdpgrpo_fast.models.lora import add_adapters

    model, tokenizer = small()
    loaded = AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    assert prepare(TrainConfig(**SHORT), model=loaded, prompts=TEXTS).tokenizer.get_vocab() == tokenizer.get_vocab()
    adapted = add_adapters(small()[0], r=2, alpha=4, dropout=0.0, target_modules=["auto"])
    frozen = small()[0].requires_grad_(False)
    for given, knobs, said in (
        ({"model": model}, {}, "tokenizer must be given beside a loaded model that names no directory to take it from"),
        ({"model": 3}, {}, "model must be a directory, a hub id or a causal language model of transformers; got int"),
        ({"model": model, "tokenizer": tokenizer}, {"model": "x"}, "model must be given once: as 'x', or as it is"),
        ({"tokenizer": tokenizer}, {}, "a tokenizer that is loaded needs a model that is"),
        ({"model": adapted, "tokenizer": tokenizer}, {}, "lora must be on for a model with LoRA adapters"),
        ({"model": frozen, "tokenizer": tokenizer}, {}, "the model has no weight to train: requires_grad is off"),
        ({"model": model, "tokenizer": "/no/such"}, {}, "tokenizer '/no/such' cannot be loaded: there is no such"),
    ):
        with pytest.raises(ConfigError, match=said):
            prepare(TrainConfig(**SHORT, **knobs), prompts=TEXTS, **given)
    task = prepare(TrainConfig(**SHORT, lora=True), model=adapted, tokenizer=tokenizer, prompts=TEXTS)
    assert task.model is adapted, "its adapters are trained on"


def test_the_tokenizer_and_rows_in_memory_stay_as_they_are(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    model, tokenizer = small()
    given = [{"messages": [{"role": "user", "content": "hi"}], "answer": 1}]
    task = prepare(
        TrainConfig(**SHORT, chat_template=str(template), columns=["solution=answer"]), model=model,
        tokenizer=tokenizer, prompts=given,
    )  # fmt: skip
    assert task.tokenizer.chat_template and not tokenizer.chat_template
    assert given == [{"messages": [{"role": "user", "content": "hi"}], "answer": 1}]


# ---- a callback per step --------------------------------------------------------------------------------------------


def test_a_callback_sees_each_step_and_ends_the_run(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def on_step(row: dict[str, Any]) -> bool:
        seen.append(row)
        row["slots"].clear()
        return row["step"] == 2

    trainer = make_trainer(tmp_path, steps=5)
    trainer.on_step = on_step
    summary = trainer.train()
    assert [r["step"] for r in seen] == [1, 2] and summary["steps"] == 2 and not summary["interrupted"]
    assert summary["hsr_after"] is not None and (trainer.out.path / "model").exists()
    assert all(r["slots"] for r in trainer.history), "it gets a copy"
    assert [r["loss"] for r in rows(trainer)] == [r["loss"] for r in seen]
