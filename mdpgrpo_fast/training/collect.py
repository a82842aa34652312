"""Collection of a step's completions: sampled, scored, given advantages; groups without a gradient are replaced.

With async_rollout those of the next step are sampled from here on, by a server, while this step trains.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import MDPGRPOConfig, TrainConfig
from ..data import Example
from ..models.lora import base_weights, merged, save_adapters
from ..models.policy import Policy
from ..reference import Advantages
from ..rewards import RewardError, Score, Scorer
from ..rollout.engine import raise_on_all_ranks, sync_weights
from ..rollout.generate import Rollout, generate, pad_id
from ..rollout.processors import generation_kwargs
from ..rollout.thinking import Thinking
from ..rollout.vllm.ahead import Ahead
from ..rollout.vllm.completion import Completion, RestartedError, RolloutError
from ..rollout.vllm.sampler import Request, RolloutEngine, trainer_logprobs, with_policy_logprobs
from ..rollout.vllm.server import VLLMServer
from .batch import Batch, replace_groups
from .scale import RunningGoal, mapped
from .show.progress import say
from .task import Task
from .timing import StageClock
from .update.advantages import of_the_batch, step_advantages
from .update.weights import importance_weights, log_ratio


class Collector:
    """Makes a step's batch. policy: not wrapped; engine: what samples, None: the policy's own model."""

    def __init__(
        self, task: Task, run: TrainConfig, method: MDPGRPOConfig, accelerator: Accelerator, scorer: Scorer,
        policy: Policy, engine: RolloutEngine | None,
    ) -> None:  # fmt: skip
        self.task, self.run, self.method, self.accelerator, self.scorer = task, run, method, accelerator, scorer
        self.policy, self.engine = policy, engine
        self.thinking = Thinking(task.tokenizer, run.strip_thinking)
        self.goal = RunningGoal()
        self.number = 0  # of the step
        self.synced = 0  # step at which vLLM was given weights last
        self.ahead: Ahead | None = None
        if run.async_rollout:
            assert isinstance(engine, VLLMServer), "check_ahead has seen to it"
            self.ahead = Ahead(engine)

    @property
    def lm(self) -> Any:
        return self.policy.model

    def collect(self, rows: list[int], number: int, clock: StageClock, following: Sequence[int] = ()) -> Batch:
        """Completions of the prompts, scored and weighed.

        following: prompts of the next step, none after the last. With async_rollout their sampling begins here, by the
        weights as they are now, and the next call has to be of them. The batch's staleness counts the rollout steps, of
        updates_per_rollout * mini_batches optimiser updates each, that the policy has gone since it sampled: 0 or 1.
        """
        self.number = number
        staleness = int(self.ahead is not None and self.ahead.pending)
        if not staleness:
            with clock.stage("generate"):
                self.sync(number)
        if self.ahead is None:
            batch = self.scored(rows, number, clock)
        else:
            batch = self.scored_on_all_ranks(rows, number, clock)
            batch.staleness = staleness
            if following:
                with clock.stage("generate"):
                    if self.synced != number:  # it has these at the first step, and after a restart
                        self.sync(number)
                    self.ahead.begin(self.ahead.engine.request(**self.asked(following)))
        if self.engine is not None:
            self.engine.sleep()
        with clock.stage("generate"):
            self.weigh(batch)
        return batch

    def close(self) -> None:
        """End what is sampled ahead."""
        if self.ahead is not None:
            self.ahead.close()

    def scored_on_all_ranks(self, rows: list[int], number: int, clock: StageClock) -> Batch:
        """`scored`, done on all ranks or failed on all: the server gets other weights next, for which no rank may still
        be sampling, and which none may be missing at."""
        problem = None
        try:
            batch = self.scored(rows, number, clock)
        except (RewardError, RolloutError) as e:
            problem = e
        with clock.stage("generate"):
            raise_on_all_ranks(self.accelerator, problem)
        return batch

    def scored(self, rows: list[int], number: int, clock: StageClock) -> Batch:
        """Completions of the prompts, scored; groups without a gradient are replaced, `refill` times at most."""
        g, rows = self.method.num_generations, list(rows)
        draw = random.Random(f"{self.run.seed} {number} {self.accelerator.process_index}")
        rollout, responses, scores = self.sample_and_score(rows, clock)
        for refills_left in range(self.run.refill, -1, -1):
            with clock.stage("score"):
                batch = self.assemble(rollout, rows, responses, scores)
                idle_groups = self.idle(batch.adv).all(1).nonzero().flatten().tolist() if refills_left else []
                # A reward that fails would fail again, and one that hangs take its time again.
                idle_groups = [i for i in idle_groups if not any(s.cause for s in scores[i * g : (i + 1) * g])]
            if not idle_groups:
                break
            new_rows = [draw.randrange(len(self.task.train)) for _ in idle_groups]
            new_rollout, new_responses, new_scores = self.sample_and_score(new_rows, clock)
            rollout = replace_groups(rollout, idle_groups, new_rollout, g)
            for j, (group, row) in enumerate(zip(idle_groups, new_rows, strict=True)):
                rows[group] = row
                responses[group * g : (group + 1) * g] = new_responses[j * g : (j + 1) * g]
                scores[group * g : (group + 1) * g] = new_scores[j * g : (j + 1) * g]
        return batch

    def sync(self, number: int) -> None:
        """vLLM gets the weights as they are now. Called where each rank has them whole."""
        if self.engine is not None:
            # A tied head under both of its names: it may have an adapter of its own.
            named = dict(self.lm.named_parameters(remove_duplicate=False))
            for left in range(self.run.vllm_retries, -1, -1):
                try:
                    self.give(named, number)
                    self.synced = number
                    break
                except RestartedError as e:  # raised on all ranks
                    if not left:
                        raise
                    say(f"step {self.number}: {e}; it is given them again", self.accelerator.is_main_process)

    def give(self, named: dict[str, Tensor], number: int) -> None:
        """vLLM gets the parameters of these names, or of LoRA the adapter alone."""
        assert self.engine is not None
        if self.run.lora and self.run.vllm_lora == "adapter":
            write = partial(save_adapters, self.lm, state_dict=named)
            sync_weights(self.engine, self.accelerator, base_weights(named), number, write)
        else:
            weights = merged(self.lm, named) if self.run.lora else named.items()
            sync_weights(self.engine, self.accelerator, weights, number)

    def sample_and_score(self, rows: list[int], clock: StageClock) -> tuple[Rollout, list[str], list[Score]]:
        """Completions of the prompts with their texts and scores, B = len(rows) * G of each."""
        with clock.stage("generate"):
            rollout = self.sample(rows)
        with clock.stage("score"):
            responses, seen, answers = self.thinking.scored_texts(rollout, self.run.keep_special_tokens)
            examples = [self.task.train[i] for i in rows for _ in range(self.method.num_generations)]
            return rollout, responses, self.scorer(examples, seen, answers=answers, completion_ids=rollout.rows)

    def sample(self, rows: list[int]) -> Rollout:
        """G completions of each prompt, slot g at its own temperature; those that were begun before, if any were."""
        if self.engine is None:
            return generate(self.lm, **self.asked(rows))
        if self.ahead is not None and self.ahead.pending:
            return self.drawn(*self.ahead.take())
        request = self.engine.request(**self.asked(rows))
        return self.drawn(request, partial(self.engine.complete, request))

    def drawn(self, request: Request, draw: Callable[[], list[Completion]]) -> Rollout:
        """What draw() gets of vLLM. One that was restarted meanwhile is given the weights again, as often as requests
        are tried again, and asked for what it drew with others; where ranks share it, the run ends."""
        assert self.engine is not None
        for left in range(self.run.vllm_retries, -1, -1):
            try:
                completions = draw()
                break
            except RestartedError as e:
                if not left or self.accelerator.num_processes > 1:
                    raise
                say(f"step {self.number}: {e}; it is given the weights again")
                self.sync(self.number)
                draw = partial(self.engine.complete, request, e.partial)
        return self.engine.rollout(request, completions)

    def asked(self, rows: Sequence[int]) -> dict[str, Any]:
        """The arguments of whatever samples."""
        method = self.method
        return {
            "prompts": [self.task.train_ids[i] for i in rows],
            "num_generations": method.num_generations,
            "temperature": method.slot_temperatures * len(rows),
            "eos": self.task.eos,
            "max_new_tokens": self.run.max_completion_length,
            "top_k": method.top_k,
            "top_p": method.top_p,
            "min_p": method.min_p,
            "generation_kwargs": generation_kwargs(self.run),
            "pad": pad_id(self.lm, self.task.tokenizer),
        }

    def assemble(self, rollout: Rollout, rows: list[int], responses: list[str], scores: list[Score]) -> Batch:
        """Advantages, and the tokens that count."""
        g, device, method = self.method.num_generations, self.accelerator.device, self.method
        examples = [self.task.train[i] for i in rows for _ in range(g)]
        on_scale = [None if s.total is None else mapped(s.total, self.run.reward_range) for s in scores]
        totals = torch.tensor([r or 0.0 for r in on_scale], device=device).view(-1, g)
        valid = torch.tensor([s.total is not None for s in scores], device=device).view(-1, g)
        adv = self.advantages(totals, valid, examples, scores, [r for r in on_scale if r is not None], None)
        mask = rollout.mask & (valid.flatten() & (rollout.finished | (not method.mask_truncated)))[:, None]
        tokens = mask.sum(1)
        contributing = self.contributing(tokens, adv)
        # One wait for the device.
        counts = torch.stack([tokens, contributing, rollout.prompt_mask.sum(1), rollout.lengths]).tolist()
        return Batch(rollout, examples, responses, scores, totals, valid, adv, mask, *counts)

    def advantages(
        self, rewards: Tensor, valid: Tensor, examples: list[Example], scores: list[Score], counted: list[float],
        accelerator: Accelerator | None,
    ) -> Advantages:  # fmt: skip
        """(P, G). counted: the rewards that are valid; accelerator: as of `step_advantages`."""
        run, method = self.run, self.method
        k = torch.tensor([self.num_constraints(e) for e in examples[:: method.num_generations]], device=rewards.device)
        running = self.goal.of(counted) if method.running_goal else None
        return step_advantages(
            rewards, k, valid, scores, run.reward_weights or [1.0] * len(run.reward), method, running=running,
            accelerator=accelerator, backend=run.backend,
        )  # fmt: skip

    def weigh(self, batch: Batch) -> None:
        """The batch gets its importance weights, the sampler's log-probs and floors, where the method takes them."""
        method, rollout = self.method, batch.rollout
        passes: dict[str, Any] = {"micro_batch_size": self.run.micro_batch_size, "backend": self.run.backend}
        own, truncated = None, method.truncated_logprobs and method.truncates
        with self.accelerator.autocast():
            if self.engine is not None and method.temperature_objective == "corrected":
                rollout = batch.rollout = with_policy_logprobs(rollout, self.policy, **passes)
            if method.weighs_sampling and method.temperature_objective == "per_row":
                own = trainer_logprobs(rollout, self.policy, rollout.temperature, truncated=truncated, **passes)
        if method.weighs_sampling:
            ratio = log_ratio(rollout, own, truncated)
            batch.weight, batch.outside = importance_weights(ratio, rollout.mask, method)
        if truncated:
            batch.logit_floor = rollout.logit_floor
        # Of another distribution than the loss's they would say little of how far the policy has moved.
        same = method.samples_as_trained and self.run.repetition_penalty == 1
        if method.off_policy_threshold is not None and self.engine is not None and same:
            batch.sampling = rollout.sampling_logprobs

    def settle(self, batch: Batch) -> None:
        """Advantages that need more than this rank's rewards: called by all ranks together."""
        if batch.kl is None and not of_the_batch(self.method):
            return
        batch.adv = self.advantages(
            self.net_rewards(batch), batch.valid, batch.examples, batch.scores, self.counted(batch), self.accelerator
        )
        batch.contributing = self.contributing(batch.mask.sum(1), batch.adv).tolist()

    def net_rewards(self, batch: Batch) -> Tensor:
        """(P, G): rewards as advantages are made of them, without the KL that is taken off."""
        if batch.kl is None:
            return batch.rewards
        return batch.rewards - self.method.kl_beta_pos * batch.kl.sum(1).view_as(batch.rewards).to(batch.rewards.dtype)

    def counted(self, batch: Batch) -> list[float]:
        """Those of `net_rewards` that are valid."""
        if batch.kl is None:
            return [mapped(s.total, self.run.reward_range) for s in batch.scores if s.total is not None]
        return self.net_rewards(batch)[batch.valid].tolist()

    def contributing(self, tokens: Tensor, adv: Advantages) -> Tensor:
        """(B,) tokens of each completion that the loss is to look at, of those that count."""
        # A quantile of entropies is that of all tokens.
        skips = self.run.skip_idle and self.method.top_entropy_quantile == 1
        return tokens.masked_fill(self.idle(adv).flatten() & skips, 0)

    def num_constraints(self, example: Example) -> int:
        """K: 1 where all constraints of a prompt make one reward of 0 or 1."""
        return 1 if self.run.constraint_reward == "all" else example.num_constraints(self.run.num_constraints)

    def idle(self, adv: Advantages) -> Tensor:
        """(P, G) bool: completions whose loss is 0 whatever the policy."""
        idle = adv.advantage == 0
        if self.method.has_entropy_bonus:
            return torch.zeros_like(idle)
        return idle & (adv.kl_beta == 0) if self.method.kl_in_loss else idle
