"""`python -m mdpgrpo_fast.train`: MDP-GRPO from the command line; without arguments, the embedded demonstration."""

from __future__ import annotations

import sys
import types
from contextlib import ExitStack
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from .config import PRESETS, ConfigError, MDPGRPOConfig, TrainConfig, unknown_name, without_effect

if TYPE_CHECKING:
    from .api import TrainResult
    from .training.loop import TrainingLoop


def resolve(argv: list[str]) -> tuple[TrainConfig, MDPGRPOConfig]:
    """The configuration of a command line: defaults, then preset, then --config file, then flags.

    Without a model the embedded demonstration's settings (demo/demo.yaml) lie under the file. Raises ConfigError.
    """
    return read(argv)[:2]


def read(argv: list[str]) -> tuple[TrainConfig, MDPGRPOConfig, set[str]]:
    """`resolve`, and the knobs that the flags, or the file in place of what lies under it, have set."""
    from . import cli
    from .demo import DEMO_DIR

    given = cli.peek(argv, "config", "preset", "model")
    from_file = cli.read_yaml(given["config"]) if given.get("config") else {}
    if given.get("preset", from_file.get("preset")) != from_file.get("preset"):
        # The file's method settings follow from its own preset; a preset on the command line replaces both.
        method_knobs = {f.name for f in fields(MDPGRPOConfig)}
        from_file = {k: v for k, v in from_file.items() if k not in method_knobs}
    model = given.get("model", from_file.get("model"))
    demo = {} if model is not None else cli.read_yaml(DEMO_DIR / "demo.yaml")
    name = given.get("preset", from_file.get("preset") or demo.get("preset", "paper"))
    if name not in PRESETS:
        raise unknown_name("preset", str(name), list(PRESETS))
    layers: list[cli.Layer] = [
        ("demo.yaml", demo),
        (f"preset {name}", {"preset": name, **PRESETS[name]}),
        (str(given.get("config")), from_file),
    ]
    config = cli.Flag("config", str, "FILE", "settings as YAML, a run's own config.yaml too; flags go over them")
    read_layers = partial(
        cli.read, argv, TrainConfig, MDPGRPOConfig, prog="mdpgrpo train", extra=[config],
        description=_description(model, name),
    )  # fmt: skip
    (run, method), flags = read_layers(layers=layers)
    below = {k: v for _, layer in layers[:2] for k, v in layer.items()}
    changed = {k for k, v in from_file.items() if v != below.get(k, _DEFAULTS.get(k))}
    return run, method, {*flags, *changed} - {"config"}


_DEFAULTS = {**asdict(TrainConfig()), **asdict(MDPGRPOConfig())}


def _description(model: str | None, preset: str) -> str:
    of = f"of preset {preset}"
    if model is None:
        of += " and of the embedded demonstration; with --model they are the paper's for a model of your own"
    return f"Trains a language model on checkable constraints and rewards.\nDefaults in brackets are those {of}."


def make_trainer(argv: list[str], workers: ExitStack) -> TrainingLoop:
    """The trainer of a command line, all that can be checked before the first step checked, and its run directory made.

    workers: ends the processes that score. Raises: ConfigError; RewardError where a reward fails on two sample rows.
    """
    from .api import refuse_child_processes

    refuse_child_processes()
    run, method, given = read(argv)

    # Heavy imports only now: `--help` and a wrong flag answer at once.
    from .models.adapters import resolve_adapter
    from .rewards import Scorer
    from .rollout.vllm.sampler import RolloutError
    from .training.before.checks import check
    from .training.loop import TrainingLoop
    from .training.run_dir import RunDir
    from .training.task import prepare

    run = resolve_adapter(run)
    check(run, method)
    scorer = workers.enter_context(Scorer.of(run))
    out = RunDir(run.output_dir, create=False)
    try:
        task = prepare(run, scorer)
        trainer = TrainingLoop(task, run, method, out, scorer)
    except RolloutError as e:
        raise ConfigError(str(e)) from None
    if trainer.accelerator.is_main_process and not run.resume:
        out.make()
        if task.dropped:
            out.append("dropped_rows.jsonl", *map(asdict, task.dropped))
    if trainer.accelerator.is_main_process:
        print(*without_effect(run, method, given), sep="\n", end="", file=sys.stderr)
    if out.moved:
        print(f"an earlier {out.path} is now {out.moved}", file=sys.stderr)
    return trainer


def _stopping() -> tuple[type[Exception], ...]:
    """What ends a run with status 1 and a sentence."""
    from .rewards import RewardError
    from .rollout.vllm.sampler import RolloutError

    return RewardError, RolloutError, FloatingPointError


def main(argv: list[str] | None = None) -> int:
    from .cli import report_errors

    trainer = failure = summary = None
    with ExitStack() as workers:
        try:
            with report_errors():
                trainer = make_trainer(sys.argv[1:] if argv is None else argv, workers)
            summary = trainer.train()
        except KeyboardInterrupt:
            print("interrupted before the first step", file=sys.stderr)
            return 130
        except Exception as e:
            if not isinstance(e, _stopping()):
                raise
            failure = e
    if trainer is None:  # a reward that failed when it was tried
        print(*filter(None, [getattr(failure, "trace", None), f"error: {failure}"]), sep="\n", file=sys.stderr)
        return 1
    try:
        if trainer.accelerator.is_main_process:
            _say_how_it_ended(trainer, summary, failure)
    finally:
        trainer.accelerator.wait_for_everyone()  # a rank that ends first would take the one that writes with it
    return 1 if summary is None else 130 if summary["interrupted"] else 0


def _say_how_it_ended(trainer: TrainingLoop, summary: dict[str, Any] | None, failure: Exception | None) -> None:
    """The report, and the last lines of a run; summary: None where it failed."""
    from .report.page import write_report
    from .training.show.end import end_lines, how_to_resume

    out = trainer.out.path
    if summary is not None:
        print("\n".join(end_lines(summary, trainer.run, write_report(out))))
        return
    learned = f"what was learned until then is in {out}" if trainer.done else "no step was done"
    if isinstance(failure, FloatingPointError):
        learned = f"its weights are not saved; checkpoints of before are in {out / 'checkpoints'}, where there are any"
    print(f"go on   {how_to_resume(trainer.run, trainer.accelerator.num_processes)}", file=sys.stderr)
    print(f"error: {failure}; {learned}", file=sys.stderr)
    write_report(out)


class _Module(types.ModuleType):
    """`mdpgrpo_fast.train` is this module once it is imported, and the function `train` before: it can be called."""

    def __call__(self, *arguments: Any, **options: Any) -> TrainResult:
        from .api import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Module

if __name__ == "__main__":
    from .cli import end

    end(main)
