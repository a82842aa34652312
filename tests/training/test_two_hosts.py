"""The launch page's commands on two hosts: they find each other, one dies, the run goes on."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.hosts import ADDRESSES, BIN, NAMES, PATIENCE, PORT, Command, Hosts, environment, two_hosts, until
from helpers.inputs import ROOT
from safetensors.torch import load_file
from torch.distributed import TCPStore

from mdpgrpo_fast.config import ConfigError, MDPGRPOConfig, TrainConfig
from mdpgrpo_fast.training.before import ranks
from mdpgrpo_fast.version import __version__

LAUNCH = ROOT / "mdpgrpo_fast" / "launch"
FLAGS = [
    "--cpu", "--prompts-per-step", "2", "--eval-samples", "2", "--max-completion-length", "8", "--log-completions", "0",
    "--lr-schedule", "constant", "--save-every", "2",
]  # fmt: skip


def train(folder: Path, *more: str) -> list[str]:
    return ["-m", "mdpgrpo_fast.train", "--output-dir", str(folder), *FLAGS, *more]


def accelerate(kind: str, *more: str) -> list[str]:
    return [
        str(BIN / "accelerate"),
        "launch",
        "--config_file",
        str(LAUNCH / f"{kind}.yaml"),
        "--num_processes",
        "2",
        *more,
    ]


def of_host(host: int, first: str = ADDRESSES[0]) -> list[str]:
    """What the page adds for two machines."""
    words = ["--num_machines", "2", "--machine_rank", str(host)]
    return [*words, "--main_process_ip", first, "--main_process_port", PORT]


def parameters(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "model.safetensors")


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in lines if "loss" in row]


def errors(command: Command) -> list[str]:
    return [line for line in command.said.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture(scope="module")
def alone(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of two processes on this machine, by `accelerate launch`."""
    folder = tmp_path_factory.mktemp("alone")
    words = accelerate("ddp", "--main_process_port", "0")
    command = hosts.run([*words, *train(folder / "run", "--steps", "4")], folder / "log")
    assert command.wait() == 0, command.said
    assert json.loads((folder / "run" / "summary.json").read_text())["processes"] == 2
    return folder / "run"


@pytest.mark.long
def test_fsdp2_on_two_hosts_makes_the_steps_of_one(hosts: Hosts, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    both = hosts.start_both(lambda h: [*accelerate("fsdp2", *of_host(h)), *train(run, "--steps", "2")])
    assert [c.wait() for c in both] == [0, 0], both[0].said + both[1].said
    assert "report  " in both[0].said and "report  " not in both[1].said, "the first process alone speaks"
    assert not (run / "checkpoints" / "checkpoint_2" / "model.safetensors").exists(), "it is shards that were trained"
    assert losses(run) == pytest.approx(losses(alone)[:2], abs=1e-5)
    whole, found = parameters(alone, "checkpoints/checkpoint_2"), parameters(run)
    assert found.keys() - whole.keys() <= {"lm_head.weight"}, "which is the embedding"
    for name, x in whole.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=1e-5)


@pytest.mark.long
def test_a_rank_that_dies_ends_all_and_slurm_goes_on(hosts: Hosts, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        str(BIN / "torchrun"),
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "a",
    ]
    words += ["--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}"]
    # It waits after two steps, as long as that it is killed there.
    rewards = ["--reward", "constraints", "helpers.rewards:waits_after_two", "--reward-weights", "1", "0"]
    both = hosts.start_both(
        lambda h: [*words, *train(run, "--steps", "400", *rewards)], WAITS_FOR=str(tmp_path / "killed")
    )
    saved = run / "checkpoints" / "checkpoint_2" / "manifest.json"
    until(lambda: saved.exists() or both[0].process.poll() is not None, lambda: both[0].said)
    (rank,) = hosts.ranks(1)
    os.kill(rank, signal.SIGKILL)
    (tmp_path / "killed").touch()
    assert [c.wait() for c in both] == [1, 1]
    (said,) = errors(both[0])
    assert said.startswith("error: another rank is lost, its own host says why (") and ADDRESSES[1] in said
    assert "[rank0]" not in both[0].said, "no traceback of ours"
    (go_on,) = re.findall(
        r"^go on   the same launcher, on every node: (-m mdpgrpo_fast.train .*) \(", both[0].said, re.M
    )
    assert "another rank is lost" in json.loads((run / "summary.json").read_text())["failure"]

    slurm = Slurm(hosts, tmp_path).start(go_on, "--steps", "4")
    assert slurm.wait() == 0, slurm.said
    assert "resumed after 2 of 400 steps" in slurm.said
    whole, found = parameters(alone), parameters(run)
    assert whole.keys() == found.keys() and all(torch.equal(found[n], x) for n, x in whole.items())
    assert losses(run) == losses(alone) and len(losses(run)) == 4


class Slurm:
    """The page's script, whose srun and scontrol are stand-ins: a task on each host, and their names."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        (folder / "bin").mkdir()
        tasks = [f'SLURM_NODEID={h} {shlex.join(hosts.inside(h, []))} "$@" &' for h in (0, 1)]
        flags = "--ntasks-per-node=1 --cpus-per-task=64"
        self.tool("srun", f'test "$1 $2" = "{flags}" && shift 2', *tasks, "wait -n && wait -n")
        self.tool("scontrol", 'test "$*" = "show hostnames nodes[0-1]"', f"printf '%s\\n' {' '.join(NAMES)}")

    def tool(self, name: str, *lines: str) -> None:
        path = self.folder / "bin" / name
        path.write_text("\n".join(["#!/bin/bash", "set -e", *lines, ""]))
        path.chmod(0o755)

    def start(self, *training: str) -> Command:
        """The script with this in place of the page's run, with DDP and one process per node."""
        page = (LAUNCH / "README.md").read_text()
        (script,) = re.findall(r"```\n(#!/bin/bash\n.*?)```", page, re.DOTALL)
        for words, given in {
            r"-m mdpgrpo_fast\.train [^']*": " ".join(training), "8 [*]": "1 *", r"fsdp2\.yaml": "ddp.yaml",
        }.items():  # fmt: skip
            script, count = re.subn(words, given, script)
            assert count == 1, words
        path = self.folder / "job.sh"
        path.write_text(script)
        env = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "nodes[0-1]", "SLURM_CPUS_PER_TASK": "64"}
        env["PATH"] = f"{self.folder / 'bin'}:{BIN}:{os.environ['PATH']}"
        return self.hosts.run(["bash", str(path)], self.folder / "job.log", **env)


def test_a_rank_that_cannot_begin_ends_all(hosts: Hosts, tmp_path: Path) -> None:
    more = ["--train-file", str(tmp_path / "none.jsonl")]
    both = hosts.start_both(lambda h: [*accelerate("ddp", *of_host(h)), *train(tmp_path / "run", *more * h)])
    assert [c.wait() for c in both] == [1, 1]
    reason = f"prompt file '{tmp_path / 'none.jsonl'}' does not exist"
    assert errors(both[1]) == [f"error: {reason}"]
    assert errors(both[0]) == [f"error: rank 1 on {NAMES[1]} cannot begin: {reason}"]


def test_a_host_that_does_not_come_is_not_waited_for_for_ever(hosts: Hosts, tmp_path: Path) -> None:
    """The first waits for the second, which asks at an address that nobody has."""
    command = train(tmp_path / "run")
    both = hosts.start_both(
        lambda h: [*accelerate("ddp", *of_host(h, ("10.77.0.1", "10.77.0.9")[h]), "--rdzv_conf", "timeout=5"), *command]
    )
    assert [c.wait() for c in both] == [1, 1]
    assert "1/2 clients joined" in both[0].said
    assert "10.77.0.9" in both[1].said and not (tmp_path / "run").exists()


# ---- what the ranks agree on, without a launcher --------------------------------------------------------------------

RANK = """
import contextlib, json, os, sys, time
from torch.distributed import TCPStore
from mdpgrpo_fast.config import MDPGRPOConfig, TrainConfig
from mdpgrpo_fast.cli import report_errors
from mdpgrpo_fast import version
version.__version__ = sys.argv[1]
from mdpgrpo_fast.training.before.ranks import agree, told_to_the_others

def meet(seed):
    with told_to_the_others():
        run = TrainConfig(seed=int(seed), reward_workers=int(sys.argv[3]), rank_timeout=float(sys.argv[4]))
        agree(run, MDPGRPOConfig(num_generations=4), lambda: {"training prompts": sys.argv[5]})
    print("alike", file=sys.stderr)

# An import may take longer than a rank is waited for.
store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
store.add("imported", 1)
while store.add("imported", 0) < int(os.environ["STARTED"]):
    time.sleep(0.05)
*before, last = sys.argv[2].split(",")
for seed in before:
    with contextlib.suppress(ValueError):
        meet(seed)
with report_errors():
    meet(last)
"""


@pytest.fixture
def agreed() -> Callable[..., list[tuple[int, str]]]:
    def meet(*arguments: list[str], of: int = 2) -> list[tuple[int, str]]:
        """Status and message of each rank; the arguments are RANK's."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        env["STARTED"] = str(len(arguments))
        started = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, *words], stderr=subprocess.PIPE, text=True,
                env=environment(RANK=str(rank), WORLD_SIZE=str(of), **env),
            )
            for rank, words in enumerate(arguments)
        ]  # fmt: skip
        try:
            said = [p.communicate(timeout=PATIENCE)[1] for p in started]
        finally:
            for p in started:
                p.kill()
        return [(p.returncode, text) for p, text in zip(started, said, strict=True)]

    return meet


def test_ranks_that_are_started_alike_go_on(agreed: Callable[..., list[tuple[int, str]]]) -> None:
    found = agreed([__version__, "1", "2", "60", "7 prompts"], [__version__, "1", "5", "60", "7 prompts"])
    assert [code for code, _ in found] == [0, 0], found


def test_ranks_that_differ_all_end_with_what_does(agreed: Callable[..., list[tuple[int, str]]]) -> None:
    many, other = f"7 {'long ' * 50}prompts", ["9.8", "2", "2", "60"]
    found = agreed(["9.9", "1", "2", "60", many], [*other, many], [*other, "8 prompts"], of=3)
    said = (
        "error: all ranks must be started alike: version is '9.9' on the first rank and '9.8' on ranks 1, 2; training "
        f"prompts is '7 {'long ' * 9}lo … {'ong ' + 'long ' * 3}prompts' on the first rank and '8 prompts' on rank 2; "
        "seed is 1 on the first rank and 2 on ranks 1, 2"
    )
    assert [(code, text.splitlines()[-1]) for code, text in found] == [(2, said)] * 3


def test_trainers_after_the_first_meet_anew(agreed: Callable[..., list[tuple[int, str]]]) -> None:
    """The first fails on a rank before it meets the other, the second is alike, the third is not."""
    found = agreed([__version__, "1,3,4", "2", "60", "x"], [__version__, "none,3,5", "2", "60", "x"])
    said = "alike\nerror: all ranks must be started alike: seed is 4 on the first rank and 5 on rank 1\n"
    assert [(code, text[-len(said) :]) for code, text in found] == [(2, said)] * 2
    assert all(text.count("alike\n") == 1 for _, text in found)


def test_a_rank_that_does_not_come_is_named(agreed: Callable[..., list[tuple[int, str]]]) -> None:
    words = [__version__, "1", "2", "2", "7 prompts"]
    first, *others = agreed(words, words, words, of=5)
    said = "rank 3 has not come within 2 seconds (rank_timeout): its host says why\n"
    assert first[0] == 2 and first[1].endswith(f"error: {said}")
    for code, text in others:  # none of which is named for what it only passes on
        assert code == 2 and "error: rank 0 on " in text and text.endswith(f"cannot begin: {said}")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose first host's launcher is gone, patient for a second."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {**env, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    patient = ranks._store
    monkeypatch.setattr(ranks, "_store", lambda meeting, patience: patient(meeting, 1))


@pytest.mark.usefixtures("nobody")
def test_a_launcher_that_is_gone_is_said_in_a_line() -> None:
    with pytest.raises(ConfigError, match="the launcher of the first host has ended, which says why"):
        ranks.agree(TrainConfig(), MDPGRPOConfig(), dict)


@pytest.mark.usefixtures("nobody")
def test_ranks_that_are_started_again_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    ranks.agree(TrainConfig(), MDPGRPOConfig(), lambda: asked.append(True) or {})
    assert asked == [] and ranks._store(0, 1) is None
