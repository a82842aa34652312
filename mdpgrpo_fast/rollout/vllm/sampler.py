"""Base of both ways of sampling with vLLM: settings per row, the record as a Rollout, weight sync with its check.

Log-probs are recorded in vLLM's mode `processed_logprobs`: those of the distribution drawn from, after temperature and
truncation. It cannot give the policy's own at temperature 1 next to them; `with_policy_logprobs` takes these from the
trainer's model.

Weights go through vLLM's own layerwise reload. After each sync the `bit_sum` of every parameter is compared with that
of what was sent, so each holds exactly the values sent, whatever vLLM fused or sharded; of one that vLLM repacks or
quantises it is that of the values as loaded. Not proven: the order of the values inside one parameter, and the
repacking itself. Supported are dense models whose parameters vLLM names as transformers does, apart from fused modules;
another is refused by its first name.

Or a LoRA adapter alone goes, by `sync_adapter`, to a vLLM that holds the model's own weights.

Each sync gives the weights a label of this run's own, which vLLM notes with every completion: a completion of other
weights, as of a server that was restarted, is told from the others.
"""

from __future__ import annotations

import math
import random
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..generate import Rollout, check_prompts, left_pad
from .checksums import bit_sum, check, layout
from .completion import Completion, RestartedError, RolloutError

LOGPROBS_MODE = "processed_logprobs"
MIN_TEMPERATURE = 0.01  # vLLM draws at this where less is asked, and only logs it
SYNC_BYTES = 1 << 28  # of weights handed over at once


def with_policy_logprobs(rollout: Rollout, policy: Any, *, micro_batch_size: int, backend: str) -> Rollout:
    """The rollout with policy_logprobs filled in by the trainer's model as it stands: a forward pass over all rows.

    What `temperature_objective = corrected` needs, before the first update on these completions: its weight
    min(exp(policy - sampling), w_max) then corrects temperature and the sampler's own numerics at once.
    policy: a `models.Policy`. micro_batch_size: rows of a pass. backend: as of `Policy.logprobs`.
    """
    found = trainer_logprobs(rollout, policy, 1.0, micro_batch_size=micro_batch_size, backend=backend)
    return replace(rollout, policy_logprobs=found)


def trainer_logprobs(
    rollout: Rollout, policy: Any, temperature: Tensor | float, *, truncated: bool = False, micro_batch_size: int,
    backend: str,
) -> Tensor:  # fmt: skip
    """(B, L) log-probs of the completions by the trainer's model as it stands. temperature: a number, or one per row;
    truncated: over the tokens that truncation kept, not over all; the rest as of `with_policy_logprobs`."""
    r, logprobs = rollout, []
    for start in range(0, len(r.tokens), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        inputs = (r.prompt_ids[rows], r.prompt_mask[rows], r.tokens[rows], r.mask[rows])
        tau = temperature[rows] if isinstance(temperature, Tensor) else temperature
        floor = r.logit_floor[rows] if truncated else None
        logprobs.append(policy.logprobs(inputs, inputs[3], r.lengths[rows].tolist(), tau, backend, floor))
    return torch.cat(logprobs)


@dataclass(frozen=True)
class Request:
    """What a vLLM is asked for, N rows, and what the Rollout needs to know of it beside the answers."""

    prompts: list[list[int]]  # of each row
    temperatures: list[float]
    settings: list[dict[str, Any]]  # of each row
    pads: tuple[int, int]  # of prompts and of completions
    cut: tuple[float, float]  # log_kept and logit_floor of all tokens


class RolloutEngine(ABC):
    """A vLLM that generates completions and takes the trainer's weights: `VLLMEngine` or `VLLMServer`."""

    logprobs_mode = LOGPROBS_MODE

    def __init__(self, device: torch.device | str, run_id: str | None = None) -> None:
        self.device = torch.device(device)
        self.version: int | None = None  # of the last sync that held
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self.label: str | None = None  # of the model's weights as vLLM holds them; None before the first sync
        self.adapter: str | None = None  # name of the LoRA adapter that completions are drawn with
        self._holds_base = False  # the model's own weights, for adapters, and not merged ones
        self._adapters = 0  # that were loaded
        self._adapter_files = ExitStack()
        weakref.finalize(self, self._adapter_files.close)
        self._lost = False  # vLLM holds a mixture of weights, or another's

    @abstractmethod
    def _rpc(self, method: str, *args: Any) -> list[Any]:
        """What each worker returns from a method of `WeightSync`."""

    @abstractmethod
    def _send(self, update: str, weights: list[tuple[str, Tensor]]) -> list[Any]:
        """Weights under their transformers names, to all workers by `mdpgrpo_load`; what each returns."""

    @abstractmethod
    def _reset_cache(self) -> None:
        """Forget what was computed with earlier weights."""

    @abstractmethod
    def _set_label(self, label: str) -> None:
        """Call the weights by this label, which comes back with every completion."""

    @abstractmethod
    def _complete(self, prompts: list[list[int]], settings: list[dict[str, Any]]) -> list[Completion]:
        """A completion of each prompt, by its own sampling settings."""

    @abstractmethod
    def _load_adapter(self, name: str, write: Callable[[str], None]) -> None:
        """Add the LoRA adapter that write() puts into a directory, for the rows to come."""

    @abstractmethod
    def sleep(self) -> None:
        """Give the device's memory to the trainer until the next sync; nothing where they do not share it."""

    def generate(
        self, prompts: list[list[int]], *, kept: Sequence[Completion | None] | None = None, **asked: Any
    ) -> Rollout:
        """Draw completions of the prompts now, as `request` has it.

        kept: `partial` of a RolloutError of the same call: what came is used, and the rest drawn.

        Raises: what `request` raises; RolloutError where vLLM fails, RestartedError where it drew with other weights
        than those of the last sync.
        """
        request = self.request(prompts, **asked)
        return self.rollout(request, self.complete(request, kept))

    def request(
        self,
        prompts: list[list[int]],
        *,
        num_generations: int = 1,
        temperature: list[float] | None,
        eos: list[int],
        max_new_tokens: int,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        pad: int | None = None,
    ) -> Request:
        """num_generations completions of each of P prompts, N = P * G rows with groups adjacent.

        temperature: one of 0.01 or more for each of the N rows, or None for greedy. Truncation is in vLLM's order:
        min-p, then top-k, then top-p. seed: of these rows; None leaves them to the engine's own, which is faster.
        generation_kwargs: repetition_penalty alone. pad: of the prompts in the result; default: eos[0].
        policy_logprobs of the Rollout are NaN, until `with_policy_logprobs` fills them in; log_kept and logit_floor are
        NaN where tokens are cut off, as vLLM does not tell what it kept.

        Raises: ValueError for an empty prompt, or a temperature or generation_kwargs that cannot be used.
        """
        check_prompts(prompts)
        rows = [p for p in prompts for _ in range(num_generations)]
        greedy = temperature is None
        temperatures = temperature or [0.0] * len(rows)
        if not greedy and (len(temperatures) != len(rows) or not all(t >= MIN_TEMPERATURE for t in temperatures)):
            raise ValueError(
                f"temperature must be None (greedy) or one number of at least {MIN_TEMPERATURE} (vLLM's floor) for "
                f"each of the {len(rows)} rows; got {temperature!r}"
            )
        asked = generation_kwargs or {}
        if more := [name for name in asked if name != "repetition_penalty"]:
            raise ValueError(f"generation_kwargs of vLLM must be repetition_penalty alone; got {', '.join(more)}")
        common = {
            "top_k": 0 if greedy else top_k,
            "top_p": 1.0 if greedy else top_p,
            "min_p": 0.0 if greedy else min_p,
            "max_tokens": max_new_tokens,
            # Exactly these end a completion, whatever the model's own files name.
            "stop_token_ids": eos,
            "ignore_eos": True,
            "logprobs": 0,  # none but the drawn token's
            "repetition_penalty": asked.get("repetition_penalty", 1.0),
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        rng = random.Random(seed)
        seeds = [None if seed is None or greedy else rng.getrandbits(62) for _ in rows]
        settings = [{**common, "temperature": t, "seed": s} for t, s in zip(temperatures, seeds, strict=True)]
        truncates = not greedy and (top_k > 0 or top_p < 1 or min_p > 0)
        cut = (math.nan, math.nan) if truncates else (0.0, -math.inf)
        pads = (eos[0] if pad is None else pad, eos[0])
        return Request(rows, temperatures, settings, pads, cut)

    def complete(self, request: Request, kept: Sequence[Completion | None] | None = None) -> list[Completion]:
        """A completion of each row, those of `kept` as they are, all of the weights of the last sync.

        A server's client does nothing here but HTTP. Raises: as `generate`.
        """
        rows, settings = request.prompts, request.settings
        if self._lost:
            raise RolloutError("vLLM does not hold the weights of the last sync(): another must come first")
        found: list[Completion | None] = list(kept) if kept is not None else [None] * len(rows)
        missing = [i for i, c in enumerate(found) if c is None]
        problem = None
        try:
            drawn: Sequence[Completion | None] = self._complete(
                [rows[i] for i in missing], [settings[i] for i in missing]
            )
        except RolloutError as e:
            drawn, problem = e.partial, e
        others: list[str | None] = []
        for i, c in zip(missing, drawn, strict=bool(drawn)):
            if c is not None and self.label not in (None, c.weights):
                others.append(c.weights)
            else:
                found[i] = c
        self._lost = bool(others) or isinstance(problem, RestartedError)
        if problem is not None:
            raise type(problem)(str(problem), found) from problem
        if others:
            raise RestartedError(
                f"{len(others)} of {len(missing)} completions were drawn with weights {others[0]!r}, not with "
                f"{self.label!r}: was vLLM restarted, or synced by another run?",
                found,
            )
        return [c for c in found if c is not None]

    def rollout(self, request: Request, completions: list[Completion]) -> Rollout:
        """What was asked for and what came, on the device."""
        pads, cut = request.pads, request.cut
        ids, mask = left_pad(request.prompts, pads[0], self.device)
        width = max(len(c.tokens) for c in completions)

        def padded(values: list[list[Any]], fill: Any) -> Tensor:
            return torch.tensor([v + [fill] * (width - len(v)) for v in values], device=self.device)

        logprobs = padded([c.logprobs for c in completions], 0.0)
        return Rollout(
            prompt_ids=ids,
            prompt_mask=mask,
            tokens=padded([c.tokens for c in completions], pads[1]),
            lengths=torch.tensor([len(c.tokens) for c in completions], device=self.device),
            finished=torch.tensor([c.finished for c in completions], device=self.device),
            temperature=torch.tensor(request.temperatures, dtype=torch.float32, device=self.device),
            sampling_logprobs=logprobs,
            policy_logprobs=torch.full_like(logprobs, torch.nan),
            log_kept=padded([[cut[0]] * len(c.tokens) for c in completions], 0.0),
            logit_floor=padded([[cut[1]] * len(c.tokens) for c in completions], 0.0),
        )

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send the weights under their transformers names, then compare what vLLM holds with what was sent.

        Tensors are cast to the dtype that vLLM loads. LoRA: pass the merged weights. A second name of tied weights is
        passed over. Where going through named_parameters is collective, ranks that do not sync have to go through it
        too.

        Raises: RolloutError naming the tensor that vLLM does not know, was not sent, or holds otherwise; RestartedError
        where vLLM was restarted meanwhile.
        """
        self.version, self.adapter, self._lost = None, None, True
        self._set_label("none")  # until it is checked, it is of no version
        update = uuid.uuid4().hex
        dtypes, holders = layout(self._rpc("mdpgrpo_start", update))
        expected: dict[str, int] = {}
        sent_sums: set[int] = set()
        batch: list[tuple[str, Tensor]] = []
        size = 0

        restarted = RestartedError("vLLM was restarted, or synced by another run, while it was given weights")

        def send() -> None:
            for name, *problem in self._send(update, batch):
                if problem:
                    raise RolloutError(f"vLLM cannot load the weights: {' '.join(problem[0].split())}")
                if name != update:
                    raise restarted

        for name, tensor in named_parameters:
            held = holders.get(name)
            if held is None:
                if any(bit_sum(tensor.detach().to(getattr(torch, d))) in sent_sums for d in set(dtypes.values())):
                    continue  # another name of one already sent: tied embeddings
                raise RolloutError(f"vLLM's model holds no parameter for {name!r}: its weights cannot be checked")
            # A copy: merged LoRA weights may be taken back while they wait here.
            sent = tensor.detach().to(getattr(torch, dtypes[held]), copy=True)
            checksum = bit_sum(sent)
            sent_sums.add(checksum)
            expected[held] = expected.get(held, 0) + checksum
            batch.append((name, sent))
            size += sent.nbytes
            if size >= SYNC_BYTES:
                send()
                batch, size = [], 0
        if batch:
            send()
        workers = self._rpc("mdpgrpo_finish", update)
        if None in workers:
            raise restarted
        check(workers, expected, set(dtypes), version)
        self._reset_cache()
        self._set_label(f"{self.run_id}-{version}")
        if self._rpc("mdpgrpo_finish", update) != workers:
            raise restarted  # and the label is that of weights which are not ours
        self.follow_sync((), version)

    def sync_adapter(self, base: Iterable[tuple[str, Tensor]], write: Callable[[str], None], version: int) -> None:
        """Give vLLM a LoRA adapter alone, which it adds to the weights that it holds.

        base: the model's weights without the adapter, sent as by `sync` where vLLM does not hold them. write: puts the
        adapter in peft's form into a directory. The adapter's values are not read back: its name, which each request
        has, tells it from an earlier one.

        Raises: as `sync`, and RolloutError for an adapter that vLLM does not take.
        """
        if not self._holds_base or self._lost:
            self.sync(base, version)
        self.version, self._holds_base, self._lost = None, True, True
        self._load_adapter(self._next_adapter(version), write)
        self._hold_adapter(version)

    def follow_sync(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """On ranks that leave `sync` to another: go through what may be collective, and hold vLLM to the version.

        A barrier has to come between that sync and the next `generate`.
        """
        for _ in named_parameters:
            pass
        self.version, self.label, self.adapter, self._lost = version, f"{self.run_id}-{version}", None, False
        self._holds_base = False

    def follow_adapter(self, base: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As `follow_sync`, of `sync_adapter`."""
        if not self._holds_base or self._lost:
            self.follow_sync(base, version)
        self._hold_adapter(version)

    def _hold_adapter(self, version: int) -> None:
        self.version, self.adapter = version, self._next_adapter(version)
        self._adapters, self._holds_base, self._lost = self._adapters + 1, True, False

    def _keep(self, files: ExitStack) -> None:
        """Hold the files of an adapter until the next one's are there: vLLM dies where it looks for them again."""
        self._adapter_files.close()
        self._adapter_files.push(files)

    def _next_adapter(self, version: int) -> str:
        """Its name, of no other: the same version may go again, to a server that was restarted."""
        return f"{self.run_id}-adapter-{version}.{self._adapters}"
