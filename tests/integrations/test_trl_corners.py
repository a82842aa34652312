"""Inside TRL, what is rare: adapters of other kinds, images, NaN of a sampler, advantages of tokens, bad arguments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.inputs import needed
from helpers.trl import make_trainer

trl = needed("trl")
ours = pytest.importorskip("mdpgrpo_fast.integrations.trl", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def plain(path: str, tmp: Path, **given: Any) -> Any:
    return make_trainer(trl.GRPOTrainer, trl.GRPOConfig, path, tmp, **{"beta": 0.1, "num_iterations": 2, **given})


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
