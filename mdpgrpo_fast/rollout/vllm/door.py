"""The door of a vLLM server: its key, the addresses that need one, and the middleware that asks for it.

vLLM's own process imports this for the middleware: it needs neither vLLM nor torch.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from ...config import ConfigError, require

KEY = "VLLM_API_KEY"  # vLLM's own name


def api_key() -> str | None:
    """The key in the environment; None where it is unset or empty. Raises ConfigError, without the key, for one that
    no header carries."""
    key = os.environ.get(KEY) or None
    if key is not None and not all("!" <= c <= "~" for c in key):
        raise ConfigError(f"{KEY} must be printable ASCII without spaces and line ends")
    return key


def host_of(url: str) -> str:
    """The host of vllm_url. Raises ConfigError for what is no address, or holds a password, which logs would show."""
    try:
        parts = urlsplit(url)
    except ValueError:  # half of an IPv6 address
        parts = urlsplit("")
    if "@" in parts.netloc:
        raise ConfigError(f"vllm_url must be without user and password: {KEY} in the environment is the key")
    require(parts.scheme in ("http", "https"), "vllm_url", url, "an http:// or https:// address")
    require(bool(parts.hostname), "vllm_url", url, "an address with a host")
    return str(parts.hostname)


def is_loopback(host: str) -> bool:
    """Whether an address or a name is reached from its own machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class KeyGuard:
    """ASGI middleware: whoever asks for anything but /health needs the header `Authorization: Bearer KEY`.

    vLLM's own check leaves open what does not begin with /v1, /v2 or /inference, such as calls of its workers' methods.

    Raises: ConfigError where no key is set: a server that was to have one does not start without.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        key = api_key()
        if key is None:
            raise ConfigError(f"the server's environment must hold {KEY}")
        self._app, self._digest = app, _digest(key.encode())

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/health" or self._has_key(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: HTTP 403
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"detail":"Unauthorized"}'})

    def _has_key(self, headers: list[tuple[bytes, bytes]]) -> bool:
        given = [value for name, value in headers if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(_digest(key), self._digest)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # one length, so that comparing takes one time


GUARD = f"{KeyGuard.__module__}.{KeyGuard.__qualname__}"  # vLLM's --middleware
