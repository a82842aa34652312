"""A real server that is killed while a run samples with it, and one that comes back."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.vllm_real import Server

import mdpgrpo_fast.train as train
from mdpgrpo_fast.rollout.vllm import server as client

COUNT = 64  # completions of a step of the demonstration


@pytest.fixture
def at_completion(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """at_completion(n, do): do() is called where the client has read its nth completion."""

    def watch(number: int, do: Callable[[], object]) -> None:
        read, lock, seen = client._read_completion, threading.Lock(), [0]

        def counted(answer: Any) -> Any:
            found = read(answer)
            with lock:
                seen[0] += 1
                if seen[0] == number:
                    do()
            return found

        monkeypatch.setattr(client, "_read_completion", counted)

    return watch


def test_a_server_that_is_killed_and_does_not_come_back_ends_the_run(
    tmp_path: Path, server: Server, at_completion: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second step, after some of its completions: these are kept, the server is asked so many times, and the run
    ends with status 1, one line, and the model of the first step."""
    at_completion(COUNT + 10, server.kill)
    out = tmp_path / "run"
    argv = ["--cpu", "--rollout", "vllm", "--vllm-url", server.url, "--vllm-retries", "2", "--steps", "4"]
    assert train.main([*argv, "--eval-samples", "2", "--output-dir", str(out)]) == 1
    *before, said = capsys.readouterr().err.strip().splitlines()
    kept = [json.loads(line) for line in (out / "partial_rollout.jsonl").read_text().splitlines()]
    assert 10 <= len(kept) < COUNT and {row["step"] for row in kept} == {2}
    assert all(row["tokens"] and row["response"] for row in kept)
    assert any(f"{len(kept)} completions of step 2 are kept in" in line for line in before)
    assert said.startswith(f"error: vLLM server {server.url} failed 3 times at /inference/v1/generate")
    assert f"{len(kept)} of {COUNT} completions kept" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 1 and summary["interrupted"] and (out / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("ahead", [0, 1], ids=["at once", "a step ahead"])
def test_a_server_that_is_restarted_gets_the_weights_again(
    tmp_path: Path, server: Server, servers: list[Server], at_completion: Any, capsys: Any, ahead: int
) -> None:
    """What came before is kept, the rest is drawn again with the trainer's weights, and the run ends well."""

    def restart() -> None:
        server.kill()
        servers.append(server.successor())

    at_completion(COUNT + 10, restart)
    out = tmp_path / "run"
    argv = ["--cpu", "--rollout", "vllm", "--vllm-url", server.url, "--vllm-retries", "20", "--steps", "4"]
    argv += [
        "--preset",
        "exact",
        "--temperature-objective",
        "per_row",
        "--sampler-correction",
        "--async-rollout",
        str(ahead),
    ]
    assert train.main([*argv, "--eval-samples", "2", "--output-dir", str(out)]) == 0
    said = capsys.readouterr().err
    assert "were drawn with weights 'default'" in said and "; it is given the weights again" in said
    logged = [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "reward" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4] and not (out / "partial_rollout.jsonl").exists()
    if not ahead:
        assert all(slot["ess"] == pytest.approx(1, abs=1e-3) for row in logged for slot in row["slots"])
