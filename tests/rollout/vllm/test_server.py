"""The client of a vLLM server, against a stand-in over HTTP; the requests against its real sources."""

from __future__ import annotations

import ast
import gc
import itertools
import math
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.vllm import (
    ARGS,
    EOS,
    GENERATE,
    PROMPTS,
    FakeServer,
    choice,
    class_fields,
    client,
    vllm_sources,
    weights,
)

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.rollout.vllm import sampler
from mdpgrpo_fast.rollout.vllm import server as server_module
from mdpgrpo_fast.rollout.vllm.completion import Completion, RestartedError, RolloutError
from mdpgrpo_fast.rollout.vllm.server import VLLMServer


def test_the_files_of_a_sync_are_gone_after_it(server: FakeServer, tmp_path: Path) -> None:
    engine = client(server, sync_dir=str(tmp_path))
    engine.sync(weights().items(), 0)
    (path,) = [
        body["args"][1] for _, p, body in server.log if p == "/collective_rpc" and body["method"] == "mdpgrpo_load"
    ]
    assert Path(path).is_relative_to(tmp_path) and not any(tmp_path.iterdir())


def failing(times: int, path: str, fault: Callable[[Any], None]) -> Callable[[Any, str, Any], bool]:
    """The first `times` requests of a path are answered by fault()."""
    remaining, lock = [times], threading.Lock()

    def answers(handler: Any, requested: str, body: Any) -> bool:
        with lock:
            faulty = requested == path and remaining[0] > 0
            remaining[0] -= faulty
        if faulty:
            fault(handler)
        return faulty

    return answers


FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "unavailable": (lambda h: h.send({"error": {"message": "no room\nmore"}}, 503), "HTTP 503 no room$"),
    "busy": (lambda h: h.send(b"wait", 429), "HTTP 429 wait"),
    "slow": (lambda h: h.send(b"late", 408), "HTTP 408 late"),
    "not json": (lambda h: h.send(b"<html>"), "cannot be used .JSONDecodeError"),
    "half": (lambda h: h.send(b'{"choices": [', length=50), "without sending complete message body"),
    "closed": (lambda h: h.connection.shutdown(socket.SHUT_RDWR), "Server disconnected|reset by peer"),
    "no choice": (lambda h: h.send({"choices": []}), "cannot be used .ValueError"),
    "null": (lambda h: h.send(b"null"), "cannot be used .TypeError"),
    "no log-probs": (
        lambda h: h.send({"choices": [{**choice([3], [-1.0], "stop"), "logprobs": None}]}),
        "cannot be used .TypeError",
    ),
    "a log-prob short": (
        lambda h: h.send({"choices": [choice([3, 4], [-1.0], "stop")]}),
        "the log-probs are of other tokens",
    ),
    "a log-prob that is no number": (
        lambda h: h.send({"choices": [choice([3, 4], [-1.0, math.inf], "stop")]}),
        "a finite log-prob per token; got 2 for 2",
    ),
    "cut off": (
        lambda h: h.send({"choices": [choice([3], [-1.0], "abort")]}),
        "finish_reason must be stop or length; got 'abort'",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_passing_fault_is_tried_again_and_a_lasting_one_is_an_error(server: FakeServer, name: str) -> None:
    fault, reason = FAULTS[name]
    engine, row = client(server), {"temperature": None, "eos": EOS, "max_new_tokens": 4}
    server.fault = failing(2, GENERATE, fault)
    assert engine.generate(PROMPTS[:1], **row).lengths.tolist() == [4]
    assert server.count(GENERATE) == 3
    server.fault = failing(99, GENERATE, fault)
    with pytest.raises(RolloutError, match=reason.removesuffix("$")) as e:
        engine.generate(PROMPTS[:1], **row)
    assert server.count(GENERATE) == 6  # once and two retries
    message = str(e.value)
    assert message.startswith(f"vLLM server {server.url} failed 3 times at /inference/v1/generate, the last because ")
    assert message.endswith("; 0 of 1 completions kept") and "\n" not in message and e.value.partial == [None]


def test_an_answer_that_does_not_come_in_time(server: FakeServer) -> None:
    engine = client(server, timeout=0.2, retries=1)
    held = threading.Event()
    server.fault = failing(99, GENERATE, lambda h: held.wait(20) and None)
    with pytest.raises(
        RolloutError, match=r"failed 2 times at /inference/v1/generate, the last because no answer within 0.2 s"
    ):
        engine.generate(PROMPTS[:1], temperature=None, eos=EOS, max_new_tokens=4)
    held.set()


def dripping(handler: Any, first: bytes, drop: bytes) -> None:
    """A server that always sends something in time, and is never done."""
    handler.wfile.write(first)
    while True:
        handler.wfile.write(drop)
        time.sleep(0.05)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ENDLESS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a body that drips": (lambda h: dripping(h, HEAD + b"Content-Length: 999\r\n\r\n", b" "), "no answer within 0.5 s"),
    "headers that drip": (lambda h: dripping(h, HEAD + b"X: ", b"x"), "no answer within 0.5 s"),
    "a status that drips": (lambda h: dripping(h, b"HTTP/1.1 200 ", b"x"), "no answer within 0.5 s"),
    "many headers": (lambda h: h.wfile.write(HEAD + b"X: y\r\n" * 10**6), "too large|too long|Receive buffer"),
    "an endless body": (
        lambda h: h.wfile.write(HEAD + b"\r\n") and [h.wfile.write(b" " * 2**16) for _ in range(10**6)],
        r"it is longer than 1,052,672 bytes",
    ),
    "an endless error": (
        lambda h: h.wfile.write(b"HTTP/1.1 500 No\r\n\r\n") and [h.wfile.write(b"x" * 2**16) for _ in range(10**6)],
        r"it is longer than 1,052,672 bytes",
    ),
    "a body that unpacks": (
        lambda h: h.wfile.write(HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\nxx"), "it is compressed",
    ),
    "100,000 brackets": (lambda h: h.send(b"[" * 100_000), "it is nested too deeply"),
    "100,000 brackets in an error": (lambda h: h.send(b'{"detail":' + b"[" * 100_000, 503), r"HTTP 503 \{"),
    "a number beyond floats": (
        lambda h: h.send({"choices": [choice([3], [10**400], "stop")]}), "a finite log-prob per token; got 1 for 1"
    ),
    "a log-prob beyond float32": (
        lambda h: h.send({"choices": [choice([3], [-1e39], "stop")]}), "a finite log-prob per token; got 1 for 1"
    ),
    "a token that is none": (
        lambda h: h.send({"choices": [choice([2**70], [-1.0], "stop")]}), "a completion must be at most 4 tokens"
    ),
    "more tokens than asked": (
        lambda h: h.send({"choices": [choice([3] * 5, [-1.0] * 5, "stop")]}), "a completion must be at most 4 tokens"
    ),
    "a long reason": (
        lambda h: h.send({"choices": [choice([3], [-1.0], "x" * 10**5)]}), "finish_reason must be stop or length"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_no_answer_takes_more_time_or_room_than_it_may(server: FakeServer, name: str) -> None:
    fault, reason = ENDLESS[name]
    engine = client(server, timeout=0.5 if "drip" in name else 20.0, retries=0)
    server.fault = failing(99, GENERATE, fault)
    began = time.monotonic()
    with pytest.raises(RolloutError, match=reason) as e:
        engine.generate(PROMPTS[:1], temperature=None, eos=EOS, max_new_tokens=4)
    assert time.monotonic() - began < 10 and len(str(e.value)) < 500 and "\n" not in str(e.value)


def test_a_request_after_a_late_one_has_its_own_time(server: FakeServer) -> None:
    engine = client(server, timeout=0.5, retries=1, concurrency=1)
    server.fault = failing(1, GENERATE, lambda h: dripping(h, HEAD, b"x"))
    row = {"temperature": None, "eos": EOS, "max_new_tokens": 4}
    assert engine.generate(PROMPTS[:1], **row).lengths.tolist() == [4]
    time.sleep(0.6)
    assert engine.generate(PROMPTS[:1], **row).lengths.tolist() == [4]


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as s:  # a port that nothing listens on
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
        with pytest.raises(RolloutError, match=rf"{url} failed 4 times at /v1/models, the last because .*refused"):
            VLLMServer(url, device="cpu", retries=3, backoff=0.001)
    with pytest.raises(RolloutError, match="failed 1 times at /v1/models, the last because Invalid port: 'x'"):
        VLLMServer("http://127.0.0.1:x", device="cpu", retries=0)


def test_the_back_off_doubles_up_to_a_bound(server: FakeServer) -> None:
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            return False

    engine = client(server, retries=8, backoff=1.0)
    with pytest.raises(RolloutError, match="failed 9 times"):
        engine._call("/v1/models", None, lambda answer: answer["nothing"], Stop())
    for pause, longest in zip(waits, [1, 2, 4, 8, 16, 30, 30, 30], strict=True):
        assert longest / 2 <= pause <= longest


def test_a_refusal_is_not_tried_again_and_says_why(server: FakeServer) -> None:
    engine = client(server)
    server.fault = failing(9, GENERATE, lambda h: h.send({"error": {"message": "too long a prompt"}}, 400))
    with pytest.raises(RolloutError, match="refuses /inference/v1/generate: HTTP 400 too long a prompt; 0 of 1"):
        engine.generate(PROMPTS[:1], temperature=None, eos=EOS, max_new_tokens=4)
    assert server.count(GENERATE) == 1


def test_completions_that_came_are_kept_when_the_server_goes(server: FakeServer) -> None:
    engine = client(server, concurrency=1)

    def gone_after_the_third(handler: Any, path: str, body: Any) -> bool:
        if path != GENERATE or body["token_ids"] != PROMPTS[1] or body["sampling_params"]["temperature"] < 1:
            return False
        handler.send(b"", 500)
        return True

    server.fault = gone_after_the_third
    with pytest.raises(RolloutError, match=r"HTTP 500 Internal Server Error; [3-5] of 6 completions kept") as e:
        engine.generate(PROMPTS, **ARGS)
    assert [c is not None for c in e.value.partial[:4]] == [True, True, True, False]
    assert e.value.partial[0] == Completion([38, 39, 40, 41], [-0.5, -0.625, -0.75, -0.875], False, "default")


def test_rows_that_would_be_tried_again_give_up_at_the_first_failure(server: FakeServer) -> None:

    def fault(handler: Any, path: str, body: Any) -> bool:
        if path == GENERATE and body["token_ids"] == PROMPTS[1]:
            handler.send({"error": {"message": "busy"}}, 503)
        elif path == GENERATE and body["token_ids"] == PROMPTS[2]:
            time.sleep(0.5)  # the others have their answers
            handler.send({"error": {"message": "too long"}}, 400)
        return handler.path == GENERATE and body["token_ids"] != PROMPTS[0]

    engine = client(server, backoff=1e6)
    server.fault = fault
    with pytest.raises(RolloutError, match="HTTP 400 too long; 2 of 6 completions kept"):
        engine.generate(PROMPTS, **ARGS)  # or it would not come back
    assert server.count(GENERATE) == 6


def test_all_rows_are_asked_at_once_up_to_the_limit(server: FakeServer) -> None:
    together = threading.Barrier(128)
    engine = client(server, retries=0)
    server.fault = lambda handler, path, body: path == GENERATE and together.wait(20) < 0
    engine.generate([[5]] * 128, temperature=None, eos=EOS, max_new_tokens=1)
    engine = client(server, retries=0, concurrency=127, timeout=0.5)
    with pytest.raises(RolloutError, match=r"no answer within 0\.5 s"):
        engine.generate([[5]] * 128, temperature=None, eos=EOS, max_new_tokens=1)
    together.abort()


def test_connections_are_kept_for_a_moment_and_closed_with_the_engine(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A connection that the server may be about to close is not used again.
    assert server_module.KEEP_ALIVE < 5
    monkeypatch.setattr(server_module, "KEEP_ALIVE", 60)
    engine = client(server, concurrency=1)
    engine.sync(weights().items(), 0)
    engine.generate(PROMPTS, **ARGS)
    assert server.connections == 1
    http = engine._http
    del engine
    gc.collect()
    assert http.is_closed
    monkeypatch.setattr(server_module, "KEEP_ALIVE", 0.01)
    engine = client(server)
    before = server.connections
    time.sleep(0.05)
    engine.generate(PROMPTS[:1], temperature=None, eos=EOS, max_new_tokens=1)
    assert server.connections == before + 1


def test_a_restarted_server_does_not_pass_for_the_synced_one(server: FakeServer) -> None:
    engine = client(server)
    engine.sync(weights().items(), 3)
    engine.generate(PROMPTS, **ARGS)
    drawn = []

    def restart_after_the_second(handler: Any, path: str, body: Any) -> bool:
        drawn.append(path)
        if drawn.count(GENERATE) == 3:
            server.restart()
        return False

    server.fault, engine.concurrency = restart_after_the_second, 1
    message = rf"4 of 6 completions were drawn with weights 'default', not with '{engine.run_id}-3': was vLLM restarted"
    with pytest.raises(RestartedError, match=message) as e:
        engine.generate(PROMPTS, **ARGS)
    assert [c is not None for c in e.value.partial] == [True] * 2 + [False] * 4
    with pytest.raises(RolloutError, match=r"does not hold the weights of the last sync\(\)"):
        engine.generate(PROMPTS, **ARGS, kept=e.value.partial)
    engine.sync(weights().items(), 4)
    before = server.count(GENERATE)
    rows = engine.generate(PROMPTS, **ARGS)
    assert server.count(GENERATE) == before + 6
    assert torch.equal(engine.generate(PROMPTS, **ARGS, kept=e.value.partial).tokens, rows.tokens)
    assert server.count(GENERATE) == before + 6 + 4


def test_a_server_restarted_during_a_sync(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "SYNC_BYTES", 40)
    engine = client(server)
    for where in ("mdpgrpo_load", "mdpgrpo_finish", f"{engine.run_id}-0"):

        def restart(handler: Any, path: str, body: Any, where: str = where) -> bool:
            if body and where in (body.get("method"), body.get("new_version")):
                server.fault = lambda handler, path, body: False
                server.restart()
            return False

        server.fault = restart
        with pytest.raises(RestartedError, match="restarted, or synced by another run, while it was given weights"):
            engine.sync(weights().items(), 0)
        with pytest.raises(RolloutError, match=r"does not hold the weights of the last sync\(\)"):
            engine.generate(PROMPTS, **ARGS)
    engine.sync(weights().items(), 0)
    assert engine.generate(PROMPTS, **ARGS).tokens.shape == (6, 4)


@pytest.mark.parametrize("method", ["mdpgrpo_start", "mdpgrpo_load", "mdpgrpo_finish"])
def test_what_is_asked_for_again_is_done_once(server: FakeServer, method: str) -> None:
    engine = client(server)

    def answer_is_lost(handler: Any, path: str, body: Any) -> bool:
        if path != "/collective_rpc" or body["method"] != method:
            return False
        server.fault = lambda handler, path, body: False
        getattr(server.workers[0], method)(*body["args"])
        handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    server.fault = answer_is_lost
    engine.sync(weights().items(), 0)
    assert server.workers[0].model.loads == 1 and engine.version == 0 and server.workers[0].reloads == 0


def test_weights_that_cannot_be_read_are_said_at_once(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(path: str) -> Any:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("mdpgrpo_fast.rollout.vllm.worker._read", cannot)
    engine = client(server)
    with pytest.raises(RolloutError, match=r"vLLM cannot load the weights: PermissionError: .*Permission denied"):
        engine.sync(weights().items(), 0)
    loads = [b for _, path, b in server.log if path == "/collective_rpc" and b["method"] == "mdpgrpo_load"]
    assert len(loads) == 1, "another try would be refused too"


def test_a_rank_that_follows_holds_the_server_to_the_same_version(server: FakeServer) -> None:
    engine, other = client(server, run_id="run"), client(server, run_id="run")
    gone_through = iter(weights().items())
    other.follow_sync(gone_through, 1)
    assert next(gone_through, None) is None
    with pytest.raises(RestartedError, match="not with 'run-1'"):
        other.generate(PROMPTS, **ARGS)
    engine.sync(weights().items(), 1)
    other.follow_sync(weights().items(), 1)
    assert other.generate(PROMPTS, **ARGS).tokens.shape == (6, 4)


def test_a_server_started_without_what_is_needed(server: FakeServer) -> None:
    server.mode = "raw_logprobs"
    with pytest.raises(ConfigError, match="--logprobs-mode must be processed_logprobs; got 'raw_logprobs'"):
        client(server)
    server.mode, server.scale_out = "processed_logprobs", False
    with pytest.raises(ConfigError, match="--enable-scale-out must be given"):
        client(server)
    server.scale_out, server.engines = True, 2
    with pytest.raises(ConfigError, match="--data-parallel-size must be 1"):
        client(server)
    server.extension, server.engines = "", 1
    with pytest.raises(
        ConfigError, match=r"--worker-extension-cls must be mdpgrpo_fast\.rollout\.vllm\.worker\.WeightSync"
    ):
        client(server)
    server.dev = False
    with pytest.raises(RolloutError, match=r"HTTP 404 Not Found: was it started with `mdpgrpo vllm-serve`\?"):
        client(server)


@pytest.mark.parametrize(
    ("knobs", "name"),
    [({"url": "localhost:8000"}, "vllm_url"), ({"timeout": 0}, "vllm_timeout"), ({"retries": -1}, "vllm_retries")],
)
def test_bad_settings_of_the_client(knobs: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        VLLMServer(**{"url": "http://127.0.0.1:1", "device": "cpu", **knobs})


def test_requests_fit_the_installed_vllm(server: FakeServer) -> None:
    root = vllm_sources()
    engine = client(server)
    engine.sync(weights().items(), 0)
    engine.generate(PROMPTS, **ARGS, seed=1)
    engine.sync_adapter(weights().items(), lambda directory: None, 1)
    lora = next(body for _, path, body in server.log if path == "/v1/load_lora_adapter")
    assert set(lora) <= class_fields(root / "entrypoints/serve/lora/protocol.py", "LoadLoRAAdapterRequest")
    protocol = root / "entrypoints/scale_out/token_in_token_out/protocol.py"
    asked = [body for _, path, body in server.log if path == GENERATE]
    params = class_fields(root / "sampling_params.py", "SamplingParams")
    assert len(asked) == 6 and all(set(body) <= class_fields(protocol, "GenerateRequest") for body in asked)
    assert all(set(body["sampling_params"]) <= params for body in asked)
    base = class_fields(protocol, "GenerateChoiceBase")
    assert set(choice([3], [-1.0], "stop")) <= base | class_fields(protocol, "GenerateTokensChoice")
    assert {"token_id", "logprob"} <= class_fields(protocol, "GenerateLogProb")
    assert {"version"} <= class_fields(root / "outputs.py", "WeightVersionSpan")
    routes = set()
    for path in (root / "entrypoints").rglob("api_router.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                route = node.args[0]
                if isinstance(route, ast.Constant) and isinstance(route.value, str):
                    methods = [ast.literal_eval(k.value) for k in node.keywords if k.arg == "methods"]  # add_api_route
                    routes |= {(name, route.value) for name in [node.func.attr.upper(), *itertools.chain(*methods)]}
    assert {(method, path) for method, path, _ in server.log} <= routes
