"""What a run can be told: accounting, traces, LoRA, memory options, dynamic sampling, engines, and bad settings."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.inputs import ROOT
from helpers.runs import parameters, rows, run_small
from transformers import AutoModelForCausalLM

from mdpgrpo_fast import train
from mdpgrpo_fast.config import ConfigError, TrainConfig, preset
from mdpgrpo_fast.models import lora
from mdpgrpo_fast.rewards import Scorer
from mdpgrpo_fast.rollout import engine
from mdpgrpo_fast.rollout.generate import Rollout, generate
from mdpgrpo_fast.rollout.vllm.sampler import Completion, RolloutError
from mdpgrpo_fast.training import timing
from mdpgrpo_fast.training.batch import replace_groups
from mdpgrpo_fast.training.collect import Collector
from mdpgrpo_fast.training.metrics import over_ranks
from mdpgrpo_fast.training.run_dir import RunDir
from mdpgrpo_fast.training.task import prepare
from mdpgrpo_fast.training.timing import StageClock, Work, peak_flops
from mdpgrpo_fast.training.trainer import Trainer

PLAIN = preset("grpo", num_generations=4, kl_beta_pos=0.0)


# ---- accounting -----------------------------------------------------------------------------------------------------


def test_every_stage_is_accounted_for(tmp_path: Path) -> None:
    trainer = run_small(tmp_path, steps=3)
    for row in rows(trainer):
        seconds, rates = row["seconds"], row["stage_tokens_per_second"]
        assert list(seconds) == [*timing.STAGES, "other"] and all(s > 0 for s in seconds.values())
        tokens = row["completion_length"] * 8
        assert row["tokens_per_second"] == pytest.approx(tokens / sum(seconds.values()))
        assert rates["generate"] == pytest.approx(tokens / seconds["generate"])
        through = rates["forward"] * seconds["forward"]
        assert through == pytest.approx(rates["backward"] * seconds["backward"]) and through > tokens
        assert row["mfu"] is None, "the peak of a CPU is not known"
        assert row["memory_mb"] > 0


def test_the_clock_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 3.5, 4.0, 10.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    clock = StageClock(torch.device("cpu"))
    for _ in range(2):
        with clock.stage("forward"):
            pass
    found = clock.read(None, [30, 10], [], 1, None)
    assert found["seconds"]["forward"] == 2.5 and found["seconds"]["other"] == 7.5
    assert found["tokens_per_second"] == 4.0


def test_model_flops_of_a_forward_pass() -> None:
    """Against torch's own counter over the matmuls and attention of one padded sequence."""
    import transformers as tf
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **heads, attn_implementation="eager"))
    work = Work()
    work.add([5], [[7]])
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(12)[None], logits_to_keep=7)
    # The counter sees all pairs, also those that the causal mask removes; and no norms, of which we count weights.
    counted = counter.get_total_flops() - 3 * 4 * 32 * (144 - 78)
    norms = 2 * 12 * sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert (work.tokens, work.rows, work.pairs) == (12, 7, 78)
    assert work.flops(model) == pytest.approx(counted + norms, rel=0.02)


def test_peaks_are_known_in_half_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "Some GPU": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda"), half=True) == peak
    assert peak_flops(torch.device("cuda"), half=False) is None and peak_flops(torch.device("cpu"), half=True) is None


def test_profile_writes_a_trace(tmp_path: Path) -> None:
    trainer = run_small(tmp_path, steps=9, profile=True)
    (trace,) = (trainer.out.path / "profile").iterdir()
    names = {e.get("name", "") for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert any("linear_token_loss" in n for n in names), "the objective's own op is in it"


def test_metrics_over_ranks() -> None:
    one = {"loss": 1.0, "dropped": 1, "ratio_max": 3.0, "note": None, "mfu": None, "seconds": {"score": 1.0}}
    two = {"loss": 2.0, "dropped": 2, "ratio_max": 2.0, "note": "why", "mfu": None, "seconds": {"score": 2.0}}
    slots = [[{"temperature": 0.5, "reward": None}], [{"temperature": 0.5, "reward": 1.0}]]
    found = over_ranks([{**one, "slots": slots[0]}, {**two, "slots": slots[1]}])
    assert found == {
        "loss": 1.5, "dropped": 3, "ratio_max": 3.0, "note": "why", "mfu": None, "seconds": {"score": 1.5},
        "slots": [{"temperature": 0.5, "reward": 1.0}],
    }  # fmt: skip
    assert over_ranks([one]) == one


# ---- LoRA and memory ------------------------------------------------------------------------------------------------


def test_lora_trains_adapters_alone_and_exports_the_sum(tmp_path: Path) -> None:
    trainer = run_small(tmp_path, lora=True, lora_r=4, steps=3, learning_rate=1e-2)
    trained = {n for n, p in trainer.lm.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in n for n in trained)
    first, _, last = rows(trainer)
    assert first["kl"] == 0 < last["kl"], "the reference is the model without its adapters"
    assert trainer.reference is None
    merged = AutoModelForCausalLM.from_pretrained(trainer.out.path / "model")
    assert not hasattr(merged, "peft_config") and (trainer.out.path / "adapters" / "adapter_config.json").exists()
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trainer.lm(ids).logits, rtol=1e-4, atol=1e-4)
        with lora.without_adapters(trainer.lm):
            assert (merged(ids).logits - trainer.lm(ids).logits).abs().max() > 1e-3


def test_the_loss_under_lora_is_that_of_a_reference_of_its_own(tmp_path: Path) -> None:
    """The first step's numbers: the base stands in for a second model."""
    full, adapted = run_small(tmp_path, name="full", steps=1), run_small(tmp_path, name="lora", lora=True, steps=1)
    for name in ("loss", "kl", "entropy", "reward", "completion_length"):
        assert rows(adapted)[0][name] == pytest.approx(rows(full)[0][name], abs=1e-6), name


@pytest.mark.parametrize(
    "knobs",
    [{"gradient_checkpointing": True}, {"fused_adamw": False}, {"compile": True, "gradient_checkpointing": True}],
    ids=str,
)
@pytest.mark.parametrize("packing", ["on", "off"])
def test_memory_and_speed_options_change_no_result(tmp_path: Path, knobs: dict[str, Any], packing: str) -> None:
    plain = run_small(tmp_path, name="plain", packing=packing, learning_rate=1e-4)
    other = run_small(tmp_path, name="other", packing=packing, learning_rate=1e-4, **knobs)
    for a, b in zip(rows(plain), rows(other), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-6) and b["grad_norm"] == pytest.approx(a["grad_norm"])
    torch.testing.assert_close(parameters(other), parameters(plain), rtol=0, atol=1e-5)


def test_compiled_blocks_take_other_lengths_without_compiling_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    graphs: list[int] = []
    update = Trainer.update

    def watched(self: Trainer, *args: Any) -> dict[str, Any]:
        row = update(self, *args)
        graphs.append(counters["stats"]["unique_graphs"])
        return row

    monkeypatch.setattr(Trainer, "update", watched)
    trainer = run_small(tmp_path, compile=True, steps=3)
    assert len({r["completion_length"] for r in rows(trainer)}) > 1, "packed rows of different lengths"
    assert graphs[0] > 0 and graphs == [graphs[0]] * 3


def test_the_config_file_of_a_packed_model_is_as_before(tmp_path: Path) -> None:
    trainer = run_small(tmp_path, steps=1)
    assert "shared_prompt" not in (trainer.out.path / "model" / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(trainer.out.path / "model").config._attn_implementation == "sdpa"


# ---- dynamic sampling -----------------------------------------------------------------------------------------------


def test_groups_without_a_gradient_are_refilled_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    sample = Collector.sample

    def counted(self: Collector, prompts: list[int]) -> Rollout:
        drawn.append(len(prompts))
        return sample(self, prompts)

    monkeypatch.setattr(Collector, "sample", counted)
    knobs = {"steps": 3, "prompts_per_step": 3, "max_completion_length": 24, "seed": 3}
    plain = run_small(tmp_path, PLAIN, "plain", **knobs)
    assert drawn == [3, 3, 3] and any(r["zero_gradient_groups"] > 0 for r in rows(plain))
    drawn.clear()
    filled = run_small(tmp_path, PLAIN, "filled", refill=8, **knobs)
    assert len(drawn) > 3 and all(r["zero_gradient_groups"] == 0 for r in rows(filled))
    assert rows(filled)[0]["completion_length"] > 0
    drawn.clear()
    # A reward that is always the same never gives a signal: the bound ends it, and the step says why it learns nothing.
    never = run_small(tmp_path, PLAIN, "never", refill=2, reward=["helpers.rewards:none"], **{**knobs, "steps": 1})
    assert drawn == [3, 3, 3] and rows(never)[0]["zero_gradient_groups"] == 1 and "all equal" in rows(never)[0]["note"]


def test_groups_with_a_kl_term_are_never_refilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    sample = Collector.sample
    monkeypatch.setattr(Collector, "sample", lambda self, prompts: drawn.append(1) or sample(self, prompts))
    run_small(tmp_path, preset("grpo", num_generations=4), reward=["helpers.rewards:none"], steps=1, refill=3)
    assert drawn == [1]


def test_replaced_groups_are_the_others_in_both_widths(model_dirs: dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    torch.manual_seed(0)
    draw = {"temperature": [1.0] * 4, "eos": [2], "num_generations": 2}
    ours = generate(model, [[5, 6, 7], [8]], max_new_tokens=4, **draw)
    theirs = generate(model, [[9] * 5, [3, 4]], max_new_tokens=7, **draw)
    for a, b in ((ours, theirs), (theirs, ours)):
        mixed = replace_groups(a, [1, 0], b, 2)
        for i, j in zip((0, 1, 2, 3), (2, 3, 0, 1), strict=True):
            assert mixed.prompt_ids[i, mixed.prompt_mask[i]].equal(b.prompt_ids[j, b.prompt_mask[j]])
            assert mixed.tokens[i, mixed.mask[i]].equal(b.tokens[j, b.mask[j]])
            assert mixed.sampling_logprobs[i, mixed.mask[i]].equal(b.sampling_logprobs[j, b.mask[j]])


def test_a_setting_that_packing_does_not_use_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for packing, said in (("on", True), ("off", False)):
        run_small(tmp_path, name=packing, packing=packing, micro_batch_size=4, steps=1, eval_samples=1)
        assert ("micro_batch_size is not used: groups are packed" in capsys.readouterr().err) == said


# ---- vLLM's place in the loop ---------------------------------------------------------------------------------------


class FakeEngine:
    """Samples with a model of its own, which sync has to bring up to date."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, []  # type: ignore[var-annotated]

    def sync(self, named: Any, version: int) -> None:
        self.calls.append("sync")
        own = self.model.state_dict()
        given = dict(named)
        missing = own.keys() - given.keys()
        assert missing <= {"lm_head.weight"}, missing
        for name, x in given.items():
            own[name].copy_(x.detach())

    def generate(self, prompts: Any, **knobs: Any) -> Rollout:
        self.calls.append("generate")
        r = generate(self.model, prompts, **knobs)
        r.policy_logprobs.fill_(torch.nan)
        return r

    def sleep(self) -> None:
        self.calls.append("sleep")


@pytest.mark.parametrize("knobs", [{}, {"lora": True, "lora_r": 4}], ids=str)
def test_an_engine_samples_with_the_weights_of_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knobs: dict[str, Any]
) -> None:
    made: list[FakeEngine] = []

    def fake(*_: Any) -> FakeEngine:
        made.append(FakeEngine(prepare(TrainConfig(max_completion_length=12)).model.eval()))
        return made[-1]

    method = preset("exact", num_generations=4, temperature_objective="corrected")
    own = run_small(tmp_path, method, "own", steps=3, **knobs)
    monkeypatch.setattr("mdpgrpo_fast.training.trainer.make_engine", fake)
    theirs = run_small(tmp_path, method, "engine", steps=3, rollout="vllm", **knobs)
    assert made[0].calls == ["sync", "generate", "sleep"] * 3
    for a, b in zip(rows(own), rows(theirs), strict=True):
        assert b["reward"] == a["reward"] and b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        for x, y in zip(a["slots"], b["slots"], strict=True):
            assert y["ess"] == pytest.approx(x["ess"], abs=1e-4), "the effective sample size of each slot is logged"


def test_an_engine_that_fails_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(FakeEngine):
        def generate(self, prompts: Any, **knobs: Any) -> Rollout:
            if len(self.calls) > 3:
                kept = [Completion([5, 6], [0.0, 0.0], False), None]
                raise RolloutError("vLLM server http://x: gave up; 1 of 2 completions kept", kept)
            return super().generate(prompts, **knobs)

    monkeypatch.setattr(
        "mdpgrpo_fast.training.trainer.make_engine",
        lambda *_: Failing(prepare(TrainConfig(max_completion_length=12)).model.eval()),
    )
    folder = tmp_path / "run"
    argv = ["--output-dir", str(folder), "--steps", "4", "--prompts-per-step", "2", "--max-completion-length", "8",
            "--eval-samples", "2", "--rollout", "vllm"]  # fmt: skip
    assert train.main(argv) == 1
    *before, said = capsys.readouterr().err.splitlines()
    assert f"1 completions of step 2 are kept in {folder / 'partial_rollout.jsonl'}" in before
    assert said.startswith("error: vLLM server http://x: gave up; 1 of 2 completions kept") and str(folder) in said
    (kept,) = [json.loads(x) for x in (folder / "partial_rollout.jsonl").read_text().splitlines()]
    assert kept["tokens"] == [5, 6] and kept["row"] == 0 and kept["step"] == 2
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1
    assert (folder / "model" / "model.safetensors").exists()


def test_make_engine_by_the_knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(engine, "VLLMServer", lambda url, **knobs: made.update(url=url, **knobs) or "server")
    monkeypatch.setattr(engine, "VLLMEngine", lambda model, **knobs: made.update(model=model, **knobs) or "engine")
    acc: Any = type("Acc", (), {"device": torch.device("cpu"), "process_index": 3})()
    method = preset("exact")
    assert engine.make_engine(TrainConfig(), method, 512, acc) is None
    assert (
        engine.make_engine(TrainConfig(rollout="vllm", vllm_url="http://x", vllm_retries=2), method, 512, acc)
        == "server"
    )
    assert made["url"] == "http://x" and made["retries"] == 2 and made["timeout"] == 600
    run = TrainConfig(rollout="vllm", model="m", max_prompt_length=100, max_completion_length=50)
    assert engine.make_engine(run, method, 512, acc) == engine.make_engine(run, method, None, acc) == "engine"
    assert made["model"] == "m" and made["seed"] == 45 and made["sleep_mode"] is True and made["max_model_len"] == 150
    assert engine.make_engine(run, method, 120, acc) == "engine" and made["max_model_len"] == 120
    with pytest.raises(ConfigError, match=r"temperatures must be at least 0.01 \(vLLM's floor\); got 0.005"):
        engine.make_engine(run, preset("exact", temperatures=[0.005, 1.0]), 512, acc)


# ---- bad settings ---------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *flags: str) -> str:
    """The one line that a command line ends with."""
    defaults = ["--output-dir", str(tmp_path / "run"), "--steps", "2", "--max-completion-length", "8"]
    with pytest.raises(SystemExit) as end:
        train.main([*defaults, *flags])
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_budget_below_one_group_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"tokens_per_micro_batch must hold a whole group: a prompt of \d+ and 4 compl"
    ):
        run_small(tmp_path, tokens_per_micro_batch=60)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resume"], r"resume needs a checkpoint in .*checkpoints.* \(save_every\)"),
        (["--attention", "flash_attention_2"], r"cannot be loaded with attention = flash_attention_2: .*installed"),
        (["--rollout", "vllm"], "rollout = vllm needs the package vllm"),
        (
            ["--rollout", "vllm", "--vllm-url", "host:1"],
            "vllm_url must be an http:// or https:// address; got 'host:1'",
        ),
        (["--tokens-per-micro-batch", "60"], "tokens_per_micro_batch must hold a whole group"),
        (["--lora", "--lora-target-modules", "nose"], "nose"),
        (["--packing", "off", "--tokens-per-micro-batch", "9000"], "tokens_per_micro_batch needs packing"),
        (["--refill", "-1"], "refill must be 0 or above; got -1"),
        (["--vllm-memory", "2"], r"vllm_memory must be in \(0, 1\); got 2.0"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_settings_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    import re

    line = refused(capsys, tmp_path, *flags)
    assert line.startswith("error: ") and re.search(said, line), line


def test_a_resumed_run_with_other_settings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--save-every", "1", "--prompts-per-step", "2", "--eval-samples", "2"]
    defaults = ["--output-dir", str(tmp_path / "run"), "--steps", "2", "--max-completion-length", "8"]
    assert train.main([*defaults, *flags]) == 0
    line = refused(capsys, tmp_path, *flags, "--resume", "--learning-rate", "1e-3")
    assert "resume needs the settings of the run before: learning_rate was 0.0005; got 0.001" in line
    assert train.main([*defaults, *flags, "--resume"]) == 0, "a finished run has nothing left to do"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_torchrun_on_the_cpu(tmp_path: Path) -> None:
    """The command as a user gives it, to the end of its processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    flags = ["--steps", "2", "--prompts-per-step", "2", "--eval-samples", "4", "--max-completion-length", "8", "--cpu"]
    command = [*run, "mdpgrpo_fast.train", "--output-dir", str(tmp_path / "run"), *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "held-out HSR" in done.stdout and done.stdout.count("run directory") == 1, "the first process alone speaks"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["processes"] == 2


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
        from accelerate.utils import DistributedType

        self.distributed_type, self.gradient_accumulation_steps, self.is_fsdp2 = (
            DistributedType(kind),
            accumulation,
            fsdp2,
        )
        plugin = type("Plugin", (), {"deepspeed_config": config, "zero_stage": 2})()
        self.state = type("State", (), {"deepspeed_plugin": plugin})()


def test_contradicting_launch_settings_are_refused() -> None:
    from mdpgrpo_fast.training.distributed import check

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


def test_the_budget_of_packing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default, or what the largest group may need; under masks no more than that, or none where it does not pay."""
    run = TrainConfig(max_completion_length=16)
    with Scorer(run.reward) as scorer:
        trainer = Trainer(prepare(run), run, preset("exact", num_generations=4), RunDir(tmp_path / "r"), scorer)
    assert trainer.budget == 8192
    packing, longest = trainer.policy.packing, max(map(len, trainer.task.train_ids))
    assert packing is not None and packing.mode == "blocks"
    for most, mode, budget in (
        (4096, "blocks", longest + 4 * 4096),
        (16, "masks", longest + 4 * 16),
        (4096, "masks", 0),
    ):
        object.__setattr__(run, "max_completion_length", most)
        packing.mode = mode  # type: ignore[assignment]
        assert trainer.micro_batch_budget(packing) == budget
    assert "under masks attention would look at 3.9 times the pairs" in capsys.readouterr().err
