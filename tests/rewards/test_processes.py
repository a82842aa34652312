"""The pool of processes: time limits, deaths, what cannot be sent, and that nothing of it is left behind."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import questions
from helpers.inputs import ROOT
from helpers.stress import stress

from mdpgrpo_fast.rewards import processes
from mdpgrpo_fast.rewards.processes import Pool
from mdpgrpo_fast.rewards.worker import Lost, lacks_memory

sys.path.insert(0, str(Path(__file__).parents[1]))  # spawned processes inherit it


@contextlib.contextmanager
def pool(
    count: int = 1, limit: float = 20.0, make: Callable[[], Any] = questions.make, memory: int = 0
) -> Iterator[Pool]:
    made = Pool(make, count, limit, memory)
    try:
        yield made
    finally:
        made.stop()


def asked(made: Pool, *what: tuple[str, Any], limit: float = 60.0) -> list[Any]:
    return made.answers(made.ask(what), limit)


def is_gone(pid: int) -> bool:
    """A zombie is not."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return True


def is_zombie(pid: int) -> bool:
    """Of a parent that is gone, where the first process of a container does not reap."""
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return status.stdout.startswith("Z")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"))


def test_answers_come_in_order_and_from_all_processes() -> None:
    with pool(2) as made:
        assert asked(made, *[("echo", i) for i in range(500)]) == list(range(500))
        assert len(made.processes) == 2 and asked(made) == []
        assert len(set(asked(made, ("sleep", 0.3), ("sleep", 0.3)))) == 2


def test_one_question_that_waits_takes_a_process_that_is_idle() -> None:
    with pool(2) as made:
        asked(made, ("sleep", 0.1), ("sleep", 0.1))
        busy = made.ask([("sleep", 3.0)])
        began = time.monotonic()
        assert asked(made, ("echo", 1)) == [1] and time.monotonic() - began < 2
        assert not busy.done.is_set()


def test_a_limit_is_of_one_question_and_not_of_its_wait_in_the_queue() -> None:
    with pool(1, limit=1.0) as made:
        assert len(set(asked(made, *[("sleep", 0.4)] * 4))) == 1, "1.6 s in all, by one process"


@pytest.mark.parametrize("kind", ["sleep", "deaf"])
def test_a_late_process_is_killed_and_replaced(kind: str) -> None:
    with pool(1, limit=1.0) as made:
        (first,) = asked(made, ("pid", 0))
        began = time.monotonic()
        late, second = asked(made, (kind, 60), ("pid", 0))
        assert late == Lost("the scoring process gave no answer within 1 s", "worker timeout")
        assert time.monotonic() - began < 30 and is_gone(first) and second != first


@pytest.mark.parametrize("kind", ["exit", "exit, and a child keeps the pipes"])
def test_a_process_that_ends_costs_its_question_and_says_its_exit_code(kind: str) -> None:
    with pool(1, limit=5.0) as made:
        died, fine = asked(made, (kind, 7), ("echo", 1))
    assert died == Lost("the scoring process died with exit code 7", "worker exit 7") and fine == 1


@pytest.mark.parametrize(
    ("then", "kind"),
    [
        (("compiled", 0), "worker timeout"), (("exit", 7), "worker exit 7"), (("killed", 0), "worker exit -9"),
        (("echo", 1), None),
    ],
)  # fmt: skip
def test_what_a_process_has_started_ends_with_it(tmp_path: Path, then: tuple[str, Any], kind: str | None) -> None:
    with pool(1, limit=1.0) as made:
        (answer,) = asked(made, ("family, and then", (tmp_path / "pids", then)))
        pids = list(map(int, (tmp_path / "pids").read_text().split()))
        assert len(pids) == 4 and (kind is None or answer.kind == kind)
        if kind is None:
            assert answer == 1 and not any(map(is_gone, pids))
            made.stop()
    assert all(is_gone(pid) or is_zombie(pid) for pid in pids)


def test_memory_has_a_limit() -> None:
    with pool(1, memory=200) as made:
        (first,) = asked(made, ("pid", 0))
        fine, lost, second, again = asked(made, ("take", 100), ("take", 300), ("pid", 0), ("take", 100))
        assert fine == again == 100 * 2**20 and second != first and is_gone(first)
        assert lost.reason.startswith("the scoring process took more than reward_memory = 200 MB: MemoryError (")
        assert "questions.py" in lost.reason and lost.kind == "memory"
    refused = OSError(errno.ENOMEM, "Cannot allocate memory")
    assert lacks_memory(refused) and not lacks_memory(OSError(errno.ENOENT, ""))
    assert lacks_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))


def test_a_question_too_large_for_the_memory_costs_itself_alone() -> None:
    with pool(1, memory=20) as made:
        *fine, lost, last = asked(made, *[("echo", i) for i in range(3)], ("echo", "x" * (30 << 20)), ("echo", 3))
    assert fine == [0, 1, 2] and last == 3
    assert lost == Lost("a completion and its row take more than reward_memory = 20 MB", "memory")


def test_what_cannot_be_sent_is_said() -> None:
    with pool(1) as made:
        back, there, raised, fine = asked(
            made, ("lambda", 0), ("echo", lambda: 0), ("raise", KeyboardInterrupt("stop")), ("echo", 1)
        )
    assert back.reason.startswith("the scoring process raised ") and "<lambda>" in back.reason
    assert there.reason.startswith("a completion cannot be sent to a scoring process: ") and "<lambda>" in there.reason
    assert "the scoring process raised KeyboardInterrupt: stop (" in raised.reason and fine == 1


def test_a_process_that_dies_idle_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STARTS", 1)  # however many they are, none has failed to start
    with pool(2) as made:
        before = asked(made, ("sleep", 0.3), ("sleep", 0.3))
        for process in made.processes:
            process.kill()
            process.join()
        after = asked(made, *[("pid", 0)] * 4)
        assert all(isinstance(pid, int) for pid in after) and not set(before) & set(after)


def test_processes_that_cannot_start_lose_all_that_waits() -> None:
    with pool(2, make=questions.dies) as made:
        (first, *others) = asked(made, *[("echo", 1)] * 50)
        assert first == Lost("the scoring processes died 4 times, the last with exit code 9", "workers")
        assert set(others) == {first}
    with pool(1, make=lambda: None) as made:
        (lost,) = asked(made, ("echo", 1))
        assert lost.reason.startswith("the scoring processes cannot be started: ") and "<lambda>" in lost.reason


def test_no_wait_is_without_a_limit() -> None:
    with pool(1, make=questions.hangs) as made:
        began = time.monotonic()
        assert {a.reason for a in asked(made, ("echo", 1), ("echo", 2), limit=1.0)} == {
            "no scoring process was done with it after 1 s"
        }
        assert time.monotonic() - began < 5 and not made.processes


def test_nothing_is_left_after_stop_and_more_can_be_asked() -> None:
    with pool(2, limit=0.5) as made:
        asked(made, ("echo", 1))  # with the first process comes multiprocessing's tracker, which stays
        made.stop()
        before = open_files(), threading.active_count()
        for _ in range(2):
            pids = [a for a in asked(made, ("pid", 0), ("sleep", 30), ("exit", 1), ("pid", 0)) if isinstance(a, int)]
            made.ask([("sleep", 30)] * 8)
            pids += [process.pid or 0 for process in made.processes]
            began = time.monotonic()
            made.stop()
            made.stop()
            assert time.monotonic() - began < 3 and all(map(is_gone, pids))
            assert (open_files(), threading.active_count()) == before
        assert asked(made, ("echo", 1)) == [1]


def test_one_that_waits_learns_of_a_stop() -> None:
    with pool(1) as made:
        threading.Timer(0.5, made.stop).start()
        assert {a.reason for a in asked(made, *[("sleep", 30)] * 3)} == {"the scoring processes were stopped"}


def test_ctrl_c_ends_the_processes() -> None:
    with pool(1) as made:
        (pid,) = asked(made, ("pid", 0))
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            asked(made, *[("sleep", 30)] * 3)
        assert is_gone(pid) and not made.processes


def test_a_pool_that_is_forgotten_ends() -> None:
    made = Pool(questions.make, 1, 20.0)
    asked(made, ("echo", 1))
    (process,) = made.processes
    del made
    gc.collect()
    process.join(10)
    assert process.exitcode == 0


def test_none_is_an_answer() -> None:
    with pool(1) as made:
        assert asked(made, ("echo", None), ("echo", 1)) == [None, 1]


def test_a_process_may_have_children() -> None:
    with pool(1) as made:
        assert asked(made, ("children", [-1, 2])) == [[1, 2]]


def test_a_start_leaves_the_main_module_alone() -> None:
    seen, over = set(), threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.add(sys.modules["__main__"])

    thread = threading.Thread(target=look)
    thread.start()
    with pool(4) as made:
        asked(made, *[("sleep", 0.1)] * 4)
    over.set()
    thread.join()
    assert len(seen) == 1 and pickle.loads(pickle.dumps(Lost("a", "b"))) == Lost("a", "b")


def test_a_wait_lasts_as_long_as_something_comes() -> None:
    with pool(1, limit=0.5, make=questions.slow) as made:
        began = time.monotonic()
        found = made.answers(made.ask([("sleep", 30), ("echo", 1)] * 3), 4.0)
        assert [a.kind if isinstance(a, Lost) else a for a in found] == ["worker timeout", 1] * 3
        assert time.monotonic() - began > 4.0
        (lost,) = made.answers(made.ask([("sleep", 0.4)]), 4.0, 0.1)
        assert lost == Lost("no scoring process was done with it after 0 s", "workers")


def test_processes_that_a_stop_ends_have_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STARTS", 1)
    with pool(3) as made:
        for _ in range(3):
            made.ask([("sleep", 3)] * 3)
            time.sleep(0.02)
            stopping = threading.Thread(target=made.stop)
            stopping.start()
            time.sleep(0.01)
            assert asked(made, *[("echo", i) for i in range(3)]) == [0, 1, 2]
            stopping.join()


def test_a_question_that_a_suspended_process_does_not_read_is_late() -> None:
    with pool(1, limit=1.0) as made:
        (pid,) = asked(made, ("pid", 0))
        os.kill(pid, signal.SIGSTOP)
        late, fine = asked(made, ("echo", b"x" * 5_000_000), ("echo", 1))
        assert late.kind == "worker timeout" and fine == 1 and is_gone(pid)


def test_what_nobody_foresaw_costs_its_question_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Pool._asked

    def breaks(self: Pool, slot: Any, question: Any) -> Any:
        if question[0] == "break":
            raise ZeroDivisionError("by zero")
        return original(self, slot, question)

    monkeypatch.setattr(Pool, "_asked", breaks)
    with pool(1) as made:
        (pid,) = asked(made, ("pid", 0))
        lost, fine = asked(made, ("break", 0), ("echo", 1))
        assert lost.reason.startswith("asking a scoring process raised ZeroDivisionError: by zero") and fine == 1
        assert is_gone(pid)


def test_threads_that_cannot_start_lose_all_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pool(2) as made:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuses)
            lost, other = asked(made, ("echo", 1), ("echo", 2))
            assert lost == other and "cannot be started: RuntimeError: can't start new thread" in lost.reason
        assert asked(made, ("echo", 1)) == [1]


def test_a_warning_of_the_library_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "mdpgrpo_fast")
    with pool(2) as made:
        asked(made, ("sleep", 0.3), ("sleep", 0.3))
        asked(made, *[("note", "this is missing")] * 20)
    assert [r.getMessage() for r in caplog.records].count("this is missing") == 1


SCRIPT = """import os, sys, time
from helpers import questions
from mdpgrpo_fast.rewards.processes import Pool
pool = Pool(questions.make, 1, 100.0)
(pid,) = pool.answers(pool.ask([("pid", 0)]), 60)
print(pid, flush=True)
"""


def script(folder: Path, code: str) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(SCRIPT + code)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(folder / "script.py")], env={**os.environ, "PYTHONPATH": paths}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["nothing", "deaf", "spin", "compiled"])
def test_the_interpreter_ends_whatever_processes_do(tmp_path: Path, kind: str) -> None:
    more = "" if kind == "nothing" else f"pool.ask([({kind!r}, 30)] * 3)\ntime.sleep(0.3)\n"
    with script(tmp_path, more) as program:
        out, err = program.communicate(timeout=20)
        assert program.returncode == 0 and not err and is_gone(int(out))


@pytest.mark.parametrize(("kind", "end"), [("sleep", signal.SIGTERM), ("compiled", signal.SIGKILL)])
def test_processes_end_with_a_program_that_is_killed(tmp_path: Path, kind: str, end: signal.Signals) -> None:
    # A fork that lives on holds the program's pipes open.
    fork = "if os.fork() == 0:\n    time.sleep(60)\n    os._exit(0)\n"
    found = "print(*pool.answers(pool.ask([('family', 0)]), 60)[0], flush=True)\n"
    more = f"{found}pool.ask([({kind!r}, 60)])\ntime.sleep(0.3)\n{fork}os.kill(os.getpid(), {int(end)})\n"
    with script(tmp_path, more) as program:
        assert program.stdout is not None
        program.stdout.readline()
        pids = list(map(int, program.stdout.readline().split()))
        try:
            assert program.wait(20) == -end and len(pids) == 4
            deadline = time.monotonic() + 2
            while (left := [p for p in pids if not (is_gone(p) or is_zombie(p))]) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not left
        finally:
            os.killpg(program.pid, signal.SIGKILL)


def test_both_sides_of_a_fork_can_ask(tmp_path: Path) -> None:
    more = """
waits = pool.ask([("sleep", 1)] * 2)
child = os.fork()
print(pool.answers(pool.ask([("echo", 1)]), 20), flush=True)
print({a.reason for a in pool.answers(waits, 5)} if child == 0 else len(pool.answers(waits, 20)), flush=True)
if child:
    os.wait()
"""
    with script(tmp_path, more) as program:
        out, err = program.communicate(timeout=40)
    assert not err and sorted(out.splitlines()[1:]) == ["2", "[1]", "[1]", "{'the scoring processes were stopped'}"]


def test_ctrl_c_ends_a_program_and_says_it_once(tmp_path: Path) -> None:
    with script(tmp_path, "print('waits', flush=True)\ntime.sleep(60)\n") as program:
        assert program.stdout is not None and program.stderr is not None
        pid = int(program.stdout.readline())
        program.stdout.readline()
        os.killpg(program.pid, signal.SIGINT)
        assert program.stderr.read().count("Traceback") == 1, "that of the program alone"
        assert program.wait(20) and is_gone(pid)


def test_bad_events_cost_their_questions_alone() -> None:
    counts = stress(10, 2, 1.0, 10, seed=3)
    assert counts.total() >= 10 and {kind.partition(" ")[0] for kind in counts} >= {"idle", "worker"}
