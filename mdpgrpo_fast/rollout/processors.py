"""What transformers' logits processors do to the logits of a decode step, each row as if it were decoded unpadded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import Tensor

from ..config import ConfigError, TrainConfig, require, unknown_name

# What belongs to a setting of ours, or to the tokenizer, by its name in transformers' GenerationConfig.
ELSEWHERE = {
    "temperature": "--temperature or --temperatures",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repetition_penalty": "--repetition-penalty",
    "max_new_tokens": "--max-completion-length",
    "max_length": "--max-completion-length",
    "num_return_sequences": "--num-generations",
    "do_sample": "--temperature: completions are always sampled",
    "bos_token_id": "the tokenizer's",
    "pad_token_id": "the tokenizer's",
    "eos_token_id": "the tokenizer's and the model's",
}


class Row(NamedTuple):
    """What processors want to know of the rows they are for."""

    prompt_length: int
    max_new_tokens: int
    eos: list[int]
    device: torch.device


# In transformers' order (generation.utils, `_get_logits_processor`): when a setting counts, and what it makes.
PROCESSORS: dict[str, tuple[Callable[[Any], bool], Callable[[Any, Row], Any]]] = {
    "sequence_bias": (bool, lambda x, row: tf.SequenceBiasLogitsProcessor(x)),
    "repetition_penalty": (lambda x: x != 1, lambda x, row: tf.RepetitionPenaltyLogitsProcessor(float(x))),
    "no_repeat_ngram_size": (lambda x: x != 0, lambda x, row: tf.NoRepeatNGramLogitsProcessor(x)),
    "bad_words_ids": (bool, lambda x, row: tf.NoBadWordsLogitsProcessor(x, row.eos)),
    "min_length": (lambda x: x != 0, lambda x, row: tf.MinLengthLogitsProcessor(x, row.eos, device=str(row.device))),
    "min_new_tokens": (
        lambda x: x != 0,
        lambda x, row: tf.MinNewTokensLengthLogitsProcessor(row.prompt_length, x, row.eos, device=str(row.device)),
    ),
    "forced_eos_token_id": (
        lambda x: True,
        lambda x, row: tf.ForcedEOSTokenLogitsProcessor(
            row.prompt_length + row.max_new_tokens, x, device=str(row.device)
        ),
    ),
    "remove_invalid_values": (lambda x: x is True, lambda x, row: tf.InfNanRemoveLogitsProcessor()),
    "exponential_decay_length_penalty": (
        bool,
        lambda x, row: tf.ExponentialDecayLengthPenalty(
            tuple(x), torch.tensor(row.eos, device=row.device), row.prompt_length
        ),
    ),
    "suppress_tokens": (bool, lambda x, row: tf.SuppressTokensLogitsProcessor(x, device=str(row.device))),
    "begin_suppress_tokens": (
        bool,
        lambda x, row: tf.SuppressTokensAtBeginLogitsProcessor(x, row.prompt_length, device=str(row.device)),
    ),
}


def generation_kwargs(run: TrainConfig) -> dict[str, Any] | None:
    """A run's settings for `generate`, values as JSON (or True, False) where they are, else text; None: there are none.

    Raises: ConfigError for a name that no logits processor has, or that is given twice.
    """
    values: dict[str, Any] = {}
    for item in run.generation_kwargs:
        name, _, text = item.partition("=")
        _check_name(name)
        if name in values:
            raise ConfigError(f"generation_kwargs: {name} is given twice")
        try:
            values[name] = json.loads({"True": "true", "False": "false"}.get(text, text))
        except ValueError:
            values[name] = text
        except RecursionError:
            raise ConfigError(f"generation_kwargs: {name} is nested too deep") from None
    if run.repetition_penalty != 1:
        values["repetition_penalty"] = run.repetition_penalty
    return values or None


def _check_name(name: str) -> None:
    known = [n for n in vars(tf.GenerationConfig()) if not n.startswith("_")]
    if name in ELSEWHERE:
        raise ConfigError(f"generation_kwargs: {name} is set elsewhere ({ELSEWHERE[name]})")
    if name in PROCESSORS:
        return
    if name not in known:
        raise unknown_name("name in generation_kwargs", name, [n for n in PROCESSORS if n not in ELSEWHERE])
    raise ConfigError(
        f"generation_kwargs: {name} is no logits processor that comes before the temperature; "
        f"known: {', '.join(n for n in PROCESSORS if n not in ELSEWHERE)}"
    )


def _check_kinds(values: dict[str, Any]) -> None:
    """Raises ConfigError for a bool where a number is meant, and for anything but one where one is meant."""
    for name, value in values.items():
        if value is None:
            continue
        if name == "remove_invalid_values":
            require(isinstance(value, bool), f"generation_kwargs: {name}", value, "True or False")
        elif any(isinstance(x, bool) for x in _flat(value)):
            raise ConfigError(f"generation_kwargs: {name} cannot be {value!r}: a number is wanted, not True or False")


def _check_ids(values: dict[str, Any], vocab: int | None) -> None:
    """Raises ConfigError for what is no token of the model, where its processor would pass over it."""
    wanted = "whole numbers from 0" + ("" if vocab is None else f" below the vocabulary size {vocab}")
    for name in ("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        for x in _flat(values.get(name) or []):
            ok = isinstance(x, int) and x >= 0 and (vocab is None or x < vocab)
            require(ok, f"generation_kwargs: tokens of {name}", x, wanted)


def _flat(value: Any) -> list[Any]:
    return [x for item in value for x in _flat(item)] if isinstance(value, (list, tuple)) else [value]


def check_generation_kwargs(run: TrainConfig, vocab: int | None = None) -> None:
    """Raises ConfigError where the run's settings cannot be used. vocab: size of the model's logits, where known."""
    values = generation_kwargs(run)
    if values is None:
        return
    if run.rollout == "vllm" and run.generation_kwargs:
        raise ConfigError(
            f"generation_kwargs need rollout = transformers: of vLLM only --repetition-penalty is asked; "
            f"got {', '.join(run.generation_kwargs)}"
        )
    _check_kinds(values)
    ids, mask = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    try:
        process = Processors(values, ids, mask, torch.zeros(1, dtype=torch.int64), [0], run.max_completion_length)
        _check_ids(values, vocab)
        if vocab is not None:
            process(torch.zeros(1, vocab), torch.zeros(1, dtype=torch.int64), ids[:, :0])
    except ValueError as e:
        raise ConfigError(str(e)) from None


class Processors:
    """transformers' LogitsProcessorLists for the rows of a call of `generate`.

    Rows whose prompts are of one length go through them together, without padding, so each row gets what
    `model.generate` would give it: the prompt's own tokens and the completion's count, and no padding does.
    values: by name, those of transformers' GenerationConfig; prompt_ids, prompt_mask (P, S) left-padded; origin (B,).

    Raises: ValueError where a value is none that its processor takes.
    """

    def __init__(
        self, values: dict[str, Any], prompt_ids: Tensor, prompt_mask: Tensor, origin: Tensor, eos: Sequence[int],
        max_new_tokens: int,
    ) -> None:  # fmt: skip
        self.ids = prompt_ids[origin]
        self.lengths: list[int] = prompt_mask.sum(1)[origin].tolist()
        rows = {n: Row(n, max_new_tokens, list(eos), prompt_ids.device) for n in set(self.lengths)}
        self.lists: dict[int, Any] = {n: _build(values, row) for n, row in rows.items()}
        self._rows: Tensor | None = None
        self._parts: list[tuple[int, Tensor]] = []

    def __call__(self, logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Logits (R, V) float32 to draw from, of the model's logits of rows (R,), which drew tokens (R, t) so far."""
        if rows is not self._rows:  # rows are looked at when they change: on a GPU that is a wait for it
            self._rows, own = rows, [self.lengths[i] for i in rows.tolist()]
            places = {n: [j for j, m in enumerate(own) if m == n] for n in sorted(set(own))}
            self._parts = [(n, torch.tensor(at, device=rows.device)) for n, at in places.items()]
        processed = logits.to(torch.float32, copy=True)
        for n, at in self._parts:
            prompt = self.ids[rows[at], self.ids.shape[1] - n :]
            processed[at] = self.lists[n](torch.cat([prompt, tokens[at]], 1), processed[at])
        return processed


def _build(values: dict[str, Any], row: Row) -> tf.LogitsProcessorList:
    made = tf.LogitsProcessorList()
    for name, (counts, make) in PROCESSORS.items():
        value = values.get(name)
        try:
            if value is not None and counts(value):
                made.append(make(value, row))
        except (TypeError, ValueError, LookupError, RuntimeError, AttributeError) as e:
            reason = " ".join(str(e).split()) or type(e).__name__
            raise ValueError(f"generation_kwargs: {name} cannot be {value!r}: {reason}") from None
    return made
