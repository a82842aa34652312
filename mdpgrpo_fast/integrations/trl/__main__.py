"""`python -m mdpgrpo_fast.integrations.trl`: TRL's script for GRPO, with our trainer, config and reward."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import DatasetMixtureConfig, ModelConfig, TrlParser, get_dataset, get_peft_config, get_quantization_config
from trl.scripts.grpo import GRPOScriptArguments

from ...cli.ending import end, report_errors
from ...config import ConfigError
from . import MDPGRPOConfig, MDPGRPOTrainer, constraint_dataset, constraint_reward

TRL_REWARDS = (
    "accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment"
)  # fmt: skip


@dataclass
class ScriptArguments(GRPOScriptArguments):
    """Those of TRL's script. dataset_name: also a local file of prompts, as the data of `mdpgrpo train`."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "rewards, which are summed: constraints (the default: the share of a prompt's constraints that "
            "hold), a reward of trl.rewards by its name, or a function as package.module.function"
        },
    )


def reward_of(name: str) -> Callable[..., Any]:
    """The reward function of a name. Raises: ConfigError."""
    if name == "constraints":
        return constraint_reward
    module, _, function = name.rpartition(".")
    if not module and function not in TRL_REWARDS:
        raise ConfigError(
            f"reward_funcs must be constraints, package.module.function or one of {', '.join(TRL_REWARDS)}; got "
            f"{name!r}"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module or "trl.rewards"), function)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"reward_funcs has {name!r}, which cannot be imported: {e}") from None
    # TRL's script has these numbers.
    made = name == "get_soft_overlong_punishment"
    return found(max_completion_len=1280, soft_punish_cache=256) if made else found  # type: ignore[no-any-return]


def data_of(script: Any, mixture: Any, model: Any, trust_remote_code: bool) -> Any:
    """Splits of the data that the arguments name. Raises: ConfigError."""
    if mixture.datasets:
        return get_dataset(mixture)
    if not script.dataset_name:
        raise ConfigError("dataset_name must be set: a local file of prompts, or a folder or hub id of `datasets`")
    if Path(script.dataset_name).is_file():
        tokenizer = AutoTokenizer.from_pretrained(
            model.model_name_or_path, revision=model.model_revision, trust_remote_code=trust_remote_code
        )
        rows = constraint_dataset(script.dataset_name, conversational=tokenizer.chat_template is not None)
        return {script.dataset_train_split: rows}
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


@contextmanager
def in_one_line() -> Iterator[None]:
    """What TRL and datasets raise for a wrong argument or a missing file becomes a ConfigError."""
    try:
        yield
    except (OSError, ValueError) as e:
        raise ConfigError(str(e)) from None


def run(argv: Sequence[str] | None = None) -> int:
    """Trains, saves and, where asked, pushes to the hub. Returns the exit status: 1 where nothing could be learned."""
    kinds = (ScriptArguments, MDPGRPOConfig, ModelConfig, DatasetMixtureConfig)
    parser = TrlParser(cast(Any, kinds), prog="python -m mdpgrpo_fast.integrations.trl")
    with in_one_line():
        script, args, model, mixture = parser.parse_args_and_config(argv)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    rewards: list[Any] = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    rewards += [reward_of(name) for name in script.reward_funcs or ([] if rewards else ["constraints"])]
    if not model.model_name_or_path:
        raise ConfigError("model_name_or_path must be set: a folder or hub id of a model")
    with in_one_line():
        data = data_of(script, mixture, model, args.trust_remote_code)
    split = script.dataset_test_split
    if args.eval_strategy != "no" and split not in data:
        raise ConfigError(f"dataset_test_split must be one of {', '.join(data)}, or eval_strategy no; got {split!r}")
    if script.dataset_train_split not in data:
        raise ConfigError(f"dataset_train_split must be one of {', '.join(data)}; got {script.dataset_train_split!r}")
    trainer = MDPGRPOTrainer(
        model.model_name_or_path, rewards, args, data[script.dataset_train_split],
        data[split] if args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model), peft_config=get_peft_config(model),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"The model is in {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    first = trainer.accelerator.is_main_process
    if hasattr(trainer, "end"):  # of transformers 5.18: ends the trackers and the process group
        trainer.end()
    if trainer.has_learned is not False:
        return 0
    if first:
        print("error: no completion ever had an advantage: nothing was learned; look at the rewards", file=sys.stderr)
    return 1


def main() -> int:
    with report_errors():
        return run()


if __name__ == "__main__":
    end(main)
