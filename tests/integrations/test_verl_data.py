"""`python -m mdpgrpo_fast.integrations.verl` as far as it needs no verl: configs, parquet files, what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.inputs import ROOT, needed

from mdpgrpo_fast.config import ConfigError, PromptConfig
from mdpgrpo_fast.data import read_prompts
from mdpgrpo_fast.demo import DEMO_DIR
from mdpgrpo_fast.integrations.verl import __main__ as command
from mdpgrpo_fast.integrations.verl.data import write_parquet

ROW = {"prompt": "Say hi.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


def rows(path: Path) -> list[dict[str, Any]]:
    needed("pyarrow")
    import pyarrow.parquet

    return list(pyarrow.parquet.read_table(path).to_pylist())


def without(package: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that cannot import a package."""
    block = f"import runpy, sys; sys.modules[{package!r}] = None"
    code = f"{block}; runpy.run_module('mdpgrpo_fast.integrations.verl', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_folder_of_configs_has_all_that_they_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(["--configs"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    read = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yaml")}
    assert {"mdp_grpo", "one_node", "paper", "ray_cluster"} <= set(read)
    assert all("mdp_grpo" in config["defaults"] for name, config in read.items() if name != "mdp_grpo")


def test_the_embedded_prompts_become_what_verl_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed("pyarrow")
    assert command.run(["--data", str(tmp_path / "new" / "folder")]) == 0
    said = capsys.readouterr().out.splitlines()
    for split, name, agent in (("train", "train", "mdp_grpo"), ("val", "heldout", "single_turn_agent")):
        made = rows(tmp_path / "new" / "folder" / f"{split}.parquet")
        examples = read_prompts(str(DEMO_DIR / f"{name}.jsonl"), PromptConfig()).examples
        assert any(f"{split}.parquet: {len(examples)} prompts of" in line for line in said)
        assert [row["prompt"] for row in made] == [[{"role": "user", "content": x.prompt}] for x in examples]
        truths = [json.loads(row["reward_model"]["ground_truth"]) for row in made]
        assert truths == [{"instruction_id_list": x.instruction_ids, "kwargs": x.kwargs} for x in examples]
        assert [row["extra_info"] for row in made] == [{"split": split, "index": i} for i in range(len(made))]
        assert {
            (row["data_source"], row["ability"], row["agent_name"], row["reward_model"]["style"]) for row in made
        } == {("mdpgrpo_fast", "instruction_following", agent, "rule")}


def test_prompts_of_ones_own_with_messages(tmp_path: Path) -> None:
    needed("pyarrow")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hi."}]
    (tmp_path / "own.jsonl").write_text(json.dumps({**ROW, "prompt": messages}) + "\n", encoding="utf-8")
    own = str(tmp_path / "own.jsonl")
    assert command.run(["--data", str(tmp_path), "--train-file", own, "--val-file", own]) == 0
    (row,) = rows(tmp_path / "train.parquet")
    assert row["prompt"] == messages
    assert {path.name for path in tmp_path.iterdir()} == {"own.jsonl", "train.parquet", "val.parquet"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Say hi."}, "has no instruction_id_list"),
        ({**ROW, "instruction_id_list": ["no:such"]}, "no:such"),
        (
            {**ROW, "prompt": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Well"}]},
            "ends with the assistant's words",
        ),
    ],
)
def test_a_prompt_that_verl_would_score_wrongly_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    needed("pyarrow")
    source = tmp_path / "prompts.jsonl"
    source.write_text(json.dumps(ROW) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        write_parquet({tmp_path / "good.parquet": ("train", [ROW]), tmp_path / "bad.parquet": ("val", str(source))})
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]  # neither


def test_other_rules_are_to_be_told_to_the_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed("pyarrow")
    source = tmp_path / "prompts.jsonl"
    source.write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    files = ["--train-file", str(source), "--val-file", str(source)]
    assert command.run(["--data", str(tmp_path / "a"), *files, "--rules", "mdpgrpo"]) == 0
    assert "reward_kwargs.rules=mdpgrpo" in capsys.readouterr().out
    assert command.run(["--data", str(tmp_path / "b"), *files]) == 0
    assert "reward_kwargs" not in capsys.readouterr().out


def test_a_file_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    needed("pyarrow")
    (tmp_path / "train.parquet").write_text("mine")
    with pytest.raises(ConfigError, match=r"train\.parquet is there already"):
        command.run(["--data", str(tmp_path)])
    assert (tmp_path / "train.parquet").read_text() == "mine"


def test_without_verl_only_the_check_ends_and_says_how_to_install() -> None:
    done = without("verl", "--check")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: --check needs the package verl: pip install 'mdpgrpo-fast[verl]'"]
    done = without("verl", "--configs")
    assert done.returncode == 0 and Path(done.stdout.strip(), "one_node.yaml").is_file(), done.stderr


def test_without_pyarrow_the_data_say_how_to_install(tmp_path: Path) -> None:
    done = without("pyarrow", "--data", str(tmp_path))
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.splitlines() == [
        f"error: {tmp_path}/train.parquet needs the package pyarrow: pip install 'mdpgrpo-fast[data]'"
    ]
