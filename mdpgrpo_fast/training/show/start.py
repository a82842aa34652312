"""The block that a run begins with: the model, what a step is, what differs from the preset, and what it runs on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator

from ...config import MDPGRPOConfig, TrainConfig, preset
from ...models.policy import Policy
from ...ops import backends
from ..before.memory import gigabytes, pass_bytes, training_bytes
from ..task import Task

MOST_SETTINGS = 12  # that a line names; config.yaml has all
# Knobs that another line of the block, or of a run's files, says.
SAID = (
    "model tokenizer train_file eval_file output_dir preset prompts_per_step steps epochs dtype backend attention "
    "packing tokens_per_micro_batch resume cpu rollout push_to_hub hub_model_id"
).split()


@dataclass(frozen=True)
class Facts:
    """What a run is, beside its settings. Lengths in tokens, memory in bytes of a process."""

    sources: dict[str, str | None]  # of Task
    parameters: int
    trained: int
    dtype: str
    prompts: int
    held_out: int
    longest_prompt: int
    steps: int
    processes: int
    device: str
    attention: str
    tokens_per_pass: int  # of packed groups; 0: padded
    backend: dict[str, str]  # op -> what it runs on
    memory: dict[str, float]
    notes: list[str]

    @classmethod
    def of(
        cls, task: Task, run: TrainConfig, method: MDPGRPOConfig, policy: Policy, accelerator: Accelerator, *,
        steps: int, budget: int, notes: list[str],
    ) -> Facts:  # fmt: skip
        """Before the policy is wrapped for training: its parameters are whole."""
        weights = list(policy.model.parameters())
        trained = [p for p in weights if p.requires_grad]
        device = accelerator.device
        longest = max(map(len, task.train_ids))
        config = policy.model.config.get_text_config()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.mixed_precision, weights[0].dtype)
        rows = run.prompts_per_step * method.num_generations
        tokens = budget or min(rows, run.micro_batch_size) * (longest + run.max_completion_length)
        if budget:
            tokens = min(budget, run.prompts_per_step * longest + rows * run.max_completion_length)
        reference = method.needs_reference and not run.lora
        memory = training_bytes(sum(p.nbytes for p in weights), sum(p.nbytes for p in trained), reference)
        notes = [*task.notes, *notes]
        if method.temperature_objective == "paper" and any(t != 1 for t in method.slot_temperatures):
            notes.append(
                "completions are sampled at several temperatures and trained on at temperature 1, uncorrected, as the "
                "paper does; --temperature-objective per_row or corrected makes the log-probs agree"
            )
        if run.async_rollout:
            weighed = "sampler_correction" if method.sampler_correction else "temperature_objective = corrected"
            notes.append(
                "the server samples one step ahead, by weights that lack the last step's updates; importance weights "
                f"make up for it ({weighed}), ess in metrics.jsonl says at what price"
            )
        processed = run.repetition_penalty != 1 or run.generation_kwargs
        if processed and method.temperature_objective != "corrected":
            notes.append(
                "log-probs of training are not those of sampling, which repetition_penalty and generation_kwargs "
                "change; --temperature-objective corrected weighs them"
            )
        return cls(
            sources=task.sources,
            parameters=sum(p.numel() for p in weights),
            trained=sum(p.numel() for p in trained),
            dtype=" and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in weights})),
            prompts=len(task.train),
            held_out=len(task.held_out),
            longest_prompt=longest,
            steps=steps,
            processes=accelerator.num_processes,
            device=_device_name(device),
            attention=str(config._attn_implementation),
            tokens_per_pass=budget,
            backend=_backends(run, method, device, dtype),
            memory={**memory, **pass_bytes(run, config, tokens, device, dtype)},
            notes=notes,
        )


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)}, {gigabytes(torch.cuda.get_device_properties(device).total_memory)}"


def _backends(run: TrainConfig, method: MDPGRPOConfig, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    loss = backends.choose(run.backend, device, dtype)
    sampling = backends.choose("auto", device, dtype)
    if run.rollout == "vllm":
        sampling = "vllm" if run.vllm_url is None else f"vllm at {run.vllm_url}"
    # Moments of the rewards seen so far, and rewards normalised one by one, are taken by the reference alone.
    in_torch = method.running_goal or method.multi_objective_aggregation == "normalize_then_sum"
    found = "torch" if in_torch else backends.choose(run.backend, device, torch.float32)
    return {"loss": loss, "log-probs": loss, "advantages": found, "sampling": sampling}


def start_lines(facts: Facts, run: TrainConfig, method: MDPGRPOConfig) -> list[str]:
    """At most ten lines, and one for each note."""
    p, g, longest = run.prompts_per_step, method.num_generations, facts.longest_prompt + run.max_completion_length
    processes = f" × {facts.processes} processes" if facts.processes > 1 else ""
    trained = "all trained" if facts.trained == facts.parameters else f"{facts.trained:,} trained"
    packing = f"groups packed, up to {facts.tokens_per_pass:,} tokens a pass" if facts.tokens_per_pass else (
        f"padded, {run.micro_batch_size} completions a pass"
    )  # fmt: skip
    memory = ", ".join(f"{name} {gigabytes(x)}" for name, x in facts.memory.items())
    rows = {
        "model": f"{facts.sources['model']}: {facts.parameters:,} parameters, {trained}, {facts.dtype}",
        "prompts": f"{facts.prompts:,} of {facts.sources['train_file']}, {_held_out(facts)}",
        "run": f"{p} prompts × {g} completions{processes} × {facts.steps:,} steps, at most "
        f"{p * g * facts.processes * longest:,} tokens a step",
        "method": f"preset {run.preset}, {_named(differing(method, run.preset)) or 'nothing changed'}",
        "settings": _named(_not_default(run)) or "defaults",
        "backend": ", ".join(f"{op} {name}" for op, name in facts.backend.items()),
        "attention": f"{facts.attention}; {packing}",
        "device": facts.device + (f" × {facts.processes}" if facts.processes > 1 else ""),
        "memory": f"about {gigabytes(sum(facts.memory.values()))} of tensors: {memory}",
    }
    return [f"{name:<9}  {text}" for name, text in rows.items()] + [f"{'note':<9}  {note}" for note in facts.notes]


def _held_out(facts: Facts) -> str:
    return f"{facts.held_out:,} held out of {facts.sources['eval_file']}" if facts.held_out else "none held out"


def differing(method: MDPGRPOConfig, name: str) -> dict[str, Any]:
    """Knobs of the method whose value is not the preset's."""
    published = asdict(preset(name))
    return {k: v for k, v in asdict(method).items() if v != published[k]}


def _not_default(run: TrainConfig) -> dict[str, Any]:
    return {
        f.name: value
        for f in fields(run)
        if f.name not in SAID and (value := getattr(run, f.name)) != getattr(TrainConfig(), f.name)
    }


def _named(knobs: dict[str, Any]) -> str:
    shown = [f"{name} {short(value)}" for name, value in list(knobs.items())[:MOST_SETTINGS]]
    more = len(knobs) - len(shown)
    return ", ".join([*shown, *([f"{more} more (config.yaml)"] if more > 0 else [])])


def short(value: Any) -> str:
    """A setting's value in at most 60 characters."""
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:59]}…"
