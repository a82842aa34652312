"""A model's card, and what a run does with the hub: asked before it begins, filled after its end, or said how later."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.hub import USER, Hub, hub_here
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, AutoTokenizer

import mdpgrpo_fast.train as train
from mdpgrpo_fast.api import Trainer
from mdpgrpo_fast.config import ConfigError, TrainConfig, preset, without_effect
from mdpgrpo_fast.demo import SEED_POLICY
from mdpgrpo_fast.training.guard.claim import check_unused
from mdpgrpo_fast.training.hub import card, repository
from mdpgrpo_fast.training.hub.names import data_set_id, hub_id, public
from mdpgrpo_fast.training.loop import TrainingLoop

SMALL = "--steps 1 --prompts-per-step 1 --num-generations 4 --max-completion-length 8 --eval-samples 2 --cpu".split()
METHOD = preset("paper", num_generations=4, temperatures=[0.5, 1.0])
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_here(monkeypatch) as found:
        yield found


# ---- the card -------------------------------------------------------------------------------------------------------


def summary(**more: Any) -> dict[str, Any]:
    scores = {"hsr_before": 0.25, "hsr_after": 0.512345, "ssr_before": 0.5, "ssr_after": 0.75}
    widths = {"hsr": 0.06, "ssr": None, "reward": None}
    return {
        **scores, "reward_before": 0.5, "reward_after": 0.75, "intervals": dict.fromkeys(("before", "after"), widths),
        "held_out": 300, "model": "org/base", "train_file": "org/data:main", "eval_file": "/home/me/held out.jsonl",
        "versions": {"mdpgrpo_fast": "0.1.0", "torch": "2.13.0"}, "steps": 140, "total_steps": 140, "processes": 1,
        "interrupted": False, **more,
        "command": "mdpgrpo train --model org/base --train-file org/data:main --eval-file='/home/me/held out.jsonl'",
    }  # fmt: skip


RUN = TrainConfig(output_dir="runs/first", model="org/base", reward=["constraints", "/home/me/judge"])


def test_the_card() -> None:
    made = card.card_of(RUN, METHOD, summary(), "org/base", "me/first")
    again = ModelCard(str(made))
    assert again.data.to_dict() == {
        "base_model": "org/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": ["org/data"],
        "tags": ["mdpgrpo_fast", "grpo", "rlvr", "mdp-grpo"],
        "model-index": [
            {
                "name": "first",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"type": "held-out.jsonl", "name": "held out.jsonl"},
                        "metrics": [
                            {"type": "hsr", "value": 0.5123, "name": "hard satisfaction (HSR)"},
                            {"type": "ssr", "value": 0.75, "name": "soft satisfaction (SSR)"},
                        ],
                    }
                ],
            }
        ],
    }
    assert again.text.strip() == (
        "# first\n\n[org/base](https://huggingface.co/org/base), trained with MDP-GRPO by mdpgrpo_fast.\n\n"
        "| held out: 300 prompts, greedy answers | before | after |\n|---|---|---|\n"
        "| hard satisfaction (HSR) | 0.250 ± 0.060 | 0.512 ± 0.060 |\n"
        "| soft satisfaction (SSR) | 0.500 | 0.750 |\n\n"
        "- prompts: org/data:main; held out: held out.jsonl\n"
        "- rewards: `constraints`, `judge`\n"
        "- method: preset `paper` with `num_generations` 4, `temperatures` 0.5 1.0\n"
        "- run: 140 steps of 4 prompts × 4 completions, learning rate 1e-05, seed 42\n"
        "- versions: mdpgrpo_fast 0.1.0, torch 2.13.0\n"
        "- command: `mdpgrpo train --model org/base --train-file org/data:main '--eval-file=held out.jsonl'`\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'path = "me/first"\n'
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)\n```"
    )


def test_the_card_of_another_run() -> None:
    told = summary(eval_file="org/held:en", interrupted=True, steps=3, processes=2, model="/home/me/base model")
    run = replace(RUN, lora=True, eval_split="test", preset="grpo")
    made = card.card_of(run, preset("grpo"), told, None, None, "peft")
    data, text = made.data.to_dict(), made.text
    assert "base_model" not in data and data["library_name"] == "peft" and data["datasets"] == ["org/data"]
    assert data["tags"] == ["mdpgrpo_fast", "grpo", "rlvr", "lora"], "without what MDP-GRPO adds it is GRPO"
    found = data["model-index"][0]["results"][0]["dataset"]
    assert found == {"type": "org/held", "name": "org/held:en", "config": "en", "split": "test"}
    assert "`base model`, trained with GRPO by mdpgrpo_fast. These are its LoRA adapters." in text
    assert "- run: stopped after 3 of 140 steps of 4 prompts × 8 completions × 2 processes, " in text
    assert "seed 42, LoRA r 32, alpha 64" in text and 'path = "."' in text and "/home" not in str(made)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) == 3 and ast.parse(code)
    merged = card.card_of(run, preset("grpo"), told, None, None).text
    assert "Its LoRA adapters are merged into the weights." in merged


def test_what_was_not_measured_is_not_in_the_card() -> None:
    none = dict.fromkeys(("hsr_before", "hsr_after", "ssr_before", "ssr_after", "reward_before", "reward_after"))
    told = summary(**none, eval_file=None, train_file="rows in memory", model="LlamaForCausalLM")
    made = card.card_of(RUN, METHOD, told, None, None)
    assert not {"model-index", "model_name", "datasets"} & made.data.to_dict().keys() and "| before |" not in made.text
    assert "`LlamaForCausalLM`, trained with" in made.text and "- prompts: rows in memory\n" in made.text
    rewards = summary(**{**none, "reward_before": 0.1, "reward_after": 0.2}, eval_file="t.jsonl")
    made = card.card_of(RUN, METHOD, rewards, None, None)
    assert "| reward | 0.100 | 0.200 |" in made.text and "model-index" not in made.data.to_dict()
    half = card.card_of(RUN, METHOD, summary(hsr_after=float("nan"), ssr_after=None), None, None)
    assert "model-index" not in half.data.to_dict(), "only numbers that are there"
    long = card.card_of(RUN, METHOD, {**summary(), "command": shlex.join(["python", "-c", "a\nb"])}, None, None)
    assert "- command" not in long.text


def test_names_tell_nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    names = ("gpt2", "org/model", "/abs/model", "a/b/c", "org", "two words", "", "train.jsonl")
    assert list(map(hub_id, names)) == ["gpt2", "org/model", None, None, None, None, None, None]
    sources = (None, "embedded", "rows in memory", "org/data:en", "no.csv", "squad")
    assert list(map(data_set_id, sources)) == [None, None, None, "org/data", None, "squad"]
    words = ("/a/b.jsonl", "--file=/a/b c", "a=b", "b/c", "module:function", "--x")
    assert list(map(public, words)) == ["b.jsonl", "--file=b c", "a=b", "b/c", "module:function", "--x"]


# ---- uploads --------------------------------------------------------------------------------------------------------


def test_a_run_uploads_its_model_once_it_is_done(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "My-Run"
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "-m", "mdpgrpo_fast.train", "--output-dir", str(out)])
    assert train.main([*SMALL, "--output-dir", str(out), "--push-to-hub", "--save-every", "1"]) == 0
    said = capsys.readouterr()
    assert f"\nhub     {constants.ENDPOINT}/{USER}/My-Run\n" in said.out
    assert f"note       after the last step the model goes to {USER}/My-Run on the hub (--push-to-hub)\n" in said.err
    assert (out / "checkpoints").is_dir() and hub.repos == {f"{USER}/My-Run": False}
    files = hub.files[f"{USER}/My-Run"]
    assert files.keys() == {*MODEL, *TOKENIZER, "README.md", "report.html"}
    assert files["README.md"].decode() == (out / "model" / "README.md").read_text() == hub.cards[0]
    assert ModelCard(files["README.md"].decode()).data["tags"] == ["mdpgrpo_fast", "grpo", "rlvr", "mdp-grpo"]
    assert f'path = "{USER}/My-Run"' in files["README.md"].decode()
    assert files["model.safetensors"] == (out / "model" / "model.safetensors").read_bytes()
    here = (out / "report.html").read_text()
    assert str(out) in here and files["report.html"].decode() == here.replace(str(out), "My-Run")
    order = [asked.rpartition("/")[2] for asked in hub.asked if "agent" not in asked]
    assert order[:2] == ["create", "write"], "the rights are known before the run"
    assert hub.asked[-1].endswith("commit/main")


def test_a_directory_is_locked_while_its_model_is_uploaded(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, out = repository.upload, tmp_path / "run"

    def asked(*given: Any) -> str:
        with pytest.raises(ConfigError, match="is in use by another run"):
            check_unused(out)
        return upload(*given)

    monkeypatch.setattr(repository, "upload", asked)
    assert train.main([*SMALL, "--output-dir", str(out), "--push-to-hub"]) == 0
    check_unused(out)
    assert hub.files


def test_an_upload_that_fails_says_how_it_is_done_later(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuse["commit"] = 403
    out = tmp_path / "run"
    flags = ["--hub-model-id", "org/late", "--hub-private-repo"]
    assert train.main([*SMALL, "--output-dir", str(out), "--push-to-hub", *flags]) == 1
    said = capsys.readouterr()
    command = f"hf upload org/late {out / 'model'} ."
    last = said.err.splitlines()[-1]
    assert last.startswith("error: the upload to org/late failed: 403 Forbidden: ")
    assert last.endswith(f"; the model is in {out / 'model'}, and this uploads it: {command}")
    assert said.out.startswith("held-out HSR ") and "\nhub " not in said.out
    assert hub.repos == {"org/late": True} and not hub.files
    assert json.loads((out / "summary.json").read_text())["interrupted"] is False
    assert AutoModelForCausalLM.from_pretrained(out / "model").num_parameters() > 100_000
    hub.refuse.clear()
    hf = Path(sys.executable).with_name("hf")
    done = subprocess.run([hf, *shlex.split(command)[1:]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert hub.files["org/late"].keys() == {*MODEL, *TOKENIZER, "README.md"}


def test_an_interrupted_run_is_not_uploaded(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLoop, "step", interrupted)
    out = tmp_path / "run"
    assert train.main([*SMALL, "--output-dir", str(out), "--push-to-hub"]) == 130
    assert f"\nhub     nothing is uploaded yet: hf upload {USER}/run {out / 'model'} .\n" in capsys.readouterr().out
    assert (
        not hub.files and "- run: stopped after 0 of 1 step of 1 prompt ×" in (out / "model" / "README.md").read_text()
    )


def test_adapters_are_uploaded_where_others_have_their_base(tmp_path: Path, hub: Hub) -> None:
    model = AutoModelForCausalLM.from_pretrained(SEED_POLICY)
    model.name_or_path = "org/base"
    knobs = {"steps": 1, "prompts_per_step": 1, "max_completion_length": 8, "lora": True, "lora_r": 2, "cpu": True}
    run = TrainConfig(output_dir=str(tmp_path / "run"), push_to_hub=True, save_every=1, **knobs)
    result = Trainer(
        model, ["Say hi.", "Name a river."], lambda completions, **_: [float(len(c)) for c in completions],
        tokenizer=AutoTokenizer.from_pretrained(SEED_POLICY), config=METHOD, run=run,
    ).train()  # fmt: skip
    assert result.hub_url == f"{constants.ENDPOINT}/{USER}/run"
    files = hub.files[f"{USER}/run"]
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert files.keys() == {*adapter, *TOKENIZER, "README.md", "report.html"}
    data = ModelCard(files["README.md"].decode()).data
    assert data["library_name"] == "peft" and data["base_model"] == "org/base" and "lora" in data["tags"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    merged = ModelCard.load(tmp_path / "run" / "model" / "README.md")
    assert merged.data["library_name"] == "transformers" and "merged into the weights" in merged.text
    assert repository.uploaded_folder(replace(run, merge_adapter=True), model).name == "model"
    model.name_or_path = str(SEED_POLICY)
    assert repository.uploaded_folder(run, model).name == "model", "nobody else has a base of this machine"


def test_ctrl_c_in_an_upload_is_an_upload_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(repository.HfApi, "upload_folder", interrupted)
    model = AutoModelForCausalLM.from_pretrained(SEED_POLICY)
    with pytest.raises(repository.HubError, match=r"the upload to a/b failed: KeyboardInterrupt; .* hf upload a/b "):
        repository.upload(TrainConfig(output_dir=str(tmp_path)), model, "a/b")


def test_a_large_report_stays_here(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["a/b"] = False
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "report.html").write_text("a long page")
    monkeypatch.setattr(repository, "LARGEST_REPORT", 10)
    model = AutoModelForCausalLM.from_pretrained(SEED_POLICY)
    repository.upload(TrainConfig(output_dir=str(tmp_path)), model, "a/b")
    assert hub.files == {"a/b": {"config.json": b"{}"}}


# ---- refusals -------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The line that a run ends with before its model is loaded."""
    with pytest.raises(SystemExit) as end:
        train.main([*SMALL, "--output-dir", str(tmp_path / "run"), "--push-to-hub", *flags])
    assert end.value.code == 2 and not (tmp_path / "run").exists()
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdpgrpo_fast.training.task.load", lambda *_, **__: pytest.fail("the model was loaded"))


def test_what_is_known_without_the_hub(
    tmp_path: Path, hub: Hub, no_model: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(tmp_path, capsys, "--hub-model-id", "two words")
    assert said == "error: hub_model_id must be an id as user/name; got 'two words'"
    assert refused(tmp_path, capsys, "--no-save-model") == "error: push_to_hub needs save_model; got False"
    monkeypatch.setattr(repository, "get_token", lambda: None)
    assert refused(tmp_path, capsys) == (
        "error: push_to_hub needs a token that may write: `hf auth login`, or HF_TOKEN in the environment"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(tmp_path, capsys) == (
        "error: push_to_hub needs the hub, which HF_HUB_OFFLINE turns off: unset it, or upload later"
    )
    assert not hub.asked and not hub.repos
    assert without_effect(TrainConfig(), METHOD, ["hub_model_id", "hub_private_repo"]) == [
        "--hub-model-id, --hub-private-repo have no effect: nothing is uploaded (--push-to-hub)"
    ]


@pytest.mark.parametrize(
    ("path", "status", "said"), [("create", 403, "403"), ("auth-check", 403, "403"), ("create", 401, "401")]
)
def test_a_right_that_is_missing_is_found_before_the_run(
    tmp_path: Path, hub: Hub, no_model: None, capsys: pytest.CaptureFixture[str], path: str, status: int, said: str
) -> None:
    hub.refuse[path] = status
    line = refused(tmp_path, capsys, "--hub-model-id", "org/mine")
    assert line.startswith("error: push_to_hub: 'org/mine' cannot be made or written to: ") and said in line


def test_a_repository_that_is_there(
    tmp_path: Path, hub: Hub, no_model: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos = {"org/public": False, "org/private": True}
    said = refused(tmp_path, capsys, "--hub-model-id", "org/public", "--hub-private-repo")
    assert said == "error: hub_private_repo needs a new or a private repository; 'org/public' is public"
    run = TrainConfig(push_to_hub=True, hub_model_id="org/private", hub_private_repo=True)
    assert repository.make_repository(run) == "org/private"
    asked = len(hub.asked)
    assert repository.make_repository(replace(run, push_to_hub=False)) is None
    monkeypatch.setenv("RANK", "1")
    assert repository.make_repository(run) is None and len(hub.asked) == asked, "the first rank alone"


def test_the_model_has_to_be_saved() -> None:
    with pytest.raises(ConfigError, match="push_to_hub needs save_model; got False"):
        TrainConfig(push_to_hub=True, save_model=False)
