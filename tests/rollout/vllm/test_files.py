"""Weights on their way: who can read the files, and that none stays."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.inputs import ROOT
from safetensors.torch import load_file

from mdpgrpo_fast.rollout.vllm import files
from mdpgrpo_fast.rollout.vllm.completion import RolloutError
from mdpgrpo_fast.rollout.vllm.files import remove_leftovers, weight_file

WEIGHTS = [("a", torch.arange(3.0)), ("b", torch.ones(2, 4).T)]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    previous = os.umask(request.param)
    yield
    os.umask(previous)


def test_only_this_user_can_read_them_and_they_go(tmp_path: Path, umask: None) -> None:
    with weight_file(WEIGHTS, str(tmp_path)) as path:
        file = Path(path)
        assert mode(file) == 0o600 and mode(file.parent) == 0o700
        assert file.parent.parent == tmp_path and [*file.parent.iterdir()] == [file]
        assert all(torch.equal(load_file(path)[name], tensor) for name, tensor in WEIGHTS)
    assert not any(tmp_path.iterdir())


def test_the_file_is_never_open_to_others_while_it_is_written(
    tmp_path: Path, umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def save(tensors: dict[str, torch.Tensor], path: str) -> None:
        seen.extend([mode(Path(path)), mode(Path(path).parent)])

    monkeypatch.setattr(files, "save_file", save)
    with weight_file(WEIGHTS, str(tmp_path)):
        assert seen == [0o600, 0o700]


def test_they_go_after_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RolloutError("no server"), KeyboardInterrupt()):
        with pytest.raises(type(error)), weight_file(WEIGHTS, str(tmp_path)):
            raise error
        assert not any(tmp_path.iterdir())

    def full(tensors: dict[str, torch.Tensor], path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with (
        pytest.raises(RolloutError, match=rf"cannot be written to {tmp_path}.*No space left"),
        weight_file(WEIGHTS, str(tmp_path)),
    ):
        pytest.fail("a file that was not written was handed over")
    assert not any(tmp_path.iterdir())


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(RolloutError, match=r"cannot be written: .*No such file"),
        weight_file(WEIGHTS, str(tmp_path / "gone")),
    ):
        pytest.fail("there is no such directory")


HOLDER = """
import sys, time, torch
from mdpgrpo_fast.rollout.vllm.files import weight_file
with weight_file([("a", torch.ones(2))], sys.argv[1]) as path:
    print(path, flush=True)
    time.sleep(600)
"""


def test_leftovers_of_a_killed_trainer_go_and_those_of_a_running_one_stay(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as trainer:
        try:
            assert trainer.stdout is not None
            left = Path(trainer.stdout.readline().strip())
            with weight_file(WEIGHTS, str(tmp_path)) as own:
                assert remove_leftovers(str(tmp_path)) == []
                assert left.exists() and Path(own).exists()
        finally:
            trainer.kill()
    assert left.exists()
    assert remove_leftovers(str(tmp_path)) == [left.parent.name]
    assert not any(tmp_path.iterdir())


def test_nothing_else_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    while files._runs(ended.pid):  # until its process is gone
        time.sleep(0.01)
    host, gone = files._host(), ended.pid
    own = tmp_path / f"{files.PREFIX}{host}-{gone}-x"
    kept = [
        f"{files.PREFIX}elsewhere-{gone}-x",
        f"{files.PREFIX}{host}1-{gone}-x",
        f"{files.PREFIX}{host}-{os.getpid()}-x",
        f"{files.PREFIX}{host}-some-x",
        f"weights-{host}-{gone}-x",
        "unrelated",
    ]
    for name in kept:
        (tmp_path / name).mkdir()
    target = tmp_path / "unrelated"
    (tmp_path / f"{files.PREFIX}{host}-{gone}-link").symlink_to(target)
    (tmp_path / f"{files.PREFIX}{host}-{gone}-file").write_text("")
    own.mkdir()
    before = {p.name for p in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: own.stat().st_uid + 1)
        assert remove_leftovers(str(tmp_path)) == []  # another user's
    assert remove_leftovers(str(tmp_path)) == [own.name]
    assert {p.name for p in tmp_path.iterdir()} == before - {own.name} and target.is_dir()
