"""`python -m mdpgrpo_fast.train`: MDP-GRPO from the command line; without arguments, the embedded demonstration."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from .config import PRESETS, ConfigError, MDPGRPOConfig, TrainConfig

if TYPE_CHECKING:
    from .training.loop import TrainingLoop


def resolve(argv: list[str]) -> tuple[TrainConfig, MDPGRPOConfig]:
    """The configuration of a command line: defaults, then preset, then --config file, then flags.

    Without a model the embedded demonstration's settings (demo/demo.yaml) lie under the file. Raises ConfigError.
    """
    import argparse

    from .cli import parse, read_yaml
    from .config import unknown_name
    from .demo import DEMO_DIR

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--preset")
    first.add_argument("--model")
    early, rest = first.parse_known_args(argv)
    given = {k: v for k, v in (("preset", early.preset), ("model", early.model)) if v is not None}
    from_file = read_yaml(early.config) if early.config else {}
    if early.preset is not None and early.preset != from_file.get("preset", early.preset):
        # The file's method settings follow from its own preset; a preset on the command line replaces both.
        method_knobs = {f.name for f in fields(MDPGRPOConfig)}
        from_file = {k: v for k, v in from_file.items() if k not in method_knobs}
    model = given.get("model", from_file.get("model"))
    demo = {} if model is not None else read_yaml(DEMO_DIR / "demo.yaml")
    name = given.get("preset", from_file.get("preset", demo.get("preset", "paper")))
    if name not in PRESETS:
        raise unknown_name("preset", str(name), list(PRESETS))
    layers: list[tuple[str, dict[str, Any]]] = [
        ("demo.yaml", demo),
        (f"preset {name}", PRESETS[name]),
        (str(early.config), from_file),
        ("command line", given),
    ]
    run, method = parse(rest, TrainConfig, MDPGRPOConfig, prog="python -m mdpgrpo_fast.train", layers=layers)
    return run, method


def refuse_child_processes() -> None:
    """Raises ConfigError in a process that imports its parent's script to begin with: its run would be a second one,
    and would move the first one's directory."""
    import multiprocessing

    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(
            "this script starts a run when a child process imports it: its call belongs under "
            "`if __name__ == '__main__':`"
        )


def make_trainer(argv: list[str], workers: ExitStack) -> TrainingLoop:
    """The trainer of a command line, all that can be checked before the first step checked, and its run directory made.

    workers: ends the processes that score. Raises: ConfigError; RewardError where a reward fails on two sample rows.
    """
    refuse_child_processes()
    run, method = resolve(argv)

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


if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    from .training.distributed import exit_process

    exit_process(code)
