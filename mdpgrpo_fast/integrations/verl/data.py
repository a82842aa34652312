"""Prompts with constraints as the parquet files that verl reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config import ConfigError, PromptConfig
from ...config.extras import needs_package
from ...data import read_prompts
from .method import NAME

DATA_SOURCE = "mdpgrpo_fast"


def write_parquet(files: Mapping[Path, tuple[str, Any]], config: PromptConfig | None = None) -> dict[Path, int]:
    """Writes prompts as parquet files of verl, all or none; returns how many each has.

    files: of each path what it is for, "train" or "val", and what `read_prompts` takes. Columns: data_source; prompt,
    chat messages; ability; reward_model, with a ground_truth of instruction_id_list and kwargs as JSON text, for
    `reward.compute_score`; extra_info, with split and index; agent_name, `mdp_grpo` for train, else verl's single turn.

    Raises: ConfigError as `read_prompts`, for a prompt without constraints or one that begins the answer, which verl
    would end, for a file that is there, without pyarrow.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(f"{next(iter(files))} {needs_package('pyarrow')}") from None
    for path in files:
        if path.exists():
            raise ConfigError(f"{path} is there already; give another folder, or move it")
    tables = {path: pa.Table.from_pylist(_rows(source, split, config)) for path, (split, source) in files.items()}
    for path, table in tables.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        pq.write_table(table, partial)
        partial.rename(path)
    return {path: len(table) for path, table in tables.items()}


def _rows(source: Any, split: str, config: PromptConfig | None) -> list[dict[str, Any]]:
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
    return rows
