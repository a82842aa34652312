"""Command lines: layers of configuration, and one clear line with exit status 2 for whatever cannot be used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mdpgrpo_fast import evaluate, train
from mdpgrpo_fast.cli import parse, read_yaml
from mdpgrpo_fast.config import PRESETS, ConfigError, MDPGRPOConfig, TrainConfig, preset

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
        train.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for f in (*dataclasses.fields(TrainConfig), *dataclasses.fields(MDPGRPOConfig)):
        assert f"--{f.name}" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning-rat", "1"], "unknown flag '--learning-rat'; did you mean '--learning-rate'?"),
        (["--no-prospct"], "unknown flag '--no-prospct'; did you mean '--no-prospect'?"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps", "0"], "steps must be at least 1; got 0"),
        (["stray"], "unexpected argument 'stray'"),
        (["--preset", "papr"], "unknown preset 'papr'; did you mean 'paper'?"),
        (["--num-generations", "1", "--temperatures", "1"], "num_generations must be at least 2"),
        (["--temperatures", "0.1", "0.4", "1"], "temperatures must be a list whose length divides num_generations = 4"),
        (["--temperatures", "0", "1"], "temperatures must be all above 0; got 0.0"),
        (["--goal-mean", "third"], "argument --goal_mean/--goal-mean: invalid choice: 'third'"),
        (["--train-file", "no.jsonl"], "prompt file 'no.jsonl' does not exist"),
        (["--model", "/no/such/model"], "train_file is required with a model of your own"),
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
        (["--temperature-objective", "corrected", "--top-k", "5"], "temperature_objective = corrected needs full-voc"),
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


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n"])
def test_a_config_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml.*(must hold a mapping|cannot be read)"):
        read_yaml(path)


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
        (["--samples", "-1"], "samples must be 0 (all) or positive; got -1"),
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
