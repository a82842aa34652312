"""Command lines: layers of configuration, and one clear line with exit status 2 for whatever cannot be used."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.inputs import ROOT

import mdpgrpo_fast.__main__ as console
import mdpgrpo_fast.train as train
from mdpgrpo_fast import __version__, evaluate, explain
from mdpgrpo_fast.cli import foreign, parse, read_yaml
from mdpgrpo_fast.cli.ending import _unread
from mdpgrpo_fast.config import (
    ADVANCED,
    GROUPS,
    PRESETS,
    ConfigError,
    MDPGRPOConfig,
    TrainConfig,
    preset,
    without_effect,
)
from mdpgrpo_fast.rollout.processors import generation_kwargs

ROW = {"prompt": "Say hi.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    return str(path)


def test_embedded_default_takes_the_demo_settings() -> None:
    run, method = train.resolve([])
    demo = read_yaml(Path(train.__file__).parent / "demo" / "demo.yaml")
    assert run.preset == demo["preset"] and run.steps == demo["steps"] and run.learning_rate == demo["learning_rate"]
    assert method == preset(demo["preset"], num_generations=demo["num_generations"])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_flag_changes_the_method_alone(name: str) -> None:
    run, method = train.resolve(["--preset", name])
    assert method == preset(name, num_generations=4), "the demonstration's budget stays"
    assert dataclasses.replace(run, preset="paper") == train.resolve([])[0]


def test_own_model_starts_from_the_papers_settings() -> None:
    run, method = train.resolve(["--model", "m", "--train-file", "t.jsonl"])
    assert run == TrainConfig(model="m", train_file="t.jsonl") and method == preset("paper")


def test_flags_override_the_file_which_overrides_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "preset: released_code\nlearning_rate: 1e-4\nsteps: 7\ngoal_mean: mean\ntemperatures: [0.5, 1]\n"
        "report_to: []\ndelta: null\nmask_truncated: true\n"
    )
    run, method = train.resolve(["--config", str(path), "--steps", "9", "--mask-truncated", "false"])
    assert (run.learning_rate, run.steps, run.preset) == (1e-4, 9, "released_code"), "1e-4 is text to YAML"
    assert method.prospect_gain == 2.0 and method.goal_mean == "mean" and method.temperatures == [0.5, 1.0]
    assert method.delta is None and not method.mask_truncated


def test_a_runs_own_config_starts_the_same_run(tmp_path: Path) -> None:
    run, method = train.resolve(["--preset", "grpo", "--seed", "3", "--delta", "4"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"run": dataclasses.asdict(run), "method": dataclasses.asdict(method)}))
    assert train.resolve(["--config", str(path)]) == (run, method)


def test_a_preset_flag_replaces_the_method_of_a_runs_own_config(tmp_path: Path) -> None:
    run, method = train.resolve(["--seed", "3"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"run": dataclasses.asdict(run), "method": dataclasses.asdict(method)}))
    again, other = train.resolve(["--config", str(path), "--preset", "grpo"])
    assert again.seed == 3 and again.preset == "grpo" and other == preset("grpo", num_generations=4)


def test_null_in_the_file_undoes_a_lower_layer(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: null\n")
    assert train.resolve([])[0].steps is not None and train.resolve(["--config", str(path)])[0].steps is None


def test_every_knob_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    for cls in (TrainConfig, MDPGRPOConfig, evaluate.EvaluateConfig):
        assert all(f.metadata["help"] for f in dataclasses.fields(cls))
    with pytest.raises(SystemExit) as stop:
        train.main(["--help-all"])
    words = capsys.readouterr().out.split()
    assert stop.value.code == 0
    for f in (*dataclasses.fields(TrainConfig), *dataclasses.fields(MDPGRPOConfig)):
        assert f"--{f.name.replace('_', '-')}" in words and ("_" not in f.name or f"--{f.name}" not in words)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning-rat", "1"], "unknown flag '--learning-rat'; did you mean '--learning-rate'?"),
        (["--no-prospct"], "unknown flag '--no-prospct'; did you mean '--no-prospect'?"),
        (["--steps", "many"], "--steps must be a whole number; got 'many'"),
        (["--steps", "0"], "steps must be at least 1; got 0"),
        (["--zzz", "1"], "unknown flag '--zzz'; --help-all lists the flags"),
        (["stray"], "unexpected argument 'stray'"),
        (["--lora", "maybe"], "--lora must be true or false; got 'maybe'"),
        (["--steps"], "--steps expected one argument"),
        (["--beta", "0.1"], "unknown flag '--beta'; TRL's beta is --kl-beta-pos and --kl-beta-neg"),
        (["--lr", "1"], "unknown flag '--lr'; it is --learning-rate"),
        (["--bf16"], "unknown flag '--bf16'; it is --mixed-precision bf16"),
        (["--loss_type=dapo"], "unknown flag '--loss-type'; TRL's loss_type is --aggregation"),
        (["--sync-ref-model"], "unknown flag '--sync-ref-model'; it is --sync-reference"),
        (["--steps-per-generation", "4"], "; --mini-batches gives parts of it an update each"),
        (["--use_adaptive_entropy"], "unknown flag '--use-adaptive-entropy'; it is --entropy-target"),
        (["algorithm.use_kl_in_reward=true"], "'algorithm.use_kl_in_reward'; it is --kl-in"),
        (["--mini-batches", "17"], "mini_batches must be at most prompts_per_step = 16; got 17"),
        (
            ["--lora", "--sync-reference", "1"],
            "reference_mix must be 1 with lora, where the reference is adapters beside the model",
        ),
        (["--use-vllm"], "unknown flag '--use-vllm'; it is --rollout vllm"),
        (["--model-name-or-path", "m"], "unknown flag '--model-name-or-path'; it is --model"),
        (["--num-train-epochs", "1"], "unknown flag '--num-train-epochs'; it is --epochs"),
        (
            ["--gradient-accumulation-steps", "4"],
            "a step is --prompts-per-step prompts of --num-generations completions",
        ),
        (
            ["--per-device-train-batch-size", "4"],
            "a step is --prompts-per-step prompts of --num-generations completions",
        ),
        (["--resume-from-checkpoint", "x"], "unknown flag '--resume-from-checkpoint'; it is --resume"),
        (
            ["actor_rollout_ref.rollout.n=8"],
            "unexpected argument 'actor_rollout_ref.rollout.n'; it is --num-generations",
        ),
        (["--preset", "papr"], "unknown preset 'papr'; did you mean 'paper'?"),
        (["--num-generations", "1", "--temperatures", "1"], "num_generations must be at least 2"),
        (["--temperatures", "0.1", "0.4", "1"], "temperatures must be a list whose length divides num_generations = 4"),
        (["--temperatures", "0", "1"], "temperatures must be all above 0; got 0.0"),
        (
            ["--goal-mean", "max_half"],
            "--goal-mean must be one of half, max_half_mean, mean, running; got 'max_half'; did",
        ),
        (["--train-file", "no.jsonl"], "prompt file 'no.jsonl' does not exist"),
        (["--model", "/no/such/model"], "train_file, or prompts, is required with a model of your own"),
        (["--model", "/no/such/model", "--train-file", "PROMPTS"], "model '/no/such/model' cannot be loaded: "),
        (["--config", "no.yaml"], "config file 'no.yaml' does not exist"),
        (["--report-to", "papyrus"], "report_to must be none or among "),
        (["--reward", "nowhere:f"], "reward 'nowhere:f' cannot be loaded"),
        (
            ["--reward", "constraints", "--reward-weights", "1", "2"],
            "reward_weights must have one weight per reward (1)",
        ),
        (["--mixed-precision", "fp16", "--cpu"], "mixed_precision fp16 needs a GPU"),
        (["--max-prompt-length", "5"], "over the limit of 5"),
        (["--max-completion-length", "4096"], "max_completion_length must be below the model's"),
    ],
)
def test_one_clear_line_and_status_2(
    argv: list[str], message: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train.main([prompts if a == "PROMPTS" else a for a in argv] + ["--output-dir", str(out)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2
    assert len(lines) == 1 and message in lines[0]
    assert not out.exists(), "nothing is written before the input is known to be good"


def test_unknown_key_of_the_file_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rte: 1\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: unknown key 'learning_rte'; did you mean 'learning_rate'\?"):
        train.resolve(["--config", str(path)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 0.1\n", "run.yaml: unknown key 'beta'; TRL's beta is --kl-beta-pos and --kl-beta-neg"),
        ("num_train_epochs: 3\n", "run.yaml: unknown key 'num_train_epochs'; it is --epochs"),
        ("steps: many\n", "run.yaml: --steps must be a whole number; got 'many'"),
        ("config: other.yaml\n", "run.yaml: unknown key 'config'; --help-all lists the flags"),
        ("actor_rollout_ref: {rollout: {n: 8}}\n", "'actor_rollout_ref.rollout.n'; it is --num-generations"),
        (
            "preset: [paper]\n",
            "unknown preset \"['paper']\"; known: cispo, dapo, dr_grpo, exact, grpo, gspo, paper, "
            "released_code, rloo, trl",
        ),
        ("run: {1: 2}\n", "run.yaml: unknown key '1'; --help-all lists the flags"),
        ("temperatures: [warm]\n", "run.yaml: --temperatures must be a number; got 'warm'"),
    ],
)
def test_keys_of_the_file_are_said_like_flags(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        train.resolve(["--config", str(path)])
    assert str(error.value).endswith(message)


def test_every_name_of_another_trainer_leads_to_a_flag_of_ours() -> None:
    settings = (TrainConfig, MDPGRPOConfig, evaluate.EvaluateConfig)
    flags = {f.name.replace("_", "-") for c in settings for f in dataclasses.fields(c)}
    for name in foreign.names():
        said = foreign.hint(name)
        assert said and set(re.findall(r"--([a-z][\w-]*)", said)) <= flags, (name, said)
        assert name.replace("-", "_") not in names_in_groups(), f"{name} is a flag of ours"
    assert foreign.hint("zzz") is None and foreign.hint("--num_train_epochs") == "it is --epochs"


def test_other_commands_hint_at_flags_of_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    """`--num-train-epochs` is --epochs, which explain does not have."""
    with pytest.raises(SystemExit):
        explain.main(["--num-train-epochs", "1"])
    assert "--epochs" not in capsys.readouterr().err


def test_negative_numbers_are_numbers() -> None:
    run, _ = train.resolve(["--reward-range", "-1e-3", "-.5e-4", "--reward-weights", "-1"])
    assert run.reward_range == [-1e-3, -0.5e-4] and run.reward_weights == [-1.0]


def test_every_knob_is_in_one_group() -> None:
    names = [name for knobs in GROUPS.values() for name in knobs]
    assert sorted(names) == sorted(f.name for c in (TrainConfig, MDPGRPOConfig) for f in dataclasses.fields(c))
    assert set(names) >= ADVANCED


@pytest.mark.parametrize("columns", ["80", "100", "200"])
def test_help_is_short_grouped_and_names_each_flag_once(columns: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert stop.value.code == 0 and len(lines) <= 150 and max(map(len, lines)) <= min(120, int(columns))
    heads = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(heads) == len(set(heads)) == 2 + len(names_in_groups()) - len(ADVANCED) - 1
    assert "--config" in heads and [line[:-1] for line in lines if line.endswith(":") and line[0] != " "][1:] == list(
        GROUPS
    )


def names_in_groups() -> list[str]:
    return [name for knobs in GROUPS.values() for name in knobs]


def test_help_shows_the_defaults_that_are_in_effect(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*argv: str) -> dict[str, str]:
        with pytest.raises(SystemExit):
            train.main([*argv, "--help-all"])
        entries = re.split(r"\n  (?=--)", capsys.readouterr().out)
        return {e.split()[0]: e.rsplit("[", 1)[1].split("]")[0] for e in entries if e.rstrip().endswith("]")}

    demo, own, grpo = shown(), shown("--model", "m"), shown("--preset", "grpo")
    assert (demo["--top-p"], demo["--top-k"], demo["--steps"], demo["--output-dir"]) == (
        "0.9",
        "50",
        "140",
        "runs/demo",
    )
    assert own["--top-p"] == "0.9" and own["--output-dir"] == "runs/train" and "--steps" not in own
    assert "--dual-anchor" in own and "--dual-anchor" not in grpo and grpo["--group-std"] == "sample"


def test_a_wrong_flag_and_help_load_no_torch() -> None:
    for argv in (["--help"], ["--help-all"], ["--lr", "1"], ["train", "--help"], ["--version"], ["explain", "--help"]):
        module = "mdpgrpo_fast" if not argv[0].startswith("--") or argv == ["--version"] else "mdpgrpo_fast.train"
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", module, *argv], capture_output=True, text=True, cwd=ROOT
        )
        loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
        assert done.returncode == (2 if argv == ["--lr", "1"] else 0) and "argparse" in loaded | {"argparse"}
        if argv[0] != "explain":
            assert not loaded & {"torch", "transformers", "accelerate", "numpy", "matplotlib"}, argv


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["--temperature", "0.5"],
            "--temperature has no effect: the group is sampled at --temperatures (--no-multi-temp",
        ),
        (
            ["--preset", "grpo", "--temperatures", "1"],
            "--temperatures has no effect: the group is sampled at one --temp",
        ),
        (["--lora-r", "8"], "--lora-r has no effect: all weights are trained (--lora)"),
        (
            ["--no-dual-anchor", "--dual-anchor-alpha", "0.5"],
            "--dual-anchor-alpha has no effect: the goal anchor is off",
        ),
        (
            ["--train-file", "x", "--eval-every", "2"],
            "--eval-every has no effect: there are no held-out prompts (--eval-f",
        ),
        (["--vllm-url", "http://x"], "--vllm-url has no effect: the model samples by itself (--rollout vllm)"),
        (
            ["--epsilon-low", "0.1", "--delta", "3"],
            "--epsilon-low, --delta have no effect: the ratio is 1 where a batch",
        ),
        (["--importance-level", "sequence"], "--importance-level has no effect: the ratio is 1 where a batch gets one"),
        (["--sync-reference", "5", "--preset", "dapo"], "--sync-reference has no effect: without a KL term there is"),
        (["--sync-reference", "9", "--steps", "9"], "--sync-reference has no effect: the run is over before"),
        (["--reference-mix", "0.5"], "--reference-mix has no effect: the reference stays as it is (--sync-reference)"),
        (["--kl-gradient", "unbiased", "--preset", "gspo"], "--kl-gradient has no effect: there is no KL term"),
        (
            ["--scale-rewards", "none", "--dual-anchor-alpha", "1"],
            "--scale-rewards has no effect: the relative anchor has no weight",
        ),
        (
            ["--baseline", "leave_one_out", "--multi-objective-aggregation", "normalize_then_sum"],
            "--baseline has no effect: its factor n / (n - 1) cancels",
        ),
        (["--group-std", "population", "--preset", "dr_grpo"], "--group-std has no effect: rewards are divided by no"),
        (
            ["--importance-weight-floor", "0.1"],
            "--importance-weight-floor has no effect: there is no importance weight",
        ),
        (
            ["--temperature-objective", "corrected", "--sampler-correction"],
            "--sampler-correction has no effect: --temperature-objective corrected weighs by itself",
        ),
        (
            ["--loss", "luspo", "--importance-level", "sequence"],
            "--importance-level has no effect: --loss luspo has a completion's ratio",
        ),
        (["--loss", "sapo", "--epsilon-low", "0.1"], "--epsilon-low has no effect: this --loss has no clip"),
        (["--sapo-temperature-pos", "2"], "--sapo-temperature-pos has no effect: --loss is not sapo"),
        (["--vespo-k-neg", "2"], "--vespo-k-neg has no effect: --loss is not vespo"),
        (["--loss", "sapo", "--sapo-temperature-pos", "2"], "--sapo-temperature-pos has no effect: the ratio is 1"),
        (["--loss", "vespo", "--vespo-k-neg", "2"], "--vespo-k-neg has no effect: the ratio is 1 where a batch gets"),
        (["--off-policy-threshold", "0.1"], "--off-policy-threshold has no effect: the policy is the one that sampled"),
        (["--entropy-coef-max", "0.1"], "--entropy-coef-max has no effect: the coefficient of the entropy bonus is"),
        (
            ["--preset", "dapo", "--refill", "2", "--entropy-coef", "0.1"],
            "--refill has no effect: with an entropy bonus every completion has a gradient",
        ),
        (["--epochs", "2", "--steps", "3"], "--epochs has no effect: --steps says how many"),
        (["--kl-beta-neg", "1", "--no-asymmetric-kl"], "--kl-beta-neg has no effect: --kl-beta-pos is for all"),
        (["--refill", "2"], "--refill has no effect: with a KL term every group has a gradient"),
        (["--no-prospect", "--prospect-gain", "1"], "--prospect-gain has no effect: the shaping is off (--prospect)"),
    ],
)
def test_a_flag_without_effect_is_said(argv: list[str], line: str) -> None:
    (said,) = without_effect(*train.read(argv))
    assert said.startswith(line)


def test_a_flag_with_effect_is_not(tmp_path: Path) -> None:
    for argv in (
        [],
        ["--temperatures", "0.5", "1"],
        ["--lora", "--lora-r", "4"],
        ["--eval-every", "2"],
        ["--preset", "grpo"],
        ["--epsilon-low", "0.1", "--importance-level", "sequence", "--mini-batches", "2"],
        ["--importance-level", "sequence", "--kl-gradient", "unbiased"],
        ["--loss", "vespo", "--vespo-k-neg", "2", "--temperature-objective", "corrected"],
        ["--loss", "sapo", "--sapo-temperature-neg", "2", "--updates-per-rollout", "2"],
        ["--sampler-correction", "--temperature-objective", "per_row", "--importance-weight-kind", "mask"],
        ["--entropy-target", "0.5", "--entropy-coef-delta", "0.01", "--sync-reference", "3", "--reference-mix", "1"],
        ["--off-policy-threshold", "0.1", "--mini-batches", "2", "--scale-rewards", "batch"],
    ):
        assert without_effect(*train.read(argv)) == []
    run, method, _ = train.read([])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"run": dataclasses.asdict(run), "method": dataclasses.asdict(method)}))
    assert without_effect(*train.read(["--config", str(path)])) == [], "a run's own file has every knob"
    path.write_text("temperature: 0.5\n")
    assert len(without_effect(*train.read(["--config", str(path)]))) == 1


@pytest.mark.parametrize(
    ("argv", "status", "out", "err"),
    [
        (["--version"], 0, f"mdpgrpo_fast {__version__}\n", ""),
        (["trian"], 2, "", "error: unknown command 'trian'; did you mean 'train'?\n"),
        (
            ["zzz"],
            2,
            "",
            "error: unknown command 'zzz'; commands: train, evaluate, score, explain, report, compare, verifiers",
        ),
        (["--lr"], 2, "", "error: unknown command '--lr'; commands: train, "),
    ],
)
def test_the_console_script(argv: list[str], status: int, out: str, err: str, capsys: Any) -> None:
    assert console.main(argv) == status
    said = capsys.readouterr()
    assert said.out == out and said.err.startswith(err)


def test_the_console_script_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main([]) == 0
    text = capsys.readouterr().out
    for name, (place, _) in console.COMMANDS.items():
        module, _, function = place.partition(":")
        assert f"  {name} " in text and callable(getattr(importlib.import_module(f"mdpgrpo_fast.{module}"), function))


_LAUGHS = "".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 10)}]}}\n" for i in range(9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold a mapping of knobs; got list"),
        ("a: [1\n", "cannot be read: while parsing a flow sequence"),
        ("", "must hold a mapping of knobs; got nothing"),
        ("false\n", "must hold a mapping of knobs; got bool"),
        ("run:\n  steps: 5\nmethod:\n  lr", ": method must hold a mapping of knobs; got str"),
        ("run: [1]\n", ": run must hold a mapping of knobs; got list"),
        ("a: " + "[" * 600 + "]" * 600, "cannot be read: it is nested too deep, or holds itself"),
        ("a: &a {b: *a}\n", "cannot be read: it is nested too deep, or holds itself"),
        ("a: &a [*a]\n", "cannot be read: Circular reference detected"),
        ("a0: &a0 {x: 1}\n" + _LAUGHS, "cannot be read: more than 20 aliases"),
        ("".join(f"{i}: 1\n" for i in range(1001)), "cannot be read: more than 1000 knobs"),
        ("a: " + "x" * 100_000, "must hold knobs in at most 100000 bytes"),
        ("seed: " + "9" * 5000, "cannot be read: Exceeds the limit"),
        ("seed: 0x" + "f" * 9000, "cannot be read: Exceeds the limit"),
        ("a: 2001-13-45\n", "cannot be read: month must be in 1..12"),
        ("a: !!timestamp b\n", "cannot be read: AttributeError"),
        ("a: !!int ''\n", "cannot be read: string index out of range"),
        ("a: !!python/object/apply:os.system [id]\n", "cannot be read: could not determine a constructor for the tag"),
        ("steps: 5\0", "cannot be read: unacceptable character #x0000"),
        ('output_dir: "\\ud800"\n', "holds '\\ud800', half of a surrogate pair, which is no text"),
        (b"a: \xff\n", "cannot be read: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert str(error.value).startswith(f"config file {str(path)!r}") and message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_config_with_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfsteps: 5\r\ncolumns: [a=b]\r\n")
    assert read_yaml(path) == {"steps": 5, "columns": ["a=b"]}


def test_an_item_of_a_list_that_begins_with_dashes_is_no_flag(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("template_args: [--steps=7, '--resume=x', -x=1, a=1]\ntemperatures: [0.5, 1]\ncolumns: []\n")
    run, method = train.resolve(["--config", str(path)])
    assert run.template_args == ["--steps=7", "--resume=x", "-x=1", "a=1"] and run.steps != 7 and run.columns == []
    assert list(method.temperatures) == [0.5, 1.0]
    path.write_text("template_args: [--resume]\n")
    with pytest.raises(ConfigError, match=r"template_args must be name=value; got '--resume'"):
        train.resolve(["--config", str(path)])
    path.write_text("steps: [1, 2]\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: --steps takes one value; got a list"):
        train.resolve(["--config", str(path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "9" * 1_000_000], "--steps must be a whole number; got '99"),
        (["--steps", str(2**63)], "--steps must be a whole number below 2^63; got '9223372036854775808'"),
        (["--learning-rate", "1" * 1000 + "x"], "--learning-rate must be a number; got '11"),
        (["--output-dir", "a\udcff"], "argument 'a\\udcff' holds bytes that are no UTF-8 text"),
        (
            ["--generation-kwargs", "suppress_tokens=" + "[" * 100_000],
            "generation_kwargs: suppress_tokens is nested too deep",
        ),
    ],
)
def test_hostile_flags_are_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run, _ = train.resolve(flags)
        generation_kwargs(run)
    assert str(error.value).startswith(message) and len(str(error.value)) < 300


def test_tokenizer_without_eos(tmp_path: Path, model_dirs: dict[str, str], prompts: str, capsys: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    tokenizer = AutoTokenizer.from_pretrained(model_dirs["llama"])
    tokenizer.eos_token = None
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(SystemExit) as stop:
        train.main(["--model", str(tmp_path / "m"), "--train-file", prompts, "--max-completion-length", "8"])
    assert stop.value.code == 2 and "no end-of-sequence token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--file", "none.jsonl"], "prompt file 'none.jsonl' does not exist"),
        (["--model", "/no/such/model"], "cannot be loaded"),
        (["--batch-size", "0"], "batch_size must be at least 1; got 0"),
        (["--max-completion-length", "600"], "max_completion_length must be below the model's 512 positions; got 600"),
        (["--output", "/no/such/folder/x.json"], "the folder of '/no/such/folder/x.json' does not exist"),
    ],
)
def test_evaluate_bad_input(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_parse_gives_defaults_without_arguments() -> None:
    assert parse([], evaluate.EvaluateConfig, prog="x") == (evaluate.EvaluateConfig(),)


def test_a_reader_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    """What is written then goes nowhere; the status is the command's own."""
    script = (
        "import sys, os\nfrom mdpgrpo_fast.cli import end\n"
        "def run():\n"
        "    print('first', flush=True)\n    os.read(0, 1)\n"
        "    for i in range(99):\n        print('x' * 999, flush=True)\n        print('y', file=sys.stderr)\n"
        "    os.system('echo child')\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').close()\n    print('last')\n    return 3\n"
        "end(run)\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as running:
        assert running.stdin and running.stdout and running.stderr
        assert running.stdout.readline() == "first\n"
        running.stdout.close()
        running.stdin.write("x")
        running.stdin.close()
        said = running.stderr.read()
    assert running.returncode == 3 and (tmp_path / "done").exists() and said == "y\n" * 99


def test_a_terminal_that_is_closed_ends_nothing() -> None:
    reader, terminal = pty.openpty()
    with open(terminal, "w", encoding="utf-8", buffering=1) as stream:
        out = _unread(stream)
        assert out.isatty() and out.line_buffering
        print("first", file=out)
        assert os.read(reader, 99) == b"first\r\n"
        os.close(reader)
        print("second", file=out)
        print("third", file=out)
