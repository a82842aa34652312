"""Rewards by name: what can be loaded, and what one is told where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.data import Example
from mdpgrpo_fast.rewards import Scorer, load_reward


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "lengths",
            "must be 'constraints', module:function, or the directory or hub id of a reward model; got 'lengths'",
        ),
        ("no_such_module_here:f", "cannot be loaded: ModuleNotFoundError: No module named"),
        ("helpers.rewards:missing", "cannot be loaded: .*missing"),
        ("helpers.rewards:NOT_A_FUNCTION", "is not a function"),
        ("helpers.rewards:Unpicklable", "cannot be loaded: TypeError"),
    ],
)
def test_bad_reward_names(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward(spec)


def test_an_async_function_cannot_be_isolated() -> None:
    with pytest.raises(ConfigError, match="is async"):
        Scorer(["helpers.rewards:slow_length"], isolation="process")


def test_a_reward_model_scores_in_this_process(
    model_dirs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(model_dirs["llama"], num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(model_dirs["llama"])
    path = tmp_path / "judge"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    with Scorer([str(path)]) as scorer:
        assert scorer.names == ["judge"]
        first, second = scorer([Example("write about "), Example("tell of ")], ["the sea", "the wind and the rain"])
    ids = tokenizer("tell of the wind and the rain", add_special_tokens=False, return_tensors="pt")
    model.config.pad_token_id = tokenizer.pad_token_id
    assert second.total == pytest.approx(model.eval()(**ids).logits[0, 0].item(), abs=1e-5)
    assert first.total != second.total
    with pytest.raises(ConfigError, match=r"reward model .* has no trained head: score.weight is not in its files"):
        Scorer([model_dirs["llama"]])
    with pytest.raises(ConfigError, match=r"reward model .*/nothing.* cannot be loaded"):
        Scorer([str(tmp_path / "nothing")])
    weights = load_file(path / "model.safetensors")
    save_file(
        {k: x for k, x in weights.items() if "layers.0.mlp" not in k}, path / "model.safetensors", {"format": "pt"}
    )
    said = (
        r"is not whole: model.layers.0.mlp.down_proj.weight, .*gate_proj.weight, .*up_proj.weight is not in its files"
    )
    with pytest.raises(ConfigError, match=said):
        Scorer([str(path)])
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    config = json.loads((path / "config.json").read_text())
    auto_map = {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M"}
    (path / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto_map}))
    with pytest.raises(ConfigError, match=r"reward model .* cannot be loaded: .*trust_remote_code"):
        Scorer([str(path)])
    assert not asked, "nothing is asked on stdin"
