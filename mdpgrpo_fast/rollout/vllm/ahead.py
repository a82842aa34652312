"""Rollouts one step ahead: a server samples the next step's completions while this step trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from .completion import Completion
from .sampler import Request
from .server import VLLMServer


class Ahead:
    """One request that is under way in a thread of its own, where nothing but HTTP happens: no tensor is made there,
    and no rank talks to another. engine: the client of the server."""

    def __init__(self, engine: VLLMServer) -> None:
        self.engine = engine
        self._thread = ThreadPoolExecutor(1, "mdpgrpo-ahead")
        self._pending: tuple[Request, Future[list[Completion]]] | None = None

    @property
    def pending(self) -> bool:
        """Whether `take` has something to wait for. Until then the server's weights may not change."""
        return self._pending is not None

    def begin(self, request: Request) -> None:
        """Returns at once; `take` has what comes of it."""
        assert self._pending is None, "one at a time"
        self._pending = request, self._thread.submit(self.engine.complete, request)

    def take(self) -> tuple[Request, Callable[[], list[Completion]]]:
        """What was begun, and the call that waits for it; it raises RolloutError where the server failed."""
        assert self._pending is not None, "nothing was begun"
        (request, found), self._pending = self._pending, None
        return request, found.result

    def close(self) -> None:
        """Ends what is under way without waiting for it; neither the thread nor the engine can be used afterwards."""
        self.engine.close()
        self._thread.shutdown(wait=False, cancel_futures=True)
