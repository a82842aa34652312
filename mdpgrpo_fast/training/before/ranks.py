"""What the ranks of a run tell each other before they join: who cannot begin, and whether all were started alike.

They meet at the launcher's store (torchrun's and accelerate's; without one nothing is told). The process group would
wait half an hour for a rank that has ended, and a rank with other settings would train on something else in silence.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
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


@contextmanager
def told_to_the_others() -> Iterator[None]:
    """What is raised inside ends the other ranks too, once they come to `agree`."""
    try:
        yield
    except Exception as e:
        try:
            store = _store(5)  # where its launcher has ended too, all know already
            if store is not None:
                store.set(FAILED, f"{_name(_rank())} on {socket.gethostname()} cannot begin: {reason_of(e)}")
        except RuntimeError:
            pass
        raise


def agree(run: TrainConfig, method: MDPGRPOConfig, prompts: str) -> None:
    """Waits until all ranks have come here, run.rank_timeout seconds at most; called by all of them.

    prompts: Task.fingerprint. Raises: ConfigError where a rank does not come, or has other settings, another version or
    other training prompts than the first.
    """
    store = _store(60)
    if store is None:
        return
    rank, ranks = _rank(), int(os.environ["WORLD_SIZE"])
    mine = {"version": __version__, "training prompts": prompts, **asdict(run), **asdict(method)}
    mine = json.loads(json.dumps({k: v for k, v in mine.items() if k not in PER_HOST}, default=str))
    if rank == 0:
        said = []
        for other in range(1, ranks):
            theirs = json.loads(_wait(store, f"settings/{other}", _name(other), run.rank_timeout))
            said += [
                f"{name} is {mine.get(name)!r} on the first rank and {theirs.get(name)!r} on {_name(other)}"
                for name in sorted(mine.keys() | theirs.keys())
                if mine.get(name) != theirs.get(name)
            ]
        verdict = f"all ranks must be started alike: {'; '.join(said[:5])}" if said else ""
        store.set(VERDICT, verdict)
    else:
        store.set(f"settings/{rank}", json.dumps(mine))
        # The first waits for the others, and then says which of them did not come.
        verdict = _wait(store, VERDICT, _name(0), run.rank_timeout + 10)
    if verdict:
        raise ConfigError(verdict)


def _rank() -> int:
    return int(os.environ["RANK"])


def _name(rank: int) -> str:
    return f"rank {rank}"


def _store(patience: float) -> Any:
    """The launcher's store, this attempt's part of it; None for one process and without a launcher that has one.

    patience: seconds that it may take to answer, after which there is a RuntimeError.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=patience))
    return PrefixStore(f"mdpgrpo_fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait(store: Any, key: str, whose: str, patience: float) -> str:
    """What a rank has set, once it has; ConfigError where it does not within so many seconds, or a rank has failed."""
    end = time.monotonic() + patience
    try:
        while not store.check([key]):
            if store.check([FAILED]):
                raise ConfigError(store.get(FAILED).decode())
            if time.monotonic() > end:
                raise ConfigError(f"{whose} has not come within {patience:g} seconds (rank_timeout): its host says why")
            time.sleep(0.2)
        return str(store.get(key).decode())
    except RuntimeError as e:
        raise ConfigError(f"the launcher of the first host has ended, which says why ({reason_of(e)})") from None
