"""A real server that is killed while a run samples with it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.vllm_real import Server

import mdpgrpo_fast.train as train
from mdpgrpo_fast.rollout.vllm import server as client

COUNT = 64  # completions of a step of the demonstration


def test_a_server_that_is_killed_and_does_not_come_back_ends_the_run(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second step, after some of its completions: these are kept, the server is asked so many times, and the run
    ends with status 1, one line, and the model of the first step."""
    read, lock, seen = client._read_completion, threading.Lock(), [0]

    def counted(answer: Any) -> Any:
        found = read(answer)
        with lock:
            seen[0] += 1
            if seen[0] == COUNT + 10:
                server.kill()
        return found

    monkeypatch.setattr(client, "_read_completion", counted)
    out, begin = tmp_path / "run", time.monotonic()
    argv = ["--cpu", "--rollout", "vllm", "--vllm-url", server.url, "--vllm-retries", "2", "--steps", "4"]
    assert train.main([*argv, "--eval-samples", "2", "--output-dir", str(out)]) == 1
    assert time.monotonic() - begin < 300, "retries are bounded"
    *before, said = capsys.readouterr().err.strip().splitlines()
    kept = [json.loads(line) for line in (out / "partial_rollout.jsonl").read_text().splitlines()]
    assert 10 <= len(kept) < COUNT and {row["step"] for row in kept} == {2}
    assert all(row["tokens"] and row["response"] for row in kept)
    assert any(f"{len(kept)} completions of step 2 are kept in" in line for line in before)
    assert said.startswith(f"error: vLLM server {server.url} failed 3 times at /inference/v1/generate")
    assert f"{len(kept)} of {COUNT} completions kept" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 1 and summary["interrupted"] and (out / "model" / "model.safetensors").exists()
