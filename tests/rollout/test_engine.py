"""The choice of an engine by the knobs of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mdpgrpo_fast.config import ConfigError, TrainConfig, preset
from mdpgrpo_fast.rewards import RewardError
from mdpgrpo_fast.rollout import engine
from mdpgrpo_fast.rollout.engine import raise_on_all_ranks
from mdpgrpo_fast.rollout.vllm.completion import Completion, RestartedError, RolloutError


def test_make_engine_by_the_knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(engine, "VLLMServer", lambda url, **knobs: made.update(url=url, **knobs) or "server")
    monkeypatch.setattr(engine, "VLLMEngine", lambda model, **knobs: made.update(model=model, **knobs) or "engine")
    acc: Any = type("Acc", (), {"device": torch.device("cpu"), "process_index": 3})()
    method = preset("exact")
    assert engine.make_engine(TrainConfig(), method, 512, acc) is None
    assert (
        engine.make_engine(TrainConfig(rollout="vllm", vllm_url="http://x", vllm_retries=2), method, 512, acc)
        == "server"
    )
    assert made["url"] == "http://x" and made["retries"] == 2 and made["timeout"] == 600
    run = TrainConfig(rollout="vllm", model="m", max_prompt_length=100, max_completion_length=50)
    assert engine.make_engine(run, method, 512, acc) == engine.make_engine(run, method, None, acc) == "engine"
    assert made["model"] == "m" and made["seed"] == 45 and made["sleep_mode"] is True and made["max_model_len"] == 150
    assert engine.make_engine(run, method, 120, acc) == "engine" and made["max_model_len"] == 120
    assert not {"trust_remote_code", "tokenizer"} & made.keys() and made["dtype"] == "float32"
    engine.make_engine(replace(run, mixed_precision="bf16"), method, 120, acc)
    assert made["dtype"] == "bfloat16", "that of a pass"
    run = TrainConfig(rollout="vllm", model="m", trust_remote_code=True, tokenizer="t")
    assert engine.make_engine(run, method, 512, acc) == "engine"
    assert made["trust_remote_code"] is True and made["tokenizer"] == "t"
    monkeypatch.setattr(engine, "base_model", lambda path: f"base of {path}")
    assert engine.make_engine(run, method, 512, acc) == "engine" and made["model"] == "base of m"
    with pytest.raises(ConfigError, match=r"temperatures must be at least 0.01 \(vLLM's floor\); got 0.005"):
        engine.make_engine(run, preset("exact", temperatures=[0.005, 1.0]), 512, acc)


@pytest.mark.parametrize("own", [RolloutError("b"), None], ids=["one of its own", "none"])
def test_ranks_raise_a_problem_of_one_class(own: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank's; another class would lead to other collective calls."""
    theirs = [(RewardError, "a", "its traceback"), (RolloutError, "b", None)]
    monkeypatch.setattr("mdpgrpo_fast.rollout.engine.gather_object", lambda said: theirs)
    with pytest.raises(RewardError, match=r"^a$") as caught:
        raise_on_all_ranks(None, own)  # type: ignore[arg-type]
    assert caught.value.trace == "its traceback"
    monkeypatch.setattr("mdpgrpo_fast.rollout.engine.gather_object", lambda said: [None, None])
    raise_on_all_ranks(None, None)  # type: ignore[arg-type]


def test_a_rank_keeps_its_own_completions_where_another_failed_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = [(RestartedError, "a", None), (RolloutError, "b", None)]
    monkeypatch.setattr("mdpgrpo_fast.rollout.engine.gather_object", lambda said: theirs)
    own = RolloutError("b", [Completion([1], [-1.0], True)])
    with pytest.raises(RolloutError, match=r"^b$") as caught:
        raise_on_all_ranks(None, own)  # type: ignore[arg-type]
    assert caught.value.partial == own.partial
