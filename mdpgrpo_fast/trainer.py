"""The training loop on accelerate, top to bottom: sample, score, advantages, update, log."""

from __future__ import annotations

import copy
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from . import __version__, evaluate, ops
from .config import MDPGRPOConfig, TrainConfig
from .data import Example, batches
from .metrics import TokenStatistics, group_health, slot_statistics, why_zero
from .models import Policy
from .reference import Advantages, default_denominator
from .rewards import RewardError, Score, Scorer
from .rollout import Rollout, decode, generate
from .runlog import (
    RunDir,
    completion_row,
    flat_config,
    peak_memory_mb,
    progress_values,
    sample_table,
    shares,
    spread,
    tracker_values,
)
from .task import Task


@dataclass
class Batch:
    """One step's completions with everything the updates need. N = P * G rows, groups adjacent."""

    rollout: Rollout
    examples: list[Example]
    responses: list[str]
    scores: list[Score]
    rewards: Tensor  # (P, G)
    valid: Tensor  # (P, G) bool
    adv: Advantages
    mask: Tensor  # (N, L) bool: tokens that count in the loss
    weight: Tensor | None  # (N, L) importance weight, `corrected` only


class Trainer:
    """MDP-GRPO over a Task. `train()` runs to the end and returns the summary."""

    def __init__(self, task: Task, run: TrainConfig, method: MDPGRPOConfig, out: RunDir, scorer: Scorer) -> None:
        self.task, self.run, self.method, self.out, self.scorer = task, run, method, out, scorer
        self.accelerator = Accelerator(
            mixed_precision=run.mixed_precision, cpu=run.cpu, log_with=run.report_to or None, project_dir=out.path
        )
        # Data order is the same on every rank, sampling differs (trl#2824).
        torch.manual_seed(run.seed + self.accelerator.process_index)
        # Never in training mode: dropout would make the ratio differ from 1 on-policy (trl#3234).
        task.model.eval()
        policy = Policy(task.model, run.lm_head, run.workspace_mb << 20, run.fp32_logits, run.skip_idle).eval()
        self.reference = copy.deepcopy(policy).requires_grad_(False) if method.needs_reference else None
        if self.reference is not None:
            self.reference.to(self.accelerator.device)
        parameters = [p for p in task.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=run.learning_rate, betas=(0.9, run.adam_beta2), weight_decay=run.weight_decay
        )
        per_step = run.prompts_per_step * self.accelerator.num_processes
        self.steps = run.steps or max(1, round(run.epochs * len(task.train) / per_step))
        self.model, self.optimizer = self.accelerator.prepare(policy, optimizer)
        schedule = "constant_with_warmup" if run.lr_schedule == "constant" else run.lr_schedule
        self.scheduler = transformers.get_scheduler(
            schedule, optimizer, run.warmup_steps, self.steps * run.updates_per_rollout
        )
        self.problem = ""
        self.done = 0
        self.last_rows: list[dict[str, Any]] = []
        self.order = batches(len(task.train), per_step, self.steps, run.seed)

    @property
    def lm(self) -> Any:
        """The language model itself, without what is wrapped around it for training."""
        return self.accelerator.unwrap_model(self.model).model

    # ---- one step ---------------------------------------------------------------------------------------------------

    def sample(self, rows: list[int]) -> Rollout:
        """G completions of each prompt in one call, slot g at its own temperature."""
        g, method = self.method.num_generations, self.method
        return generate(
            self.lm,
            [self.task.train_ids[i] for i in rows for _ in range(g)],
            temperature=method.slot_temperatures * len(rows),
            eos=self.task.eos,
            max_new_tokens=self.run.max_completion_length,
            top_k=method.top_k,
            top_p=method.top_p,
            min_p=method.min_p,
        )

    def score(self, rollout: Rollout, rows: list[int]) -> Batch:
        """Rewards, advantages and the mask of the tokens that count."""
        g, device, method = self.method.num_generations, self.accelerator.device, self.method
        examples = [self.task.train[i] for i in rows for _ in range(g)]
        responses = decode(rollout, self.task.tokenizer)
        scores = self.scorer(examples, responses)
        problems = [s.problem for s in scores if s.problem]
        if problems:
            self.problem = problems[0]
        totals = torch.tensor([0.0 if s.total is None else s.total for s in scores], device=device).view(-1, g)
        valid = torch.tensor([s.total is not None for s in scores], device=device).view(-1, g)
        k = torch.tensor([self.task.train[i].num_constraints(self.run.num_constraints) for i in rows], device=device)
        adv = ops.advantages(totals, k, method, valid=valid, backend=self.run.backend)
        counts = valid.flatten() & (rollout.finished | (not method.mask_truncated))
        mask = rollout.mask & counts[:, None]
        weight = None
        if method.temperature_objective == "corrected":
            gap = (rollout.policy_logprobs - rollout.sampling_logprobs).masked_fill(~rollout.mask, 0)
            weight = gap.exp().clamp(max=method.importance_weight_cap)
        return Batch(rollout, examples, responses, scores, totals, valid, adv, mask, weight)

    def micro_batches(self, batch: Batch) -> list[dict[str, Any]]:
        """Row slices cut to their own longest prompt and completion; what a forward pass and its loss need."""
        r, size, pieces = batch.rollout, self.run.micro_batch_size, []
        advantage, kl_beta = batch.adv.advantage.flatten(), batch.adv.kl_beta.flatten()
        counted, contributing = self.counts(batch)
        per_row = self.method.temperature_objective == "per_row"
        for start in range(0, len(r.tokens), size):
            rows = slice(start, start + size)
            first = r.prompt_ids.shape[1] - int(r.prompt_mask[rows].sum(1).max())
            width = int(r.lengths[rows].max())
            pieces.append(
                {
                    "inputs": (
                        r.prompt_ids[rows, first:],
                        r.prompt_mask[rows, first:],
                        r.tokens[rows, :width],
                        r.mask[rows, :width],
                    ),
                    "mask": batch.mask[rows, :width],
                    "counted": counted[rows],
                    "contributing": contributing[rows],
                    "advantage": advantage[rows],
                    "kl_beta": kl_beta[rows],
                    "temperature": r.temperature[rows] if per_row else 1.0,
                    "importance_weight": None if batch.weight is None else batch.weight[rows, :width],
                }
            )
        return pieces

    def counts(self, batch: Batch) -> tuple[list[int], list[int]]:
        """Tokens of each completion that count; and of those, what the loss is to look at."""
        idle = batch.adv.advantage == 0
        if self.reference is not None:
            idle = idle & (batch.adv.kl_beta == 0)
        tokens = batch.mask.sum(1)
        left_out = idle.flatten() & self.run.skip_idle
        counted, contributing = torch.stack([tokens, tokens.masked_fill(left_out, 0)]).tolist()
        return counted, contributing

    def reference_logprobs(self, pieces: list[dict[str, Any]]) -> list[Tensor | None]:
        if self.reference is None:
            return [None] * len(pieces)
        # In the policy's own precision, or the KL of two equal models would not be 0.
        with self.accelerator.autocast():
            return [
                self.reference.logprobs(
                    p["inputs"], p["mask"], p["counted"], self.method.kl_temperature, self.run.backend
                )
                for p in pieces
            ]

    def update(self, batch: Batch) -> dict[str, Any]:
        """All optimiser updates on one batch. Normalisers are those of the whole batch, all ranks and micro-batches."""
        acc, method, run = self.accelerator, self.method, self.run
        pieces = self.micro_batches(batch)
        refs = self.reference_logprobs(pieces)
        olds: list[Tensor | None] = [None] * len(pieces)
        denominator = acc.reduce(
            default_denominator(batch.mask.sum(1), method.aggregation, run.max_completion_length).float(), "sum"
        )
        local = method.aggregation == "bnpo"
        row: dict[str, Any] = {}
        for update in range(run.updates_per_rollout):
            stats, loss_sum = TokenStatistics(), torch.zeros((), device=acc.device)
            for i, piece in enumerate(pieces):
                with nullcontext() if i == len(pieces) - 1 else acc.no_sync(self.model):
                    out = self.model(
                        piece["inputs"],
                        piece["mask"],
                        method,
                        piece["contributing"],
                        advantage=piece["advantage"],
                        kl_beta=piece["kl_beta"],
                        max_completion_length=run.max_completion_length,
                        old_logprobs=olds[i],
                        ref_logprobs=refs[i],
                        importance_weight=piece["importance_weight"],
                        temperature=piece["temperature"],
                        denominator=None if local else denominator,
                        backend=run.backend,
                    )
                    # DDP averages gradients over ranks; the denominator has already counted them all.
                    scale = 1 / len(pieces) if local else acc.num_processes
                    acc.backward(out.loss * scale)
                loss_sum += out.loss.detach() * scale
                if update == 0:
                    olds[i] = out.logprobs
                stats.add(out)
            norm = acc.clip_grad_norm_(self.model.parameters(), run.max_grad_norm or float("inf"))
            learning_rate = self.scheduler.get_last_lr()[0]
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            row = {
                "loss": acc.reduce(loss_sum, "mean").item(),
                **stats.read(),
                "grad_norm": float(norm),
                "learning_rate": learning_rate,
            }
        return row

    def step(self, number: int, rows: list[int]) -> dict[str, Any]:
        """Sample, score, update; the step's metrics."""
        rank, p = self.accelerator.process_index, self.run.prompts_per_step
        clock = [time.perf_counter()]
        # Prompts of like length next to each other: micro-batches are cut to their own longest.
        rows = sorted(rows[rank * p : (rank + 1) * p], key=lambda i: len(self.task.train_ids[i]))
        rollout = self.sample(rows)
        clock.append(time.perf_counter())
        batch = self.score(rollout, rows)
        clock.append(time.perf_counter())
        row = self.update(batch)
        clock.append(time.perf_counter())

        has_kl = self.reference is not None
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
        names = ("generate", "score", "train")
        row["seconds"] = {n: b - a for n, a, b in zip(names, clock, clock[1:], strict=False)}
        row["tokens_per_second"] = rollout.lengths.sum().item() / (clock[-1] - clock[0])
        self.log_completions("train", number, batch, rollout)
        row["seconds"]["other"] = time.perf_counter() - clock[-1]
        return {"step": number, **row}

    # ---- evaluation and logging -------------------------------------------------------------------------------------

    def evaluate(self, step: int, phase: str | None = None) -> dict[str, Any] | None:
        """Greedy held-out evaluation over all ranks; rows to completions.jsonl where a phase is named."""
        task, acc = self.task, self.accelerator
        if not task.held_out:
            return None
        mine = list(range(acc.process_index, len(task.held_out), acc.num_processes))
        responses, finished = evaluate.answer(
            self.lm,
            task.tokenizer,
            [task.held_out_ids[i] for i in mine],
            task.eos,
            self.run.max_completion_length,
            self.run.eval_batch_size,
        )
        scores = self.scorer([task.held_out[i] for i in mine], responses)
        gathered = sorted(gather_object(list(zip(mine, responses, finished, scores, strict=True))), key=lambda x: x[0])
        result = evaluate.from_scores([task.held_out[i] for i, *_ in gathered], [s for *_, s in gathered])
        problems = [s.problem for *_, s in gathered if s.problem]
        if problems:
            self.say(f"{len(problems)} held-out samples count as unsatisfied, the first because {problems[0]}")
        self.log({"step": step, "eval": result})
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
        except RewardError as e:
            stopped, failure = True, e
        summary = self.summary(before, after, self.done, train_seconds, time.perf_counter() - started)
        summary["interrupted"] = stopped
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
        bar = tqdm(total=self.steps, disable=not self.accelerator.is_main_process, dynamic_ncols=True, mininterval=1.0)
        said: set[str] = set()
        with bar:
            for number, rows in enumerate(self.order, 1):
                row = self.step(number, rows)
                self.log(row)
                self.done = number
                bar.update()
                bar.set_postfix_str(progress_values(row, row["hsr"], row["ssr"]), refresh=False)
                if row["note"] and row["note"] not in said:
                    said.add(row["note"])
                    self.say(f"step {number}: {row['note']}")
                if row["dropped"] and "dropped" not in said:
                    said.add("dropped")
                    self.say(f"step {number}: {row['dropped']} samples dropped, the first because {self.problem}")
                if number % max(1, self.steps // 4) == 0 and run.log_completions:
                    self.say(f"step {number}, some completions:\n{sample_table(self.last_rows)}")
                if run.eval_every and number % run.eval_every == 0 and number < self.steps:
                    self.evaluate(number)

    def save(self) -> None:
        """The model as it stands, in from_pretrained form."""
        if self.run.save_model and self.accelerator.is_main_process:
            self.lm.save_pretrained(self.out.path / "model")
            self.task.tokenizer.save_pretrained(self.out.path / "model")

    def summary(
        self, before: dict[str, Any] | None, after: dict[str, Any] | None, steps: int, train_s: float, total_s: float
    ) -> dict[str, Any]:
        first, last = before or {}, after or {}
        types = {
            t: {"before": row["rate"], "after": last["types"][t]["rate"] if last else None, "count": row["count"]}
            for t, row in first.get("types", {}).items()
        }
        device = self.accelerator.device
        return {
            "hsr_before": first.get("hsr"),
            "hsr_after": last.get("hsr"),
            "ssr_before": first.get("ssr"),
            "ssr_after": last.get("ssr"),
            "steps": steps,
            "train_seconds": round(train_s, 2),
            "total_seconds": round(total_s, 2),
            "method": self.run.preset,
            "seed": self.run.seed,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": self.accelerator.num_processes,
            "peak_memory_mb": peak_memory_mb(),
            "dropped_samples": self.scorer.dropped,
            "model": self.run.model or "embedded seed policy",
            "train_file": self.run.train_file or "embedded",
            "eval_file": self.run.eval_file or ("embedded" if before else None),
            "types": types,
            "versions": {
                "mdpgrpo_fast": __version__,
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)
