"""Client of a vLLM server as the rollout engine: every request is retried with back-off, up to a bound.

The server's environment has this package installed, and `mdpgrpo vllm-serve MODEL` starts it there: docs/vllm.md.
"""

from __future__ import annotations

import json
import math
import os
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import httpx2
import torch
from torch import Tensor

from ...config import ConfigError, require
from ...log import log
from .completion import Completion, RestartedError, RolloutError, completion
from .door import KEY, api_key, host_of, is_loopback
from .files import adapter_files, remove_leftovers, weight_file
from .sampler import LOGPROBS_MODE, RolloutEngine
from .worker import EXTENSION

T = TypeVar("T")
GENERATE = "/inference/v1/generate"  # tokens in, tokens out
MAX_PAUSE = 30.0  # seconds between two attempts
CONNECT = 10.0  # seconds until a connection must stand
KEEP_ALIVE = 2.0  # seconds that an idle connection is kept: vLLM closes it after 5
RETRIED = (408, 429)  # of the client errors, the two that may pass
MOST_BYTES = 64 << 20  # of an answer: the largest that is known lists all tensors of a model
COMPLETION_BYTES, TOKEN_BYTES = (
    1 << 20,
    1 << 10,
)  # of a completion, and more for each token asked for: about 100 are used
MOST_SHOWN = 300  # characters of what a server says


class VLLMServer(RolloutEngine):
    """The client of one server. Rows are sent one request each; weights through files that both sides see.

    Where the environment has a VLLM_API_KEY, each request brings it. Certificates of https are verified, redirects not
    followed, compressed answers not taken.

    url: as http://host:8000. device: of the Rollout's tensors. timeout: seconds from a request to the end of its
    answer, however that comes: a completion comes whole. retries: attempts after the first. backoff: seconds before the
    second attempt, doubled with each, less up to half at random. sync_dir: directory for the weights on their way,
    /dev/shm on one machine or a shared file system, both sides being the same user; None: the system's for temporary
    files. concurrency: most requests at once. run_id: what the weights are labelled with on the server, the same on all
    ranks. lora_rank: of the adapters that `sync_adapter` brings; None: it is not called.

    Raises: ConfigError for a bad setting or a server that `mdpgrpo vllm-serve` did not start; RolloutError where none
    answers, or one refuses.
    """

    def __init__(
        self,
        url: str,
        *,
        device: torch.device | str,
        timeout: float = 600.0,
        retries: int = 5,
        backoff: float = 0.5,
        sync_dir: str | None = None,
        concurrency: int = 256,
        run_id: str | None = None,
        lora_rank: int | None = None,
    ) -> None:
        super().__init__(device, run_id)
        host, key = host_of(url), api_key()
        require(timeout > 0, "vllm_timeout", timeout, "above 0")
        require(retries >= 0, "vllm_retries", retries, "0 or above")
        require(sync_dir is None or os.path.isdir(sync_dir), "vllm_sync_dir", sync_dir, "a directory that is there")
        self.url, self.timeout, self.retries, self.backoff = url.rstrip("/"), timeout, retries, backoff
        self.sync_dir, self.concurrency = sync_dir, concurrency
        limits = httpx2.Limits(max_keepalive_connections=concurrency, keepalive_expiry=KEEP_ALIVE)
        headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
        local = {f"all://{f'[{host}]' if ':' in host else host}": None} if is_loopback(host) else {}  # through no proxy
        connect = httpx2.Timeout(timeout, connect=min(timeout, CONNECT))  # which `close` cannot end
        self._http = httpx2.Client(
            timeout=connect, limits=limits, headers=headers, follow_redirects=False, mounts=local
        )
        weakref.finalize(self, self._http.close)
        self._lock, self._closed, self._stop = threading.Lock(), False, threading.Event()
        self._end = threading.local()  # of the request of a thread
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        if key and not url.lower().startswith("https:") and not is_loopback(host):
            log.warning("vllm_url %s: without https, whoever is on the way can read the key in %s", url, KEY)
        if left := remove_leftovers(sync_dir):
            log.info("weights removed that killed trainers had left: %s", ", ".join(left))
        self._model = self._call("/v1/models", None, lambda answer: str(answer["data"][0]["id"]))
        settings = self._call("/server_info?config_format=json", None, _read_settings)
        for flag, expected in (("--logprobs-mode", LOGPROBS_MODE), ("--worker-extension-cls", EXTENSION)):
            if settings[flag] != expected:
                raise ConfigError(f"vLLM server {url}: {flag} must be {expected}; got {settings[flag][:80]!r}")
        if settings["--data-parallel-size"] > 1:
            raise ConfigError(
                f"vLLM server {url}: --data-parallel-size must be 1: of several engines only the first tells what it "
                "holds"
            )
        if lora_rank is not None and settings["--max-lora-rank"] < lora_rank:
            raise ConfigError(
                f"vLLM server {url}: --enable-lora and --max-lora-rank {lora_rank} or more must be given with "
                f"vllm_lora = adapter; got {settings['--max-lora-rank'] or 'no --enable-lora'}"
            )
        try:
            self._call("/inference/v1/abort_requests", {"request_ids": []}, lambda answer: None)  # of the same service
        except RolloutError as e:
            if "HTTP 403" not in str(e):
                raise
            raise ConfigError(
                f"vLLM server {url}: --enable-scale-out must be given: `mdpgrpo vllm-serve` does"
            ) from None

    def _call(
        self, path: str, payload: Any, read: Callable[[Any], T], stop: threading.Event | None = None,
        most: int = MOST_BYTES,
    ) -> T:  # fmt: skip
        """read() of the JSON that answers a GET, or a POST of the payload where there is one.

        Tried again, unless stop is set: no connection, no whole answer in time, half an answer, one of more bytes than
        `most` or that read() cannot use, a server's error.
        """
        stop, method = stop or threading.Event(), "GET" if payload is None else "POST"
        for attempt in range(self.retries + 1):
            try:
                if self._closed:
                    raise RolloutError(f"vLLM server {self.url} is asked for nothing more: the run has ended")
                answer, data = self._request(method, path, payload, most)
                if answer.is_success:
                    as_json = answer.headers.get("Content-Type", "").startswith("application/json")
                    return read(json.loads(data) if as_json else data.decode(errors="replace"))
                reason = f"HTTP {answer.status_code} {_first_line(answer, data)}"
                if answer.status_code < 500 and answer.status_code not in RETRIED:
                    raise RolloutError(f"vLLM server {self.url} refuses {path}: {reason}{self._hint(answer, path)}")
            except httpx2.TimeoutException:
                reason = f"no answer within {self.timeout:g} s"
            except (httpx2.RequestError, httpx2.InvalidURL) as e:
                reason = str(e) or type(e).__name__
                if "CERTIFICATE_VERIFY_FAILED" in reason:
                    trust = "SSL_CERT_FILE may name the file of an authority of your own"
                    raise RolloutError(f"vLLM server {self.url} is not trusted: {reason}; {trust}") from None
            except RecursionError:
                reason = "an answer that cannot be used: it is nested too deeply"
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
                reason = f"an answer that cannot be used ({type(e).__name__}: {e})"
            pause = min(self.backoff * 2**attempt, MAX_PAUSE) * random.uniform(0.5, 1.0)
            if attempt == self.retries or self._closed or stop.wait(pause):
                break
        reason = " ".join(reason.split())[:MOST_SHOWN]
        raise RolloutError(f"vLLM server {self.url} failed {attempt + 1} times at {path}, the last because {reason}")

    def _request(self, method: str, path: str, payload: Any, most: int) -> tuple[httpx2.Response, bytes]:
        """An answer and its body, whole. Raises ValueError where that is longer than `most` bytes."""
        self._end.at, data = time.monotonic() + self.timeout, bytearray()
        url, extensions = self.url + path, {"trace": self._watch}
        with self._http.stream(method, url, json=payload, extensions=extensions) as answer:
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise ValueError("it is compressed, which was not asked for")
            for piece in answer.iter_raw():
                data += piece
                if len(data) > most:
                    raise ValueError(f"it is longer than {most:,} bytes")
        return answer, bytes(data)

    def _hint(self, answer: httpx2.Response, path: str) -> str:
        """What to do about a refusal, where that is known."""
        if answer.status_code == 401:
            return f": {KEY} is " + ("not the server's" if api_key() else "not set here")
        if answer.has_redirect_location:
            return f": redirects are not followed; this one goes to {answer.headers['Location'][:200]!r}"
        if answer.status_code == 404 and not path.startswith("/v1/"):
            return ": was it started with `mdpgrpo vllm-serve`?"
        return ""

    def _complete(self, prompts: list[list[int]], settings: list[dict[str, Any]]) -> list[Completion]:
        def request(prompt: list[int], row: dict[str, Any]) -> Completion:
            payload = {
                "model": self.adapter or self._model,
                "token_ids": prompt,
                "sampling_params": {**row, "detokenize": False},
            }
            try:
                most = COMPLETION_BYTES + TOKEN_BYTES * row["max_tokens"]
                return self._call(GENERATE, payload, lambda a: _read_completion(a, row["max_tokens"]), stop, most)
            except RolloutError as e:
                if self.adapter and "HTTP 404" in str(e):
                    raise RestartedError(
                        f"vLLM server {self.url} does not know {self.adapter}: was it restarted?"
                    ) from None
                raise

        stop, pool = threading.Event(), ThreadPoolExecutor(min(self.concurrency, len(prompts)))
        self._stop = stop
        try:
            futures = [pool.submit(request, p, s) for p, s in zip(prompts, settings, strict=True)]
            first, _ = wait(futures, return_when=FIRST_EXCEPTION)
            stop.set()
            pool.shutdown(cancel_futures=True)  # what is under way may still come back; nothing is tried again
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if failure := next((e for f in first if (e := f.exception())), None):
            partial = [None if f.cancelled() or f.exception() else f.result() for f in futures]
            if not isinstance(failure, RolloutError):
                raise failure
            kept = len(partial) - partial.count(None)
            raise type(failure)(f"{failure}; {kept} of {len(partial)} completions kept", partial)
        return [f.result() for f in futures]

    def _watch(self, event: str, found: dict[str, Any]) -> None:
        """httpcore's trace of a request: bounds each new connection, and keeps its socket for `close`."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            stream = found["return_value"]
            stream.read, stream.write = _until(self._end, stream.read), _until(self._end, stream.write)
            with self._lock:
                connected = stream.get_extra_info("socket")
                self._sockets.add(connected)
                if self._closed:
                    _shut(connected)

    def close(self) -> None:
        """End the run's requests: those that other threads wait for fail there at once, and none is made from now on.

        The server drops what it was computing for them, as their connections are gone.
        """
        with self._lock:
            self._closed = True
            for connected in self._sockets:
                _shut(connected)
        self._stop.set()

    def sleep(self) -> None:
        """Nothing: the server's memory is its own."""

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        return self._call("/collective_rpc", {"method": method, "args": list(args)}, lambda a: list(a["results"]))

    def _send(self, update: str, weights: list[tuple[str, Tensor]]) -> list[Any]:
        with weight_file(weights, self.sync_dir) as path:
            return self._rpc("mdpgrpo_load", update, path)

    def _load_adapter(self, name: str, write: Callable[[str], None]) -> None:
        with ExitStack() as files:
            directory = files.enter_context(adapter_files(write, self.sync_dir))
            try:
                self._call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": directory}, lambda answer: None)
            except RolloutError as e:
                if "already been loaded" not in str(e):  # by a request whose answer was lost
                    raise
            self._keep(files.pop_all())
        if self.adapter is not None:
            with suppress(RolloutError):  # of a server that was restarted
                self._call("/v1/unload_lora_adapter", {"lora_name": self.adapter}, lambda answer: None)

    def _reset_cache(self) -> None:
        def read(answer: Any) -> None:
            if not answer["success"]:
                raise ValueError("the prefix cache is still in use")

        self._call("/reset_prefix_cache", {}, read)

    def _set_label(self, label: str) -> None:
        self._call("/update_weight_version", {"new_version": label}, lambda answer: answer["success"])


def _until(end: threading.local, transfer: Callable[[Any, float | None], T]) -> Callable[[Any, float | None], T]:
    """A stream's read or write that waits no longer than the thread's request may take: httpcore's limit is of each."""

    def limited(what: Any, timeout: float | None = None) -> T:
        left = getattr(end, "at", math.inf) - time.monotonic()
        if left <= 0:
            raise httpx2.ReadTimeout("the request's time is over")
        return transfer(what, left if timeout is None else min(left, timeout))

    return limited


def _shut(connected: socket.socket) -> None:
    """Ends a connection under a thread that waits for it. Of the class: that of TLS would take its state away first."""
    with suppress(OSError):  # it is closed
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _read_settings(answer: Any) -> dict[str, Any]:
    config = answer["vllm_config"]
    return {
        "--data-parallel-size": int(config["parallel_config"]["data_parallel_size"]),
        "--max-lora-rank": int((config["lora_config"] or {}).get("max_lora_rank") or 0),
        "--logprobs-mode": str(config["model_config"]["logprobs_mode"]),
        "--worker-extension-cls": str(config["parallel_config"]["worker_extension_cls"]),
    }


def _read_completion(answer: Any, max_tokens: int) -> Completion:
    (choice,) = answer["choices"]
    tokens, drawn = choice["token_ids"], choice["logprobs"]["content"]
    if len(tokens) > max_tokens or not all(type(t) is int and 0 <= t < 2**31 for t in tokens):
        raise ValueError(f"a completion must be at most {max_tokens} tokens")
    if tokens != [step["token_id"] for step in drawn]:
        raise ValueError("the log-probs are of other tokens")
    labels = [str(span["version"])[:MOST_SHOWN] for span in choice["weight_versions"]]
    return completion(tokens, [step["logprob"] for step in drawn], choice["finish_reason"], labels)


def _first_line(answer: httpx2.Response, data: bytes) -> str:
    """What the server says about its error: its message where it answers in JSON."""
    try:
        said = json.loads(data)
        text = str(said["error"]["message"] if "error" in said else said["detail"])
    except (ValueError, LookupError, TypeError, RecursionError):
        text = data[: 4 * MOST_SHOWN].decode(errors="replace")
    return (text.strip() or answer.reason_phrase).partition("\n")[0][:MOST_SHOWN]
