"""A hub in this process: what huggingface_hub asks where it makes a repository and uploads a folder, answered."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants

USER, TOKEN = "somebody", "hf_of_somebody"


class Hub:
    """repos: those that are there -> whether they are private. files: what was committed, by repository and path.

    asked: method and path of each request, in their order. refuse: what a path has in it -> the status that it gets.
    cards: those that were to be validated.
    """

    def __init__(self) -> None:
        self.repos: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.refuse: dict[str, int] = {}
        self.cards: list[str] = []

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, Any]:
        """Status and JSON of a request."""
        self.asked.append(f"{method} {path}")
        refused = [status for words, status in self.refuse.items() if words in path]
        if refused or token != f"Bearer {TOKEN}":
            return (refused or [401])[0], {"error": "not for you"}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization'] or USER}/{wanted['name']}"
            status = 409 if repo in self.repos else 200
            self.repos.setdefault(repo, wanted.get("visibility") == "private")
            return status, {"url": f"{constants.ENDPOINT}/{repo}"}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}
        repo, _, what = path.removeprefix("/api/models/").partition("/")
        name, _, what = what.partition("/")
        repo = f"{repo}/{name}"
        if repo not in self.repos:
            return 404, {"error": "there is no such repository"}
        if what == "preupload/main":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if what == "commit/main":
            lines = map(json.loads, body.splitlines())
            files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            self.files.setdefault(repo, {}).update(files)
            return 200, {"commitUrl": f"{constants.ENDPOINT}/{repo}/commit/0", "commitOid": "0"}
        return 200, {"id": repo, "private": self.repos[repo], "siblings": [], "tags": []}


@contextmanager
def hub_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Inside, huggingface_hub is not offline, has the token of somebody, and the hub is the one that this gives."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, answer = hub.answer(self.command, self.path, self.headers.get("Authorization"), body)
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name, value in (("HF_ENDPOINT", endpoint), ("HF_HUB_OFFLINE", "0"), ("HF_TOKEN", TOKEN), ("NO_PROXY", "*")):
        monkeypatch.setenv(name, value)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
