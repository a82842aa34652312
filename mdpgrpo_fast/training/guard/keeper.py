"""When a run's state is written: as save_every says, and where a signal ends the run."""

from __future__ import annotations

import time

from torch import nn

from ...durable import StorageError
from .. import distributed
from ..checkpoint import Checkpoints
from ..show.progress import say
from .finite import check_weights
from .stop import Stop, Stopped

SECONDS = 15 * 60.0  # from one checkpoint to the next, where save_every does not count steps


class Keeper:
    """Writes the checkpoints of a run of so many steps. step: of the newest, 0 where there is none."""

    def __init__(self, checkpoints: Checkpoints, model: nn.Module, steps: int, stop: Stop, step: int) -> None:
        self.checkpoints, self.model, self.steps, self.stop, self.step = checkpoints, model, steps, stop, step
        self.accelerator, self.run = checkpoints.accelerator, checkpoints.run
        self.saved_at = time.monotonic()
        self.begun = step  # that of the last checkpoint that was begun

    def boundary(self, done: int, ends: bool = False) -> bool:
        """After so many steps, on all ranks: writes the checkpoint that is due. Whether the first rank ends the run.

        Raises: Stopped where a signal has come to any; StorageError; FloatingPointError where weights are not finite.
        """
        every, due = self.run.save_every, False
        if every is None:
            due = self.accelerator.is_main_process and time.monotonic() - self.saved_at >= SECONDS
        # The largest of all ranks tells: a signal to one, else what the first alone says.
        found = distributed.max_over_ranks(self.accelerator, 4 * (self.stop.signum or 0) + 2 * due + ends)
        if (every and done % every == 0) or found & 2:
            self.save(done)
        if found >= 4:
            self.stop.raise_(found >> 2)
        return bool(found & 1)

    def save(self, done: int) -> None:
        """The checkpoint after so many steps, where there is none. Raises as `boundary`, but not Stopped."""
        if self.step != done:
            check_weights(self.accelerator, self.model, done)
            self.begun = done
            with self.stop.writing():
                self.checkpoints.save(done, self.steps)
            self.step, self.saved_at = done, time.monotonic()

    def at_interrupt(self, done: int, interrupt: KeyboardInterrupt) -> None:
        """The same, unless that came in the middle of an update or of this, or to one rank of several; says where it
        cannot be."""
        self.stop.settle()
        agreed = self.accelerator.num_processes == 1 or isinstance(interrupt, Stopped)
        if self.run.save_every == 0 or not agreed or self.stop.half_done or self.begun == done:
            return
        try:
            self.save(done)
        except StorageError as e:
            say(f"the state after step {done} is lost: {e}", self.accelerator.is_main_process)
