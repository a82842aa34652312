"""Client of a vLLM server as the rollout engine: every request is retried with back-off, up to a bound.

The server's environment has this package installed, and `mdpgrpo vllm-serve MODEL` starts it there: docs/vllm.md.
"""

from __future__ import annotations

import os
import random
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import httpx2
import torch
from torch import Tensor

from ...config import ConfigError, require
from ...log import log
from .door import KEY, api_key, host_of, is_loopback
from .files import remove_leftovers, weight_file
from .sampler import LOGPROBS_MODE, Completion, RolloutEngine, RolloutError, completion
from .worker import EXTENSION

T = TypeVar("T")
MAX_PAUSE = 30.0  # seconds between two attempts
KEEP_ALIVE = 2.0  # seconds that an idle connection is kept: vLLM closes it after 5
RETRIED = (408, 429)  # of the client errors, the two that may pass


class VLLMServer(RolloutEngine):
    """The client of one server. Rows are sent one request each; weights through files that both sides see.

    Where the environment has a VLLM_API_KEY, each request brings it. Certificates of https are verified, redirects not
    followed.

    url: as http://host:8000. device: of the Rollout's tensors. timeout: seconds that an answer may take, a whole
    completion among them. retries: attempts after the first. backoff: seconds before the second attempt, doubled with
    each, less up to half at random. sync_dir: directory for the weights on their way, /dev/shm on one machine or a
    shared file system, both sides being the same user; None: the system's for temporary files. concurrency: most
    requests at once.

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
    ) -> None:
        super().__init__(device)
        host, key = host_of(url), api_key()
        require(timeout > 0, "vllm_timeout", timeout, "above 0")
        require(retries >= 0, "vllm_retries", retries, "0 or above")
        require(sync_dir is None or os.path.isdir(sync_dir), "vllm_sync_dir", sync_dir, "a directory that is there")
        self.url, self.timeout, self.retries, self.backoff = url.rstrip("/"), timeout, retries, backoff
        self.sync_dir, self.concurrency = sync_dir, concurrency
        limits = httpx2.Limits(max_keepalive_connections=concurrency, keepalive_expiry=KEEP_ALIVE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        local = {f"all://{f'[{host}]' if ':' in host else host}": None} if is_loopback(host) else {}  # through no proxy
        self._http = httpx2.Client(
            timeout=timeout, limits=limits, headers=headers, follow_redirects=False, mounts=local
        )
        weakref.finalize(self, self._http.close)
        if key and not url.lower().startswith("https:") and not is_loopback(host):
            log.warning("vllm_url %s: without https, whoever is on the way can read the key in %s", url, KEY)
        if left := remove_leftovers(sync_dir):
            log.info("weights removed that killed trainers had left: %s", ", ".join(left))
        self._model = self._call("/v1/models", None, lambda answer: str(answer["data"][0]["id"]))
        settings = self._call("/server_info?config_format=json", None, _read_settings)
        for flag, expected in (("--logprobs-mode", LOGPROBS_MODE), ("--worker-extension-cls", EXTENSION)):
            if settings[flag] != expected:
                raise ConfigError(f"vLLM server {url}: {flag} must be {expected}; got {settings[flag]!r}")

    def _call(self, path: str, payload: Any, read: Callable[[Any], T], stop: threading.Event | None = None) -> T:
        """read() of the JSON that answers a GET, or a POST of the payload where there is one.

        Tried again, unless stop is set: no connection, no answer in time, half an answer, one that read() cannot use, a
        server's error.
        """
        stop, method = stop or threading.Event(), "GET" if payload is None else "POST"
        for attempt in range(self.retries + 1):
            try:
                answer = self._http.request(method, self.url + path, json=payload)
                if answer.is_success:
                    return read(answer.json())
                reason = f"HTTP {answer.status_code} {_first_line(answer)}"
                if answer.status_code < 500 and answer.status_code not in RETRIED:
                    raise RolloutError(f"vLLM server {self.url} refuses {path}: {reason}{self._hint(answer, path)}")
            except httpx2.TimeoutException:
                reason = f"no answer within {self.timeout:g} s"
            except (httpx2.RequestError, httpx2.InvalidURL) as e:
                reason = str(e) or type(e).__name__
                if "CERTIFICATE_VERIFY_FAILED" in reason:
                    trust = "SSL_CERT_FILE may name the file of an authority of your own"
                    raise RolloutError(f"vLLM server {self.url} is not trusted: {reason}; {trust}") from None
            except (ValueError, LookupError, TypeError) as e:
                reason = f"an answer that cannot be used ({type(e).__name__}: {e})"
            pause = min(self.backoff * 2**attempt, MAX_PAUSE) * random.uniform(0.5, 1.0)
            if attempt == self.retries or stop.wait(pause):
                break
        raise RolloutError(
            f"vLLM server {self.url} failed {attempt + 1} times at {path}, the last because {' '.join(reason.split())}"
        )

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
            payload = {"model": self._model, "prompt": prompt, "return_token_ids": True, **row}
            return self._call("/v1/completions", payload, _read_completion, stop)

        stop, pool = threading.Event(), ThreadPoolExecutor(min(self.concurrency, len(prompts)))
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
            raise RolloutError(f"{failure}; {kept} of {len(partial)} completions kept", partial)
        self._check_version()
        return [f.result() for f in futures]

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
        with weight_file(weights, self.sync_dir) as path:
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


def _first_line(answer: httpx2.Response) -> str:
    """What the server says about its error: its message where it answers in JSON."""
    try:
        said = answer.json()
        text = str(said["error"]["message"] if "error" in said else said["detail"])
    except (ValueError, LookupError, TypeError):
        text = answer.text
    return (text.strip() or answer.reason_phrase).partition("\n")[0][:300]
