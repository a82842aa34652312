"""The training loop on accelerate, in the order in which it runs: sample, score, advantages, update, log."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object

from ..config import MDPGRPOConfig, TrainConfig
from ..data import batches
from ..durable import StorageError
from ..models.blocks import compile_blocks
from ..models.load import context_length
from ..models.policy import Policy
from ..rewards import RewardError, Scorer, TrainerState
from ..rewards.lost import LostSamples, raise_where_all_failed, why_all_failed
from ..rollout.engine import make_engine, raise_on_all_ranks
from ..rollout.vllm.completion import RolloutError
from . import checkpoint, distributed
from .batch import budget_and_notes
from .collect import Collector
from .guard.finite import BadSteps, BadStepsError, check_weights
from .guard.keeper import Keeper
from .guard.stop import Stop, Stopped
from .held_out import answer_and_score
from .hub.card import write_cards
from .metrics import over_ranks, step_metrics
from .run_dir import (
    RunDir,
    bad_rows,
    completion_row,
    flat_config,
    keep_partial,
    peak_memory_mb,
    tracker_values,
    training_rows,
)
from .show.end import evaluation_line, how_to_resume, now, summarize
from .show.progress import Progress, say
from .show.quiet import quiet
from .show.start import Facts, start_lines
from .task import Task, make_policy
from .timing import StageClock, peak_flops, traced
from .update.reference import Reference
from .update.updates import Passes, Updates


class TrainingLoop:
    """MDP-GRPO over a Task. `train()` runs to the end and returns the summary.

    on_step: is called on the main process after each step with a copy of its row of metrics.jsonl; where it returns
    True, the run ends with that step as it would with its last. All ranks are given one, or none is.
    """

    def __init__(
        self, task: Task, run: TrainConfig, method: MDPGRPOConfig, out: RunDir, scorer: Scorer,
        on_step: Callable[[dict[str, Any]], bool | None] | None = None,
    ) -> None:  # fmt: skip
        self.task, self.run, self.method, self.out, self.scorer, self.on_step = task, run, method, out, scorer, on_step
        self.accelerator = distributed.accelerator(
            run, out.path, max(run.prompts_per_step * method.num_generations, len(task.held_out))
        )
        # Data order is the same on every rank, sampling differs (trl#2824).
        torch.manual_seed(run.seed + self.accelerator.process_index)
        data = self.fingerprints = task.fingerprints(run, method)
        policy = make_policy(task.model, run, self.accelerator.device)
        self.budget, notes = budget_and_notes(policy.packing, list(map(len, task.train_ids)), run, method)
        per_step = self.prompts_per_step = run.prompts_per_step * self.accelerator.num_processes
        self.steps = run.steps or max(1, round(run.epochs * len(task.train) / per_step))
        self.facts = Facts.of(
            task, run, method, policy, self.accelerator, steps=self.steps, budget=self.budget, notes=notes
        )
        self.reference = Reference(run, method, self.accelerator, policy)
        for copied in (policy, self.reference.model) if run.compile else ():
            if copied is not None:
                compile_blocks(copied.model)
        optimizer = torch.optim.AdamW(
            [p for p in task.model.parameters() if p.requires_grad], lr=run.learning_rate,
            betas=(0.9, run.adam_beta2), weight_decay=run.weight_decay, fused=run.fused_adamw,
        )  # fmt: skip
        self.model, self.optimizer = distributed.prepare(self.accelerator, policy, optimizer, self.reference.model)
        self.reference.begin(self.model)
        engine = make_engine(run, method, context_length(task.model), self.accelerator)
        scorer.to(self.accelerator.device)
        self.collector = Collector(task, run, method, self.accelerator, scorer, policy, engine)
        if self.collector.thinking.active:
            self.facts.notes.append(
                "rewards score what follows the last closing think tag (--strip-thinking off: whole completions)"
            )
        schedule = "constant_with_warmup" if run.lr_schedule == "constant" else run.lr_schedule
        count = Updates.count(run, self.steps)
        self.scheduler = transformers.get_scheduler(schedule, optimizer, run.warmup_steps, count)
        self.stop = Stop(self.accelerator.num_processes == 1, self._last_words)
        self.updates = Updates(
            run, method, self.accelerator, policy, self.model, self.optimizer, self.scheduler, self.reference,
            self.budget, self.stop.begin_change,
        )  # fmt: skip
        parts = {"scheduler": self.scheduler}
        parts |= {"goal": self.collector.goal} if method.running_goal else {}
        parts |= {"entropy": self.updates.entropy} if self.updates.entropy.adapts else {}
        parts |= {"reference": self.reference} if self.reference.moves else {}
        state = checkpoint.State(
            self.accelerator, self.model, self.optimizer, task.model, task.tokenizer, parts
        )  # fmt: skip
        self.checkpoints = checkpoint.Checkpoints(out.path, state, run, method, data)
        if run.save_every != 0 and (short := self.checkpoints.space_note(run.save_model)):
            self.facts.notes.append(short)
        self.done = self._resume() if run.resume else 0
        logged = checkpoint.logged_rows(self.accelerator, out.path, self.done) if run.resume else []
        if lost := checkpoint.lost_rows(logged, self.done):
            self.say(lost)
        self.history = [r for r in logged if "eval" not in r]  # trainer_state.log_history of reward functions
        self.dropped = sum(row.get("eval", row).get("dropped", 0) for row in logged)
        self.lost, self.bad = LostSamples(run.max_dropped), BadSteps(run.max_bad_steps)
        for row in self.history:
            self.lost.record(row["dropped"], per_step * method.num_generations)
            self.bad.record(row)
        # Evaluated again where what ended the run before came between a step and its evaluation.
        self.evaluated = not run.resume or any("eval" in r and r["step"] == self.done for r in logged)
        self.keeper = Keeper(self.checkpoints, self.model, self.steps, self.stop, self.done)
        self.saved, self.ended = False, False  # ended: all ranks have come to the end, and may wait for each other
        self.best = checkpoint.Best(self.accelerator, out.path, bool(run.resume))
        self.last_rows: list[dict[str, Any]] = []
        self.order = itertools.islice(batches(len(task.train), per_step, self.steps, run.seed), self.done, None)
        self.peak = peak_flops(self.accelerator.device, run.mixed_precision != "no" or run.dtype == "bfloat16")

    def _resume(self) -> int:
        """Steps done by the run that goes on, from its newest checkpoint; says what is another than it was."""
        loaded = self.checkpoints.load(self.steps)
        done, total = loaded.step, loaded.total
        was, rate = self.scheduler.get_last_lr()[0], checkpoint.follow_schedule(self.scheduler)
        said = f"resumed after {done} of {total} steps"
        if total != self.steps or was != rate:
            said += f"; now {self.steps}: the learning rate goes on from {rate:.3g}"
        for line in (*loaded.notes, said):
            self.say(line)
        return done

    @property
    def policy(self) -> Policy:
        """The model and its objective, without what is wrapped around them for training."""
        return self.collector.policy

    @property
    def lm(self) -> Any:
        """The language model itself."""
        return self.policy.model

    # ---- the run ----------------------------------------------------------------------------------------------------

    @quiet()
    def train(self) -> dict[str, Any]:
        """Evaluate, run all steps, save, evaluate. A signal (SIGINT, SIGTERM, SIGHUP) ends it early with a checkpoint
        and the model; an unusable reward with the model."""
        with self.stop:
            return self._train()

    def _train(self) -> dict[str, Any]:
        acc, run = self.accelerator, self.run
        if run.report_to:
            acc.init_trackers("mdpgrpo_fast", config=flat_config(run, self.method))
        resumed_after = self.done
        if acc.is_main_process:
            if run.resume:
                checkpoint.drop_what_came_later(self.out.path, self.done)
            self.out.write_config(run, self.method)
        self.say("\n".join(start_lines(self.facts, run, self.method)))
        started, started_at, train_seconds, interrupted = time.perf_counter(), now(), 0.0, False
        before = after = None
        failure: Exception | None = None
        try:
            if run.resume:
                before = checkpoint.first_evaluation(self.out.path) if acc.is_main_process else None
            else:
                before = self.evaluate(0, "before")
            train_started = time.perf_counter()
            try:
                self.loop()
            except BaseException as e:
                # Weights that are no numbers are the usual reason. Shards are gathered by all ranks together, and these
                # alone end them alike.
                alike = isinstance(e, (RewardError, RolloutError, KeyboardInterrupt, BadStepsError))
                whole = acc.num_processes == 1 or not distributed.is_sharded(acc)
                weights = not isinstance(e, FloatingPointError) or isinstance(e, BadStepsError)
                if isinstance(e, KeyboardInterrupt):
                    self.keeper.at_interrupt(self.done, e)
                try:
                    if weights and (alike or whole):
                        self.save(alone=not alike)
                except StorageError as full:  # no reason to lose the other
                    self.say(str(full))
                raise
            finally:
                train_seconds = time.perf_counter() - train_started
            self.save()
            after = self.evaluate(self.done, "after")
            self.lost.check_end()
        except KeyboardInterrupt as e:
            interrupted = True
            self.keeper.at_interrupt(self.done, e)
            by = f" by {self.stop.name}" if self.stop.signum else ""
            kept = f"; --resume goes on from checkpoint_{self.keeper.step}" if self.keeper.step else ""
            self.say(f"interrupted{by} after step {self.done}{kept}")
        except (RewardError, RolloutError, FloatingPointError) as e:
            interrupted, failure = True, e
            if isinstance(e, RewardError) and e.trace:
                self.say(e.trace)
            if isinstance(e, RolloutError):
                self.say(keep_partial(self.out, acc, e, self.done + 1, self.task.tokenizer))
        except Exception as e:  # of on_step, for one; on other ranks there is none, and they are ended with this one
            lost = distributed.lost_rank(e)
            if acc.num_processes > 1 and lost is None:
                raise
            interrupted, failure = True, lost or e
        summary = summarize(
            run, self.facts, acc.device, before, after, steps=self.done, resumed_after=resumed_after,
            started=started_at, train_seconds=round(train_seconds, 2),
            total_seconds=round(time.perf_counter() - started, 2),
            dropped_samples=self.dropped, dropped_rows=len(self.task.dropped), interrupted=interrupted,
            best=self.best.found, fingerprints=self.fingerprints,
            **({} if failure is None else {"failure": str(failure)}),
        )  # fmt: skip
        try:
            if acc.is_main_process:
                self.out.write_summary(summary)
                if self.saved:
                    write_cards(self.out.path, run, self.method, summary, self.lm, self.task.repo_id)
        except StorageError as e:
            failure = failure or e
        for tracker in acc.trackers:  # acc.end_training() would end the process group too
            tracker.finish()
        if not isinstance(failure, distributed.RankLostError):
            acc.wait_for_everyone()  # a rank that ends first would take the one that writes with it
            self.ended = True
        if failure is not None:
            raise failure
        return summary

    def loop(self) -> None:
        """All steps, each logged as soon as it is done; `done` counts them."""
        run = self.run
        main = self.accelerator.is_main_process
        progress = Progress(run, self.method, self.steps, self.done, main)
        trace_to = self.out.path / "profile" if run.profile and main else None
        with closing(self.collector), progress, traced(trace_to) as profiler:
            if not self.evaluated and self.evaluates_after(self.done):
                self.evaluate(self.done)
            steps = itertools.pairwise(itertools.chain(self.order, [[]]))
            for number, (rows, following) in enumerate(steps, self.done + 1):
                with self.stop.droppable(self.accelerator.device):
                    row = self.step(number, rows, following)
                self.reference.follow(number)
                trace = row.pop("trace")
                self.log(row)
                self.done = number
                self.history.append(row)
                self.stop.whole()
                samples = self.prompts_per_step * self.method.num_generations
                self.dropped += row["dropped"]
                self.lost.check(number, row["dropped"], samples, row["problem"], trace)
                if profiler is not None:
                    profiler.step()
                if self.updates.bad:
                    check_weights(self.accelerator, self.model, number)
                self.bad.check(row, self.updates.bad)
                progress.step(row, self.last_rows)
                if self.evaluates_after(number):
                    self.keeper.boundary(number)
                    self.evaluate(number)
                with self.stop.droppable(self.accelerator.device):
                    ends = main and self.on_step is not None and self.on_step(copy.deepcopy(row)) is True
                if self.keeper.boundary(number, ends):
                    break

    def evaluates_after(self, step: int) -> bool:
        every = self.run.eval_every
        return bool(every) and step > 0 and step % every == 0 and step < self.steps

    def _last_words(self) -> str:
        """How to go on, where the process ends without the end of the run."""
        acc = self.accelerator
        return f"go on   {how_to_resume(self.run, acc.num_processes)}" if acc.is_main_process else ""

    # ---- one step ---------------------------------------------------------------------------------------------------

    def step(self, number: int, rows: list[int], following: Sequence[int] = ()) -> dict[str, Any]:
        """Sample, score, update; the step's metrics. rows: the prompts of all ranks, by their indices; following: those
        of the next step, none after the last."""
        acc, run = self.accelerator, self.run
        clock = StageClock(acc.device)
        self.scorer.state = self.state(number - 1)
        mine, then = self.of_this_rank(rows), self.of_this_rank(following)
        problem = None
        try:
            # vLLM's weights and shards are gathered by all ranks: one that left would be waited for.
            with self.stop.apart(self.collector.engine is None and not distributed.is_sharded(acc)):
                batch = distributed.call_whole(
                    acc, self.model, lambda: self.collector.collect(mine, number, clock, then)
                )
            failed = why_all_failed(batch.scores)
        except (RewardError, RolloutError, FloatingPointError, Stopped) as e:
            problem = e
        with clock.stage("generate"):  # the others' wait for the slowest
            raise_on_all_ranks(acc, self.stop.problem() or problem)
            raise_where_all_failed(gather_object([failed]), f"step {number}", len(batch.scores) * acc.num_processes)
        passes = Passes()
        self.updates.take_kl_off(batch, clock, passes)
        with clock.stage("score"):
            self.collector.settle(batch)
        row = self.updates.apply(batch, number, clock, passes)
        row = step_metrics(batch, row, self.method, peak_memory_mb())
        row["logged"] = self.scorer.take_metrics()
        if self.method.running_goal:
            self.collector.goal.add(list(itertools.chain(*gather_object([self.collector.counted(batch)]))))
        if acc.is_main_process:
            self.last_rows = training_rows(number, batch, run.log_completions)
            self.out.append("completions.jsonl", *self.last_rows)
        if self.updates.bad:
            found = gather_object(bad_rows(number, batch, self.updates.bad, run.seed, acc.process_index))
            if acc.is_main_process:
                self.out.append("bad_steps.jsonl", *found)
        row |= clock.read(
            self.lm, batch.lengths, passes.trained, run.updates_per_rollout, self.peak, without=passes.without
        )
        if batch.staleness:  # its seconds are those of the wait, not of what was sampled
            row["stage_tokens_per_second"].pop("generate", None)
        if acc.num_processes > 1:
            row = over_ranks(gather_object([row]))
        return {"step": number, **row}

    def of_this_rank(self, rows: Sequence[int]) -> list[int]:
        """The prompts of this rank, those of like length next to each other: padded micro-batches are cut to their own
        longest."""
        per_step = self.run.prompts_per_step
        rows = rows[self.accelerator.process_index * per_step :][:per_step]
        return sorted(rows, key=lambda i: len(self.task.train_ids[i]))

    def state(self, done: int) -> TrainerState:
        """What reward functions see of the run after `done` steps."""
        epoch = self.prompts_per_step / len(self.task.train)
        return TrainerState(
            done, self.steps, done * epoch, self.steps * epoch, self.accelerator.is_main_process, self.history
        )

    # ---- evaluation and logging -------------------------------------------------------------------------------------

    def evaluate(self, step: int, phase: str | None = None) -> dict[str, Any] | None:
        """Greedy held-out evaluation over all ranks; rows to completions.jsonl where a phase is named."""
        task, acc = self.task, self.accelerator
        if not task.held_out:
            return None
        self.scorer.state = self.state(step)
        with self.stop.droppable(acc.device):
            result, found = answer_and_score(
                task, self.run, acc, self.scorer, self.collector.thinking, self.model, self.lm
            )
        problems = [s.problem for *_, s in found if s.problem]
        self.dropped += len(problems)
        if problems:
            self.say(f"{len(problems)} held-out samples have no reward, the first because {problems[0]}")
        if self.run.keep_best:
            self.best.keep(step, result, partial(self.save, best=True))
        self.log({"step": step, "eval": result, "phase": phase or "between"})
        if phase != "after":  # which the end of the run says
            self.say(evaluation_line(step, result))
        if phase and acc.is_main_process:
            rows = [
                completion_row(step, phase, task.held_out[i], a.response, 0.0, s, None, a.finished)
                for i, a, s in found
            ]  # fmt: skip
            self.out.append("completions.jsonl", *rows)
        return result

    def log(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.out.append("metrics.jsonl", row)
        if self.run.report_to:
            self.accelerator.log(tracker_values(row), step=row["step"])

    def save(self, best: bool = False, alone: bool = False) -> None:
        """The model as it stands, in from_pretrained form. alone: the other ranks may not come here."""
        if self.run.save_model or best:
            check_weights(self.accelerator, self.model, self.done, alone)
            with self.stop.writing():
                state = distributed.whole_state(self.accelerator, self.model)
                if self.accelerator.is_main_process:
                    self.out.write_model(self.lm, self.task.tokenizer, state, self.run.lora, best)
                    self.saved = self.saved or not best

    def say(self, text: str) -> None:
        """A line on stderr above the progress bar, from the first rank."""
        say(text, self.accelerator.is_main_process)
