"""Short runs killed and hindered at their file operations, and brought to the end of an uninterrupted one.

    python tests/chaos.py [--output FILE] [--jobs N] [--few] [WORD ...]

A run of three steps is ended at every operation on its directory, before, midway and after it, and at random moments;
or an operation fails, once (EIO) or with all that need space after it (ENOSPC), as SQLite tests itself. A library that
is preloaded does both (helpers/file_operations.c). The run then goes on, as its user would have it go on, and must
leave what an uninterrupted one leaves: every byte of its checkpoints, its model and completions.jsonl, and the numbers
of metrics.jsonl but for its times. One that an operation failed in must have ended with status 1 and one line, without
a torn line or an empty file, and with the newest checkpoint that was whole.

Two runs in one directory, and signals that ask a run to end, are tried too.

WORD: kinds of trials alone, of `kill`, `random`, `power`, `fault`, `resume`, `read`, `command`, `signal`, `twice`.
Exits 1 where a trial fails.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import functools
import gc
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "helpers" / "file_operations.c"
BEFORE, MIDWAY, AFTER, FAIL, FAIL_ON, SHORT, SHORT_ON = range(1, 8)  # enum Action of SOURCE
MOMENTS = {BEFORE: "before", MIDWAY: "midway", AFTER: "after"}
FAULTS = {
    "EIO": (FAIL, errno.EIO), "EIO midway": (SHORT, errno.EIO),
    "ENOSPC": (FAIL_ON, errno.ENOSPC), "ENOSPC midway": (SHORT_ON, errno.ENOSPC),
}  # fmt: skip
MEMORY = Path("/dev/shm")  # fsync is counted, and costs nothing there
SPACE = ("open", "write", "truncate", "fsync", "mkdir", "link")  # what a full disk refuses
STEPS, LENGTH, LIMIT = 3, 6, 300  # LIMIT: seconds of a run, against one that hangs
ARGUMENTS = (
    f"--steps {STEPS} --save-every 1 --prompts-per-step 1 --num-generations 4 --max-completion-length {LENGTH} "
    "--eval-samples 1 --learning-rate 1e-3 --log-completions 2 --reward-workers 1"
).split()
# Prompts without constraints and a function that is called in the trainer's process. Commands of their own take the
# embedded prompts, whose constraints other processes check.
PROMPTS = [f"Say something about {thing}." for thing in ("the sea", "a tree", "bread", "the moon", "rain", "a song")]
FORKED = ("--reward", "helpers.rewards:vowels", "--train-file", "prompts.jsonl", "--eval-file", "prompts.jsonl")
TIMES = ("seconds", "tokens_per_second", "stage_tokens_per_second", "memory_mb", "mfu")


class Operation(NamedTuple):
    """One of a run's, as the preloaded library has logged it."""

    number: int
    kind: str
    inode: int
    size: int
    path: str


class Ended(NamedTuple):
    """How a run ended. status: negative for a signal."""

    status: int
    stderr: str

    @property
    def last(self) -> str:
        return (self.stderr.strip().splitlines() or [""])[-1]


class Trial(NamedTuple):
    """What is done to a run.

    at: number of its operation; action: of SOURCE; base: the name of what it goes on from.
    """

    kind: str
    what: str = ""  # the operation's kind and file, in words
    at: int = 0
    action: int = 0
    code: int = 0
    base: str = ""
    fraction: float = 0.0  # of the time of an uninterrupted run, until it gets the signal, or another one begins
    signum: int = signal.SIGKILL
    fresh: bool = False  # in processes of its own, from the command line

    @property
    def moment(self) -> str:
        if self.code:
            return next(name for name, plan in FAULTS.items() if plan == (self.action, self.code))
        return MOMENTS.get(self.action, signal.Signals(self.signum).name)


# ---- runs -----------------------------------------------------------------------------------------------------------


def build(folder: Path) -> Path:
    library = folder / "file_operations.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def prepare(folder: Path) -> None:
    """Loads what a run needs, so that a fork begins at once; threads are kept to one, as they do not survive it."""
    import torch

    torch.set_num_threads(1)
    from mdpgrpo_fast.config import TrainConfig
    from mdpgrpo_fast.models.load import load
    from mdpgrpo_fast.training import task

    text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
    os.chdir(folder)
    # The prompts are read and tokenised once for all runs.
    known = task.prepare(
        TrainConfig(train_file="prompts.jsonl", eval_file="prompts.jsonl", eval_samples=1, max_completion_length=LENGTH)
    )
    task.prepare = lambda *given, **named: replace(known, model=load(None)[0])  # type: ignore[assignment]


def load_what_a_run_loads(folder: Path) -> None:
    """Imports what a run has imported when it ends, so that no other run has to."""
    names, pid = folder / "modules", os.fork()
    if not pid:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            import mdpgrpo_fast.train as train

            train.main(argv(folder / "first", *FORKED))
        names.write_text("\n".join(sys.modules))
        os._exit(0)
    os.waitpid(pid, 0)
    for name in names.read_text().splitlines():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def argv(run: Path, *more: str) -> list[str]:
    return [*ARGUMENTS, "--output-dir", str(run), *more]


def arm(trial: Trial, folder: Path, log: Path) -> None:
    import ctypes

    ctypes.CDLL(None).arm_file_operations(
        str(folder).encode(), str(log).encode(), ctypes.c_long(trial.at), trial.action, trial.code, trial.kind == "read"
    )


def begin(
    words: list[str], error: Path, trial: Trial | None, folder: Path, fresh: bool
) -> tuple[int, Callable[[], Ended]]:
    """Starts a run; its process, and what waits for its end."""
    log = folder.with_suffix(".log")
    if trial is not None:
        log.unlink(missing_ok=True)
    if fresh:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if trial is not None:
            env["FILE_OPERATIONS"] = (
                f"{folder}:{log}:{trial.at}:{trial.action}:{trial.code}:{int(trial.kind == 'read')}"
            )
        with error.open("wb") as f:
            process = subprocess.Popen(
                [sys.executable, "-m", "mdpgrpo_fast.train", *words],
                stdout=subprocess.DEVNULL,
                stderr=f,
                stdin=subprocess.DEVNULL,
                env=env,
            )
        return process.pid, lambda: Ended(process.wait(LIMIT), error.read_text(errors="replace"))
    pid = os.fork()
    if pid:
        return pid, lambda: Ended(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), error.read_text(errors="replace"))
    status = 1
    try:
        signal.alarm(LIMIT)
        file = os.open(error, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        import mdpgrpo_fast.train as train

        if trial is not None:
            arm(trial, folder, log)
        status = train.main(words)
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def run(words: list[str], folder: Path, trial: Trial | None = None, fresh: bool = False) -> Ended:
    return begin(words, folder.with_suffix(".err"), trial, folder, fresh)[1]()


def operations(log: Path) -> list[Operation]:
    rows = [line.split("\t") for line in log.read_text().splitlines()]
    return [Operation(int(n), kind, int(inode), int(size), path) for n, kind, inode, size, path in rows]


def in_words(operation: Operation, folder: Path) -> str:
    path = re.sub(r"\.tmp\w{6}", ".tmp*", operation.path.removeprefix(f"{folder}/"))
    return f"{operation.kind} {re.sub(r'_[0-9]+', '_N', path)}"


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def checkpoint(path: Path) -> Path | None:
    found = [p for p in (path / "checkpoints").glob("checkpoint_*") if re.fullmatch(r"checkpoint_\d+", p.name)]
    return max(found, key=lambda p: int(p.name.rpartition("_")[2]), default=None)


def state(path: Path) -> dict[str, Any]:
    """All of a run directory that must not depend on how often the run was ended."""
    newest = checkpoint(path)
    files = [p for folder in (newest, path / "model") if folder for p in sorted(folder.rglob("*")) if p.is_file()]
    found: dict[str, Any] = {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if p.name not in ("README.md", "manifest.json", "random_0.safetensors")
    }
    found["random"] = _random_states(newest)
    for name in ("metrics.jsonl", "completions.jsonl"):
        rows = [json.loads(line) for line in (path / name).read_text().splitlines()]
        found[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    summary = json.loads((path / "summary.json").read_text())
    found["summary.json"] = {k: summary[k] for k in ("steps", "hsr_before", "hsr_after", "dropped_samples")}
    return found


def _random_states(newest: Path | None) -> Any:
    """torch's; Python's and NumPy's differ from one process to the next, and no step takes them."""
    from safetensors.torch import load_file

    file = newest and newest / "state" / "random_0.safetensors"
    return file and file.exists() and {name: tensor.tolist() for name, tensor in load_file(file).items()}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def torn(path: Path) -> list[str]:
    """Lines that do not parse, and empty files outside unfinished folders."""
    found = []
    for name in ("metrics.jsonl", "completions.jsonl"):
        lines = (path / name).read_text().splitlines() if (path / name).exists() else []
        for i, line in enumerate(lines):
            try:
                json.loads(line)
            except json.JSONDecodeError:
                found.append(f"line {i + 1} of {name} is torn")
    for name in ("config.json", "config.yaml", "summary.json", "best.json"):
        found += [
            f"{p.relative_to(path)} is empty"
            for p in path.rglob(name)
            if not p.stat().st_size and not p.parent.name.endswith((".new", ".partial", ".old"))
        ]
    return found


def lose_power(folder: Path) -> None:
    """Takes from the files what was written after their last fsync, as a machine that loses its power may."""
    kept: dict[int, int] = {}
    for o in operations(folder.with_suffix(".log")):
        if o.kind == "fsync":
            kept[o.inode] = o.size
        elif o.kind in ("open", "write", "truncate") and o.inode:
            kept.setdefault(o.inode, 0)
    for path in folder.rglob("*"):
        if path.is_file() and (size := kept.get(path.stat().st_ino)) is not None and size < path.stat().st_size:
            os.truncate(path, size)


def settings(fresh: bool) -> tuple[str, ...]:
    return () if fresh else FORKED


def go_on(folder: Path, fresh: bool = False) -> tuple[str, list[str]]:
    """Brings a run to its end as a script does that starts it again. Returns how it went on, and what went wrong."""
    ended = run(argv(folder / "run", *settings(fresh), "--resume", "auto"), folder, fresh=fresh)
    after = re.search(r"resumed after (\d+)", ended.stderr)
    finished = "nothing is left to do" in ended.stderr
    how = f"after step {STEPS if finished else after[1] if after else 0}"
    return how, [] if ended.status == 0 else [f"status {ended.status} of the run that goes on: {ended.last}"]


# ---- trials ---------------------------------------------------------------------------------------------------------


class Bench:
    """The folder of all trials, and what they are compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bases = folder, {}
        started = time.perf_counter()
        whole = folder / "whole"
        self.whole, log = self._whole(whole, Trial("kill"))
        self.seconds = time.perf_counter() - started
        # A run that was killed in its last step, midway in a line of metrics.jsonl: what a resumed one goes on from.
        lines = [o for o in log if o.kind == "write" and o.path.endswith("metrics.jsonl")]
        base = folder / "killed"
        self._new(base)
        run(argv(base / "run", *FORKED), base, Trial("kill", at=lines[STEPS].number, action=MIDWAY))
        self.bases["killed"] = base
        self.logs = {"": [o._replace(path=in_words(o, whole)) for o in log]}
        for kind in ("resume", "read"):
            copy = self._copy(base, folder / "counted")
            ended = run(argv(copy / "run", *FORKED, "--resume"), copy, Trial(kind))
            assert ended.status == 0, ended.stderr
            self.logs[kind] = [o._replace(path=in_words(o, copy)) for o in operations(copy.with_suffix(".log"))]
        self.checkpoints = self._checkpoints(log)

    @staticmethod
    def _new(folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    @staticmethod
    def _copy(base: Path, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(base, folder))

    def _whole(self, folder: Path, trial: Trial) -> tuple[dict[str, Any], list[Operation]]:
        ended = run(argv(self._new(folder) / "run", *settings(trial.fresh)), folder, trial, trial.fresh)
        assert ended.status == 0, ended.stderr
        return state(folder / "run"), operations(folder.with_suffix(".log"))

    @staticmethod
    def _checkpoints(log: list[Operation]) -> list[int]:
        """The last operation of each checkpoint's making: the last rename to it before the next step's lines."""
        found = []
        for step in range(1, STEPS + 1):
            renames = [o.number for o in log if o.kind == "rename" and re.search(rf"checkpoint_{step}(/|$)", o.path)]
            found.append(max(renames))
        return found

    def whole_before(self, trial: Trial) -> int:
        """Steps of the newest checkpoint that is whole when an operation begins."""
        if trial.base:
            return STEPS - 1
        return sum(number < trial.at for number in self.checkpoints)

    def run(self, trial: Trial, folder: Path) -> dict[str, Any]:
        """One trial; `problems` is empty where it ended as it must."""
        begun = time.perf_counter()
        if trial.base:
            self._copy(self.bases[trial.base], folder)
        else:
            self._new(folder)
        path, more, problems, how = folder / "run", ["--resume"] * bool(trial.base), [], ""
        torn_before = torn(path)
        try:
            ended = self._end(trial, folder, more)
            problems += self._wrong_end(trial, ended, path)
            if trial.code or trial.kind in ("signal", "twice"):
                problems += [p for p in torn(path) if p not in torn_before]
            if trial.kind == "power":
                lose_power(folder)
            how, wrong = go_on(folder, trial.fresh)
            problems += wrong
            least = self.whole_before(trial) if trial.action else 0
            if not wrong and int(how.split()[-1]) < least:
                problems.append(f"went on {how}, where the checkpoint of step {least} was whole")
            if not wrong:
                problems += self._different(path, trial)
        except Exception as e:
            problems.append(f"{type(e).__name__}: {e}")
        return {
            **trial._asdict(), "moment": trial.moment, "went_on": how, "problems": problems,
            "seconds": round(time.perf_counter() - begun, 2),
        }  # fmt: skip

    @functools.cached_property
    def commands(self) -> tuple[dict[str, Any], list[Operation]]:
        """What a command of its own leaves, and its operations."""
        return self._whole(self.folder / "whole_command", Trial("command", fresh=True))

    def _end(self, trial: Trial, folder: Path, more: list[str]) -> Ended:
        words = argv(folder / "run", *settings(trial.fresh), *more)
        pid, wait = begin(words, folder.with_suffix(".err"), trial, folder, trial.fresh)
        if trial.fraction:
            time.sleep(trial.fraction * self.seconds)
            if trial.kind == "twice":
                return self._second(trial, folder, wait)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, trial.signum)
        return wait()

    def _second(self, trial: Trial, folder: Path, wait: Callable[[], Ended]) -> Ended:
        """Begins another run in the same directory; returns the end of the one that was refused, if one was."""
        words = argv(folder / "run", *settings(trial.fresh), *(["--resume", "auto"] if trial.at else []))
        _, other = begin(words, folder.with_suffix(".err2"), None, folder, trial.fresh)
        ends = sorted([wait(), other()])
        if ends[0].status == 0 and ends[1].status == 2:
            found = self._different(folder / "run", trial)
            return Ended(1, f"the run beside it: {found[0]}") if found else ends[1]
        return Ended(0 if ends[0].status == ends[1].status == 0 else 1, f"{ends[0].last} / {ends[1].last}")

    def _different(self, path: Path, trial: Trial) -> list[str]:
        found = differences(state(path), self.commands[0] if trial.fresh else self.whole)
        return [f"differs from an uninterrupted run: {', '.join(found)}"] * bool(found)

    def _wrong_end(self, trial: Trial, ended: Ended, path: Path) -> Iterator[str]:
        one_line = "Traceback" not in ended.stderr and re.match("(error|the report cannot be written): .+", ended.last)
        # What a run cannot begin with is a setting.
        unusable = trial.kind == "read" or ended.last.startswith("error: output_dir")
        if trial.code and ended.status == 0:  # a folder that was there, a report that is said not to be
            if trial.what.startswith("fsync") and "report" not in trial.what:
                yield "status 0 although an fsync failed"
            yield from self._different(path, trial)
        elif trial.code and not (ended.status in (1, 2 if unusable else 1) and one_line):
            yield f"status {ended.status}{', traceback' * ('Traceback' in ended.stderr)}: {ended.last}"
        elif trial.kind == "twice":
            if not (ended.status == 0 or (ended.status == 2 and one_line)):
                yield f"status {ended.status}: {ended.last}"
        elif trial.kind == "signal":  # 0: it had ended; negative: it had not begun
            if ended.status not in (0, -trial.signum, 128 + trial.signum):
                yield f"status {ended.status}: {ended.last}"
            if ended.status > 0 and "--resume" not in ended.stderr and (path / "checkpoints").exists():
                yield f"no line says how to go on: {ended.last}"
        elif not trial.code and ended.status not in (-signal.SIGKILL, 0 if trial.fraction or trial.fresh else None):
            yield f"status {ended.status} in place of a kill: {ended.last}"


def plan(bench: Bench, kinds: list[str], few: bool) -> list[Trial]:
    """All trials, or a few of each kind."""
    trials: list[Trial] = []
    for o in ends_of_stretches(bench.logs[""]):
        at = {"at": o.number, "what": o.path}
        trials += [Trial("kill", action=BEFORE, **at)]
        trials += [Trial("kill", action=MIDWAY, **at)] * (o.kind == "write" and o.size > 1)
        trials += [Trial("power", action=AFTER, **at)] * (o.kind in ("rename", "fsync", "unlink"))
        trials += faults("fault", o)
    for o in ends_of_stretches(bench.logs["resume"]):
        at = {"at": o.number, "what": o.path, "base": "killed"}
        trials += [Trial("resume", action=BEFORE, **at)]
        trials += [Trial("resume", action=MIDWAY, **at)] * (o.kind == "write" and o.size > 1)
        trials += faults("resume", o, "killed")
    for o in ends_of_stretches(bench.logs["read"]):
        trials += [Trial("read", o.path, o.number, FAIL, errno.EIO, "killed")]
    dice = random.Random(0)
    trials += [Trial("random", fraction=dice.random()) for _ in range(60)]
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        trials += [Trial("signal", fraction=dice.random(), signum=signum) for _ in range(12)]
    trials += [Trial("twice", at=i % 2, fraction=max(0.01, dice.random() - 0.5)) for i in range(20)]
    if (not kinds or "command" in kinds) and not few:
        log = [o._replace(path=in_words(o, bench.folder / "whole_command")) for o in bench.commands[1]]
        chosen = dice.sample(log, 24)
        trials += [Trial("command", o.path, o.number, MIDWAY, fresh=True) for o in chosen[:16]]
        trials += [Trial("command", o.path, o.number, FAIL_ON, errno.ENOSPC, fresh=True) for o in chosen[16:]]
    trials = [t for t in trials if not kinds or t.kind in kinds]
    if few:
        trials = _few(trials)
    # Where time ends it, more of the kills have been done, and of all kinds some.
    return sorted(trials, key=lambda t: dice.random() * (2 if t.code else 1))


def ends_of_stretches(log: list[Operation]) -> list[Operation]:
    """Of writes, or reads, of one file in a row the first, the middle one and the last; all else."""
    found: list[Operation] = []
    for _, same in itertools.groupby(log, lambda o: (o.kind, o.inode) if o.kind in ("write", "read") else o.number):
        row = list(same)
        found += [row[i] for i in sorted({0, len(row) // 2, len(row) - 1})]
    return found


def faults(kind: str, o: Operation, base: str = "") -> list[Trial]:
    found = []
    for name, (action, code) in FAULTS.items():
        applies = o.kind == "write" and o.size > 1 if "midway" in name else name == "EIO" or o.kind in SPACE
        if applies:
            found.append(Trial(kind, o.path, o.number, action, code, base))
    return found


# What ten kills and six faults are of: kind, moment, operation.
FEW = [
    ("kill", "before", "rename run/checkpoints/checkpoint_N"), ("kill", "midway", "write run/metrics.jsonl"),
    ("kill", "midway", r"write run/checkpoints/checkpoint_N\S*/optimizer"), ("kill", "before", "rename run/model"),
    ("kill", "before", r"unlink run/checkpoints/\S*/manifest.json"), ("resume", "midway", "write run/metrics.jsonl"),
    ("power", "after", "rename run/checkpoints/checkpoint_N"), ("power", "after", "rename run/model"),
    ("random", "SIGKILL", ""), ("random", "SIGKILL", ""),
    ("fault", "EIO midway", "write run/completions.jsonl"),
    ("fault", "EIO", r"write run/checkpoints/\S*/tokenizer.json"),
    ("fault", "ENOSPC", r"write run/checkpoints/\S*/optimizer"), ("fault", "EIO", "fsync run/checkpoints"),
    ("fault", "ENOSPC midway", "write run/model"), ("fault", "ENOSPC", r"open run/model/README"),
]  # fmt: skip


def _few(trials: list[Trial]) -> list[Trial]:
    """One of each of FEW, drawn at random."""
    left = random.Random(1).sample(trials, len(trials))
    found = []
    for kind, moment, what in FEW:
        found.append(next(t for t in left if (t.kind, t.moment) == (kind, moment) and re.match(what, t.what)))
        left.remove(found[-1])
    return found


def carry_out(
    bench: Bench, trials: list[Trial], jobs: int, until: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All trials that begin before `until`, by forks of this process, each of which takes every jobs-th."""
    ends, pids = [], []
    for job in range(jobs):
        receive, send = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(receive)
            with os.fdopen(send, "w", buffering=1) as f:
                for trial in trials[job::jobs]:
                    if time.perf_counter() > until:
                        break
                    f.write(json.dumps(bench.run(trial, bench.folder / f"trial{job}")) + "\n")
            os._exit(0)
        os.close(send)
        ends.append(os.fdopen(receive))
        pids.append(pid)
    import threading

    results: list[dict[str, Any]] = []

    def collect(end: Any) -> None:
        for line in end:
            results.append(json.loads(line))
            r = results[-1]
            if r["problems"]:
                say(f"FAILS {r['kind']} {r['moment']} {r['at']} {r['what']}: {'; '.join(r['problems'])}")
            if len(results) % 50 == 0:
                say(f"{len(results)} of {len(trials)} trials, {sum(bool(r['problems']) for r in results)} fail")

    threads = [threading.Thread(target=collect, args=(end,)) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pid in pids:
        os.waitpid(pid, 0)
    return results


def document(bench: Bench, results: list[dict[str, Any]], planned: int, seconds: float) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import harness

    def counted(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        by: dict[str, dict[str, Any]] = collections.defaultdict(lambda: {"trials": 0, "failed": 0})
        for r in chosen:
            name = f"{r['moment']} {r['what'].split()[0]}" if r["what"] else r["moment"]
            by[name]["trials"] += 1
            by[name]["failed"] += bool(r["problems"])
        return dict(sorted(by.items()))

    kinds = sorted({r["kind"] for r in results})
    kills, failing = [r for r in results if not r["code"]], [r for r in results if r["code"]]
    return {
        **harness.provenance("RECORD=benchmarks/results/cpu/chaos.json make chaos"),
        "run": " ".join(ARGUMENTS),
        "operations": dict(collections.Counter(o.kind for o in bench.logs[""])),
        "operations_resumed": dict(collections.Counter(o.kind for o in bench.logs["resume"])),
        "planned": planned,
        "kills": len(kills),
        "faults": len(failing),
        "failed": sum(bool(r["problems"]) for r in results),
        "went_on": dict(collections.Counter(r["went_on"] for r in results)),
        "by_kind": {
            kind: {
                "kills": counted([r for r in kills if r["kind"] == kind]),
                "faults": counted([r for r in failing if r["kind"] == kind]),
            }
            for kind in kinds
        },
        "by_file": dict(sorted(collections.Counter(r["what"] for r in results if r["what"]).items())),
        "seconds": round(seconds, 1),
        "failures": [r for r in results if r["problems"]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--few", action="store_true", help="ten kills and six faults")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no trial begins later than this")
    options = parser.parse_args()
    if "file_operations" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory(prefix="chaos-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
            env = {
                **os.environ, "LD_PRELOAD": str(build(Path(folder))), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
                "CHAOS_FOLDER": folder,
            }  # fmt: skip
            return subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=env).returncode
    started = time.perf_counter()
    folder = Path(os.environ["CHAOS_FOLDER"])
    output = options.output and options.output.resolve()  # before prepare() goes to another folder
    prepare(folder)
    gc.freeze()
    load_what_a_run_loads(folder)
    bench = Bench(folder)
    trials = plan(bench, options.kinds, options.few)
    print(f"{len(bench.logs[''])} operations, {len(trials)} trials; {bench.seconds:.1f} s a run", flush=True)
    results = carry_out(bench, trials, options.jobs, started + options.seconds, lambda line: print(line, flush=True))
    found = document(bench, results, len(trials), time.perf_counter() - started)
    if output:
        import harness

        harness.write_json(output, found)
    print(f"{found['kills']} kills, {found['faults']} faults, {found['failed']} trials fail; {found['seconds']} s")
    return int(found["failed"] > 0 or not results)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # triton's bindings report at the interpreter's end what they leak
