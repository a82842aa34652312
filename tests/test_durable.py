"""Files that are whole or not there, whichever file operation fails."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdpgrpo_fast import durable
from mdpgrpo_fast.durable import StorageError

OPERATIONS = ("fsync", "replace", "rename")


def failing_at(n: int, patch: pytest.MonkeyPatch) -> list[int]:
    """From now on the n-th file operation (from 0) fails for want of space, as all after it; the calls so far."""
    calls = [0]

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] > n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        return call

    for name in OPERATIONS:
        patch.setattr(os, name, wrap(getattr(os, name)))
    return calls


def test_a_file_is_the_one_before_or_the_one_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    for n in range(10):
        file.write_text("before")
        with monkeypatch.context() as patch:
            failing_at(n, patch)
            try:
                durable.write_text(file, "äfter")
            except StorageError as e:
                assert "a.json' cannot be written: No space left on device" in str(e)
                assert file.read_text(encoding="utf-8") in ("before", "äfter")
            else:
                break
        assert os.listdir(tmp_path) == ["a.json"], "nothing is left beside it"
    assert n == 3 and file.read_text(encoding="utf-8") == "äfter"


def test_lines_that_do_not_fit_are_taken_back(tmp_path: Path) -> None:
    durable.append_text(tmp_path / "a.jsonl", "{}\n")
    durable.append_text(tmp_path / "a.jsonl", "[]\n")
    assert (tmp_path / "a.jsonl").read_text() == "{}\n[]\n"
    if os.path.exists("/dev/full"):
        with pytest.raises(StorageError, match="'/dev/full' cannot be written: No space left"):
            durable.append_text(Path("/dev/full"), "{}\n")


def test_lines_that_fit_in_part_are_taken_back_too(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    durable.append_text(file, "{}\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    try:
        with pytest.raises(StorageError, match="too large"):
            durable.append_text(file, "[1, 2]\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_text() == "{}\n"


def test_errors_of_libraries_in_rust_are_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left"), durable.storing(tmp_path):
        raise Exception("No space left on device (os error 28)")
    with pytest.raises(KeyError), durable.storing(tmp_path):
        raise KeyError("x")


def test_a_folder_is_the_one_before_or_the_one_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, new, old = tmp_path / "model", tmp_path / "model.new", tmp_path / "model.old"
    for n in range(12):
        for folder in (path, new, old):
            shutil.rmtree(folder, ignore_errors=True)
        for folder, text in ((path, "before"), (new, "after")):
            (folder / "sub").mkdir(parents=True)
            (folder / "sub" / "file").write_text(text)
        (new / "sub" / "file").chmod(0o444)
        with monkeypatch.context() as patch:
            failing_at(n, patch)
            try:
                durable.replace_folder(new, path)
            except StorageError:
                whole = [f for f in (path, old, new) if (f / "sub" / "file").exists()]
                assert len(whole) >= 1 + (not path.exists()), "both are there where neither has the name"
            else:
                break
    assert n == 6 and (path / "sub" / "file").read_text() == "after" and not old.exists() and not new.exists()
    durable.remove_folder(path)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_lost_its_name_has_it_again(tmp_path: Path) -> None:
    path, old = tmp_path / "best", tmp_path / "best.old"
    old.mkdir()
    (old / "file").write_text("before")
    durable.put_back_folder(path)
    assert (path / "file").read_text() == "before" and not old.exists()
    old.mkdir()  # of a kill after the new one had the name
    durable.put_back_folder(path)
    assert (path / "file").read_text() == "before"


def test_space_is_looked_at(tmp_path: Path) -> None:
    free = durable.free_bytes(tmp_path / "not" / "there")
    assert free > 0
    durable.need_space(tmp_path, 1, "a checkpoint")
    with pytest.raises(StorageError, match=r"a checkpoint needs [\d,.]+ MB, and '.*' has [\d,.]+ MB free"):
        durable.need_space(tmp_path, free * 10, "a checkpoint")
