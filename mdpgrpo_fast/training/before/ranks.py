"""What the ranks of a run tell each other before they join: who cannot begin, and whether all were started alike.

They meet at the launcher's store (torchrun's and accelerate's; without one nothing is told). The process group would
wait half an hour for a rank that has ended, and a rank with other settings would train on something else in silence.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from ...config import ConfigError, MDPGRPOConfig, TrainConfig
from ...log import reason_of
from ...version import __version__

# Knobs that a host may have its own value of.
PER_HOST = ("reward_workers", "vllm_url", "vllm_sync_dir")
FAILED, VERDICT = "failed", "verdict"

_meeting = 0  # of the trainers of this process: each has keys of its own in the store


@contextmanager
def told_to_the_others() -> Iterator[None]:
    """What is raised inside ends the other ranks too, once they come to `agree`."""
    global _meeting
    meeting = _meeting
    try:
        yield
    except BaseException as e:
        why = reason_of(e) if isinstance(e, Exception) else repr(e)
        try:
            store = _store(meeting, 5)  # where its launcher has ended too, all know already
            if store is not None:  # the first that fails is told: others may only pass that on
                store.compare_set(FAILED, "", f"{_named(_rank())} on {socket.gethostname()} cannot begin: {why}")
        except RuntimeError:
            pass
        _meeting = meeting + 1
        raise


def agree(run: TrainConfig, method: MDPGRPOConfig, given: Callable[[], dict[str, Any]]) -> None:
    """Waits until all ranks have come here, run.rank_timeout seconds at most; called by all of them.

    given: what else must be alike, by its name; it is called where there are ranks to compare with. Raises: ConfigError
    where a rank does not come, or has other settings or another version than the first.
    """
    global _meeting
    try:
        store = _store(_meeting, 15)
        if store is not None:
            mine = {"version": __version__, **given(), **asdict(run), **asdict(method)}
            _compare(store, {k: v for k, v in mine.items() if k not in PER_HOST}, run.rank_timeout)
    except RuntimeError as e:
        raise ConfigError(f"the launcher of the first host has ended, which says why ({reason_of(e)})") from None
    finally:
        _meeting += 1


def _compare(store: Any, mine: dict[str, Any], patience: float) -> None:
    mine, now = json.loads(json.dumps(mine)), time.monotonic()
    if _rank() == 0:
        differ: dict[str, dict[str, list[int]]] = {name: {} for name in mine}  # the ranks by their value
        for other in range(1, int(os.environ["WORLD_SIZE"])):
            theirs = json.loads(_wait(store, f"settings/{other}", other, now, patience))
            for name in {**mine, **theirs}:
                if mine.get(name) != theirs.get(name):
                    differ.setdefault(name, {}).setdefault(_short(theirs.get(name)), []).append(other)
        said = [
            f"{name} is {_short(mine.get(name))} on the first rank and "
            + ", ".join(f"{value} on {_named(*ranks)}" for value, ranks in list(values.items())[:5])
            for name, values in differ.items()
            if values
        ]
        verdict = f"all ranks must be started alike: {'; '.join(said[:5])}" if said else ""
        store.set(VERDICT, verdict)
    else:
        store.set(f"settings/{_rank()}", json.dumps(mine))
        # The first may come as late as that, waits for the others, and then says which of them did not come.
        verdict = _wait(store, VERDICT, 0, now, 2 * patience + 10)
    if verdict:
        raise ConfigError(verdict)


def _rank() -> int:
    return int(os.environ["RANK"])


def _named(*ranks: int) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{', …' * (len(ranks) > 8)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:50]} … {text[-27:]}"


def _store(meeting: int, patience: float) -> Any:
    """The launcher's store, a meeting's part of it; None for one process and without a launcher that has one.

    patience: seconds that it may take to answer, after which there is a RuntimeError. Where the launcher starts
    processes again there is none: the store keeps what the ended ones said, and no number of the attempt is the same on
    all nodes.
    """
    env = os.environ.get
    has_one = env("TORCHELASTIC_USE_AGENT_STORE") == "True" and env("TORCHELASTIC_MAX_RESTARTS", "0") == "0"
    if not has_one or env("WORLD_SIZE", "1") == "1":
        return None
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=patience))
    return PrefixStore(f"mdpgrpo_fast/{meeting}", store)


def _wait(store: Any, key: str, whose: int, since: float, patience: float) -> str:
    """What a rank has set, once it has; ConfigError where it does not within so many seconds, or a rank has failed."""
    while not store.check([key]):
        if store.check([FAILED]):
            raise ConfigError(store.get(FAILED).decode())
        if time.monotonic() > since + patience:
            why = f"within {patience:g} seconds (rank_timeout): its host says why"
            raise ConfigError(f"{_named(whose)} has not come {why}")
        time.sleep(0.2)
    return str(store.get(key).decode())
