"""A run whose server is restarted meanwhile: it gets the weights again, and what it drew with others is drawn again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import make_trainer, rows, run_small
from helpers.vllm import GENERATE, FakeServer

from mdpgrpo_fast.config import preset
from mdpgrpo_fast.rollout.vllm.completion import RestartedError
from mdpgrpo_fast.rollout.vllm.server import VLLMServer

METHOD = preset("exact", num_generations=4)
PER_STEP = 8  # requests: two prompts, four completions


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The versions of all syncs, which do nothing but name the weights: the stand-in's model is none of a trainer's."""
    versions: list[int] = []

    def sync(self: VLLMServer, named: Any, version: int) -> None:
        versions.append(version)
        self.follow_sync(named, version)
        self._set_label(str(self.label))

    monkeypatch.setattr(VLLMServer, "sync", sync)
    return versions


def knobs_of(server: FakeServer, **knobs: Any) -> dict[str, Any]:
    return {"rollout": "vllm", "vllm_url": server.url, "vllm_retries": 2, "steps": 3, **knobs}


class Restarts:
    """Restarts the stand-in at the request with this number, and keeps the labels that all were answered with."""

    def __init__(self, server: FakeServer, at: set[int]) -> None:
        self.server, self.at, self.labels = server, at, []
        server.fault = self

    def __call__(self, handler: Any, path: str, body: Any) -> bool:
        if path == GENERATE and body:
            if len(self.labels) in self.at:
                self.server.restart()
            self.labels.append(self.server.label)
        return False


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_run_goes_on(server: FakeServer, synced: list[int], tmp_path: Path, ahead: int, capsys: Any) -> None:
    seen = Restarts(server, {PER_STEP + 5})  # in the second step
    more = {"async_rollout": 1} if ahead else {}
    method = preset("exact", num_generations=4, sampler_correction=True)
    trainer = run_small(tmp_path, method, **knobs_of(server, **more))
    assert [r["step"] for r in rows(trainer)] == [1, 2, 3]
    lost = seen.labels.count("default")
    assert 1 <= lost <= PER_STEP and len(seen.labels) == 3 * PER_STEP + lost
    assert synced == ([1, 2, 2, 3] if not ahead else [1, 2])
    said = capsys.readouterr().err
    assert (
        f"step 2: {lost} of 8 completions were drawn with weights 'default'" in said
        and "; it is given the weights again" in said
    )


def test_it_ends_where_that_does_not_help(server: FakeServer, synced: list[int], tmp_path: Path) -> None:
    seen = Restarts(server, set(range(PER_STEP + 4, 100)))
    trainer = make_trainer(tmp_path, METHOD, **knobs_of(server))
    with pytest.raises(RestartedError, match="completions were drawn with weights 'default'"):
        trainer.train()
    assert synced == [1, 2, 2, 2], "as often as a request is tried"
    kept = (trainer.out.path / "partial_rollout.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step"] == 2 for line in kept) and len(kept) >= 1
    assert seen.labels.count("default") >= 1 and (trainer.out.path / "model").is_dir()


def test_a_restart_during_a_sync_is_one_more_sync(server: FakeServer, monkeypatch: Any, tmp_path: Path) -> None:
    versions, fail = [], [2, 2]

    def sync(self: VLLMServer, named: Any, version: int) -> None:
        versions.append(version)
        if version in fail:
            fail.remove(version)
            raise RestartedError("vLLM was restarted")
        self.follow_sync(named, version)
        self._set_label(str(self.label))

    monkeypatch.setattr(VLLMServer, "sync", sync)
    trainer = run_small(tmp_path, METHOD, **knobs_of(server))
    assert versions == [1, 2, 2, 2, 3] and len(rows(trainer)) == 3
    fail[:] = [1] * 9
    with pytest.raises(RestartedError):
        run_small(tmp_path, METHOD, "lost", **knobs_of(server))
    assert versions[5:] == [1] * 3, "as often as a request is tried"
