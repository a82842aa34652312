"""The training loop on accelerate, top to bottom: sample, score, advantages, update, log."""

from __future__ import annotations

import copy
import itertools
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from .. import evaluate
from ..config import ConfigError, MDPGRPOConfig, TrainConfig
from ..data import batches
from ..kernels import onednn
from ..models.blocks import compile_blocks, enable_checkpointing
from ..models.load import context_length
from ..models.lora import save_adapters, save_merged, without_adapters
from ..models.packing import Packing
from ..models.policy import Policy
from ..reference import default_denominator
from ..rewards import RewardError, Scorer
from ..rollout.engine import make_engine, raise_on_all_ranks
from ..rollout.generate import Rollout
from ..rollout.vllm.sampler import RolloutError
from . import checkpoint, distributed
from .batch import Batch, Piece, packed_bins, packed_pieces, padded_pieces
from .collect import Collector
from .metrics import TokenStatistics, group_health, over_ranks, slot_statistics, why_zero
from .run_dir import (
    RunDir,
    completion_row,
    flat_config,
    keep_partial,
    peak_memory_mb,
    progress_values,
    sample_table,
    shares,
    spread,
    summarize,
    tracker_values,
)
from .task import Task
from .timing import StageClock, peak_flops, traced

# Pairs of a query with a key, masked ones too, over those of padded rows: as many as fewer tokens elsewhere outweigh.
MOST_PAIRS = 2.0


class Trainer:
    """MDP-GRPO over a Task. `train()` runs to the end and returns the summary."""

    def __init__(self, task: Task, run: TrainConfig, method: MDPGRPOConfig, out: RunDir, scorer: Scorer) -> None:
        self.task, self.run, self.method, self.out, self.scorer = task, run, method, out, scorer
        self.accelerator = distributed.accelerator(run, out.path)
        # Data order is the same on every rank, sampling differs (trl#2824).
        torch.manual_seed(run.seed + self.accelerator.process_index)
        # Never in training mode: dropout would make the ratio differ from 1 on-policy (trl#3234).
        task.model.eval()
        if run.cpu_linear == "auto" and self.accelerator.device.type == "cpu":
            onednn.install(task.model)
        if run.gradient_checkpointing:
            enable_checkpointing(task.model)
        policy = Policy(
            task.model, run.lm_head, run.workspace_mb << 20, run.fp32_logits, run.skip_idle, run.packing,
            self.accelerator.device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.mixed_precision),
        ).eval()  # fmt: skip
        self.budget = self.micro_batch_budget(policy.packing) if policy.packing else 0
        if self.budget and run.micro_batch_size != TrainConfig().micro_batch_size:
            self.say("micro_batch_size is not used: groups are packed, by tokens_per_micro_batch")
        self.has_kl = method.needs_reference
        # Under LoRA the reference is the model without its adapters.
        separate = self.has_kl and not run.lora
        self.reference = copy.deepcopy(policy).requires_grad_(False) if separate else None
        for copied in (policy, self.reference) if run.compile else ():
            if copied is not None:
                compile_blocks(copied.model)
        parameters = [p for p in task.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=run.learning_rate,
            betas=(0.9, run.adam_beta2),
            weight_decay=run.weight_decay,
            fused=run.fused_adamw,
        )
        per_step = run.prompts_per_step * self.accelerator.num_processes
        self.steps = run.steps or max(1, round(run.epochs * len(task.train) / per_step))
        self.model, self.optimizer = distributed.prepare(self.accelerator, policy, optimizer, self.reference)
        engine = make_engine(run, method, context_length(task.model), self.accelerator)
        self.collector = Collector(task, run, method, self.accelerator, scorer, policy, engine)
        schedule = "constant_with_warmup" if run.lr_schedule == "constant" else run.lr_schedule
        self.scheduler = transformers.get_scheduler(
            schedule, optimizer, run.warmup_steps, self.steps * run.updates_per_rollout
        )
        self.accelerator.register_for_checkpointing(self.scheduler)
        self.done = checkpoint.load(self.accelerator, out.path) if run.resume else 0
        self.last_rows: list[dict[str, Any]] = []
        self.order = itertools.islice(batches(len(task.train), per_step, self.steps, run.seed), self.done, None)
        self.peak = peak_flops(self.accelerator.device, run.mixed_precision != "no" or run.dtype == "bfloat16")

    @property
    def policy(self) -> Policy:
        """The model and its objective, without what is wrapped around them for training."""
        return self.collector.policy

    @property
    def lm(self) -> Any:
        """The language model itself."""
        return self.policy.model

    def micro_batch_budget(self, packing: Packing) -> int:
        """Tokens of a packed forward pass; 0: pad. Raises ConfigError for fewer than the largest group may need."""
        prompts, g, most = (
            list(map(len, self.task.train_ids)),
            self.method.num_generations,
            self.run.max_completion_length,
        )
        longest, usual = max(prompts), sum(prompts) / len(prompts)
        largest, given = longest + g * most, self.run.tokens_per_micro_batch
        pairs = (usual + g * most) ** 2 / (g * (usual + most) ** 2)
        mode = packing.mode_for(longest + most)
        if mode == "masks" and pairs > MOST_PAIRS and self.run.packing == "auto":
            self.say(
                f"prompts are not shared inside a group: under masks attention would look at {pairs:.1f} times the "
                "pairs; shorter completions, --attention sdpa where the model has it, or --packing on change that"
            )
            return 0
        if given is not None and given < largest:
            raise ConfigError(
                f"tokens_per_micro_batch must hold a whole group: a prompt of {longest} and {g} completions of "
                f"{self.run.max_completion_length} tokens make {largest}; got {given}"
            )
        # Under masks attention grows with the square of what is packed together: no more than one group needs.
        return given or (largest if mode == "masks" else max(8192, largest))

    # ---- one step ---------------------------------------------------------------------------------------------------

    def pieces(self, batch: Batch) -> list[Piece]:
        """The micro-batches, as many on every rank."""
        if not self.budget:
            return padded_pieces(batch, self.method, self.run.micro_batch_size)
        packed = packed_bins(batch, self.method, self.budget)
        return packed_pieces(batch, self.method, packed, distributed.most(self.accelerator, max(1, len(packed))))

    def reference_logprobs(self, pieces: list[Piece]) -> list[Tensor | None]:
        if not self.has_kl:
            return [None] * len(pieces)
        reference = self.policy if self.reference is None else self.reference
        # In the policy's own precision, or the KL of two equal models would not be 0.
        with self.accelerator.autocast(), without_adapters(self.lm) if self.run.lora else nullcontext():
            return [
                reference.logprobs(p.inputs, p.mask, p.lengths, self.method.kl_temperature, self.run.backend)
                for p in pieces
            ]

    def update(self, batch: Batch, pieces: list[Piece], clock: StageClock) -> dict[str, Any]:
        """All optimiser updates on one batch. Normalisers are those of the whole batch, all ranks and micro-batches."""
        acc, method, run = self.accelerator, self.method, self.run
        with clock.stage("reference"):
            refs = self.reference_logprobs(pieces)
        olds: list[Tensor | None] = [None] * len(pieces)
        denominator = acc.reduce(
            default_denominator(batch.mask.sum(1), method.aggregation, run.max_completion_length).float(), "sum"
        )
        local = method.aggregation == "bnpo"
        # DDP averages gradients over ranks; the denominator has already counted them all.
        scale = 1 / max(1, sum(p.counted > 0 for p in pieces)) if local else acc.num_processes
        row: dict[str, Any] = {}
        for update in range(run.updates_per_rollout):
            stats, loss_sum = TokenStatistics(), torch.zeros((), device=acc.device)
            for i, piece in enumerate(pieces):
                acc.sync_gradients = i == len(pieces) - 1
                # Shards are reduced each time: otherwise every rank would keep gradients of all weights.
                whole = acc.sync_gradients or distributed.is_sharded(acc)
                with nullcontext() if whole else acc.no_sync(self.model):
                    with clock.stage("forward"):
                        out = self.model(
                            piece.inputs,
                            piece.mask,
                            method,
                            piece.lengths,
                            **piece.objective,
                            max_completion_length=run.max_completion_length,
                            old_logprobs=olds[i],
                            ref_logprobs=refs[i],
                            denominator=None if local else denominator,
                            backend=run.backend,
                        )
                    with clock.stage("backward"):
                        acc.backward(out.loss * scale)
                loss_sum += out.loss.detach() * scale
                if update == 0:
                    olds[i] = out.logprobs
                stats.add(out)
            with clock.stage("optimizer"):
                norm = acc.clip_grad_norm_(self.model.parameters(), run.max_grad_norm or float("inf"))
                learning_rate = self.scheduler.get_last_lr()[0]
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            row = {
                "loss": acc.reduce(loss_sum, "mean").item(),
                **stats.read(),
                "grad_norm": distributed.norm_of(norm),
                "learning_rate": learning_rate,
            }
        return row

    def step(self, number: int, rows: list[int]) -> dict[str, Any]:
        """Sample, score, update; the step's metrics."""
        acc, run = self.accelerator, self.run
        clock = StageClock(acc.device)
        rows = rows[acc.process_index * run.prompts_per_step :][: run.prompts_per_step]
        # Prompts of like length next to each other: padded micro-batches are cut to their own longest.
        rows = sorted(rows, key=lambda i: len(self.task.train_ids[i]))
        problem = None
        try:
            batch = distributed.call_whole(acc, self.model, lambda: self.collector.collect(rows, number, clock))
        except (RewardError, RolloutError, FloatingPointError) as e:
            problem = e
        with clock.stage("generate"):  # the others' wait for the slowest
            raise_on_all_ranks(acc, problem)
        with clock.stage("forward"):
            pieces = self.pieces(batch)
        row = self.update(batch, pieces, clock)

        rollout, has_kl = batch.rollout, self.has_kl
        quality = evaluate.from_scores(batch.examples, batch.scores)
        row.update(group_health(batch.rewards, batch.valid, batch.adv, has_kl))
        row.update(
            hsr=quality["hsr"],
            ssr=quality["ssr"],
            completion_length=rollout.lengths.float().mean().item(),
            truncated=1 - rollout.finished.float().mean().item(),
            dropped=sum(s.total is None for s in batch.scores),
            slots=slot_statistics(batch.rewards, batch.valid, self.method, batch.weight, batch.mask),
            memory_mb=peak_memory_mb(),
            note=why_zero(row["loss"], row["grad_norm"], int(batch.mask.sum()), batch.adv, self.method, has_kl),
        )
        self.log_completions("train", number, batch, rollout)
        row.update(clock.read(self.lm, batch.lengths, pieces, run.updates_per_rollout, self.peak))
        if acc.num_processes > 1:
            row = over_ranks(gather_object([row]))
        return {"step": number, **row}

    # ---- evaluation and logging -------------------------------------------------------------------------------------

    def evaluate(self, step: int, phase: str | None = None) -> dict[str, Any] | None:
        """Greedy held-out evaluation over all ranks; rows to completions.jsonl where a phase is named."""
        task, acc = self.task, self.accelerator
        if not task.held_out:
            return None
        mine = list(range(acc.process_index, len(task.held_out), acc.num_processes))

        def answer() -> tuple[list[str], list[bool]]:
            return evaluate.answer(
                self.lm,
                task.tokenizer,
                [task.held_out_ids[i] for i in mine],
                task.eos,
                self.run.max_completion_length,
                self.run.eval_batch_size,
            )

        responses, finished = distributed.call_whole(acc, self.model, answer)
        problem, scores = None, []
        try:
            scores = self.scorer([task.held_out[i] for i in mine], responses)
        except RewardError as e:
            problem = e
        raise_on_all_ranks(acc, problem)
        gathered = sorted(gather_object(list(zip(mine, responses, finished, scores, strict=True))), key=lambda x: x[0])
        result = evaluate.from_scores([task.held_out[i] for i, *_ in gathered], [s for *_, s in gathered])
        problems = [s.problem for *_, s in gathered if s.problem]
        if problems:
            self.say(f"{len(problems)} held-out samples count as unsatisfied, the first because {problems[0]}")
        self.log({"step": step, "eval": result, "phase": phase or "between"})
        for i, response, done, score in gathered if phase and acc.is_main_process else []:
            row = completion_row(step, phase or "", task.held_out[i], response, 0.0, score, None, done)
            self.out.append("completions.jsonl", row)
        return result

    def log(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.out.append("metrics.jsonl", row)
        if self.run.report_to:
            self.accelerator.log(tracker_values(row), step=row["step"])

    def log_completions(self, phase: str, step: int, batch: Batch, rollout: Rollout) -> None:
        if not self.accelerator.is_main_process:
            return
        advantage = batch.adv.advantage.flatten().tolist()
        self.last_rows = [
            completion_row(
                step,
                phase,
                batch.examples[i],
                batch.responses[i],
                rollout.temperature[i].item(),
                batch.scores[i],
                advantage[i],
                bool(rollout.finished[i]),
            )
            for i in spread(len(batch.responses), self.run.log_completions)
        ]
        for row in self.last_rows:
            self.out.append("completions.jsonl", row)

    def train(self) -> dict[str, Any]:
        """Evaluate, run all steps, save, evaluate. Ctrl-C or an unusable reward stops early and keeps the model."""
        acc, run = self.accelerator, self.run
        if run.report_to:
            acc.init_trackers("mdpgrpo_fast", config=flat_config(run, self.method))
        started = time.perf_counter()
        before = after = None
        train_seconds, stopped, failure = 0.0, False, None
        try:
            if run.resume:
                before = checkpoint.first_evaluation(self.out.path) if acc.is_main_process else None
                self.say(f"resumed after {self.done} steps")
            else:
                before = self.evaluate(0, "before")
            self.say(f"held-out before: {shares(before)}")
            train_started = time.perf_counter()
            try:
                self.loop()
            finally:
                train_seconds = time.perf_counter() - train_started
                self.save()
            after = self.evaluate(self.done, "after")
            self.say(f"held-out after: {shares(after)}")
        except KeyboardInterrupt:
            stopped = True
            self.say(f"interrupted after {self.done} steps")
        except (RewardError, RolloutError) as e:
            stopped, failure = True, e
            if isinstance(e, RolloutError):
                kept = keep_partial(self.out, acc, e, self.done + 1, self.task.tokenizer)
                where = self.out.path / "partial_rollout.jsonl"
                self.say(f"{kept} completions of step {self.done + 1} are kept in {where}")
        summary = {
            **summarize(run, before, after),
            "steps": self.done,
            "train_seconds": round(train_seconds, 2),
            "total_seconds": round(time.perf_counter() - started, 2),
            "device": torch.cuda.get_device_name(acc.device) if acc.device.type == "cuda" else acc.device.type,
            "processes": acc.num_processes,
            "peak_memory_mb": peak_memory_mb(),
            "dropped_samples": self.scorer.dropped,
            "interrupted": stopped,
        }
        if acc.is_main_process:
            self.out.write_json("summary.json", summary)
        if run.report_to:
            acc.end_training()
        if failure is not None:
            raise failure
        return summary

    def loop(self) -> None:
        """All steps, each logged as soon as it is done; `done` counts them."""
        run = self.run
        main = self.accelerator.is_main_process
        bar = tqdm(total=self.steps, initial=self.done, disable=not main, dynamic_ncols=True, mininterval=1.0)
        said: set[str] = set()
        with bar, traced(self.out.path / "profile" if run.profile and main else None) as profiler:
            for number, rows in enumerate(self.order, self.done + 1):
                row = self.step(number, rows)
                self.log(row)
                self.done = number
                bar.update()
                if profiler is not None:
                    profiler.step()
                bar.set_postfix_str(progress_values(row, row["hsr"], row["ssr"]), refresh=False)
                if row["note"] and row["note"] not in said:
                    said.add(row["note"])
                    self.say(f"step {number}: {row['note']}")
                if row["dropped"] and "dropped" not in said:
                    said.add("dropped")
                    self.say(
                        f"step {number}: {row['dropped']} samples dropped, the first because {self.collector.problem}"
                    )
                if number % max(1, self.steps // 4) == 0 and run.log_completions:
                    self.say(f"step {number}, some completions:\n{sample_table(self.last_rows)}")
                if run.eval_every and number % run.eval_every == 0 and number < self.steps:
                    self.evaluate(number)
                if run.save_every and number % run.save_every == 0:
                    checkpoint.save(self.accelerator, self.out.path, number)

    def save(self) -> None:
        """The model as it stands, in from_pretrained form."""
        if not self.run.save_model:
            return
        state = distributed.whole_state(self.accelerator, self.model)
        if self.accelerator.is_main_process and self.run.lora:
            save_merged(self.lm, self.task.tokenizer, self.out.path / "model", state)
            save_adapters(self.lm, self.out.path / "adapters", state)
        elif self.accelerator.is_main_process:
            self.lm.save_pretrained(self.out.path / "model", state_dict=state)
            self.task.tokenizer.save_pretrained(self.out.path / "model")

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)
