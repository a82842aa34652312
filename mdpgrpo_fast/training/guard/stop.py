"""Signals that end a run: between two steps, or with the one under way dropped as if it had not begun."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 10.0  # seconds that a step may take to come to its end, or to a place where it can be dropped
SAME = 1.0  # seconds within which another signal is the same one: a launcher and its group both pass it on


class Stopped(KeyboardInterrupt):
    """A signal, which its text names, has ended the run; no step is half done."""


class Stop:
    """Inside, a signal of SIGNALS is kept until `droppable` or `raise_` asks; a second one ends the process at once, as
    does one that nothing asks for within PATIENCE seconds.

    alone: one process, which may leave a step by itself; ranks agree on it, but for what is `apart`. last_words: what
    the process says before it ends at once. Where the interpreter has no handler to give, in a notebook and in threads,
    nothing is done; handlers are as before afterwards, and what is ignored stays so.
    """

    def __init__(self, alone: bool, last_words: Callable[[], str]) -> None:
        self.alone, self.last_words = alone, last_words
        self.signum: int | None = None  # that has come, here or on another rank
        self.half_done = False  # a step has begun to change what a checkpoint holds
        self._open = False  # the handler itself may raise
        self._unhurried = False  # what is under way takes the time that it takes
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is not threading.main_thread() or "ipykernel" in sys.modules:
            return self
        found = {number: signal.getsignal(number) for number in SIGNALS}
        self._before = {n: handler for n, handler in found.items() if handler not in (None, signal.SIG_IGN)}
        if not self._before:
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # The thread sees a signal even where the main thread is in a call that does not return.
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="mdpgrpo-signals")
        self._watcher.start()
        for number in self._before:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)
        self._watcher.join()
        os.close(self._read)

    @property
    def name(self) -> str:
        """Of the signal that has come."""
        return "" if self.signum is None else signal.Signals(self.signum).name

    def whole(self) -> None:
        """The step is done, with all that a checkpoint holds of it."""
        self.half_done = False

    def begin_change(self) -> None:
        """From here until `whole`, the step is not dropped any more."""
        self._open, self.half_done = False, True

    def settle(self) -> None:
        """The step has ended, or is dropped: what follows takes the time that it takes."""
        self._unhurried = True

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, what is written takes the time that it takes."""
        before, self._unhurried = self._unhurried, True
        try:
            yield
        finally:
            self._unhurried = before

    def raise_(self, signum: int | None = None) -> None:
        """Raises Stopped where a signal has come. signum: what the ranks have agreed on; None: this rank's own."""
        self.signum = signum or self.signum
        if self.signum:
            raise Stopped(self.name)

    def problem(self) -> Stopped | None:
        """What this rank has to tell the others, who drop the step with it."""
        return Stopped(self.name) if self.signum and not self.alone else None

    @contextmanager
    def droppable(self, device: torch.device) -> Iterator[None]:
        """Inside, up to `begin_change`, a signal raises Stopped at once, and random states become what they were."""
        before = random_states(device)
        try:
            try:
                self._open = self.alone
                if self.alone:
                    self.raise_()
                yield
            finally:
                self._open = False
        except KeyboardInterrupt as e:
            if isinstance(e, Stopped):  # of another rank too
                self.signum = self.signum or int(signal.Signals[str(e)])
            if not self.half_done:
                set_random_states(before, device)
            raise

    @contextmanager
    def apart(self, waits_for_none: bool) -> Iterator[None]:
        """Inside, where a rank of several waits for no other, a signal raises Stopped at once on it too."""
        before = self._open
        try:
            self._open = before or waits_for_none
            if self._open:
                self.raise_()
            yield
        finally:
            self._open = self._open and before

    def _handle(self, signum: int, frame: object) -> None:
        self.signum = self.signum or signum
        if self._open:
            self._open = False
            raise Stopped(self.name)

    def _watch(self) -> None:
        first: tuple[float, int] | None = None
        deadline: float | None = None
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._read], [], [], left)[0]:
                assert first is not None
                if self._unhurried:
                    deadline = time.monotonic() + PATIENCE
                    continue
                self._end(first[1], f"no step could end within {PATIENCE:g} s of {signal.Signals(first[1]).name}")
            numbers = os.read(self._read, 64)
            if not numbers:
                return
            for number in numbers:
                if number in SIGNALS and number in self._before:
                    now = time.monotonic()
                    if first is None:
                        first, deadline = (now, number), now + PATIENCE
                    elif now - first[0] > SAME:
                        self._end(number, f"{signal.Signals(number).name} came once more")

    def _end(self, signum: int, why: str) -> None:
        """Without the interpreter's own end, which would wait for threads and the other ranks."""
        with contextlib.suppress(Exception):
            if words := self.last_words():
                os.write(2, f"\nended at once, as {why}\n{words}\n".encode())
        with contextlib.suppress(Exception):
            for child in multiprocessing.active_children():
                child.kill()
        os._exit(128 + signum)


def random_states(device: torch.device) -> tuple[Any, ...]:
    """Of python, numpy, torch and the device."""
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), own


def set_random_states(states: tuple[Any, ...], device: torch.device) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3], device)
