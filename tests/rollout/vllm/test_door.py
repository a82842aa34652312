"""The door of a vLLM server: who is let in, where, and what the client shows and trusts."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers.vllm import ARGS, PROMPTS, FakeServer, client, weights

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.rollout.vllm.completion import RolloutError
from mdpgrpo_fast.rollout.vllm.door import GUARD, KeyGuard, api_key, host_of, is_loopback
from mdpgrpo_fast.rollout.vllm.server import VLLMServer

SECRET = "a-key_of/many+signs="


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    return SECRET


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def asked(path: str, *authorization: bytes, kind: str = "http") -> list[dict[str, Any]]:
    """What KeyGuard sends for a request; the app behind it sends {"type": "in"}."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "in"})

    async def receive() -> dict[str, Any]:
        raise AssertionError("nothing of a request is read")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", b"here"), *((b"authorization", value) for value in authorization)]
    scope = {"type": kind} if kind == "lifespan" else {"type": kind, "path": path, "headers": headers}
    asyncio.run(KeyGuard(app)(scope, receive, send))
    return sent


PATHS = [
    "/v1/completions", "/inference/v1/generate", "/collective_rpc", "/server_info", "/reset_prefix_cache",
    "/update_weights", "/metrics", "/docs", "/", "/healthy", "/health/", "//health", "/HEALTH", "",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_every_path_needs_the_key(key: str, path: str) -> None:
    assert asked(path, f"Bearer {key}".encode()) == [{"type": "in"}]
    start, body = asked(path)
    assert (start["type"], start["status"]) == ("http.response.start", 401)
    assert body == {"type": "http.response.body", "body": b'{"detail":"Unauthorized"}'}


@pytest.mark.parametrize(
    "authorization",
    [
        (),
        (b"",),
        (b"Bearer",),
        (b"Bearer ",),
        (SECRET.encode(),),
        (b"Basic " + SECRET.encode(),),
        (b"Bearer " + SECRET.encode()[:-1],),
        (b"Bearer " + SECRET.encode() + b"x",),
        (b"Bearer  " + SECRET.encode(),),
        (b"Bearer " + SECRET.upper().encode(),),
        (b"Bearer \xff\xfe",),
        (b"Bearer wrong", b"Bearer " + SECRET.encode()),
        (b"Bearer " + SECRET.encode(), b"Bearer wrong"),
    ],
)
def test_nothing_but_the_key_opens(key: str, authorization: tuple[bytes, ...]) -> None:
    assert asked("/collective_rpc", *authorization)[0]["status"] == 401


def test_what_is_open_without_it(key: str) -> None:
    assert asked("/health") == [{"type": "in"}]
    assert asked("", kind="lifespan") == [{"type": "in"}]
    assert asked("/v1/realtime", kind="websocket") == [{"type": "websocket.close", "code": 1008}]
    assert asked("/v1/realtime", f"bearer {key}".encode(), kind="websocket") == [{"type": "in"}]


def test_a_guard_without_a_key_does_not_start() -> None:
    with pytest.raises(ConfigError, match="must hold VLLM_API_KEY"):
        asked("/health")
    assert GUARD == "mdpgrpo_fast.rollout.vllm.door.KeyGuard"


@pytest.mark.parametrize("value", ["secret\n", "se cret", "s\u00e9cret", "\tsecret", "secret\x00"[:-1] + "\x7f"])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("VLLM_API_KEY", value)
    with pytest.raises(ConfigError, match="VLLM_API_KEY must be printable ASCII") as e:
        api_key()
    assert "cret" not in str(e.value)


def test_an_empty_key_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert api_key() is None


def test_addresses() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.3.2.1", "localhost", "LocalHost", "::1", "[::1]"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "", "10.0.0.1", "localhost.example", "127.0.0.1.example"]))
    assert host_of("https://[::1]:8000/") == "::1" and host_of("http://Here:1") == "here"
    for url in ("localhost:8000", "ftp://here", "http://", "http://[::1", ""):
        with pytest.raises(ConfigError, match="vllm_url must be an"):
            host_of(url)
    with pytest.raises(ConfigError, match="without user and password") as e:
        host_of("http://user:word@here:8000")
    assert "word@" not in str(e.value)


def test_the_client_brings_the_key_everywhere(server: FakeServer, key: str) -> None:
    server.key = key
    engine = client(server)
    engine.sync(weights().items(), 0)
    assert engine.generate(PROMPTS, **ARGS).tokens.shape == (6, 4)


@pytest.mark.parametrize(("value", "said"), [("wrong-key", "not the server's"), ("", "not set here")])
def test_a_wrong_key_ends_at_once_and_is_not_shown(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, value: str, said: str
) -> None:
    server.key = SECRET
    monkeypatch.setenv("VLLM_API_KEY", value)
    with pytest.raises(RolloutError, match=rf"refuses /v1/models: HTTP 401 Unauthorized: VLLM_API_KEY is {said}$") as e:
        client(server)
    assert len(server.log) == 1 and "wrong-key" not in str(e.value)


def test_a_key_that_goes_unencrypted_to_another_machine_is_said(
    server: FakeServer, key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def warned() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        caplog.clear()
        return found

    client(server)
    assert warned() == []
    monkeypatch.setattr("mdpgrpo_fast.rollout.vllm.server.is_loopback", lambda host: False)
    client(server)
    (line,) = warned()
    assert server.url in line and "can read the key in VLLM_API_KEY" in line and key not in line
    monkeypatch.delenv("VLLM_API_KEY")
    client(server)
    assert warned() == []


def test_requests_to_this_machine_go_through_no_proxy(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    proxy = FakeServer()  # it is not served
    monkeypatch.setenv("http_proxy", proxy.url)
    client(server, retries=0, timeout=5.0)
    proxy.server_close()
    assert server.count("/v1/models") == 1
    with pytest.raises(RolloutError, match="failed 1 times"):
        VLLMServer("http://sampler.example:1", device="cpu", retries=0)  # through the proxy, which is gone


def test_redirects_are_not_followed(server: FakeServer, key: str) -> None:
    def elsewhere(handler: Any, path: str, body: Any) -> bool:
        handler.send_response(307)
        handler.send_header("Location", f"{server.url}/other")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    server.fault = elsewhere
    with pytest.raises(RolloutError, match=r"HTTP 307 Temporary Redirect: redirects are not followed; this .*/other'$"):
        client(server)
    assert [path for _, path, _ in server.log] == ["/v1/models"]


def test_a_certificate_is_verified(
    server: FakeServer, key: str, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = key
    server.encrypt(str(certificates / "server.pem"))
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    before = server.connections
    with pytest.raises(RolloutError, match=r"is not trusted: .*CERTIFICATE_VERIFY_FAILED.*; SSL_CERT_FILE may") as e:
        client(server, backoff=100.0)
    assert "\n" not in str(e.value) and server.connections <= before + 1 and server.log == []

    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    engine = client(server)
    engine.sync(weights().items(), 0)
    assert engine.generate(PROMPTS, **ARGS).tokens.shape == (6, 4)
    with pytest.raises(RolloutError, match=r"is not trusted: .*(not valid for|doesn't match) 'localhost'"):
        VLLMServer(server.url.replace("127.0.0.1", "localhost"), device="cpu", retries=0)


def test_plain_http_to_a_server_that_speaks_tls(server: FakeServer, certificates: Path) -> None:
    server.encrypt(str(certificates / "server.pem"))
    server.scheme = "http"
    with pytest.raises(RolloutError, match="failed 3 times at /v1/models"):
        client(server)


def test_weights_of_a_killed_trainer_are_removed_at_the_start(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mdpgrpo_fast.rollout.vllm import files

    left = tmp_path / f"{files.PREFIX}{files._host()}-1234-x"
    left.mkdir()
    (left / "weights.safetensors").write_bytes(b"secret")
    monkeypatch.setattr(files, "_runs", lambda pid: pid != 1234)
    with caplog.at_level(logging.INFO):
        client(server, sync_dir=str(tmp_path))
    assert not any(tmp_path.iterdir()) and left.name in caplog.text
    with pytest.raises(ConfigError, match="vllm_sync_dir must be a directory that is there"):
        client(server, sync_dir=str(tmp_path / "none"))
