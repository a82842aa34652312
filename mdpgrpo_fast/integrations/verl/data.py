"""Prompts with constraints as the parquet files that verl reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...config import ConfigError, PromptConfig
from ...config.extras import needs_package
from ...data import read_prompts
from .method import NAME

DATA_SOURCE = "mdpgrpo_fast"


def write_parquet(source: Any, path: str | Path, *, split: str, config: PromptConfig | None = None) -> int:
    """Writes the prompts that `read_prompts` finds as a parquet file of verl; returns how many.

    Columns: data_source; prompt, chat messages; ability; reward_model, with a ground_truth of instruction_id_list and
    kwargs as JSON text, for `reward.compute_score`; extra_info, with split and index; agent_name, `mdp_grpo` where
    split is train, else verl's single turn. path must not be there.

    Raises: ConfigError as `read_prompts`, for a prompt without constraints or one that begins the answer, which verl
    would end, for a file that is there, without pyarrow.
    """
    path = Path(path)
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(f"{path} {needs_package('pyarrow')}") from None
    if path.exists():
        raise ConfigError(f"{path} is there already; give another folder, or move it")
    rows = []
    for i, example in enumerate(read_prompts(source, config).examples):
        if not example.instruction_ids:
            raise ConfigError(f"{example.where or f'prompt {i}'} has no instruction_id_list: the reward would not know")
        if example.opening:
            raise ConfigError(f"{example.where or f'prompt {i}'} ends with the assistant's words, which verl would end")
        messages = [{"role": "user", "content": example.prompt}] if isinstance(example.prompt, str) else example.prompt
        truth = {"instruction_id_list": example.instruction_ids, "kwargs": example.kwargs}
        rows.append(
            {
                "data_source": DATA_SOURCE,
                "prompt": [{"role": m["role"], "content": m["content"] or ""} for m in messages],
                "ability": "instruction_following",
                "reward_model": {"style": "rule", "ground_truth": json.dumps(truth)},
                "extra_info": {"split": split, "index": i},
                "agent_name": NAME if split == "train" else "single_turn_agent",
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows), partial)
    partial.rename(path)
    return len(rows)
