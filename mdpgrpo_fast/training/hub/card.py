"""README.md of a trained model, its card on the hub: what it came from, how it was trained and scored, how it loads."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ... import durable
from ...config import MDPGRPOConfig, TrainConfig
from ...log import counted
from ..show.end import with_interval
from ..show.start import differing, short
from .names import data_set_id, hub_id, public

TAGS = ["mdpgrpo_fast", "grpo", "rlvr"]
SATISFACTION = {"hsr": "hard satisfaction (HSR)", "ssr": "soft satisfaction (SSR)"}
LONGEST_COMMAND = 1000  # characters; `python -c` takes a whole program


def write_cards(
    out: Path, run: TrainConfig, method: MDPGRPOConfig, summary: dict[str, Any], lm: Any, repo_id: str | None
) -> None:
    """README.md into model/, and into adapters/ where there are some.

    out: the run's directory. summary: of summary.json. lm: the language model, which knows its base. repo_id: on the
    hub; None: it goes nowhere. Raises: StorageError.
    """
    for folder, library in (("model", "transformers"), ("adapters", "peft")):
        if (out / folder).is_dir():
            card = card_of(run, method, summary, hub_id(lm.name_or_path), repo_id, library)
            durable.write_text(out / folder / "README.md", str(card))


def card_of(
    run: TrainConfig, method: MDPGRPOConfig, summary: dict[str, Any], base: str | None, repo_id: str | None,
    library: str = "transformers",
) -> ModelCard:  # fmt: skip
    """The card. base: id of the model on the hub that was trained; None: it is of somewhere else."""
    name = PurePath(repo_id or Path(run.output_dir).absolute()).name
    is_mdp = method.multi_temperature or method.dual_anchor or method.prospect or method.asymmetric_kl
    trained = f"trained with {'MDP-GRPO' if is_mdp else 'GRPO'} by mdpgrpo_fast"
    data = ModelCardData(
        model_name=name,
        base_model=base,
        library_name=library,
        pipeline_tag="text-generation",
        datasets=[found] if (found := data_set_id(summary["train_file"])) else None,
        tags=[*TAGS, *["mdp-grpo"] * is_mdp, *["lora"] * run.lora],
        eval_results=_results(run, summary) or None,
    )
    text = [
        f"# {name}",
        f"{_base(base, summary)}, {trained}.{_kept(run, library)}",
        _scores(summary),
        "\n".join(f"- {what}: {said}" for what, said in _facts(run, method, summary).items()),
        _loading(library, repo_id),
    ]
    # Without results there is no model-index that the name would be of.
    if data.eval_results is None:
        data.pop("model_name")
    return ModelCard("---\n" + data.to_yaml() + "\n---\n\n" + "\n\n".join(filter(None, text)) + "\n")


def _results(run: TrainConfig, summary: dict[str, Any]) -> list[EvalResult]:
    """Held-out satisfaction after training, where it was measured, in the words of the hub's index."""
    source = summary["eval_file"]
    found = data_set_id(source)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=found or re.sub(r"[^\w.-]+", "-", PurePath(source).name),
            dataset_name=_prompts(source),
            dataset_config=source.partition(":")[2] or None if found else None,
            dataset_split=run.eval_split or run.split if found else None,
            metric_type=key,
            metric_name=label,
            metric_value=round(value, 4),
        )
        for key, label in SATISFACTION.items()
        if (value := summary[f"{key}_after"]) is not None and math.isfinite(value)
    ]


def _prompts(source: str) -> str:
    if source == "embedded":
        return "prompts embedded in mdpgrpo_fast"
    return source if data_set_id(source) else PurePath(source).name


def _base(base: str | None, summary: dict[str, Any]) -> str:
    if base is not None:
        return f"[{base}](https://huggingface.co/{base})"
    seed = summary["model"] == "embedded seed policy"
    return "The seed policy embedded in mdpgrpo_fast" if seed else f"`{PurePath(summary['model']).name}`"


def _kept(run: TrainConfig, library: str) -> str:
    if library == "peft":
        return " These are its LoRA adapters."
    return " Its LoRA adapters are merged into the weights." if run.lora else ""


def _scores(summary: dict[str, Any]) -> str:
    """A table of what was measured before and after; the reward where no prompt has constraints."""
    labels = SATISFACTION if summary["hsr_before"] is not None else {"reward": "reward"}
    rows = [
        f"| {label} | " + " | ".join(with_interval(*pair) for pair in pairs) + " |"
        for key, label in labels.items()
        if (pairs := [(summary[f"{key}_{when}"], summary["intervals"][when][key]) for when in ("before", "after")])
        and all(value is not None for value, _ in pairs)
    ]
    held_out = f"held out: {counted(summary['held_out'], 'prompt')}, greedy answers"
    return "\n".join([f"| {held_out} | before | after |", "|---|---|---|", *rows]) if rows else ""


def _facts(run: TrainConfig, method: MDPGRPOConfig, summary: dict[str, Any]) -> dict[str, str]:
    changed = ", ".join(f"`{knob}` {short(value)}" for knob, value in differing(method, run.preset).items())
    steps = counted(summary["steps"], "step")
    if summary["interrupted"]:
        steps = f"stopped after {summary['steps']} of {counted(summary['total_steps'], 'step')}"
    processes = f" × {summary['processes']} processes" if summary["processes"] > 1 else ""
    adapters = f", LoRA r {run.lora_r}, alpha {run.lora_alpha:g}" if run.lora else ""
    facts = {
        "prompts": f"{_prompts(summary['train_file'])}"
        + (f"; held out: {_prompts(summary['eval_file'])}" if summary["eval_file"] else ""),
        "rewards": ", ".join(f"`{public(reward)}`" for reward in run.reward),
        "method": f"preset `{run.preset}`" + (f" with {changed}" if changed else ""),
        "run": f"{steps} of {counted(run.prompts_per_step, 'prompt')} × {method.num_generations} completions"
        f"{processes}, learning rate {run.learning_rate:g}, seed {run.seed}{adapters}",
        "versions": ", ".join(f"{package} {version}" for package, version in summary["versions"].items()),
    }
    command = shlex.join(map(public, shlex.split(summary["command"])))
    return facts | ({"command": f"`{command}`"} if "\n" not in command and len(command) <= LONGEST_COMMAND else {})


def _loading(library: str, repo_id: str | None) -> str:
    kind = "AutoPeftModelForCausalLM" if library == "peft" else "AutoModelForCausalLM"
    imports = f"from transformers import {kind}, AutoTokenizer"
    if library == "peft":
        imports = f"from peft import {kind}; from transformers import AutoTokenizer"
    path = f'path = "{repo_id}"' if repo_id else 'path = "."  # the folder of this file'
    load = f"model, tokenizer = {kind}.from_pretrained(path), AutoTokenizer.from_pretrained(path)"
    return f"```python\n{imports}\n{path}\n{load}\n```"
