"""The door in Python: `train(...)` in one call, or a `Trainer` that trains, evaluates and saves."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ConfigError, MDPGRPOConfig, TrainConfig, nearest_preset, preset, with_correction
from .training.before.ranks import agree, told_to_the_others

if TYPE_CHECKING:
    from .data import Source

Row = dict[str, Any]
RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: its directory, the numbers of its summary.json, the rows of its steps.

    summary: held-out scores before and after (`hsr_before`, `reward_after` …), settings, versions, times in seconds.
    history: one row of metrics.jsonl for each step, in their order. hub_url: of the model on the hub, from the first
    rank of a run with push_to_hub that came to its end.
    """

    path: Path
    summary: Row
    history: list[Row] = field(repr=False)
    hub_url: str | None = None

    @property
    def report(self) -> Path:
        """The page of the run."""
        return self.path / "report.html"

    @property
    def model_path(self) -> Path | None:
        """The trained model in from_pretrained form; None where it was not saved."""
        path = self.path / "model"
        return path if path.is_dir() else None

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended it before its last step."""
        return bool(self.summary["interrupted"])

    def __str__(self) -> str:
        from .training.show.end import last_line

        return last_line(self.summary)


class Trainer:
    """MDP-GRPO on a model, prompts and rewards; for scripts and notebooks.

    model: a directory or hub id, or a causal language model of transformers that is loaded, which is trained in place;
        None: the embedded seed policy. tokenizer: of a loaded model, where it does not name its directory.
    prompts, eval_prompts: a file, folder or hub id; a list of texts, of chats or of rows (`prompt` and the columns that
        rewards take); a data set of the package datasets, a table of pandas. eval_prompts are answered greedily before
        and after; None: none.
    rewards: functions of TRL's signature, lambdas too, or names as `--reward` takes them; None: those of `run`, which
        are the constraints of each prompt. reward_weights: one for each.
    config: the method, as `preset("paper", num_generations=8)`; None: run's preset.
    run: everything else; arguments of this class go over it. None: the defaults, and for the embedded model those of
        the demonstration.
    on_step: called after each step with its row of metrics.jsonl; where it returns True the run ends as it would after
        its last step.

    Everything that can be wrong is found here, before anything is written. Raises: ConfigError for what cannot be used,
    in one line that names the argument, and its subclass FinishedError where run.resume is "auto" and output_dir holds
    this very run with nothing left to do; RewardError where a reward fails on two sample rows.
    """

    def __init__(
        self,
        model: Any = None,
        prompts: Source | None = None,
        rewards: Sequence[str | RewardFunction] | str | RewardFunction | None = None,
        *,
        eval_prompts: Source | None = None,
        reward_weights: Sequence[float] | None = None,
        tokenizer: Any = None,
        config: MDPGRPOConfig | None = None,
        run: TrainConfig | None = None,
        on_step: Callable[[Row], bool | None] | None = None,
    ) -> None:
        refuse_child_processes()
        with told_to_the_others():
            from .models.adapters import resolve_adapter
            from .rewards import Scorer, named_spec
            from .rollout.vllm.completion import RolloutError
            from .training.before.checks import check
            from .training.checkpoint import check_unfinished, resolve_resume
            from .training.checkpoint.data import fingerprint
            from .training.loop import TrainingLoop
            from .training.run_dir import RunDir
            from .training.task import prepare

            for name, value, kind in (("config", config, MDPGRPOConfig), ("run", run, TrainConfig)):
                if value is not None and not isinstance(value, kind):
                    raise ConfigError(f"{name} must be a {kind.__name__}; got {type(value).__name__}")
            if run is None:
                run, demo = _demonstration() if model is None else (TrainConfig(), None)
                config = config or demo
            config = config or preset(run.preset)
            named, model = _named(model)
            train_file, prompts = _named(prompts)
            eval_file, eval_prompts = _named(eval_prompts)
            given = {"model": named, "train_file": train_file, "eval_file": eval_file}
            changed: Row = {name: value for name, value in given.items() if value is not None}
            several = rewards is None or isinstance(rewards, (list, tuple))
            functions: Any = rewards if several else [rewards]
            for reward in functions or ():
                if not (isinstance(reward, str) or callable(reward)):
                    raise ConfigError(f"rewards must be functions or names of rewards; got {reward!r}")
            if functions is not None:
                changed["reward"] = [named_spec(reward) for reward in functions]
            if reward_weights is not None:
                changed["reward_weights"] = reward_weights
            run = resolve_adapter(replace(run, preset=nearest_preset(config, run.preset), **changed))
            by_name = model is None and functions is None  # what these do, no file says
            run, asked = resolve_resume(run), run.resume
            config = with_correction(run, config)
            self.run, self.config, self._trained = run, config, False
            self.result: TrainResult | None = None  # of train(), also where the upload after it failed
            self.unwritten: str | None = None  # why there is no report
            check(run, config, model=model is not None, prompts=prompts is not None)
            self.scorer = Scorer.of(run, functions)
            weakref.finalize(self, self.scorer.stop)
            self.out = RunDir(run.output_dir, create=False)
            try:
                task = prepare(
                    run, self.scorer, model=model, tokenizer=tokenizer, prompts=prompts, eval_prompts=eval_prompts
                )
                agree(
                    run,
                    config,
                    lambda: {
                        "training prompts": task.fingerprint,
                        "eval_prompts": fingerprint(task.held_out_ids, task.held_out),
                        "on_step given": on_step is not None,
                    },
                )
                if asked == "auto" and by_name:
                    check_unfinished(run, config, task)
                if run.resume and os.environ.get("RANK", "0") == "0":
                    self.out.resume()
                self.loop = TrainingLoop(task, run, config, self.out, self.scorer, on_step)
            except BaseException as e:  # else its processes go on to train()
                self.scorer.stop()
                self.out.release()
                if isinstance(e, RolloutError):
                    raise ConfigError(str(e)) from None
                raise

    @property
    def model(self) -> Any:
        """The model, as it is trained by now."""
        return self.loop.lm

    @property
    def tokenizer(self) -> Any:
        return self.loop.task.tokenizer

    def train(self) -> TrainResult:
        """All steps, with everything in run.output_dir.

        Ctrl-C, SIGTERM and SIGHUP end it early, with a checkpoint, and keep what was learned; the latter two are
        delivered once more after that, when the handlers are those of before. In notebooks and threads they are not
        looked at.

        Raises: what ends a run, after its directory is complete: RewardError, RolloutError, FloatingPointError,
            StorageError, RankLostError; HubError where only its upload failed; ConfigError where another run has taken
            output_dir; RuntimeError where it has been called before.
        """
        result = self.train_and_return()
        if self.loop.stop.signum in (signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(self.loop.stop.signum)
        return result

    def train_and_return(self) -> TrainResult:
        """`train`, but that a signal that ended the run is only told (`loop.stop.signum`)."""
        from .training.hub.repository import upload

        if self._trained:
            raise RuntimeError("train() runs once; a run with run.resume goes on from a checkpoint")
        self._trained = True
        loop, out = self.loop, self.out
        try:
            self._begin()
            try:
                with self.scorer:
                    summary = loop.train()
            finally:
                if loop.accelerator.is_main_process:
                    self._report()
                if loop.ended:
                    # A rank that ends first would take the one that writes with it.
                    loop.accelerator.wait_for_everyone()
            self.result = TrainResult(out.path, summary, loop.history)
            repo_id = loop.task.repo_id
            if repo_id is not None and not self.result.interrupted:
                self.result = replace(self.result, hub_url=upload(self.run, loop.lm, repo_id))
            return self.result
        finally:
            out.release()

    def _begin(self) -> None:
        """The directory of a new run, which the first rank makes. Raises: ConfigError, on all ranks."""
        from .durable import StorageError
        from .rollout.engine import raise_on_all_ranks

        loop, out, problem = self.loop, self.out, None
        try:
            if loop.accelerator.is_main_process and not self.run.resume:
                out.make()
                if loop.task.dropped:
                    out.append("dropped_rows.jsonl", *map(asdict, loop.task.dropped))
        except (ConfigError, StorageError) as e:
            problem = e
        raise_on_all_ranks(loop.accelerator, problem)
        if out.moved:
            loop.say(f"an earlier {out.path} is now {out.moved}")
        if out.unlocked:
            loop.say(f"another run in {out.path} would not be noticed: its file system has no locks ({out.unlocked})")

    def _report(self) -> None:
        from .durable import StorageError
        from .report.page import write_report

        try:
            write_report(self.out.path)
        except (ConfigError, OSError, StorageError) as e:  # no reason to lose the result
            self.unwritten = f"the report cannot be written: {e}"
            self.loop.say(self.unwritten)

    def evaluate(self, prompts: Source | None = None) -> Row:
        """Greedy answers to prompts (None: the held-out ones), scored: hsr, ssr, reward with their intervals.

        Raises: ConfigError where there are no such prompts.
        """
        from .data import read_prompts, tokenize
        from .models.load import context_length
        from .training.held_out import answer_and_score

        loop, task = self.loop, self.loop.task
        if prompts is not None:
            read = read_prompts(prompts, self.run)
            read, ids = tokenize(read, task.tokenizer, self.run, context=context_length(task.model), eos=task.eos)
            task = replace(task, held_out=read.examples, held_out_ids=ids)
        if not task.held_out:
            raise ConfigError("prompts must be given where the run has no eval_prompts; got none")
        with self.scorer:
            thinking = loop.collector.thinking
            return answer_and_score(task, self.run, loop.accelerator, self.scorer, thinking, loop.model, loop.lm)[0]

    def save(self, path: str | Path) -> Path:
        """Writes the model as it is by now in from_pretrained form, LoRA adapters merged, with its tokenizer.

        Raises: ConfigError where the path exists; StorageError where it cannot be written, and nothing is there then.
        """
        from .durable import StorageError
        from .rollout.engine import raise_on_all_ranks
        from .training.distributed import max_over_ranks, whole_state
        from .training.run_dir import write_new_folder, write_pretrained
        from .training.show.quiet import quiet

        path, loop, acc = Path(path), self.loop, self.loop.accelerator
        # As the first rank sees it, before that writes.
        if max_over_ranks(acc, int(acc.is_main_process and path.exists())):
            raise ConfigError(f"path {str(path)!r} exists; a model is written into a new directory")
        problem = None
        with quiet():
            state = whole_state(acc, loop.model)
            try:
                if acc.is_main_process:
                    tokenizer, lora = self.tokenizer, self.run.lora
                    write_new_folder(path, lambda folder: write_pretrained(folder, loop.lm, tokenizer, state, lora))
            except StorageError as e:
                problem = e
        raise_on_all_ranks(acc, problem)
        return path


def train(
    model: Any = None,
    prompts: Source | None = None,
    rewards: Sequence[str | RewardFunction] | str | RewardFunction | None = None,
    *,
    eval_prompts: Source | None = None,
    reward_weights: Sequence[float] | None = None,
    tokenizer: Any = None,
    config: MDPGRPOConfig | None = None,
    run: TrainConfig | None = None,
    on_step: Callable[[Row], bool | None] | None = None,
) -> TrainResult:
    """`Trainer(...).train()`; arguments, result and errors are those. Without arguments: the demonstration."""
    return Trainer(
        model, prompts, rewards, eval_prompts=eval_prompts, reward_weights=reward_weights, tokenizer=tokenizer,
        config=config, run=run, on_step=on_step,
    ).train()  # fmt: skip


def refuse_child_processes() -> None:
    """Raises ConfigError in a process that imports its parent's script to begin with: its run would be a second one,
    and would move the first one's directory."""
    import multiprocessing

    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(
            "this script starts a run when a child process imports it: its call belongs under "
            "`if __name__ == '__main__':`"
        )


def _named(given: Any) -> tuple[str | None, Any]:
    """(path or hub id, None), or (None, what is in memory)."""
    return (str(given), None) if isinstance(given, (str, Path)) else (None, given)


def _demonstration() -> tuple[TrainConfig, MDPGRPOConfig]:
    from .cli import parse, read_yaml
    from .config import PRESETS
    from .demo import DEMO_DIR

    settings = read_yaml(DEMO_DIR / "demo.yaml")
    layers = [("demo.yaml", settings), ("preset", PRESETS[settings["preset"]])]
    run, config = parse([], TrainConfig, MDPGRPOConfig, prog="", layers=layers)
    return run, config
