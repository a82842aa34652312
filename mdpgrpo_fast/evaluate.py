"""Held-out evaluation: greedy answers, strict and loose accuracy, SSR, HSR, per instruction type.

`python -m mdpgrpo_fast.evaluate --model DIR --file held.jsonl` prints a table and writes JSON.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from .config import ConfigError, PromptConfig, knob, require
from .evaluation.answers import answer
from .evaluation.scores import strict_and_loose, table

if TYPE_CHECKING:
    from .data import Example


@dataclass(frozen=True)
class EvaluateConfig(PromptConfig):
    """What to evaluate."""

    file: str | None = knob(None, "prompts with constraints, as for training; unset: the embedded held-out prompts")
    output: str | None = knob(None, "write the result as JSON here")
    completions: str | None = knob(None, "write prompts, responses and verdicts as JSON lines here")
    samples: int = knob(0, "prompts to use, from the first; 0: all")
    batch_size: int = knob(64, "prompts answered at once")
    workers: int = knob(2, "processes that check responses")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob("auto", "dtype the weights are loaded in")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "workers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.samples >= 0, "samples", self.samples, "0 (all) or positive")


def _check_constraints(examples: list[Example], file: str | None) -> None:
    if not any(e.instruction_ids for e in examples):
        raise ConfigError(f"no prompt of {file!r} has an instruction_id_list: there is nothing to check")


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Load, answer, check. Raises, before a token is generated, ConfigError for anything that cannot be used and
    RewardError for an instruction type of one's own that answers no sample text."""
    import json

    from accelerate import PartialState

    from .data import read_prompts, tokenize
    from .demo import DEMO_DIR
    from .kernels import onednn
    from .models.load import context_length, load
    from .rewards import Scorer
    from .rollout.generate import eos_ids
    from .rollout.thinking import Thinking

    for path in (config.output, config.completions):
        if path is not None and not Path(path).parent.is_dir():
            raise ConfigError(f"the folder of {path!r} does not exist")
    read = read_prompts(config.file or DEMO_DIR / "heldout.jsonl", config)
    read = replace(read, examples=read.examples[: config.samples or None])
    _check_constraints(read.examples, config.file)
    checking = partial(
        Scorer, ["constraints"], rules=config.rules, instructions=config.instructions, workers=config.workers
    )
    with checking() as scorer:
        scorer.try_own_types(read.examples)
    model, tokenizer = load(
        config.model, config.dtype, tokenizer=config.tokenizer, trust_remote_code=config.trust_remote_code,
        text_only=config.text_only or None,
    )  # fmt: skip
    device = PartialState(cpu=config.cpu).device
    model.to(device).eval()
    if device.type == "cpu":
        onednn.install(model)
    eos = eos_ids(model, tokenizer)
    read, prompts = tokenize(read, tokenizer, config, context=context_length(model), eos=eos)
    examples = read.examples
    _check_constraints(examples, config.file)  # some may have been too long
    thinking = Thinking(tokenizer, config.strip_thinking)
    if thinking.active:
        read.notes.append("what follows the last closing think tag is scored (--strip-thinking off: whole completions)")
    longest = config.max_completion_length
    try:
        answers = answer(model, thinking, prompts, eos, longest, config.batch_size)
    except FloatingPointError as e:
        raise ConfigError(str(e)) from None
    with checking() as scorer:
        result, flags = strict_and_loose(scorer, examples, [a.scored for a in answers])
    result |= {"truncated": fmean(not a.finished for a in answers), "max_completion_length": longest}
    result |= {"model": config.model, "file": config.file}
    result |= {"notes": read.notes, "left_out": [asdict(row) for row in read.dropped]}
    if config.output:
        Path(config.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if config.completions:
        with open(config.completions, "w", encoding="utf-8") as f:
            for example, a, row in zip(examples, answers, flags, strict=True):
                line = {"prompt": example.prompt, "response": a.response, "instruction_ids": example.instruction_ids}
                f.write(json.dumps({**line, "strict": row}) + "\n")
    return result


def main(argv: list[str] | None = None) -> int:
    from .cli import parse, report_errors
    from .rewards import RewardError

    with report_errors():
        (config,) = parse(argv, EvaluateConfig, prog="python -m mdpgrpo_fast.evaluate")
        try:
            result = run(config)
        except RewardError as e:
            print(*filter(None, [e.trace, f"error: {e}"]), sep="\n", file=sys.stderr)
            return 1
        for note in result["notes"]:
            print(f"note: {note}", file=sys.stderr)
        print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
