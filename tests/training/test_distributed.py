"""Training on several processes, with gloo on the CPU: the same parameters however many, and runs that are resumed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers.inputs import ROOT, unavailable
from helpers.ranks import spawn, spawn_fleet

from mdpgrpo_fast.config import ConfigError, TrainConfig
from mdpgrpo_fast.training.distributed import check, lost_rank

DEEPSPEED = Path(sys.prefix) / "deepspeed"
PROMPTS = 6  # per step, over all ranks
KNOBS = {"max_completion_length": 10, "learning_rate": 2e-4, "eval_samples": 4, "log_completions": 0, "seed": 7}
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}  # fmt: skip
KINDS: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": FSDP,
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}

TYPES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def train(
    rank: int, ranks: int, kind: str, folder: str, knobs: dict[str, Any], fixed: bool, stop_at: int = 0,
    signalled: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A run of the embedded policy on this rank; fixed: with completions that depend on the prompt alone.

    stop_at: the step that is interrupted, on all ranks at its start, or by a signal to the second one.
    """
    AcceleratorState._reset_state(True)  # a process may have had a run before
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    for name in FSDP:
        os.environ.pop(name, None)
    if kind.startswith("zero"):
        # accelerate has it for accelerators alone; on a CPU nothing else of it asks for one.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed
        from deepspeed.ops.op_builder import ShareMemCommBuilder  # compiled at first use, and waits by spinning

        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    if ranks > 1:
        os.environ |= KINDS[kind]
    from mdpgrpo_fast.config import TrainConfig, preset
    from mdpgrpo_fast.rewards import Scorer
    from mdpgrpo_fast.rollout.generate import Rollout
    from mdpgrpo_fast.training.batch import replace_groups
    from mdpgrpo_fast.training.collect import Collector
    from mdpgrpo_fast.training.loop import TrainingLoop
    from mdpgrpo_fast.training.run_dir import RunDir
    from mdpgrpo_fast.training.task import prepare

    texts: list[list[int]] = []
    step, sample, collect = TrainingLoop.step, Collector.sample, Collector.collect

    def watched_step(self: TrainingLoop, number: int, rows: list[int], *more: Any) -> dict[str, Any]:
        if number == stop_at and not signalled:
            raise KeyboardInterrupt
        if number == stop_at and rank == 1:  # the other is not told by anybody else
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, rows, *more)

    def watched_collect(self: Collector, *args: Any) -> Any:
        batch = collect(self, *args)
        texts.append(batch.rollout.tokens.flatten().tolist())
        return batch

    def fixed_sample(self: Collector, rows: list[int]) -> Rollout:
        state, g = torch.get_rng_state(), self.method.num_generations
        parts = []
        for i in rows:
            torch.manual_seed(1000 * i)
            parts.append(sample(self, [i]))
        torch.set_rng_state(state)
        width = max(p.tokens.shape[1] for p in parts)
        whole = Rollout(**{
            n: torch.zeros((len(rows) * g, *([width] if x.ndim == 2 else [])), dtype=x.dtype)
            for n, x in vars(parts[0]).items()
        })  # fmt: skip
        for j, part in enumerate(parts):
            whole = replace_groups(whole, [j], part, g)
        return whole

    patch = pytest.MonkeyPatch()
    patch.setattr(TrainingLoop, "step", watched_step)
    patch.setattr(Collector, "collect", watched_collect)
    if fixed:
        patch.setattr(Collector, "sample", fixed_sample)
    cpu = not kind.startswith("zero")
    run = TrainConfig(prompts_per_step=PROMPTS // ranks, output_dir=folder, cpu=cpu, **{**KNOBS, **knobs})
    method = preset("exact", num_generations=4)
    with Scorer(run.reward, workers=1) as scorer:
        out = RunDir(folder, create=rank == 0 and not run.resume)
        trainer = TrainingLoop(prepare(run), run, method, out, scorer)
        trainer.train()
        from mdpgrpo_fast.training.distributed import whole_state

        state = whole_state(trainer.accelerator, trainer.model)
        state = dict(trainer.lm.state_dict()) if state is None else state
    patch.undo()
    # The embedding is the head too: gathered states may leave one of the two out.
    flat = {n: x.detach().float().clone() for n, x in state.items() if "lm_head" not in n}
    acc = trainer.accelerator
    done: dict[str, Any] = {"signal": trainer.stop.signum}
    done |= {"processes": acc.num_processes, "seed": torch.initial_seed(), "kind": acc.distributed_type.value}
    return {"parameters": flat, "tokens": texts, **done}


def stopped(rank: int, ranks: int, folder: str, reward: str) -> tuple[str, bool]:
    """What a reward that fails ends this rank with, and whether all is written by then, which takes its time."""
    from mdpgrpo_fast.rewards import RewardError
    from mdpgrpo_fast.training.run_dir import RunDir

    write = RunDir.write_summary

    def slow_write(self: RunDir, value: dict[str, Any]) -> None:
        time.sleep(2)
        write(self, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "write_summary", slow_write)
        try:
            train(rank, ranks, "ddp", folder, {"reward": [f"helpers.rewards:{reward}"], "steps": 3}, False)
        except RewardError as e:
            return str(e), (Path(folder) / "summary.json").exists()
    return "no end", False


def not_finite(rank: int, ranks: int, folder: str) -> str:
    """How a rank ends where the second one's held-out answers fail."""
    from mdpgrpo_fast.evaluation import answers

    answer = answers.answer

    def failing(*args: Any) -> Any:
        if rank:
            raise FloatingPointError("the model's logits must be finite")
        return answer(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "answer", failing)
        try:
            train(rank, ranks, "ddp", folder, {"steps": 1}, False)
        except FloatingPointError as e:
            return str(e)
    return "no end"


def failing_save(rank: int, ranks: int, folder: str) -> str:
    """How a rank ends where the second one's disk fails."""
    from mdpgrpo_fast.durable import StorageError
    from mdpgrpo_fast.training.checkpoint import State

    write = State.write

    def failing(self: State, at: Path) -> None:
        write(self, at)
        if rank:
            raise OSError(5, "it is broken")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "write", failing)
        try:
            train(rank, ranks, "ddp", folder, {"steps": 1, "save_every": 1, "eval_samples": 2}, False)
        except StorageError as e:
            return str(e)
    return "no end"


def test_no_rank_waits_for_one_that_cannot_answer_or_save(tmp_path: Path) -> None:
    run, full = str(tmp_path / "run"), str(tmp_path / "full")
    found = spawn_fleet({"answer": (not_finite, run), "save": (failing_save, full)}, 2, tmp_path)
    assert found["answer"] == ["the model's logits must be finite"] * 2
    assert all("no checkpoint could be written: " in s and "it is broken" in s for s in found["save"]), found
    assert not list((tmp_path / "full" / "checkpoints").iterdir()), "nothing of it is left"


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("boom_later", "all 24 samples of step 2 were lost like this"),
        pytest.param("nan_elsewhere", "gave nan for prompt", marks=pytest.mark.long),
    ],
)
def test_ranks_stop_together_and_after_all_is_written(tmp_path: Path, reward: str, said: str) -> None:
    """Whether a reward fails on all of them or on one."""
    for message, written in spawn(stopped, 2, tmp_path, str(tmp_path / "run"), reward):
        assert said in message and written
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 1 and said in summary["failure"]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def values(folder: Path, name: str) -> list[float]:
    """Of each step, from metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r[name] for r in map(json.loads, lines) if name in r]


def losses(folder: Path) -> list[float]:
    return values(folder, "loss")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert found.keys() == expected.keys() and len(found) > 5
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def need_deepspeed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind.startswith("zero"):
        # Before the processes import accelerate, which looks for it then.
        monkeypatch.setattr(sys, "path", [*sys.path, str(DEEPSPEED)])  # which they are given
    here = importlib.util.find_spec("deepspeed") is not None or (DEEPSPEED / "deepspeed").exists()
    if kind.startswith("zero") and not here:
        unavailable(f"peer deepspeed is neither installed nor in {DEEPSPEED} (see constraints-test-deepspeed.txt)")


def whole_and_interrupted(
    rank: int, ranks: int, kind: str, whole: str, parts: str, knobs: dict[str, Any], stop_at: int = 4,
    signalled: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Two runs, the second of which is interrupted at its step stop_at."""
    return (
        train(rank, ranks, kind, whole, knobs, False),
        train(rank, ranks, kind, parts, knobs, False, stop_at=stop_at, signalled=signalled),
    )


def stuck(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """Every rank gets a signal while it samples, which takes longer than it is waited for."""
    from mdpgrpo_fast.training.collect import Collector

    sample, calls = Collector.sample, [0]

    def sampled(self: Collector, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1000)
        return sample(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collector, "sample", sampled)
        return train(rank, ranks, "ddp", folder, {"steps": 3}, False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Three steps in one process."""
    folder = tmp_path_factory.mktemp("alone")
    (one,) = spawn(train, 1, folder, "ddp", str(folder / "run"), {"steps": 3}, True)
    return one["parameters"], losses(folder / "run")


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("ddp", 2),
        ("fsdp2", 2),
        *(pytest.param(k, n, marks=pytest.mark.long) for k, n in (("ddp", 3), ("zero2", 2), ("zero3", 2))),
    ],
)
def test_more_processes_make_the_same_steps(
    kind: str, ranks: int, alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_deepspeed(kind, monkeypatch)
    found = spawn(train, ranks, tmp_path, kind, str(tmp_path / "run"), {"steps": 3}, True)
    expected, steps = alone
    assert [f["processes"] for f in found] == [ranks] * ranks
    assert {f["kind"] for f in found} == {TYPES[kind]}, "it is this that ran"
    assert losses(tmp_path / "run") == pytest.approx(steps, abs=1e-5)
    assert_equal(found[0]["parameters"], expected, 1e-5)


PARTS = {"steps": 2, "mini_batches": 3, "updates_per_rollout": 2}


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Two steps of six updates on two ranks, which end with the same weights."""
    folder = tmp_path_factory.mktemp("in_parts")
    one, other = spawn(train, 2, folder, "ddp", str(folder / "run"), PARTS, True)
    assert all(torch.equal(x, other["parameters"][n]) for n, x in one["parameters"].items())
    return one["parameters"], losses(folder / "run")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_parts_of_a_batch_have_their_updates_on_shards_too(
    kind: str, in_parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log-probs of before, of which each rank takes as many passes as the others, are the same."""
    need_deepspeed(kind, monkeypatch)
    found = spawn(train, 2, tmp_path, kind, str(tmp_path / "run"), PARTS, True)
    expected, steps = in_parts
    assert {f["kind"] for f in found} == {TYPES[kind]}
    assert losses(tmp_path / "run") == pytest.approx(steps, abs=1e-4)
    assert_equal(found[0]["parameters"], expected, 1e-4)


def moving_reference(rank: int, ranks: int, kind: str, folder: str) -> str:
    try:
        train(rank, ranks, kind, folder, {"steps": 1, "sync_reference": 1}, True)
    except ConfigError as e:
        return str(e)
    return "it ran"


@pytest.mark.long
@pytest.mark.parametrize(("kind", "said"), [("ddp", "it ran"), ("fsdp2", "sync_reference needs one process or DDP")])
def test_the_reference_moves_where_ranks_have_whole_weights(kind: str, said: str, tmp_path: Path) -> None:
    for message in spawn(moving_reference, 2, tmp_path, kind, str(tmp_path / "run")):
        assert message.startswith(said)


def test_ranks_drop_what_they_sample_at_a_signal(tmp_path: Path) -> None:
    found = spawn(stuck, 2, tmp_path, str(tmp_path / "run"))
    assert [f["signal"] for f in found] == [signal.SIGTERM] * 2 and [len(f["tokens"]) for f in found] == [1, 1]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint_1"]


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.long)])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(kind: str, tmp_path: Path) -> None:
    """To the bit, sampling included: weights, AdamW's state, schedule, random state of each rank, order of prompts.

    Under DDP a signal to one rank takes the fourth step back on both; else the third is, which no checkpoint is of.
    """
    knobs, ranks, signalled = {"steps": 4, "save_every": 2, "warmup_steps": 1}, 2, kind == "ddp"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    both = spawn(whole_and_interrupted, ranks, tmp_path, kind, str(whole), str(parts), knobs, 4, signalled)
    expected, stopped = zip(*both, strict=True)
    assert len(stopped[0]["tokens"]) == 3 + signalled and len(losses(parts)) == 3
    done = 2 + signalled
    assert (parts / "checkpoints" / f"checkpoint_{done}").is_dir()
    assert [s["signal"] for s in stopped] == [signal.SIGTERM if signalled else None] * ranks
    found = spawn(train, ranks, tmp_path, kind, str(parts), {**knobs, "resume": True}, False)
    assert {f["kind"] for f in (*found, *expected)} == {TYPES[kind]}
    for rank, (one, want) in enumerate(zip(found, expected, strict=True)):
        assert one["tokens"] == want["tokens"][done:] and want["seed"] == KNOBS["seed"] + rank
        assert one["parameters"].keys() == want["parameters"].keys()
        assert all(torch.equal(one["parameters"][n], x) for n, x in want["parameters"].items())
    assert losses(parts) == losses(whole) and len(losses(whole)) == 4
    summary = json.loads((parts / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["processes"] == ranks and summary["hsr_before"] is not None
    kept = sorted(p.name for p in (parts / "checkpoints").iterdir())
    assert kept == [f"checkpoint_{done}", "checkpoint_4"]
    assert expected[0]["tokens"] != expected[1]["tokens"]


@pytest.mark.long
def test_deepspeed_resumes_to_the_bit_from_files_that_are_no_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_deepspeed("zero2", monkeypatch)
    knobs: dict[str, Any] = {"steps": 2, "save_every": 1, "save_model": False, "eval_samples": 2}
    tasks: dict[str, tuple[Any, ...]] = {}
    for kind in ("zero2", "zero3"):
        parts = (kind, str(tmp_path / kind / "parts"))
        tasks[kind] = (
            whole_and_interrupted, kind, str(tmp_path / kind / "whole"), str(tmp_path / kind / "parts"), knobs, 2
        )  # fmt: skip
        tasks[f"{kind} resumed"] = (train, *parts, {**knobs, "resume": True}, False)
    found = spawn_fleet(tasks, 2, tmp_path)
    for kind in ("zero2", "zero3"):
        for one, (want, _) in zip(found[f"{kind} resumed"], found[kind], strict=True):
            assert one["kind"] == "DEEPSPEED" and one["tokens"] == want["tokens"][1:]
            assert all(torch.equal(one["parameters"][n], x) for n, x in want["parameters"].items())
        files = [p for p in (tmp_path / kind / "parts" / "checkpoints").rglob("*") if p.suffix in (".pt", ".py")]
        assert len(files) == (8 if kind == "zero3" else 6)
        assert all(p.read_bytes()[8:23] == b'{"__metadata__"' for p in files), "safetensors, by whatever name"


LORA: dict[str, Any] = {"steps": 2, "lora": True, "lora_r": 4, "learning_rate": 1e-2}
BF16: dict[str, Any] = {"steps": 2, "mixed_precision": "bf16"}
RESUMED: dict[str, Any] = {**LORA, **BF16, "steps": 3, "save_every": 2, "save_model": False}


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory, peer: Any) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Runs with LoRA and in bfloat16: alone, with DDP and in shards, on a process group for all that have as many."""
    peer("peft")
    folder = tmp_path_factory.mktemp("fleets")

    def task(kind: str, name: str, knobs: dict[str, Any], fixed: bool = True, **more: Any) -> tuple[Any, ...]:
        return train, kind, str(folder / name), {**knobs, **more}, fixed

    parts = (whole_and_interrupted, "fsdp2", str(folder / "whole"), str(folder / "parts"), RESUMED, 3)
    found = spawn_fleet({n: task("ddp", n, k) for n, k in (("lora", LORA), ("bf16", BF16))}, 1, folder)
    found |= spawn_fleet(
        {
            "ddp bf16": task("ddp", "ddp bf16", BF16),
            "fsdp2 bf16": task("fsdp2", "fsdp2 bf16", BF16),
            "fsdp2 lora": task("fsdp2", "fsdp2 lora", LORA),
            "parts": parts,
            "resumed": task("fsdp2", "parts", RESUMED, False, resume=True),
        },
        2,
        folder,
    )
    return folder, found


@pytest.mark.long
def test_adapters_on_shards_are_those_of_one_process(fleets: Any) -> None:
    folder, found = fleets
    assert {f["kind"] for f in found["fsdp2 lora"]} == {"FSDP"}
    assert losses(folder / "fsdp2 lora") == pytest.approx(losses(folder / "lora"), abs=1e-5)
    several, alone = found["fsdp2 lora"][0]["parameters"], found["lora"][0]["parameters"]
    assert several.keys() == alone.keys()
    assert all(torch.equal(several[n], x) for n, x in alone.items() if ".lora_" not in n), "which are not trained"
    for part in ("lora_A", "lora_B"):  # where a gradient is next to 0, AdamW makes more of its last bits
        one, two = (torch.cat([p[n].flatten() for n in alone if part in n]) for p in (alone, several))
        assert (two - one).norm() < 1e-3 * one.norm()
    assert all(x.abs().max() > 1e-2 for n, x in alone.items() if "lora_B" in n), "they start at 0"


@pytest.mark.long
def test_the_adapters_of_shards_are_saved_whole(fleets: Any) -> None:
    """peft finds all of them, and they add up to the merged model."""
    from peft import PeftModel
    from safetensors.torch import load_file

    from mdpgrpo_fast.models.load import load

    folder, _ = fleets
    saved = [load_file(folder / name / "adapters" / "adapter_model.safetensors") for name in ("lora", "fsdp2 lora")]
    assert saved[0].keys() == saved[1].keys() and all(x.shape == saved[0][n].shape for n, x in saved[1].items())
    base, _ = load(None, "float32")
    adapted = PeftModel.from_pretrained(base, str(folder / "fsdp2 lora" / "adapters"))
    ours = {n.replace(".default.weight", ".weight"): p for n, p in adapted.named_parameters() if ".lora_" in n}
    assert ours.keys() == saved[1].keys() and all(torch.equal(p, saved[1][n]) for n, p in ours.items())
    merged, _ = load(str(folder / "fsdp2 lora" / "model"), "float32")
    assert_equal(dict(adapted.merge_and_unload().state_dict()), dict(merged.state_dict()), 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_bfloat16_on_two_ranks_is_that_of_one(kind: str, fleets: Any) -> None:
    """To bfloat16's rounding, of the residual stream too under FSDP2: the same gradients, and moves of the weights."""
    from mdpgrpo_fast.models.load import load

    folder, found = fleets
    several, alone = found[f"{kind} bf16"], found["bf16"][0]["parameters"]
    assert {f["kind"] for f in several} == {TYPES[kind]}
    assert losses(folder / f"{kind} bf16") == pytest.approx(losses(folder / "bf16"), abs=0.01)
    start = load(None, "float32")[0].state_dict()
    one, two = (torch.cat([(p[n] - start[n]).flatten() for n in alone]) for p in (alone, several[0]["parameters"]))
    norms, expected = (values(folder / name, "grad_norm") for name in (f"{kind} bf16", "bf16"))
    assert norms == pytest.approx(expected, rel=0.02)
    assert one.norm() > 0.1 and torch.cosine_similarity(one, two, dim=0) > {"ddp": 0.99, "fsdp2": 0.8}[kind]


@pytest.mark.long
def test_a_resumed_run_with_adapters_on_shards_in_bfloat16_ends_as_one(fleets: Any) -> None:
    folder, found = fleets
    for resumed, (whole, stopped) in zip(found["resumed"], found["parts"], strict=True):
        assert resumed["kind"] == "FSDP" and len(stopped["tokens"]) == 2
        assert resumed["tokens"] == whole["tokens"][2:]
        assert all(torch.equal(resumed["parameters"][n], x) for n, x in whole["parameters"].items())
    assert losses(folder / "parts") == losses(folder / "whole") and len(losses(folder / "whole")) == 3


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ddp", "zero3"])
def test_ranks_without_a_token_that_counts_take_part(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank has nothing to look at, the other more groups than go into a micro-batch: nobody waits for ever."""
    need_deepspeed(kind, monkeypatch)
    found = spawn(train_unevenly, 2, tmp_path, kind, str(tmp_path / "run"))
    assert found[0]["passes"] == found[1]["passes"] == 3
    assert found[0]["counted"] == 0 < found[1]["counted"]
    assert found[0]["norm"] == pytest.approx(found[1]["norm"]) and found[0]["norm"] > 0


def train_unevenly(rank: int, ranks: int, kind: str, folder: str) -> dict[str, Any]:
    from mdpgrpo_fast.training.update.updates import Updates

    seen: dict[str, Any] = {}
    micro_batches, apply = Updates.micro_batches, Updates.apply

    def watched_micro_batches(self: Updates, batch: Any, part: Any) -> Any:
        if rank == 0:
            batch.mask = torch.zeros_like(batch.mask)
            batch.counted, batch.contributing = [[0] * len(batch.counted)] * 2
        self.budget = 1 + max(
            batch.prompt_lengths[i] + sum(batch.lengths[i : i + 4]) for i in range(0, len(batch.lengths), 4)
        )
        found = micro_batches(self, batch, part)
        return seen.update(passes=len(found), counted=sum(m.counted for m in found)) or found

    def watched_apply(self: Updates, *args: Any) -> Any:
        row = apply(self, *args)
        return seen.update(norm=row["grad_norm"]) or row

    Updates.micro_batches, Updates.apply = watched_micro_batches, watched_apply  # type: ignore[method-assign]
    train(rank, ranks, kind, folder, {"steps": 1}, True)
    return seen


def torchrun(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it, to the end of its processes."""
    flags = ["--prompts-per-step", "2", "--eval-samples", "2", "--max-completion-length", "8", "--cpu", *more]
    return on_two("-m", "mdpgrpo_fast.train", "--output-dir", str(folder), *flags)


def on_two(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *words]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.long
def test_torchrun_keeps_all_of_a_run_that_stops(tmp_path: Path) -> None:
    done = torchrun(tmp_path / "run", "--steps", "3", "--reward", "helpers.rewards:boom_later")
    assert done.returncode != 0 and done.stderr.count("error: reward 'helpers.rewards:boom_later' raised") == 1
    assert all((tmp_path / "run" / name).exists() for name in ("summary.json", "report.html", "model/config.json"))


def test_torchrun_on_the_cpu(tmp_path: Path) -> None:
    done = torchrun(tmp_path / "run", "--steps", "1", "--report-to", "tensorboard")
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    assert "held-out HSR" in done.stdout and done.stdout.count("report  ") == 1, "the first process alone speaks"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["processes"] == 2


@pytest.mark.long
def test_an_error_of_one_rank_alone_is_not_lost_to_the_saving_of_shards(tmp_path: Path) -> None:
    """Which all ranks would have to take part in: a save of one would end its process before the traceback."""
    script = tmp_path / "script.py"
    script.write_text(
        "from mdpgrpo_fast import TrainConfig, train\n"
        f"knobs = dict(output_dir={str(tmp_path / 'run')!r}, steps=2, prompts_per_step=2, max_completion_length=8)\n"
        "if __name__ == '__main__':\n"
        "    run = TrainConfig(cpu=True, eval_samples=2, **knobs)\n"
        "    train(run=run, on_step=lambda row: row['no such metric'])\n"
    )
    done = on_two(str(script), **FSDP)
    assert done.returncode != 0 and "KeyError: 'no such metric'" in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "run" / "model").exists()


CLOSED = "[/pytorch/gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:4000"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(CLOSED), True),
        (RuntimeError("[x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv"), True),
        (RuntimeError("[x/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4"), False),
        (RuntimeError("Connection closed by peer"), False),
        (dist.DistNetworkError("anything"), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (dist.DistBackendError("NCCL error: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device"), False),
    ],
)
def test_what_says_that_a_rank_is_lost(error: Exception, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = lost_rank(error)
    assert (found is not None) == lost and (found is None or found.__cause__ is error)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert lost_rank(error) is None, "there is none to lose"


def test_the_packaged_files_are_accelerates_own() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((ROOT / "mdpgrpo_fast" / "launch").glob("*.yaml"))
    assert [f.stem for f in files] == ["ddp", "fsdp2", "zero2", "zero3"]
    for file in files:
        assert load_config_from_file(str(file)).num_processes >= 2
    page = (ROOT / "mdpgrpo_fast" / "launch" / "README.md").read_text()
    assert all(f"`{f.name}`" in page for f in files)


class Said:
    """As much of an Accelerator as the check of settings asks."""

    def __init__(self, kind: str, accumulation: int = 1, fsdp2: bool = True, **config: Any) -> None:
        self.distributed_type, self.gradient_accumulation_steps, self.is_fsdp2 = (
            DistributedType(kind),
            accumulation,
            fsdp2,
        )
        plugin = type("Plugin", (), {"deepspeed_config": config, "zero_stage": 2})()
        self.state = type("State", (), {"deepspeed_plugin": plugin})()


def test_contradicting_launch_settings_are_refused() -> None:

    run = TrainConfig(max_grad_norm=1.0)
    for said, message in (
        (Said("MULTI_GPU", accumulation=4), "gradient_accumulation_steps of accelerate must be 1.*got 4"),
        (Said("FSDP", fsdp2=False), "fsdp_version of accelerate's configuration must be 2; got 1"),
        (Said("DEEPSPEED", gradient_clipping=0.5), r"gradient_clipping .* must be 1.0 \(max_grad_norm\); got 0.5"),
        (Said("DEEPSPEED", gradient_accumulation_steps=2), "gradient_accumulation_steps .* must be 1; got 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(said, run)  # type: ignore[arg-type]
    for config, message in (
        ({"optimizer": {"type": "Adam"}}, "must have no optimizer section"),
        ({"bf16": {"enabled": True}}, r"bf16 of the DeepSpeed .* must be false \(mixed_precision = no\); got true"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(Said("DEEPSPEED", **config), run)  # type: ignore[arg-type]
    fine = Said("DEEPSPEED", gradient_clipping="auto", gradient_accumulation_steps=1)
    check(fine, run)  # type: ignore[arg-type]
    assert fine.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] == 1.0
