"""The door of a real vLLM server that `mdpgrpo vllm-serve` started with a key."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from helpers.vllm_real import Server

from mdpgrpo_fast.rollout.vllm.completion import RolloutError
from mdpgrpo_fast.rollout.vllm.door import api_key
from mdpgrpo_fast.rollout.vllm.server import VLLMServer


def paths_of(server: Server) -> set[str]:
    """Every path that the server has, by its own description."""
    found = httpx2.get(f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {api_key()}"})
    return set(found.json()["paths"])


def test_nothing_but_its_health_is_open(server: Server) -> None:
    paths = paths_of(server)
    assert {"/collective_rpc", "/server_info", "/reset_prefix_cache", "/update_weights", "/v1/models"} <= paths
    for path in sorted(paths | {"/metrics", "/docs", "/openapi.json", "/no/such/path"}):
        for method in ("GET", "POST", "OPTIONS"):
            for headers in ({}, {"Authorization": "Bearer another"}):
                status = httpx2.request(method, server.url + path, headers=headers, timeout=20.0).status_code
                assert (status == 401) == (path != "/health"), f"{method} {path}: {status}"


def test_the_trainer_needs_the_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    VLLMServer(server.url, device="cpu", retries=0)
    monkeypatch.setenv("VLLM_API_KEY", "another")
    with pytest.raises(RolloutError, match="HTTP 401 Unauthorized: VLLM_API_KEY is not the server's"):
        VLLMServer(server.url, device="cpu", retries=0)


def test_the_key_is_shown_nowhere(server: Server) -> None:
    key = api_key()
    assert key and key not in server.log.read_text()
    assert key.encode() not in Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
