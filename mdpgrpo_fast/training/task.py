"""A run's model, tokenizer and prompts, loaded and checked before any training starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..config import ConfigError, TrainConfig
from ..data import Example, read_prompts, tokenize
from ..demo import DEMO_DIR
from ..models.load import load, prompt_limit
from ..models.lora import add_adapters
from ..rollout.generate import eos_ids
from .run_dir import check_trackers


@dataclass
class Task:
    """A model and the prompts it is trained and scored on, checked."""

    model: Any
    tokenizer: Any
    eos: list[int]
    train: list[Example]
    train_ids: list[list[int]]
    held_out: list[Example]
    held_out_ids: list[list[int]]


def prepare(run: TrainConfig) -> Task:
    """Everything that can be wrong with the input is found here. Raises ConfigError."""
    check_trackers(run.report_to)
    if run.mixed_precision == "fp16" and (run.cpu or not torch.cuda.is_available()):
        raise ConfigError("mixed_precision fp16 needs a GPU; bf16 works on the CPU too")
    embedded = run.model is None
    if run.train_file is None and not embedded:
        raise ConfigError("train_file is required with a model of your own")
    train = read_prompts(run.train_file or DEMO_DIR / "train.jsonl", run.rules)
    held_out: list[Example] = []
    if run.eval_file or (embedded and run.train_file is None):
        held_out = read_prompts(run.eval_file or DEMO_DIR / "heldout.jsonl", run.rules)[: run.eval_samples or None]
    model, tokenizer = load(run.model, run.dtype, run.attention)
    eos = eos_ids(model, tokenizer)
    longest = prompt_limit(model, run.max_prompt_length, run.max_completion_length)
    train_ids, held_out_ids = tokenize(train, tokenizer, longest), tokenize(held_out, tokenizer, longest)
    if run.lora:
        torch.manual_seed(run.seed)  # adapters start at random, and the same on every rank
        # Without dropout, which would make the ratio differ from 1 on-policy.
        model = add_adapters(
            model, r=run.lora_r, alpha=run.lora_alpha, dropout=0.0, target_modules=run.lora_target_modules
        )
    return Task(model, tokenizer, eos, train, train_ids, held_out, held_out_ids)
