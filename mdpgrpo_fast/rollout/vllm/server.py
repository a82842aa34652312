"""A vLLM server as the rollout engine, over HTTP: every request is retried with back-off, up to a bound.

The server's environment has this package installed, for `worker`, and it is started as

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs \\
        --worker-extension-cls mdpgrpo_fast.rollout.vllm.worker.WeightSync

which opens weight updates to whoever reaches the port: keep it inside a trusted network.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...config import ConfigError, require
from .sampler import LOGPROBS_MODE, Completion, RolloutEngine, RolloutError, completion
from .worker import EXTENSION

T = TypeVar("T")
LONGEST_WAIT = 30.0  # seconds between two attempts
BUSY = (408, 429)  # of the client errors, the two that may pass


class VLLMServer(RolloutEngine):
    """The client of one server. Rows are sent one request each; weights through files that both sides see.

    url: as http://host:8000. device: of the Rollout's tensors. timeout: seconds that an answer may take, a whole
    completion among them. retries: attempts after the first. backoff: seconds before the second attempt, doubled with
    each, less up to half at random. sync_dir: directory for the weights on their way, /dev/shm on one machine or a
    shared file system, both sides being the same user; None: the system's for temporary files. concurrency: most
    requests at once.

    Raises: ConfigError for a bad setting or a server started otherwise than above; RolloutError where none answers.
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
    ) -> None:
        super().__init__(device)
        require(url.startswith(("http://", "https://")), "vllm_url", url, "an http:// or https:// address")
        require(timeout > 0, "vllm_timeout", timeout, "above 0")
        require(retries >= 0, "vllm_retries", retries, "0 or above")
        self.url, self.timeout, self.retries, self.backoff = url.rstrip("/"), timeout, retries, backoff
        self.sync_dir, self.concurrency = sync_dir, concurrency
        self._model = self._call("/v1/models", None, lambda answer: str(answer["data"][0]["id"]))
        started = self._call("/server_info?config_format=json", None, _read_settings)
        for flag, want in (("--logprobs-mode", LOGPROBS_MODE), ("--worker-extension-cls", EXTENSION)):
            if started[flag] != want:
                raise ConfigError(f"vLLM server {url}: {flag} must be {want}; got {started[flag]!r}")

    def _call(self, path: str, payload: Any, read: Callable[[Any], T], stop: threading.Event | None = None) -> T:
        """read() of the JSON that answers a GET, or a POST of the payload where there is one.

        Tried again, unless stop is set: no connection, no answer in time, half an answer, one that read() cannot use, a
        server's error.
        """
        stop = stop or threading.Event()
        body = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt and stop.wait(min(self.backoff * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)):
                break
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return read(json.loads(answer.read()))
            except urllib.error.HTTPError as e:
                reason = f"HTTP {e.code} {_first_line(e)}"
                if e.code < 500 and e.code not in BUSY:
                    missing = e.code == 404 and not path.startswith("/v1/")
                    hint = ": was it started with VLLM_SERVER_DEV_MODE=1?" if missing else ""
                    raise RolloutError(f"vLLM server {self.url} refuses {path}: {reason}{hint}") from None
            except TimeoutError:
                reason = f"no answer within {self.timeout:g} s"
            except (OSError, http.client.HTTPException) as e:
                reason = str(getattr(e, "reason", "") or e) or type(e).__name__
            except (ValueError, LookupError, TypeError) as e:
                reason = f"an answer that cannot be used ({type(e).__name__}: {e})"
        raise RolloutError(
            f"vLLM server {self.url} failed {attempt + 1} times at {path}, the last because {' '.join(reason.split())}"
        )

    def _complete(self, prompts: list[list[int]], settings: list[dict[str, Any]]) -> list[Completion]:
        def ask(prompt: list[int], row: dict[str, Any]) -> Completion:
            payload = {"model": self._model, "prompt": prompt, "return_token_ids": True, **row}
            return self._call("/v1/completions", payload, _read_completion, stop)

        stop, failure = threading.Event(), None
        pool = ThreadPoolExecutor(min(self.concurrency, len(prompts)))
        futures = [pool.submit(ask, p, s) for p, s in zip(prompts, settings, strict=True)]
        try:
            done, late = wait(futures, return_when=FIRST_EXCEPTION)
            failure = next((e for f in done if (e := f.exception())), None)
            stop.set()
            for f in late:
                f.cancel()
            wait(futures)  # what is under way may still come back; nothing is tried again
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        came = [_result(f) for f in futures]
        if isinstance(failure, RolloutError):
            kept = sum(c is not None for c in came)
            raise RolloutError(f"{failure}; {kept} of {len(came)} completions kept", came)
        if failure is not None:
            raise failure
        self._check_version()
        return [c for c in came if c is not None]

    def follow_sync(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """On ranks that leave `sync` to another: go through what may be collective, and hold the server to the version.

        A barrier has to come between that sync and the next `generate`.
        """
        for _ in named_parameters:
            pass
        self.version = version

    def _check_version(self) -> None:
        """A server that was restarted, or that another trainer syncs too, answers from weights that are not ours."""
        if self.version is None:
            return
        held = [v for (v,) in self._rpc("mdpgrpo_version")]
        if held != [str(self.version)] * len(held):
            raise RolloutError(
                f"vLLM server {self.url} must hold version {self.version} of the weights; got {held}: was it restarted?"
            )

    def sleep(self) -> None:
        """Nothing: the server's memory is its own."""

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        return self._call("/collective_rpc", {"method": method, "args": list(args)}, lambda a: list(a["results"]))

    def _send(self, weights: list[tuple[str, Tensor]]) -> None:
        with tempfile.TemporaryDirectory(prefix="mdpgrpo-weights-", dir=self.sync_dir) as directory:
            path = os.path.join(directory, "weights.safetensors")
            save_file({name: tensor.cpu().contiguous() for name, tensor in weights}, path)
            self._rpc("mdpgrpo_load", path)

    def _reset_cache(self) -> None:
        def read(answer: Any) -> None:
            if not answer["success"]:
                raise ValueError("the prefix cache is still in use")

        self._call("/reset_prefix_cache", {}, read)


def _read_settings(answer: Any) -> dict[str, str]:
    config = answer["vllm_config"]
    return {
        "--logprobs-mode": config["model_config"]["logprobs_mode"],
        "--worker-extension-cls": config["parallel_config"]["worker_extension_cls"],
    }


def _read_completion(answer: Any) -> Completion:
    (choice,) = answer["choices"]
    return completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"])


def _result(future: Future[Completion]) -> Completion | None:
    return None if future.cancelled() or future.exception() else future.result()


def _first_line(error: urllib.error.HTTPError) -> str:
    """What the server says about its error: its message where it answers in JSON."""
    try:
        text = error.read().decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        said = json.loads(text)
        text = str(said["error"]["message"] if "error" in said else said["detail"])
    except (ValueError, LookupError, TypeError):
        pass
    return (text or error.reason).splitlines()[0][:300]
