"""A run's model, tokenizer and prompts, loaded and checked before any training starts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..config import ConfigError, MDPGRPOConfig, TrainConfig
from ..data import BadRow, Example, Prompts, Source, read_prompts, tokenize
from ..demo import DEMO_DIR
from ..kernels import onednn
from ..models.blocks import enable_checkpointing
from ..models.load import adopt, context_length, load
from ..models.lora import add_adapters
from ..models.policy import Policy
from ..rewards import Scorer
from ..rollout.generate import eos_ids
from .before.checks import check_settings
from .checkpoint.data import fingerprint, weights_fingerprint
from .hub.repository import make_repository
from .show.quiet import quiet


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
    sources: dict[str, str | None] = field(default_factory=dict)  # where the model and the prompts come from, in words
    notes: list[str] = field(default_factory=list)  # how prompts were read and rendered
    dropped: list[BadRow] = field(default_factory=list)  # rows left out, of both files
    repo_id: str | None = None  # on the hub, where the first rank uploads the model to

    @cached_property
    def fingerprint(self) -> str:
        """Of the training prompts in their order, with all that rewards see of them: a run that goes on takes them by
        their numbers."""
        return fingerprint(self.train_ids, self.train)

    def fingerprints(self, run: TrainConfig, method: MDPGRPOConfig) -> dict[str, str]:
        """Of what a run learns from, by its names. Before the first step, on a model that is whole."""
        found = {"training prompts": self.fingerprint}
        found |= {"held-out prompts": fingerprint(self.held_out_ids, self.held_out)} if self.held_out else {}
        # Checkpoints have neither the model under adapters nor a reference that stays.
        if run.lora or (method.needs_reference and not run.sync_reference):
            found["weights of the starting model"] = weights_fingerprint(self.model)
        return found


@quiet()
def prepare(
    run: TrainConfig, scorer: Scorer | None = None, *, model: Any = None, tokenizer: Any = None,
    prompts: Source | None = None, eval_prompts: Source | None = None,
) -> Task:  # fmt: skip
    """Everything that can be wrong with the input is found here, rewards that fail before the model is loaded.

    model: a causal language model of transformers in place of run.model. It is trained in place: its weights change, it
    goes to the run's device and into eval() mode, and with run.lora its layers get adapters. It keeps its dtype.
    tokenizer: the model's; None: of the directory that the model was loaded from. It is copied.
    prompts, eval_prompts: in place of run.train_file and run.eval_file: a path, a hub id, a list of texts or rows, or
    a data set of the package datasets.

    Raises: ConfigError; RewardError where the scorer's rewards fail on two sample rows.
    """
    check_settings(run, model is not None, prompts is not None)
    for name, given, named in (("model", model, run.model), ("tokenizer", tokenizer, run.tokenizer)):
        if given is not None and named is not None:
            raise ConfigError(f"{name} must be given once: as {named!r}, or as it is loaded")
    if tokenizer is not None and model is None:
        raise ConfigError("a tokenizer that is loaded needs a model that is")
    train_source = run.train_file if prompts is None else prompts
    eval_source = run.eval_file if eval_prompts is None else eval_prompts
    if train_source is None:
        train_source = DEMO_DIR / "train.jsonl"
        eval_source = eval_source if eval_source is not None else DEMO_DIR / "heldout.jsonl"
    train = read_prompts(train_source, run)
    held_out = Prompts([])
    if eval_source is not None:
        held_out = read_prompts(eval_source, replace(run, split=run.eval_split or run.split), "eval_prompts")
        held_out = replace(held_out, examples=held_out.examples[: run.eval_samples or None])
    if run.keep_best and not held_out.examples:
        raise ConfigError("keep_best needs held-out prompts (eval_file) to compare models by; got none")
    if scorer is not None:
        scorer.check(train.examples)
        scorer.check(held_out.examples)
        if run.reward_check:
            scorer.try_own_types([*train.examples, *held_out.examples])
            scorer.try_out(train.examples)
    sources = {
        "model": run.model or (type(model).__name__ if model is not None else "embedded seed policy"),
        "train_file": _in_words(train_source), "eval_file": _in_words(eval_source),
    }  # fmt: skip
    repo_id = make_repository(run)  # now: a right that is missing would be found after the last step
    if model is None:
        model, tokenizer = load(
            run.model, run.dtype, run.attention, tokenizer=run.tokenizer, trust_remote_code=run.trust_remote_code,
            text_only=run.text_only, keep_adapter=run.lora and not run.merge_adapter,
            allow_random=run.allow_random_weights,
        )  # fmt: skip
    else:
        model, tokenizer = adopt(
            model, tokenizer or run.tokenizer, run.attention, trust_remote_code=run.trust_remote_code,
            text_only=run.text_only, keep_adapter=run.lora,
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
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("the model has no weight to train: requires_grad is off for all of them")
    notes = list(dict.fromkeys([*train.notes, *held_out.notes]))  # both files are rendered alike
    if repo_id is not None:
        notes.append(f"after the last step the model goes to {repo_id} on the hub (--push-to-hub)")
    dropped = [*train.dropped, *held_out.dropped]
    return Task(
        model, tokenizer, eos, train.examples, train_ids, held_out.examples, held_out_ids, sources, notes, dropped,
        repo_id,
    )  # fmt: skip


def make_policy(model: Any, run: TrainConfig, device: torch.device) -> Policy:
    """The model and its objective as the run's settings have them."""
    # Never in training mode: dropout would make the ratio differ from 1 on-policy (trl#3234).
    model.eval()
    if run.cpu_linear == "auto" and device.type == "cpu":
        onednn.install(model)
    if run.gradient_checkpointing:
        enable_checkpointing(model)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.mixed_precision)
    workspace = run.workspace_mb and run.workspace_mb << 20
    return Policy(
        model, run.lm_head, workspace, run.fp32_logits, run.skip_idle, run.packing, device, dtype
    ).eval()  # fmt: skip


def _in_words(source: Source | None) -> str | None:
    if isinstance(source, (str, Path)):
        return "embedded" if Path(source).parent == DEMO_DIR else str(source)
    return None if source is None else "rows in memory"
