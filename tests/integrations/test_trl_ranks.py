"""TRL on two processes, with gloo on the CPU: our kernels give TRL's numbers, however it shards the model."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers import trl as _  # noqa: F401  all is skipped without TRL
from helpers.inputs import unavailable
from helpers.ranks import spawn_fleet

import mdpgrpo_fast as mf

DEEPSPEED = Path(sys.prefix) / "deepspeed"
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}  # fmt: skip
KINDS: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp1": {**FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "FULL_SHARD", "FSDP_USE_ORIG_PARAMS": "true"},
    "fsdp2": {**FSDP, "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
    "fsdp2, loaded on one rank": {
        **FSDP,
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    },
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
TYPES = {"ddp": "MULTI_CPU", "fsdp1": "FSDP", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
WORDS = ["write three", "the sea and the wind", "short", "about the wind and the sea"]
CONSTRAINTS = {f"{WORDS[i % 4]} {i}": 1 + i % 5 for i in range(24)}  # of each prompt
# Plain gradient steps: Adam's first ones are as long where a gradient is but rounding.
KNOBS = {
    "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "max_steps": 3,
    "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1, "bf16": False, "seed": 3, "gradient_checkpointing": False,
    "model_init_kwargs": {"dtype": "float32"}, "use_cpu": True, "report_to": "none", "save_strategy": "no",
    "disable_tqdm": True, "accelerator_config": {"use_configured_state": True},
}  # fmt: skip
# Two updates with the same completions, so that ratios differ from 1.
TWICE = {"loss_type": "dapo", "beta": 0.04, "num_iterations": 2, "gradient_checkpointing": True}


# ---- on the ranks ---------------------------------------------------------------------------------------------------


def set_up(rank: int, ranks: int, kind: str) -> None:
    """The process as `accelerate launch` starts it."""
    for name in {name for variables in KINDS.values() for name in variables}:
        os.environ.pop(name, None)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), **KINDS[kind]}
    AcceleratorState._reset_state(True)  # a process may have had a run before
    PartialState(cpu=True)
    if kind != "ddp":
        # accelerate has these for accelerators alone; on a CPU nothing else of it asks for one.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        PartialState._shared_state["device"] = torch.device("cpu")  # FSDP1 knows no numbers of CPUs
    if kind.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed
        from deepspeed.ops.op_builder import ShareMemCommBuilder  # compiled at first use, and waits by spinning

        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [sum(map(ord, c)) % 7 / 6 for c in completions]


def make(
    rank: int, ranks: int, kind: str, model: str, knobs: dict[str, Any], trainer: Any = None, lora: bool = False
) -> Any:  # fmt: skip
    """A trainer of TRL's classes or ours."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from mdpgrpo_fast.integrations.trl import MDPGRPOConfig

    set_up(rank, ranks, kind)
    rows = [{"prompt": prompt, "num_constraints": k} for prompt, k in CONSTRAINTS.items()]
    config = MDPGRPOConfig if trainer else GRPOConfig
    return (trainer or GRPOTrainer)(
        model, reward, config(**{"output_dir": f"{model}/runs", **KNOBS, **knobs}), Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=LoraConfig(target_modules=["q_proj", "down_proj"], r=4) if lora else None,
    )  # fmt: skip


def run(trainer: Any) -> dict[str, Any]:
    """Its log without what it took."""
    trainer.train()
    taken = ("step_time", "runtime", "per_second", "flos")
    log = [{n: x for n, x in row.items() if not any(t in n for t in taken)} for row in trainer.state.log_history]
    return {"log": log, "kind": trainer.accelerator.distributed_type.value}


def both(
    rank: int, ranks: int, kind: str, model: str, knobs: dict[str, Any], lora: bool = False, packing: Any = "off"
) -> list[dict[str, Any]]:
    """A run of TRL and the same on our kernels."""
    from mdpgrpo_fast.integrations.trl import accelerate_trl

    plain = run(make(rank, ranks, kind, model, knobs, lora=lora))
    return [plain, run(accelerate_trl(make(rank, ranks, kind, model, knobs, lora=lora), packing=packing))]


def method(rank: int, ranks: int, kind: str, model: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """A run of MDPGRPOTrainer, with the generations that this rank saw."""
    from mdpgrpo_fast.integrations.trl import MDPGRPOTrainer, sampling

    seen: list[dict[str, Any]] = []

    class Watched(MDPGRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batch = super()._generate_and_score_completions(inputs)
            names = ("advantages", "kl_beta", "sampling_temperature")
            prompts = [row["prompt"] for row in inputs]
            seen.append(
                {"sampled": sampled[-1], "prompts": prompts, "rewards": self._rewards} | {n: batch[n] for n in names}
            )
            return batch

    sampled: list[list[float]] = []
    through = sampling.through_transformers

    def watched(trainer: Any, taus: list[float]) -> Any:
        sampled.append(taus)
        return through(trainer, taus)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "through_transformers", watched)
        return {**run(make(rank, ranks, kind, model, knobs, Watched)), "seen": seen}


def halves(rank: int, ranks: int, kind: str, model: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """A run of both in 16 bits, and what the loss of the first update took and gave."""
    from mdpgrpo_fast.integrations.trl import fused

    seen: dict[str, Any] = {}
    ours = fused.linear_token_loss

    def watched(*args: Any, **given: Any) -> Any:
        out = ours(*args, **given)
        if not seen:
            names = ("advantage", "old_logprobs", "ref_logprobs")
            seen.update({n: given[n] for n in names} | {"ratio": out.ratio.detach(), "mask": given["mask"]})
        return out

    compute = fused.FusedGRPOTrainer._compute_loss

    def watched_compute(self: Any, *args: Any) -> Any:
        loss = compute(self, *args)
        seen.setdefault("loss", loss.detach())
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "linear_token_loss", watched)
        patch.setattr(fused.FusedGRPOTrainer, "_compute_loss", watched_compute)
        return {"runs": both(rank, ranks, kind, model, knobs), **seen}


# ---- what they found ------------------------------------------------------------------------------------------------


def assert_same_log(found: dict[str, Any], expected: dict[str, Any], case: str, kind: str) -> None:
    assert found["kind"] == kind, "it is this that ran"
    assert len(found["log"]) == len(expected["log"]) > 2
    for i, (row, wanted) in enumerate(zip(found["log"], expected["log"], strict=True)):
        assert row.keys() == wanted.keys(), case
        for name, value in wanted.items():
            # Sums that cancel are left with the rounding of their terms, which are of the size of 1.
            wanted_value = value if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)
            assert row[name] == wanted_value, f"{case}, {name} of step {i + 1}"
    assert "grad_norm" in found["log"][0] and math.isfinite(found["log"][-2]["loss"])


GRPO = {"loss_type": "grpo"}
ADAPTIVE = {"use_adaptive_entropy": True, "entropy_target": 3.0, "entropy_coef_delta": 0.05}
MASKED = {"mask_truncated_completions": True, "max_completion_length": 16, "max_steps": 4}
IN_PARTS = {"per_device_train_batch_size": 2}  # of groups of four
DDP: dict[str, tuple[Any, ...]] = {
    "grpo": ({**GRPO, "beta": 0.04, "gradient_checkpointing": True},),
    "dapo": ({**TWICE, "gradient_accumulation_steps": 2},),
    "vespo": ({"loss_type": "vespo", "num_iterations": 2},),
    "quantile": ({**GRPO, "top_entropy_quantile": 0.3},),
    "adaptive": ({**GRPO, **ADAPTIVE, "gradient_accumulation_steps": 2},),
    "parts of groups": ({**GRPO, **IN_PARTS, "beta": 0.04},),
    "masked": ({**GRPO, **IN_PARTS, **MASKED}, False, "auto"),
    "lora": ({**GRPO, "beta": 0.04}, True),
}


@pytest.mark.long
def test_ddp(model_dirs: dict[str, str], tmp_path: Path) -> None:
    """Losses, gradient norms and all else that is logged are TRL's own. Advantages are over whole groups, although a
    rank holds a part, and temperatures by the place in the group."""
    model = model_dirs["llama"]
    tasks: dict[str, tuple[Any, ...]] = {case: (both, "ddp", model, *given) for case, given in DDP.items()}
    tasks["method"] = (method, "ddp", model, {**IN_PARTS, "steps_per_generation": 3, "max_steps": 6})
    found = spawn_fleet(tasks, 2, tmp_path)
    for case in DDP:
        for plain, ours in found[case]:
            assert_same_log(ours, plain, case, TYPES["ddp"])
    clipped = [row.get("completions/clipped_ratio") for row in found["masked"][0][1]["log"]]
    assert 0.75 in clipped, f"a rank without a token that counts, beside one that has some: {clipped}"
    assert {row["entropy_coef"] for row in found["adaptive"][0][1]["log"][:3]} != {0.0}
    check_method(found["method"])


def check_method(ranks: list[dict[str, Any]]) -> None:
    from mdpgrpo_fast.integrations.trl import MDPGRPOConfig

    config = MDPGRPOConfig("unused", num_generations=4, bf16=False, use_cpu=True).method()
    assert len(set(config.slot_temperatures)) > 1
    assert len(ranks[0]["seen"]) == len(ranks[1]["seen"]) == 2
    for one, other in zip(*(rank["seen"] for rank in ranks), strict=True):
        assert torch.equal(one["rewards"], other["rewards"]) and len(one["prompts"]) == 6
        prompts = (one["prompts"] + other["prompts"])[::4]
        assert len({CONSTRAINTS[p] for p in prompts}) > 1 and len(set(prompts)) == 3
        rewards, constraints = one["rewards"].view(3, 4), torch.tensor([float(CONSTRAINTS[p]) for p in prompts])
        expected = mf.advantages(rewards, constraints, config).advantage.flatten()
        whole = {n: torch.cat([one[n], other[n]]) for n in ("advantages", "kl_beta", "sampling_temperature")}
        torch.testing.assert_close(whole["advantages"], expected, rtol=1e-6, atol=1e-7)
        assert whole["advantages"].abs().amax() > 0.1
        slots = torch.tensor(config.slot_temperatures).repeat(3)
        assert torch.equal(whole["sampling_temperature"], slots)
        torch.testing.assert_close(torch.tensor(one["sampled"] + other["sampled"]), slots)
        betas = torch.where(expected < 0, config.kl_beta_neg, config.kl_beta_pos)
        torch.testing.assert_close(whole["kl_beta"], betas)


def check_halves(ranks: list[dict[str, Any]], case: str) -> None:
    """Nothing that is of 32 bits is rounded on its way into a model that runs in 16 bits, or out of it."""
    for seen in ranks:
        for name in ("advantage", "old_logprobs", "ref_logprobs", "loss"):
            x = seen[name]
            assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float()), f"{case}, {name}"
        mask = seen["mask"]
        assert torch.equal(seen["old_logprobs"] * mask, seen["ref_logprobs"] * mask), case
        torch.testing.assert_close(seen["ratio"] * mask, mask.float(), rtol=0, atol=1e-6)  # the policy has not moved
        # Log-probs of up to 8 nats are off by up to 2^-6 where TRL, or FSDP2 for it, rounds them or the logits to 8
        # bits. The loss is a mean of some dozens of them, times advantages of the size of 1.
        plain, ours = (r["log"][0] for r in seen["runs"])
        assert ours["loss"] == pytest.approx(plain["loss"], abs=2**-7), case
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=2**-6), case
        assert ours["entropy"] == pytest.approx(plain["entropy"], rel=2**-7) and ours["kl"] == 0, case


@pytest.mark.long
@pytest.mark.parametrize("kinds", [("fsdp1", "fsdp2"), ("zero2", "zero3")], ids=["fsdp", "zero"])
def test_sharded(
    kinds: tuple[str, str], model_dirs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same under what shards a model, in 32 bits and 16; and the method, which takes the same steps as without."""
    need_deepspeed(kinds[0], monkeypatch)
    model = model_dirs["llama"]
    in_halves = {"loss_type": "cispo", "beta": 0.04, "num_iterations": 2, "max_steps": 1, "bf16": True}
    tasks: dict[str, tuple[Any, ...]] = {"method, ddp": (method, "ddp", model, {})}
    for kind in kinds:
        tasks |= {kind: (both, kind, model, TWICE), f"method, {kind}": (method, kind, model, {})}
        tasks[f"halves, {kind}"] = (halves, kind, model, in_halves)
    tasks["lora"] = (both, kinds[1], model, {"loss_type": "grpo", "beta": 0.04}, True)
    if "fsdp2" in kinds:
        tasks["halves, ddp"] = (halves, "ddp", model, in_halves)
        # TRL's reference has no weights on the other rank then.
        tasks["loaded"] = (both, "fsdp2, loaded on one rank", model, {"loss_type": "vespo"}, False, "on")
    found = spawn_fleet(tasks, 2, tmp_path)
    for case in [*kinds, *({"lora", "loaded"} & tasks.keys())]:
        for plain, ours in found[case]:
            assert_same_log(ours, plain, case, TYPES[kinds[0]])
    for kind in kinds:
        for ours, whole in zip(found[f"method, {kind}"], found["method, ddp"], strict=True):
            assert_same_log(ours, whole, f"method, {kind}", TYPES[kind])
    for case in tasks:
        if case.startswith("halves"):
            check_halves(found[case], case)


def need_deepspeed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kind.startswith("zero"):
        return
    # Before the processes import accelerate, which looks for it then.
    monkeypatch.setattr(sys, "path", [*sys.path, str(DEEPSPEED)])  # which they are given
    if importlib.util.find_spec("deepspeed") is None and not (DEEPSPEED / "deepspeed").exists():
        unavailable(f"peer deepspeed is neither installed nor in {DEEPSPEED} (see constraints-test-deepspeed.txt)")
