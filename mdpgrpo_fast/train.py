"""`python -m mdpgrpo_fast.train`: MDP-GRPO from the command line; without arguments, the embedded demonstration."""

from __future__ import annotations

import os
import sys
import types
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from .config import PRESETS, MDPGRPOConfig, TrainConfig, unknown_name, with_correction, without_effect
from .log import printable

if TYPE_CHECKING:
    from .api import Trainer, TrainResult


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
    name = str(given.get("preset", from_file.get("preset") or demo.get("preset", "paper")))
    if name not in PRESETS:
        raise unknown_name("preset", name, list(PRESETS))
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
    named = {*flags, *changed} - {"config"}
    return run, with_correction(run, method, named), named


_DEFAULTS = {**asdict(TrainConfig()), **asdict(MDPGRPOConfig())}


def _description(model: str | None, preset: str) -> str:
    of = f"of preset {preset}"
    if model is None:
        of += " and of the embedded demonstration; with --model they are the paper's for a model of your own"
    return f"Trains a language model on checkable constraints and rewards.\nDefaults in brackets are those {of}."


def main(argv: list[str] | None = None) -> int:
    """Status: 0 done, 1 a run or its upload that failed, 2 settings that cannot be used; 130, 143 and 129 of a run that
    SIGINT, SIGTERM and SIGHUP ended."""
    from .api import Trainer, refuse_child_processes
    from .cli import report_errors
    from .training.before.ranks import told_to_the_others

    trainer = None
    try:
        with report_errors():
            refuse_child_processes()
            with told_to_the_others():
                run, method, given = read(sys.argv[1:] if argv is None else argv)
                notes = without_effect(run, method, given) if os.environ.get("RANK", "0") == "0" else []
                print(*(f"{line}\n" for line in notes), sep="", end="", file=sys.stderr)
                from .training.checkpoint import FinishedError

                try:
                    trainer = Trainer(config=method, run=run)
                except FinishedError as e:
                    if os.environ.get("RANK", "0") == "0":
                        print(e, file=sys.stderr)
                    return 0
            result = trainer.train_and_return()
    except KeyboardInterrupt:  # before the run had begun, or a second one while it ended
        if trainer is not None and trainer.loop.done:
            from .training.show.end import how_to_resume

            print(f"go on   {how_to_resume(trainer.run, trainer.loop.accelerator.num_processes)}", file=sys.stderr)
        print(f"interrupted after step {trainer.loop.done if trainer else 0}", file=sys.stderr)
        return 130
    except Exception as e:
        from .training.distributed import lost_rank

        failure = lost_rank(e) or e
        if not isinstance(failure, _stopping()):
            raise
        if trainer is None or _speaks(trainer, failure):
            _say_failure(trainer, failure)
        return 1
    if trainer.loop.accelerator.is_main_process:
        _say_end(trainer, result)
    if result.interrupted:
        return 128 + (trainer.loop.stop.signum or 2)
    return 1 if trainer.unwritten else 0


def _stopping() -> tuple[type[Exception], ...]:
    """What ends a run with status 1 and a sentence."""
    from .durable import StorageError
    from .rewards import RewardError
    from .rollout.vllm.completion import RolloutError
    from .training.distributed import RankLostError
    from .training.hub.repository import HubError

    return RewardError, RolloutError, FloatingPointError, HubError, RankLostError, StorageError


def _speaks(trainer: Trainer, failure: Exception) -> bool:
    """Whether this process tells how the run failed: the first, and one of each host where it may be the first that is
    lost."""
    from .training.distributed import RankLostError

    acc = trainer.loop.accelerator
    return bool(acc.is_local_main_process if isinstance(failure, RankLostError) else acc.is_main_process)


def _say_end(trainer: Trainer, result: TrainResult) -> None:
    from .training.hub.repository import upload_command
    from .training.show.end import end_lines

    hub, repo_id = result.hub_url, trainer.loop.task.repo_id
    if repo_id is not None and result.interrupted:
        hub = f"nothing is uploaded yet: {upload_command(trainer.run, trainer.loop.lm, repo_id)}"
    print(printable("\n".join(end_lines(result.summary, trainer.run, result.report, hub))))


def _say_failure(trainer: Trainer | None, failure: Exception) -> None:
    if trainer is None:  # a reward that failed when it was tried
        print(
            printable("\n".join(filter(None, [getattr(failure, "trace", None), f"error: {failure}"]))), file=sys.stderr
        )
        return
    if trainer.result is not None:  # the run is whole, its upload failed
        _say_end(trainer, trainer.result)
        print(printable(f"error: {failure}"), file=sys.stderr)
        return
    from .training.show.end import how_to_resume

    out, loop = trainer.out.path, trainer.loop
    learned = f"what was learned until then is in {out}" if loop.done else "no step was done"
    if not loop.saved and (loop.done or isinstance(failure, FloatingPointError)):
        unsaved = "its weights are not saved; " * loop.accelerator.is_main_process  # only the first knows
        learned = f"{unsaved}checkpoints of before are in {out / 'checkpoints'}, where there are any"
    print(f"go on   {how_to_resume(trainer.run, loop.accelerator.num_processes)}", file=sys.stderr)
    print(printable(f"error: {failure}; {learned}"), file=sys.stderr)


class _Module(types.ModuleType):
    """`mdpgrpo_fast.train` is this module once it is imported, and the function `train` before: it can be called."""

    def __call__(self, *arguments: Any, **options: Any) -> TrainResult:
        from .api import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Module

if __name__ == "__main__":
    from .cli import end

    end(main)
