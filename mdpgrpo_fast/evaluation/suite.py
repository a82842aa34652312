"""Tasks of lm-eval on a model that is loaded already."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError, needs_package
from ..log import counted, reason_of
from .settings import EvaluateConfig

Z = 1.959964  # of lm-eval's standard error, the 95 % interval of a normal mean


@dataclass(frozen=True)
class Suite:
    """Tasks of lm-eval with their data sets, ready to be asked."""

    manager: Any
    tasks: list[Any]


def find(config: EvaluateConfig) -> Suite:
    """The tasks that the settings name, with their data sets.

    Raises: ConfigError in one line where lm-eval is missing, a task is unknown, or its data set cannot be loaded.
    """
    manager = _manager(config)
    tasks: list[Any] = []
    for name in config.tasks:
        if name not in manager.task_index:
            raise ConfigError(f"suite: lm-eval has no task {name!r}{_where(config)}{_near(name, manager.all_tasks)}")
        try:
            with redirect_stdout(sys.stderr):  # the result alone goes to stdout
                found = manager.load([name])
        except Exception as e:  # of any kind: the hub, the disk, what a task file imports
            raise ConfigError(f"suite: task {name!r} or its data set cannot be loaded: {reason_of(e)}") from None
        group = found.get("groups", {}).get(name)  # which holds its own groups and tasks
        _check_shots(config, found["tasks"])
        tasks += found["tasks"].values() if group is None else [group]
    return Suite(manager, tasks)


def _manager(config: EvaluateConfig) -> Any:
    if config.suite_tasks is not None and not Path(config.suite_tasks).is_dir():
        raise ConfigError(f"suite_tasks {config.suite_tasks!r} is no folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        importlib.import_module("lm_eval.evaluator")
        importlib.import_module("lm_eval.models.huggingface")
        tasks = importlib.import_module("lm_eval.tasks")
    except ImportError as e:
        raise ConfigError(f"suite {needs_package('lm-eval', reason_of(e))}") from None
    if config.suite_tasks:
        own = tasks.TaskManager(include_path=config.suite_tasks, include_defaults=False)
        if all(name in own.task_index for name in config.tasks):
            return own  # lm-eval reads its 14,000 task files for half a minute
    return tasks.TaskManager(include_path=config.suite_tasks)


def _check_shots(config: EvaluateConfig, tasks: dict[str, Any]) -> None:
    """Raises ConfigError for a task with fewer documents than a question's examples need, where that is known."""
    for name, task in tasks.items():
        own, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
        # 0 in a task file stays, as lm-eval has it; another number gives way to that of the settings.
        shots = own or 0 if own == 0 or config.suite_fewshot is None else config.suite_fewshot
        if not shots or sampler is None:
            continue
        # One more where the questions are of the same split: none is its own example.
        needed, there = shots + (task.fewshot_cfg.split == task.config.test_split), len(sampler.fewshot_docs())
        if there < needed:
            raise ConfigError(
                f"suite: {counted(shots, 'example')} before each question of task {name!r} need {needed} documents; it "
                f"has {there}"
            )


def _where(config: EvaluateConfig) -> str:
    return f" and {config.suite_tasks!r} none" if config.suite_tasks else ""


def _near(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def ask(suite: Suite, config: EvaluateConfig, model: Any, tokenizer: Any, context: int | None) -> dict[str, Any]:
    """lm-eval's scores of a loaded model, by task and group, each with half of its 95 % interval.

    context: positions of the model; None: no limit. A question and its answer get suite_max_length of them at most,
    2048 as in the paper's runs, whose other arguments are lm-eval's defaults too. Raises what lm-eval raises.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    length = min(config.suite_max_length, context or config.suite_max_length)
    # A length of the model's own would win over the task's, and cut answers in silence.
    model.generation_config.max_new_tokens = None
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size, max_length=length)
    found = simple_evaluate(
        model=lm,
        tasks=suite.tasks,
        task_manager=suite.manager,
        num_fewshot=config.suite_fewshot,
        apply_chat_template=config.suite_chat_template,
        limit=config.limit or None,
        log_samples=False,
    )
    rows = {**found["results"], **found.get("groups", {})}
    return {
        "tasks": {name: _metrics(name, row, found) for name, row in rows.items()},
        "lm_eval": importlib.metadata.version("lm-eval"),
        "max_length": length,
        "chat_template": config.suite_chat_template,
        "limit": config.limit,
    }


def _metrics(name: str, row: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    values, halves = {}, {}
    for key, value in row.items():
        metric, _, rule = key.partition(",")
        if not rule or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        label = metric if rule == "none" else f"{metric},{rule}"
        error = _number(row.get(f"{metric}_stderr,{rule}"))
        values[label], halves[label] = _number(value), Z * error if error else None  # 0: all documents score alike
    count = found["n-samples"].get(name, {}).get("effective", row.get("sample_len"))
    return {"count": count, "fewshot": found["n-shot"].get(name), "metrics": values, "intervals": halves}


def _number(value: Any) -> float | None:
    """None for the "N/A" and NaN of lm-eval."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
