"""Two hosts on one machine: network namespaces with names and addresses of their own, joined by a virtual cable."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.inputs import ROOT, unavailable

NAMES, ADDRESSES, PORT = ("first", "second"), ("10.77.0.1", "10.77.0.2"), "29500"
PATIENCE = 180  # seconds: far more than a run here takes, so that one which hangs fails by name
BIN = Path(sys.executable).parent
# A host's own name, and the names of both without a name server, which there is none of.
ENTER = """set -e
hostname "$1"
for file in hosts resolv.conf; do mount --bind "$2/$file" /etc/$file; done
shift 2
exec "$@\""""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **more}


class Command:
    """A command that runs on a host, all of its processes, and what it has said so far."""

    def __init__(self, words: list[str], log: Path, **env: str) -> None:
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                words, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent, env=environment(**env),
                start_new_session=True,
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit status; fails the test where it does not end in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            pytest.fail(f"{self.log.name} was still running after {seconds} s:\n{self.said[-2000:]}")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Hosts:
    """host 0 and host 1, whose names, addresses and network interfaces are NAMES, ADDRESSES and NAMES."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spaces = folder, [f"mdpgrpo-{os.getpid()}-{name}" for name in NAMES]
        self.commands: list[Command] = []
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        (folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True))
        )

    def set_up(self) -> None:
        for space in self.spaces:
            ip("netns", "add", space)
        one, other = self.spaces
        ip("link", "add", NAMES[0], "netns", one, "type", "veth", "peer", "name", NAMES[1], "netns", other)
        for space, name, address in zip(self.spaces, NAMES, ADDRESSES, strict=True):
            ip("-n", space, "addr", "add", f"{address}/24", "dev", name)
            for device in ("lo", name):
                ip("-n", space, "link", "set", device, "up")

    def tear_down(self) -> None:
        for command in self.commands:
            command.end()
        for space in self.spaces:
            left = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split()
            for pid in left:  # trainers have sessions of their own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def inside(self, host: int, words: list[str]) -> list[str]:
        """The command that runs `words` on a host."""
        enter = ["unshare", "--uts", "sh", "-c", ENTER, "sh", NAMES[host], str(self.folder)]
        return ["ip", "netns", "exec", self.spaces[host], *enter, *words]

    def run(self, words: list[str], log: Path, **env: str) -> Command:
        """A command on this machine itself, ended with the hosts."""
        command = Command(words, log, **env)
        self.commands.append(command)
        return command

    def start(self, host: int, words: list[str], **env: str) -> Command:
        return self.run(self.inside(host, words), self.folder / f"{len(self.commands)}-{NAMES[host]}.log", **env)

    def start_both(self, words: Callable[[int], list[str]], **env: str) -> list[Command]:
        """words: of a host by its number."""
        return [self.start(host, words(host), **env) for host in (0, 1)]

    def ranks(self, host: int) -> list[int]:
        """Process ids of the trainers on a host, without their launchers."""
        found = ip("netns", "pids", self.spaces[host]).split()
        return [int(p) for p in found if "RANK=" in environ(p) and "mdpgrpo_fast.train" in words_of(p)]


def environ(pid: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    return ""


def words_of(pid: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    return []


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Skips where this machine makes no network namespaces for this user, and fails there in CI."""
    for tool in ("ip", "unshare", "mount", "hostname"):
        if shutil.which(tool) is None:
            unavailable(f"two hosts on one machine need the command {tool}")
    hosts = Hosts(folder)
    try:
        try:
            hosts.set_up()
        except OSError as e:
            unavailable(f"two hosts on one machine need root and network namespaces: {e}")
        yield hosts
    finally:
        hosts.tear_down()


def until(what: Callable[[], bool], message: Callable[[], str]) -> None:
    """Waits for something; fails with the message where it does not come."""
    end = time.monotonic() + PATIENCE
    while not what():
        if time.monotonic() > end:
            pytest.fail(message())
        time.sleep(0.05)
