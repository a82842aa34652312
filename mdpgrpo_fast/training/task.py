"""A run's model, tokenizer and prompts, loaded and checked before any training starts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..config import ConfigError, TrainConfig
from ..data import BadRow, Example, Prompts, read_prompts, tokenize
from ..demo import DEMO_DIR
from ..models.load import context_length, load
from ..models.lora import add_adapters
from ..rewards import Scorer
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
    notes: list[str] = field(default_factory=list)  # how prompts were read and rendered
    dropped: list[BadRow] = field(default_factory=list)  # rows left out, of both files


def prepare(run: TrainConfig, scorer: Scorer | None = None) -> Task:
    """Everything that can be wrong with the input is found here, rewards that fail before the model is loaded.

    Raises: ConfigError; RewardError where the scorer's rewards fail on two sample rows.
    """
    check_trackers(run.report_to)
    if run.mixed_precision == "fp16" and (run.cpu or not torch.cuda.is_available()):
        raise ConfigError("mixed_precision fp16 needs a GPU; bf16 works on the CPU too")
    embedded = run.model is None
    if run.train_file is None and not embedded:
        raise ConfigError("train_file is required with a model of your own")
    train = read_prompts(run.train_file or DEMO_DIR / "train.jsonl", run)
    held_out = Prompts([])
    if run.eval_file or (embedded and run.train_file is None):
        held_out = read_prompts(
            run.eval_file or DEMO_DIR / "heldout.jsonl", replace(run, split=run.eval_split or run.split)
        )  # fmt: skip
        held_out = replace(held_out, examples=held_out.examples[: run.eval_samples or None])
    if run.keep_best and not held_out.examples:
        raise ConfigError("keep_best needs held-out prompts (eval_file) to compare models by; got none")
    if scorer is not None:
        scorer.check(train.examples)
        scorer.check(held_out.examples)
        if run.reward_check:
            scorer.try_own_types([*train.examples, *held_out.examples])
            scorer.try_out(train.examples)
    model, tokenizer = load(
        run.model, run.dtype, run.attention, tokenizer=run.tokenizer, trust_remote_code=run.trust_remote_code,
        text_only=run.text_only, keep_adapter=run.lora and not run.merge_adapter,
    )  # fmt: skip
    eos = eos_ids(model, tokenizer)
    context = context_length(model)
    train, train_ids = tokenize(train, tokenizer, run, context=context, eos=eos)
    held_out, held_out_ids = tokenize(held_out, tokenizer, run, context=context, eos=eos)
    if run.lora and not getattr(model, "peft_config", None):
        torch.manual_seed(run.seed)  # adapters start at random, and the same on every rank
        # Without dropout, which would make the ratio differ from 1 on-policy.
        model = add_adapters(
            model, r=run.lora_r, alpha=run.lora_alpha, dropout=0.0, target_modules=run.lora_target_modules
        )
    notes = list(dict.fromkeys([*train.notes, *held_out.notes]))  # both files are rendered alike
    dropped = [*train.dropped, *held_out.dropped]
    return Task(model, tokenizer, eos, train.examples, train_ids, held_out.examples, held_out_ids, notes, dropped)
