"""An evaluation from its settings: checks, model, answers, scores, files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..config import ConfigError
from ..data import Example, Prompts, prompt_limit, read_prompts, tokenize
from ..demo import DEMO_DIR
from ..log import counted, reason_of, to_json
from ..models.load import positions_of, read_config
from ..rewards import Scorer
from ..rewards.lost import raise_where_all_failed, why_all_failed
from . import followbench, sampled, scores, suite
from .answers import Answer, Draw, answers
from .settings import EvaluateConfig


def check_outputs(config: EvaluateConfig) -> None:
    """Raises ConfigError where a file that is to be written cannot be, or exists and may not be replaced."""
    paths = {name: Path(value) for name in ("output", "completions") if (value := getattr(config, name)) is not None}
    for name, path in paths.items():
        if not path.parent.is_dir():
            raise ConfigError(f"the folder of {str(path)!r} does not exist")
        if path.is_dir():
            raise ConfigError(f"{name} {str(path)!r} is a folder; a file is expected")
        if path.exists() and not config.overwrite:
            raise ConfigError(f"{name} {str(path)!r} exists already; --overwrite replaces it")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"{name} {str(path)!r} cannot be written")
        if config.file is not None and path.resolve() == Path(config.file).resolve():
            raise ConfigError(f"{name} must be another file than the prompts; got {str(path)!r}")
    if len({path.resolve() for path in paths.values()}) < len(paths):
        raise ConfigError(f"output and completions must be two files; got {config.output!r} twice")


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Check, load, answer, score, write. The result is what is written as JSON; docs/evaluation.md has its keys.

    Raises, before the model is loaded, ConfigError for anything that cannot be used, and RewardError for a reward or an
    instruction type of one's own that fails on sample texts; RewardError later where all completions lose their reward.
    """
    check_outputs(config)
    result: dict[str, Any] = {"model": config.model, "file": config.file, "notes": [], "left_out": []}
    lines: list[dict[str, Any]] = []  # of the file of completions
    with ExitStack() as workers:
        scorer, read = None, Prompts([])
        if config.scores_prompts:
            scorer = workers.enter_context(Scorer.of(config))
            read = _read(config, scorer)
        entries = followbench.read(config.followbench, config.limit) if config.followbench else []
        if scorer is not None or entries:
            prompt_limit(config, positions_of(read_config(config.model, config.trust_remote_code)))
        tasks = suite.find(config) if config.tasks else None
        model = Loaded.of(config)
        if scorer is not None:
            result |= _prompts(config, model, scorer, read, lines, result)
        if config.followbench:
            result["followbench"] = _followbench(config, model, entries, lines, result)
        if tasks is not None:
            try:
                result["suite"] = suite.ask(tasks, config, model.model, model.tokenizer, model.context)
            except Exception as e:  # what was scored until here is kept
                result["suite"] = {"error": reason_of(e)}
    result["notes"] = list(dict.fromkeys(result["notes"]))
    if config.output:
        Path(config.output).write_text(to_json(result, indent=2) + "\n", encoding="utf-8")
    if config.completions:
        with open(config.completions, "w", encoding="utf-8") as f:
            f.writelines(to_json(line) + "\n" for line in lines)
    return result


@dataclass(frozen=True)
class Loaded:
    """A model that answers, and what it needs for that."""

    model: Any
    tokenizer: Any
    eos: list[int]
    context: int | None
    thinking: Any

    @classmethod
    def of(cls, config: EvaluateConfig) -> Loaded:
        """The model of the settings, on its device."""
        from accelerate import PartialState

        from ..kernels import onednn
        from ..models.load import context_length, load
        from ..rollout.generate import eos_ids
        from ..rollout.thinking import Thinking

        model, tokenizer = load(
            config.model, config.dtype, tokenizer=config.tokenizer, trust_remote_code=config.trust_remote_code,
            text_only=config.text_only or None,
        )  # fmt: skip
        device = PartialState(cpu=config.cpu).device
        model.to(device).eval()
        if device.type == "cpu":
            onednn.install(model)
        thinking = Thinking(tokenizer, config.strip_thinking)
        return cls(model, tokenizer, eos_ids(model, tokenizer), context_length(model), thinking)

    def answer(
        self, config: EvaluateConfig, read: Prompts, draw: Draw, result: dict[str, Any]
    ) -> tuple[list[Example], list[list[Answer]]]:
        """The prompts that the model can take, with G answers to each; notes and rows left out go to the result."""
        import torch

        read, ids = tokenize(read, self.tokenizer, config, context=self.context, eos=self.eos)
        result["notes"] += read.notes
        result["left_out"] += [asdict(row) for row in read.dropped]
        if self.thinking.active:
            result["notes"].append(
                "what follows the last closing think tag is scored (--strip-thinking off: whole completions)"
            )
        torch.manual_seed(config.seed)
        try:
            found = answers(
                self.model, self.thinking, ids, self.eos, config.max_completion_length, config.batch_size,
                config.keep_special_tokens, draw,
            )  # fmt: skip
        except FloatingPointError as e:
            raise ConfigError(str(e)) from None
        return read.examples, found


# ---- what is known before the model is loaded -----------------------------------------------------------------------


def _read(config: EvaluateConfig, scorer: Scorer) -> Prompts:
    """The prompts, which the scorer can score."""
    read = read_prompts(config.file or DEMO_DIR / "heldout.jsonl", config)
    read = replace(read, examples=read.examples[: config.limit or None])
    read.notes.extend(_unscored(config, scorer, read.examples))
    if config.reward_check:
        scorer.try_own_types(read.examples)
        scorer.try_out(read.examples)
    return read


def _unscored(config: EvaluateConfig, scorer: Scorer, examples: Sequence[Example]) -> list[str]:
    """A note where some prompts have no score. Raises ConfigError where none has one."""
    free = sum(not e.instruction_ids for e in examples)
    if not free or scorer.names != ["constraints"]:
        return []
    if free == len(examples):
        raise ConfigError(
            f"no prompt of {config.file!r} has an instruction_id_list: there is nothing to check; --reward names "
            "another reward than constraints"
        )
    return [f"{free} of {len(examples)} prompts have no instruction_id_list, and no score"]


# ---- the parts ------------------------------------------------------------------------------------------------------


def _prompts(
    config: EvaluateConfig, model: Loaded, scorer: Scorer, read: Prompts, lines: list[dict[str, Any]],
    result: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Scores of the prompts' completions."""
    examples, found = model.answer(config, read, config.draw, result)
    _unscored(config, scorer, examples)  # raises where those that have one were too long
    scorer.to(model.model.device)
    scored = scores.score(scorer, examples, found, config.draw.temperatures)
    raise_where_all_failed([why_all_failed(scored.scores)], "the evaluation", len(scored.scores))
    part = scores.summary(scored)
    if scored.samples > 1:
        part["sampled"], part["intervals"]["sampled"] = _split(sampled.over_samples(scored))
    for i, (a, strict, score) in enumerate(zip(scored.answers, scored.strict, scored.scores, strict=True)):
        example = examples[i // scored.samples]
        lines.append(
            {
                "prompt": example.prompt,
                "response": a.response,
                "instruction_ids": example.instruction_ids,
                "strict": strict,
                "reward": score.total,
                "rewards": score.parts,
                "temperature": scored.temperatures[i % scored.samples],
                "finished": a.finished,
            }
        )
    part["dropped_reason"] = next((s.problem for s in scored.scores if s.total is None), None)
    return {
        **part,
        "unchecked": scorer.unchecked,
        "unchecked_reason": scorer.unchecked_reason,
        "logged": scorer.take_metrics(),
        "max_completion_length": config.max_completion_length,
        "reward_names": scorer.names,
        "reward_weights": scorer.weights,
        "samples": config.samples,
        **asdict(config.draw),
        "seed": config.seed,
    }


def _split(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tree of (value, ±) as a tree of values and one of ±."""
    values, halves = {}, {}
    for name, item in found.items():
        if isinstance(item, dict):
            values[name], halves[name] = _split(item)
        elif isinstance(item, tuple):
            values[name], halves[name] = item
        else:
            values[name] = item
    return values, halves


def _followbench(
    config: EvaluateConfig, model: Loaded, entries: Sequence[followbench.Entry], lines: list[dict[str, Any]],
    result: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Scores of greedy answers to FollowBench."""
    verdicts: list[bool | None] = [None] * len(entries)
    examples, found = model.answer(config, Prompts(followbench.examples(entries)), Draw(), result)
    for example, (a,) in zip(examples, found, strict=True):
        entry = entries[example.columns["entry"]]
        verdicts[example.columns["entry"]] = followbench.satisfied(entry, a.scored)
        where = {"category": entry.category, "example_id": entry.example_id, "level": entry.level}
        line = {"prompt": example.prompt, "response": a.response, "followbench": where, "finished": a.finished}
        lines.append({**line, "satisfied": verdicts[example.columns["entry"]]})
    part = followbench.summary(entries, verdicts)
    if part["groups_left_out"]:
        result["notes"].append(
            f"{counted(part['groups_left_out'], 'group')} of FollowBench left out, as not all levels were answered"
        )
    part["truncated"] = fmean(not a.finished for (a,) in found)
    part["max_completion_length"] = config.max_completion_length
    return part
