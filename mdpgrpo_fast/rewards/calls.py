"""Calls of a user's functions in this process, each with a time limit."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import TimeoutError as FutureTimeout
from functools import cache
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
# One that nobody else sends, where the system has such.
SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGUSR2)


class CallTimeout(Exception):
    """A call did not come back in time."""


class _Expired(BaseException):
    """Raised inside a call whose time is up; no `except Exception` of the called code keeps it."""


def call_limited(function: Callable[[], T], seconds: float) -> T:
    """function(), in this thread where it is the main one: functions that use signals work there alone (math-verify).

    A call that is late is interrupted there, asleep in the system or at work in Python; in compiled code that never
    looks at signals it is not. Raises: CallTimeout; whatever the function raises.
    """
    if threading.current_thread() is not threading.main_thread():
        return _call_in_thread(function, seconds)
    done, expired = threading.Event(), threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if expired.is_set() and not done.is_set():
            raise _Expired

    def watch() -> None:
        if done.wait(seconds):
            return
        expired.set()
        while True:  # a bare `except` in a loop may have taken the first
            signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)
            if done.wait(1.0):
                return

    before = signal.signal(SIGNAL, interrupt)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        try:
            result = function()
        finally:
            done.set()
    except _Expired:
        raise CallTimeout from None
    finally:
        done.set()
        watcher.join()
        signal.signal(SIGNAL, before or signal.SIG_DFL)
    if expired.is_set():
        raise CallTimeout
    return result


def _call_in_thread(function: Callable[[], T], seconds: float) -> T:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((True, function()))
        except BaseException as e:
            outcome.extend((False, e))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if len(outcome) < 2:
        raise CallTimeout
    if not outcome[0]:
        raise outcome[1]
    result: T = outcome[1]
    return result


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for the life of the process: what an async function keeps (a client's connections) stays usable."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def call_async(functions: list[Callable[[], Awaitable[Any]]], seconds: float) -> list[Any]:
    """What each coroutine function gave or the exception it raised, all at once, in order."""

    async def caught(function: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await function()
        except BaseException as e:  # sys.exit() would end the loop's thread
            return e

    async def limited(function: Callable[[], Awaitable[Any]]) -> Any:
        task = asyncio.ensure_future(caught(function))
        if (await asyncio.wait({task}, timeout=seconds))[0]:
            return task.result()
        task.cancel()
        return CallTimeout()

    async def gather() -> list[Any]:
        return await asyncio.gather(*map(limited, functions))

    future = asyncio.run_coroutine_threadsafe(gather(), _loop())
    try:
        return future.result(seconds + 5)
    except (TimeoutError, FutureTimeout):  # a coroutine that never awaits blocks the loop; another one takes its place
        _loop.cache_clear()
        return [CallTimeout() for _ in functions]
