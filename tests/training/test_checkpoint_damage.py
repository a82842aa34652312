"""Checkpoints that are not as they were written, disks that fail, and files that would run code: each is named."""

from __future__ import annotations

import errno
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.inputs import ROOT
from helpers.runs import make_trainer, parameters, rows, run_small

import mdpgrpo_fast.train as train
from mdpgrpo_fast import durable
from mdpgrpo_fast.config import ConfigError, TrainConfig, preset
from mdpgrpo_fast.data import Example
from mdpgrpo_fast.durable import StorageError
from mdpgrpo_fast.models.load import load
from mdpgrpo_fast.training import checkpoint
from mdpgrpo_fast.training.checkpoint import manifest, tree
from mdpgrpo_fast.training.checkpoint import rows as rows_of_steps
from mdpgrpo_fast.training.checkpoint.data import fingerprint, weights_fingerprint
from mdpgrpo_fast.training.checkpoint.state import random_state, set_random_state
from mdpgrpo_fast.training.loop import TrainingLoop

KNOBS: dict[str, Any] = {"steps": 3, "save_every": 1, "max_completion_length": 8, "eval_samples": 2}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> TrainingLoop:
    """A run of three steps with its last two checkpoints."""
    return run_small(tmp_path_factory.mktemp("done"), **KNOBS)


@pytest.fixture
def copy(done: TrainingLoop, tmp_path: Path) -> Iterator[Path]:
    """A copy of its directory, in which `done` looks for checkpoints meanwhile."""
    path = tmp_path / "run"
    shutil.copytree(done.out.path, path)
    before, done.checkpoints.path = done.checkpoints.path, path
    yield path
    done.checkpoints.path = before


def missing(file: Path) -> None:
    file.unlink()


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [missing, truncated, emptied, flipped])
def test_any_damage_names_the_file(damage: Callable[[Path], None], copy: Path, done: TrainingLoop) -> None:
    newest, before = manifest.folders(copy)
    names = [*manifest.file_names(newest), manifest.NAME]
    assert {"model.safetensors", "config.json", "state/random_0.safetensors", "state/optimizer.safetensors",
            "state/run.safetensors"} < {*names}  # fmt: skip
    for name in names:
        kept = (newest / name).read_bytes()
        damage(newest / name)
        said = done.checkpoints._damage(newest)
        assert said is not None and said.startswith(name), said
        if damage is not flipped or name == manifest.NAME:
            assert checkpoint.newest(copy) == before, "sizes are enough to see it"
        (newest / name).write_bytes(kept)
    assert done.checkpoints._damage(newest) is None and checkpoint.newest(copy) == newest


def test_a_file_too_many_is_damage_where_a_loader_might_take_it(copy: Path, done: TrainingLoop) -> None:
    newest = manifest.folders(copy)[0]
    (newest / ".DS_Store").write_bytes(b"x")
    assert done.checkpoints._damage(newest) is None
    for name in ("custom_checkpoint_0.pkl", "state/random_states_0.pkl", "optimizer.bin", "state/x.safetensors"):
        (newest / name).write_bytes(b"x")
        assert done.checkpoints._damage(newest) == f"{name} was not written with it"
        (newest / name).unlink()


def test_the_newest_whole_one_is_taken_and_the_other_named_once(
    copy: Path, done: TrainingLoop, capsys: pytest.CaptureFixture[str]
) -> None:
    flipped(copy / "checkpoints" / "checkpoint_3" / "state" / "random_0.safetensors")
    (copy / "checkpoints" / "checkpoint_9").mkdir()
    (copy / "config.yaml").write_text("run: {")  # the manifest has the settings too
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(line for line in lines if not line.startswith('{"step": 1,')) + '{"st')
    resumed = make_trainer(copy.parent, resume=True, save_model=False, **KNOBS)
    assert capsys.readouterr().err.splitlines()[-4:] == [
        "checkpoint_9 is damaged, and left out: manifest.json is missing",
        "checkpoint_3 is damaged, and left out: state/random_0.safetensors is not as it was written",
        "resumed after 2 of 3 steps",
        "metrics.jsonl lacks 1 of the 2 steps that are done: log_history of rewards begins later",
    ]
    resumed.train()
    assert torch.equal(parameters(resumed), parameters(done))
    assert [r["loss"] for r in rows(resumed)] == [r["loss"] for r in rows(done)[1:]]
    found = sorted(os.listdir(copy / "checkpoints"))
    assert found == ["checkpoint_2", "checkpoint_3", "checkpoint_3.damaged", "checkpoint_9.damaged"]


def test_where_none_is_whole_it_is_one_line(copy: Path, done: TrainingLoop) -> None:
    for folder in manifest.folders(copy):
        flipped(folder / "model.safetensors")
    with pytest.raises(
        ConfigError,
        match=r"resume needs a whole checkpoint in .*, and there is none: checkpoint_3 is "
        r"damaged, and left out: model.safetensors is not as it was written$",
    ):
        done.checkpoints.load(3)  # fmt: skip
    for folder in manifest.folders(copy):
        missing(folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"there is none: checkpoint_3 is damaged: model.safetensors is missing$"):
        checkpoint.check_resume(TrainConfig(output_dir=str(copy)), preset("exact"))


def test_a_disk_that_does_not_give_a_whole_one_is_one_line(
    copy: Path, done: TrainingLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("unable to open file in read-only mode: Input/output error (5)")

    monkeypatch.setattr(done.checkpoints.state, "read", fails)
    with pytest.raises(ConfigError, match=r"checkpoint_3' cannot be read: unable to open"):
        done.checkpoints.load(3)
    monkeypatch.setattr(tree, "safe_open", fails)
    with pytest.raises(ConfigError, match="cannot be read: RuntimeError"):
        tree.read(copy / "checkpoints" / "checkpoint_3" / "state" / "run.safetensors")
    assert manifest.hash_damage(tmp_path) == "manifest.json is missing"
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl' cannot be read: Is a directory"):
        rows_of_steps.metrics(tmp_path, 1)


def test_other_data_is_refused(copy: Path, done: TrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = done.checkpoints
    data = checkpoints.data
    assert data.keys() == {"training prompts", "held-out prompts", "weights of the starting model"}
    for name in ("training prompts", "weights of the starting model"):
        monkeypatch.setattr(checkpoints, "data", {**data, name: "others"})
        with pytest.raises(ConfigError, match=f"resume needs the {name} of the run before: they were .*; got others"):
            checkpoints.load(3)
    monkeypatch.setattr(checkpoints, "data", {**data, "held-out prompts": "others"})
    (said,) = checkpoints.load(3).notes
    assert said.startswith("the held-out prompts are others than before, 2 prompts (")
    monkeypatch.setattr(checkpoints, "must_match", [*data])  # with keep_best
    with pytest.raises(ConfigError, match="resume needs the held-out prompts of the run before"):
        checkpoints.load(3)


def test_the_fingerprint_covers_what_rewards_see() -> None:
    ids = [[1, 2], [3]]
    first = Example("a", ["x"], [{"n": 1}], {"answer": "4", "when": {1}}, "f.jsonl:1")
    second = Example("b")
    found = fingerprint(ids, [first, second])
    assert found.startswith("2 prompts (") and found == fingerprint(
        ids, [Example("a", ["x"], [{"n": 1}], {"when": {1}, "answer": "4"}, "renamed.jsonl:7"), second]
    )
    others = [
        fingerprint([[1, 2], [4]], [first, second]), fingerprint(ids, [second, first]),
        fingerprint(ids, [Example("a", ["x"], [{"n": 2}], first.columns), second]),
        fingerprint(ids, [Example("a", ["y"], first.kwargs, first.columns), second]),
        fingerprint(ids, [Example("a", ["x"], first.kwargs, {**first.columns, "answer": "5"}), second]),
    ]  # fmt: skip
    assert len({found, *others}) == 6
    model = torch.nn.Linear(300, 2)
    before = weights_fingerprint(model)
    with torch.no_grad():
        model.bias += 1e-6
    assert weights_fingerprint(model) != before


def test_files_beside_the_checkpoints_are_cut_whole_and_read_or_refused(
    copy: Path, done: TrainingLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (copy / "metrics.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
        with pytest.raises(StorageError, match=r"metrics.jsonl' cannot be written: no"):
            checkpoint.drop_what_came_later(copy, 2)
    assert (copy / "metrics.jsonl").read_text() == lines, "as it was"
    (copy / "bad_steps.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    (copy / "best.old").mkdir()  # of a kill between two renames
    checkpoint.drop_what_came_later(copy, 2)
    assert (copy / "bad_steps.jsonl").read_text() == '{"step": 2}\n'
    assert (copy / "best").is_dir() and not (copy / "best.old").exists()
    shutil.rmtree(copy / "best")
    for text in ("", "{", '{"step": 1}', "[]", '{"step": null, "score": 1}'):
        (copy / "best.json").write_text(text)
        with pytest.raises(ConfigError, match=r"best.json' as it was written, or not at all: it cannot be read$"):
            checkpoint.Best(done.accelerator, copy, True)
    monkeypatch.setattr(done.checkpoints.state, "lm", torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"resume needs the model of the run before; .*checkpoint_2: ") as e:
        done.checkpoints.load(3)
    assert "\n" not in str(e.value)


# ---- disks that fail ------------------------------------------------------------------------------------------------


def test_a_save_that_fails_anywhere_leaves_the_checkpoints_before(
    copy: Path, done: TrainingLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(99):
        calls = [0]

        def failing(real: Callable[..., Any], calls: list[int] = calls, n: int = n) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                calls[0] += 1
                if calls[0] == n + 1:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return real(*args)

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "replace"):
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                done.checkpoints.save(4 + n, 99)
            except StorageError as e:
                assert str(e).startswith("no checkpoint could be written: ") and "Input/output error" in str(e)
            else:
                assert calls[0] <= n
                break
        found = manifest.folders(copy)
        assert len(found) >= 2 and all(manifest.damage(p) is None for p in found), n
        assert not list((copy / "checkpoints").glob("*.partial"))
    assert n > 10


def test_a_disk_without_room_is_one_line(
    tmp_path: Path, done: TrainingLoop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert done.checkpoints.space_note(True) is None
    free = {"free": 1 << 40}
    monkeypatch.setattr(durable, "free_bytes", lambda path: free["free"])
    log = TrainingLoop.log

    def filling(self: TrainingLoop, row: dict[str, Any]) -> None:
        free["free"] = 10 if row["step"] == 2 else 1 << 40
        log(self, row)

    monkeypatch.setattr(TrainingLoop, "log", filling)
    path = tmp_path / "run"
    flags = ["--output-dir", str(path), "--steps", "3", "--max-completion-length", "8", "--save-every", "1",
             "--prompts-per-step", "1", "--eval-samples", "1"]  # fmt: skip
    assert train.main(flags) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "MB, and " in last and "has 0.0 MB free" in last
    assert os.listdir(path / "checkpoints") == ["checkpoint_1"] and not (path / "model").exists()
    assert all(p.stat().st_size for p in path.rglob("*") if p.is_file())
    free["free"] = 10
    note = done.checkpoints.space_note(True)
    assert note is not None and note.startswith("the disk may not suffice: 3 checkpoints while one is saved and the ")


# ---- files that would run code --------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["EVIL"],)


def test_no_pickle_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dirs: dict[str, str]) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "run"))
    evil = tmp_path / "evil"
    shutil.copytree(model_dirs["llama"], evil)
    for file in evil.glob("*.safetensors"):
        file.unlink()
    for content in ({"weight": Evil()}, None):
        if content is None:
            (evil / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Evil()}))
        else:
            torch.save(content, evil / "pytorch_model.bin")
        with pytest.raises(ConfigError) as e:
            load(str(evil))
        assert "\n" not in str(e.value) and not (tmp_path / "run").exists(), str(e.value)
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError, match=r"evil.safetensors' cannot be read: "):
        tree.read(tmp_path / "evil.safetensors")
    assert not (tmp_path / "run").exists()


def test_no_module_loads_what_runs_code() -> None:
    words = r"\btorch\.load\(|import (pickle|joblib|dill|shelve)|\bpickle\.\w|\.load_state\(|\bnp\.load\(|unsafe_load"
    files = list((ROOT / "mdpgrpo_fast").rglob("*.py"))
    # A fork that renders templates reads what the process that it was forked from sends.
    found = [p.name for p in files if re.search(words, p.read_text(encoding="utf-8"))]
    assert len(files) > 200 and found == ["rendering.py"]


def test_what_is_stored_comes_back_to_the_bit(tmp_path: Path) -> None:
    file, shared = tmp_path / "a.safetensors", torch.randn(4, 3)
    value = {
        "state": {0: {"step": torch.tensor(3.0), "half": shared.bfloat16(), "empty": torch.zeros(0)}},
        "tied": [shared, shared, shared.T, shared[1:]], "betas": (0.9, float("inf"), None, True, -1),
        "bytes": torch.arange(5, dtype=torch.uint8)[1:], "of": torch.Size([2]), "in": torch.float16, "set": {"a"},
    }  # fmt: skip
    tree.write(file, value)
    found = tree.read(file)
    assert found["tied"][0] is found["tied"][1] and torch.equal(found["tied"][2], shared.T)
    for a, b in zip(found["state"][0].values(), value["state"][0].values(), strict=True):  # type: ignore[index]
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert {n: found[n] for n in ("betas", "of", "in", "set")} == {n: value[n] for n in ("betas", "of", "in", "set")}
    assert found["bytes"].tolist() == [1, 2, 3, 4] and type(found["of"]) is torch.Size
    with pytest.raises(TypeError, match=r"a pathlib\..*Path cannot be stored"):
        tree.write(file, [tmp_path])
    scaler, again = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.amp.GradScaler("cpu")
    loss = (torch.ones(1, requires_grad=True) * torch.inf).sum()
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    optimizer.param_groups[0]["params"][0].grad = scaler.scale(loss).detach().reshape(1)
    scaler.step(optimizer)
    scaler.update()
    tree.write(file, scaler.state_dict())
    again.load_state_dict(tree.read(file))
    assert again.state_dict() == scaler.state_dict() and again.get_scale() == 512
    before = random_state(torch.device("cpu"))
    tree.write(file, before)
    random.gauss(0, 1), np.random.standard_normal(), torch.rand(1)
    set_random_state(tree.read(file), torch.device("cpu"))
    drawn = random.random(), np.random.standard_normal(), torch.rand(1)
    set_random_state(before, torch.device("cpu"))
    assert drawn == (random.random(), np.random.standard_normal(), torch.rand(1))
